"""What is known about each multi-view transformer: one file per model, and the one table of them.

A record says how to recognise the model, which of its attention modules look across frames, how their tokens lie, and
for some models how to build, feed and read them. Models are recognised by structure and by class name, so no model
package is imported here. `patching` acts on records and knows no model by name.

| record | global attention | special tokens per frame | reference frame | to run it |
|---|---|---|---|---|
| VGGT | every `global_blocks[i].attn` | first 5 (camera, registers) | 0 | vggt |
| StreamVGGT | the same, causal over frames | first 5 | 0 | |
| VGGT-Omega | `inter_frame_blocks[i].attn` of type "global"; the others, among special tokens, stay | first 17 | 0 | |
| Pi3 | `decoder[i].attn`, odd i | first 5, alike in all frames | none | pi3 |
| Depth Anything 3 | `pretrained.blocks[i].attn`, odd i from `alt_start` | first 1 | 0, after reordering | da3-small |
| MapAnything | `self_attention_blocks[i].attn`, even i | last T, and trailing tokens after all frames | 0 | |
| toy | as VGGT | first 5 | 0 | toy |
"""

from __future__ import annotations

from torch import nn

from .base import ForwardInputs, ModelRecord, RunnableModel, stated_record
from .depth_anything_3 import DEPTH_ANYTHING_3
from .mapanything import MAPANYTHING
from .pi3 import PI3
from .toy import TOY
from .vggt import STREAM_VGGT, VGGT
from .vggt_omega import VGGT_OMEGA

__all__ = ["RECORDS", "RUNNABLE", "ForwardInputs", "ModelRecord", "RunnableModel", "find_model", "stated_record"]

RECORDS = (TOY, STREAM_VGGT, VGGT, VGGT_OMEGA, PI3, DEPTH_ANYTHING_3, MAPANYTHING)
"""Every record; the first that matches a module is the module's."""

RUNNABLE = {record.runnable.name: record.runnable for record in RECORDS if record.runnable is not None}
"""The models that can be built here, by their names on the command line."""


def find_model(model: nn.Module) -> tuple[ModelRecord, str, nn.Module]:
    """Return the record of a model, and the name and module inside it that the record recognises.

    Args:
        model: A model of the family, or any module that holds one: a wrapper with heads, a pipeline.

    Raises:
        ValueError: If no record knows the model, or it holds several known models.
        TypeError: If it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; load the model first")
    matches: list[tuple[ModelRecord, str, nn.Module]] = []
    for name, module in model.named_modules():
        record = next((record for record in RECORDS if record.matches(module)), None)
        if record is not None:
            # A wrapper that passes attributes on (torch.compile) looks like the model inside it.
            matches = [match for match in matches if module not in match[2].modules()]
            matches.append((record, name, module))
    if not matches:
        structures = "\n".join(f"  {record.name}: {record.structure}" for record in RECORDS)
        raise ValueError(
            f"no record knows the model {type(model).__name__}. Name the modules of its global attention yourself: "
            "patch(model, modules=[block.attn for block in ...], tokens_per_frame=P, num_special_tokens=R). "
            f"Known are models that have, in themselves or in a submodule,\n{structures}"
        )
    if len(matches) > 1:
        listed = ", ".join(f"{name} ({record.name})" for record, name, _ in matches)
        raise ValueError(
            f"{type(model).__name__} holds {len(matches)} models: {listed}; patch each by itself, "
            f"for example patch(model.{matches[0][1]})"
        )
    return matches[0]
