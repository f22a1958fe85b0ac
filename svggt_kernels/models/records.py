"""What is known about each multi-view transformer: one frozen record per model.

A record says how to recognise the model, which of its attention modules look across frames, and how their tokens lie.
Models are recognised by structure and by class name, so no model package is imported here. The records side by side
are the documentation of how the models differ; `patching` acts on them and knows no model by name.

| record | global attention | special tokens per frame | reference frame |
|---|---|---|---|
| VGGT | every `global_blocks[i].attn` | first 5 (camera, registers) | 0 |
| StreamVGGT | the same, causal over frames | first 5 | 0 |
| VGGT-Omega | `inter_frame_blocks[i].attn` of type "global"; the others, among special tokens, stay | first 17 | 0 |
| Pi3 | `decoder[i].attn`, odd i | first 5, alike in all frames | none |
| Depth Anything 3 | `pretrained.blocks[i].attn`, odd i from `alt_start` | first 1 | 0, after reordering |
| MapAnything | `self_attention_blocks[i].attn`, even i | last T, and trailing tokens after all frames | 0 |
| toy | every `global_blocks[i].attn` | first `num_special_tokens` | 0 |
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["RECORDS", "ForwardInputs", "ModelRecord", "find_model", "stated_record"]


@dataclass(frozen=True)
class ForwardInputs:
    """What a record reads from the arguments of one forward: how many frames there are and how their tokens lie.

    Attributes:
        images: What a covisibility function is given: the images `[B, S, 3, H, W]`; for MapAnything, whose transformer
            never sees them, its list of S feature maps `[B, C, h, w]`; for a model no record knows, its first tensor.
        frames: Frames S of each sample; None if the number of tokens tells.
        tokens_per_frame: Tokens P of each frame, special ones included; None if the number of frames tells.
        special_tokens: The first R tokens of each frame, or (a, b) for the first a and the last b.
        trailing_tokens: Tokens after the last frame that belong to no frame.
    """

    images: Any
    frames: int | None
    tokens_per_frame: int | None = None
    special_tokens: int | tuple[int, int] = 0
    trailing_tokens: int = 0


def _keeps_order(module: nn.Module) -> None:
    return None


@dataclass(frozen=True)
class ModelRecord:
    """The facts about one model that patching needs.

    `module` below is the module the record recognises: the innermost one whose own forward runs every global
    attention, so that a patch attached to it works however the model is called.

    Attributes:
        name: What to call the model.
        structure: What makes a module this model, in words.
        matches: Whether a module is this model.
        global_attention: The attention modules that look across frames, by name relative to `module`.
        read: Reads (module, arguments of its forward by name) and tells how the tokens of this forward lie.
        known: Children of the module whose attention is all accounted for: global, within frames, or meant to stay
            dense. None if the module was not recognised but named by the caller.
        reference_frame: The frame that sets the coordinate system, as the model orders frames; None if there is none.
        causal: Whether a frame sees only itself and earlier frames.
        reorders_between: Names of the two consecutive blocks between which the model reorders its frames: what leaves
            the first and what enters the second are the same tokens `[B * S, P, C]`, frames in another order. None if
            it keeps the order of the images.
        images_are_normalised: Whether its images come with ImageNet's mean and deviation taken out; others take [0, 1].
    """

    name: str
    structure: str
    matches: Callable[[nn.Module], bool]
    global_attention: Callable[[nn.Module], dict[str, nn.Module]]
    read: Callable[[nn.Module, Mapping[str, Any]], ForwardInputs]
    known: tuple[str, ...] | None = None
    reference_frame: int | None = 0
    causal: bool = False
    reorders_between: Callable[[nn.Module], tuple[str, str] | None] = _keeps_order
    images_are_normalised: bool = False

    def unknown_attention(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the attention modules outside the known children, by name; some forks have more than their model."""
        known = None if self.known is None else {id(m) for name in self.known for m in _modules_of(module, name)}
        return {
            name: inner
            for name, inner in module.named_modules()
            if known is not None and id(inner) not in known and "attn" in name.rpartition(".")[2]
        }


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
    found: list[tuple[ModelRecord, str, nn.Module]] = []
    for name, module in model.named_modules():
        record = next((record for record in RECORDS if record.matches(module)), None)
        if record is not None:
            # A wrapper that passes attributes on (torch.compile) looks like the model inside it.
            found = [other for other in found if module not in other[2].modules()]
            found.append((record, name, module))
    if not found:
        known = "\n".join(f"  {record.name}: {record.structure}" for record in RECORDS)
        raise ValueError(
            f"no record knows the model {type(model).__name__}. Name the modules of its global attention yourself: "
            "patch(model, modules=[block.attn for block in ...], tokens_per_frame=P, num_special_tokens=R). "
            f"Known are models that have, in themselves or in a submodule,\n{known}"
        )
    if len(found) > 1:
        listed = ", ".join(f"{name} ({record.name})" for record, name, _ in found)
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} models: {listed}; patch each by itself, "
            f"for example patch(model.{found[0][1]})"
        )
    return found[0]


