"""The rest of a model beside its global attention, lean: fused blocks and heads, no outputs that nobody reads.

Sparse attention leaves VGGT's time to what is linear in the number of frames, and its memory to 24 stored layers of
which heads read four. `blocks` runs a block in few passes over memory, by `arithmetic` and, where every frame attends
to itself, `within_frames`; `heads` does so for DPT heads, which `proven_heads` makes ready. `proof` has the rule by
which both are compared with their own forward, `settings` for what a proof holds, `inference` what must run as it is.
`outputs` keeps what is read, `embedding` runs the images' encoder in parts, `memory` plans both to a budget; `model`
holds them together. docs/whole-model.md has what each saves.
"""

from __future__ import annotations
