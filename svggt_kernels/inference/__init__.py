"""A forward of our own for models of VGGT's shape, at inference, with the model's parameters.

Sparse attention leaves VGGT's time to what is linear in the number of frames, and its memory to 24 stored layers of
which heads read four. `aggregator` runs the aggregator: `blocks` in few passes over memory, by `ops` and, where every
frame attends to itself, `within_frames`; `layer_outputs` keeps what heads read; `heads` runs them, DPT heads by `dpt`;
`memory` plans a forward to a budget. `verification` compares all this with the model's own forward, `proofs` remembers
how that ended and by `settings` tells when it must be done again, and `fused_forward` puts it into one patched model.
docs/whole-model.md has what each saves.
"""