def _blocks(module: nn.Module, path: str, chosen: Callable[[int], bool]) -> dict[str, nn.Module]:
    """Return the attention of the chosen blocks of a ModuleList, by name."""
    blocks: Any = module.get_submodule(path)
    return {f"{path}.{i}.attn": block.attn for i, block in enumerate(blocks) if chosen(i)}


def _modules_of(module: nn.Module, name: str) -> Iterable[nn.Module]:
    child = getattr(module, name, None)
    return child.modules() if isinstance(child, nn.Module) else ()


def _has_blocks(module: nn.Module, *paths: str) -> bool:
    """Whether each path names a ModuleList, not empty, whose blocks have an attention called `attn`."""
    return all(_are_blocks(getattr(module, path, None)) for path in paths)


def _are_blocks(blocks: object) -> bool:
    return (
        isinstance(blocks, nn.ModuleList)
        and len(blocks) > 0
        and all(isinstance(getattr(block, "attn", None), nn.Module) for block in blocks)
    )


def _has(module: nn.Module, names: Iterable[str]) -> bool:
    return all(hasattr(module, name) for name in names)


def _argument(
    module: nn.Module, arguments: Mapping[str, Any], name: str, what: str, is_such: Callable[[Any], bool]
) -> Any:
    """Return an argument by name, or in a fork that calls it otherwise the only one that is such.

    Raises:
        TypeError: If there is no such argument, or several.
    """
    if name in arguments:
        return arguments[name]
    such = [value for value in arguments.values() if is_such(value)]
    if len(such) != 1:
        raise TypeError(
            f"a patched {type(module).__name__} must be given {what}, as the argument {name} or as the only argument "
            f"of that kind, but the arguments of this call ({', '.join(arguments) or 'none'}) hold {len(such)}"
        )
    return such[0]


def _images(module: nn.Module, arguments: Mapping[str, Any], name: str = "images") -> Tensor:
    images: Tensor = _argument(
        module,
        arguments,
        name,
        "images [B, S, 3, H, W]",
        lambda value: isinstance(value, Tensor) and value.dim() in (4, 5) and value.shape[-3] == 3,
    )
    return images


def _from_images(images: Tensor, special_tokens: int, patch_size: object) -> ForwardInputs:
    """Read images `[B, S, 3, H, W]`, or `[S, 3, H, W]` for one sample, cut into square patches."""
    if not isinstance(images, Tensor) or images.dim() not in (4, 5):
        given = list(images.shape) if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise TypeError(f"a patched model must be given images [B, S, 3, H, W] or [S, 3, H, W], got {given}")
    batched = images if images.dim() == 5 else images[None]
    height, width = images.shape[-2:]
    patches = (height // patch_size) * (width // patch_size) if isinstance(patch_size, int) else None
    return ForwardInputs(
        images=batched,
        frames=batched.shape[1],
        tokens_per_frame=None if patches is None else special_tokens + patches,
        special_tokens=special_tokens,
    )


def _is_alternating(module: nn.Module) -> bool:
    return _has_blocks(module, "frame_blocks", "global_blocks") and hasattr(module, "patch_start_idx")


def _is_streaming(module: nn.Module) -> bool:
    return _is_alternating(module) and "past_key_values" in inspect.signature(type(module).forward).parameters


def _global_blocks(module: nn.Module) -> dict[str, nn.Module]:
    return _blocks(module, "global_blocks", lambda i: True)


def _read_vggt(module: Any, arguments: Mapping[str, Any]) -> ForwardInputs:
    return _from_images(_images(module, arguments), module.patch_start_idx, getattr(module, "patch_size", None))


def _read_streaming(module: Any, arguments: Mapping[str, Any]) -> ForwardInputs:
    if arguments.get("use_cache"):
        raise ValueError(
            "a patched StreamVGGT runs all frames at once, without a KV cache, but got use_cache=True; "
            "call undo() on the patch before streaming"
        )
    return _read_vggt(module, arguments)


def _is_omega(module: nn.Module) -> bool:
    names = ("inter_frame_attention_types", "patch_token_start")
    return _has_blocks(module, "inter_frame_blocks") and _has(module, names)


def _read_omega(module: Any, arguments: Mapping[str, Any]) -> ForwardInputs:
    return _from_images(_images(module, arguments), module.patch_token_start, module.patch_size)


def _omega_attention(module: Any) -> dict[str, nn.Module]:
    kinds = module.inter_frame_attention_types
    return _blocks(module, "inter_frame_blocks", lambda i: kinds[i] == "global")


def _is_pi3(module: nn.Module) -> bool:
    return _has_blocks(module, "decoder") and _has(module, ("encoder", "register_token", "patch_start_idx"))


def _pi3_attention(module: nn.Module) -> dict[str, nn.Module]:
    return _blocks(module, "decoder", lambda i: i % 2 == 1)


def _read_pi3(module: Any, arguments: Mapping[str, Any]) -> ForwardInputs:
    return _from_images(_images(module, arguments, "imgs"), module.patch_start_idx, module.patch_size)


def _is_da3(module: Any) -> bool:
    # The wrapper of the transformer, which others call; the transformer itself has no forward.
    pretrained = getattr(module, "pretrained", None)
    return isinstance(pretrained, nn.Module) and _has_blocks(pretrained, "blocks") and _alt_start(pretrained) >= 0


def _alt_start(pretrained: Any) -> int:
    return getattr(pretrained, "alt_start", -1)


def _da3_attention(module: Any) -> dict[str, nn.Module]:
    first = module.pretrained.alt_start
    return _blocks(module, "pretrained.blocks", lambda i: i >= first and i % 2 == 1)


def _da3_reorders_between(module: Any) -> tuple[str, str] | None:
    first = module.pretrained.alt_start
    return (f"pretrained.blocks.{first - 2}", f"pretrained.blocks.{first - 1}") if first >= 2 else None


def _read_da3(module: Any, arguments: Mapping[str, Any]) -> ForwardInputs:
    transformer = module.pretrained
    return _from_images(_images(module, arguments, "x"), 1 + transformer.num_register_tokens, transformer.patch_size)


def _is_mapanything(module: nn.Module) -> bool:
    name = "MultiViewAlternatingAttentionTransformer"
    return _has_blocks(module, "self_attention_blocks") and name in (cls.__name__ for cls in type(module).__mro__)


def _mapanything_attention(module: nn.Module) -> dict[str, nn.Module]:
    return _blocks(module, "self_attention_blocks", lambda i: i % 2 == 0)


def _read_mapanything(module: Any, arguments: Mapping[str, Any]) -> ForwardInputs:
    what = "a MultiViewTransformerInput"
    given = _argument(module, arguments, "model_input", what, lambda value: hasattr(value, "features"))
    per_view, trailing = given.additional_input_tokens_per_view, given.additional_input_tokens
    last = 0 if per_view is None else per_view[0].shape[-1]
    return ForwardInputs(
        images=given.features,
        frames=len(given.features),
        tokens_per_frame=given.features[0].shape[-2:].numel() + last,
        special_tokens=(0, last),
        trailing_tokens=0 if trailing is None else trailing.shape[-1],
    )


def _is_toy(module: nn.Module) -> bool:
    return _has_blocks(module, "frame_blocks", "global_blocks") and hasattr(module, "num_special_tokens")


def _read_toy(module: Any, arguments: Mapping[str, Any]) -> ForwardInputs:
    return _from_images(_images(module, arguments), module.num_special_tokens, module.patch_size)


def stated_record(
    name: str,
    *,
    tokens_per_frame: int | None,
    special_tokens: int | tuple[int, int],
    trailing_tokens: int,
) -> ModelRecord:
    """Return a record for a model no record knows, whose tokens lie as the caller states.

    Raises:
        ValueError: If a count is negative, or there are more special tokens than tokens.
        TypeError: If a count is no int.
    """
    ends = special_tokens if isinstance(special_tokens, (tuple, list)) else (special_tokens, 0)
    if len(ends) != 2:
        raise ValueError(f"num_special_tokens must be an int or (first, last), got {special_tokens}")
    first, last = (_count("num_special_tokens", count) for count in ends)
    tokens = None if tokens_per_frame is None else _count("tokens_per_frame", tokens_per_frame)
    trailing = _count("trailing_tokens", trailing_tokens)
    if tokens is not None and tokens < max(1, first + last):
        raise ValueError(
            "tokens_per_frame must be 1 or more and hold the special tokens, got "
            f"tokens_per_frame={tokens_per_frame}, num_special_tokens={special_tokens}"
        )
    read = _StatedTokens(tokens, (first, last), trailing)
    return ModelRecord(name, "named by the caller", _is_nothing, _no_modules, read)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    count = operator.index(value)
    if count < 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")
    return count


@dataclass(frozen=True)
class _StatedTokens:
    tokens_per_frame: int | None
    special_tokens: tuple[int, int]
    trailing_tokens: int

    def __call__(self, module: nn.Module, arguments: Mapping[str, Any]) -> ForwardInputs:
        images = next((given for given in arguments.values() if isinstance(given, Tensor)), None)
        # [B, S, 3, H, W] tells the number of frames; any other shape may be anything.
        frames = images.shape[1] if images is not None and images.dim() == 5 and images.shape[2] == 3 else None
        return ForwardInputs(images, frames, self.tokens_per_frame, self.special_tokens, self.trailing_tokens)


def _is_nothing(module: nn.Module) -> bool:
    return False


def _no_modules(module: nn.Module) -> dict[str, nn.Module]:
    return {}


RECORDS = (
    ModelRecord(
        name="StreamVGGT",
        structure="frame_blocks, global_blocks and patch_start_idx, and a forward that takes past_key_values",
        matches=_is_streaming,
        global_attention=_global_blocks,
        read=_read_streaming,
        known=("patch_embed", "frame_blocks", "global_blocks"),
        causal=True,
    ),
    ModelRecord(
        name="VGGT",
        structure="frame_blocks, global_blocks and patch_start_idx; so have forks of VGGT and HunyuanWorld-Mirror",
        matches=_is_alternating,
        global_attention=_global_blocks,
        read=_read_vggt,
        known=("patch_embed", "frame_blocks", "global_blocks"),
    ),
    ModelRecord(
        name="VGGT-Omega",
        structure="inter_frame_blocks, inter_frame_attention_types and patch_token_start",
        matches=_is_omega,
        global_attention=_omega_attention,
        read=_read_omega,
        known=("patch_embed", "frame_blocks", "inter_frame_blocks"),
    ),
    ModelRecord(
        name="Pi3",
        structure="decoder (blocks with attn), encoder, register_token and patch_start_idx",
        matches=_is_pi3,
        global_attention=_pi3_attention,
        read=_read_pi3,
        known=("encoder", "decoder", "point_decoder", "conf_decoder", "camera_decoder"),
        reference_frame=None,
    ),
    ModelRecord(
        name="Depth Anything 3",
        structure="pretrained.blocks and pretrained.alt_start of 0 or more",
        matches=_is_da3,
        global_attention=_da3_attention,
        read=_read_da3,
        known=("pretrained",),
        reorders_between=_da3_reorders_between,
        images_are_normalised=True,
    ),
    ModelRecord(
        name="MapAnything",
        structure="UniCeption's class MultiViewAlternatingAttentionTransformer, with self_attention_blocks",
        matches=_is_mapanything,
        global_attention=_mapanything_attention,
        read=_read_mapanything,
        known=("self_attention_blocks",),
    ),
    ModelRecord(
        name="toy",
        structure="frame_blocks, global_blocks and num_special_tokens (svggt_kernels.demo.toy)",
        matches=_is_toy,
        global_attention=_global_blocks,
        read=_read_toy,
        known=("frame_blocks", "global_blocks"),
    ),
)
