"""What a model's file states, and helpers to state it: the record that `patching` acts on, and how to run the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from ..graph.arguments import integer


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
        patch_grid: Rows and columns of the patches of each frame, which lie row after row; None if that is not known.
    """

    images: Any
    frames: int | None
    tokens_per_frame: int | None = None
    special_tokens: int | tuple[int, int] = 0
    trailing_tokens: int = 0
    patch_grid: tuple[int, int] | None = None


def one_batch(
    frames: Tensor,  # [S, 3, H, W]
) -> Tensor:
    """Return the frames as a batch of one sample, `[1, S, 3, H, W]`."""
    return frames[None]


@dataclass(frozen=True)
class RunnableModel:
    """How to build a model, feed it and read its outputs.

    Attributes:
        name: Its name on the command line.
        build: Makes the model with random weights; imports the package that holds its code.
        outputs: Reads the result of its forward into named tensors `[S, ...]`; "depth" is `[S, H, W]`.
        cameras: Reads poses, camera to world `[S, 4, 4]` float64 with axes as in OpenCV, from what `outputs` returns.
        intrinsics: Reads intrinsics `[S, 3, 3]` float64 of the frames likewise, in pixels; the centre of the first is
            (0.5, 0.5).
        confidence: Reads how sure the model is of each pixel's depth likewise, `[S, H, W]`; only its order means much.
        feed: Turns frames `[S, 3, H, W]` in [0, 1] into the argument of its forward.
        requirement: How to install what `build` imports; empty if nothing is needed.
        published: The repository of the Hugging Face hub that has the weights of the model's own release.
        long_side: The model's usual resolution: pixels of the longer side.
        one_size: Width and height of a frame where the model has learned no other.
        patch_size: Pixels of a patch.
        trained: Makes the model with the weights of a file in a format of its own, or for None with those that the
            package has. None if weights come as tensors by name, and the package has none.
        key_prefix: A prefix that weight files put before every name.
    """

    name: str
    build: Callable[[], nn.Module]
    outputs: Callable[[Mapping[str, Any]], dict[str, Tensor]]
    cameras: Callable[[Mapping[str, Tensor]], Tensor]
    intrinsics: Callable[[Mapping[str, Tensor]], Tensor]
    confidence: Callable[[Mapping[str, Tensor]], Tensor]
    feed: Callable[[Tensor], Tensor] = one_batch
    requirement: str = ""
    published: str = ""
    long_side: int = 518
    one_size: tuple[int, int] | None = None
    patch_size: int = 14
    trained: Callable[[Path | None], nn.Module] | None = None
    key_prefix: str = ""


@dataclass(frozen=True)
class ModelRecord:
    """The facts about one model that patching needs, and how to run it.

    `module` below is the module the record recognises: the innermost one whose own forward runs every global
    attention, so that a patch attached to it works however the model is called. A patch travels with pickled models, so
    functions must be importable: no lambdas.

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
        followers: The attention modules outside `module` or among its special tokens that look across frames too, each
            frame with as many tokens, by name relative to the model that is given: they follow the core of an opened
            scene. None if there are none.
        growth: The factor by which the scores of one of its global attention modules grow with its number of tokens, of
            the module and that number; None where they do not.
        first_is_reference: Arguments of the model's forward by which its first frame is its reference frame.
        runnable: How to build, feed and read the whole model; None if that is not known.
    """

    name: str
    structure: str
    matches: Callable[[nn.Module], bool]
    global_attention: Callable[[nn.Module], dict[str, nn.Module]]
    read: Callable[[nn.Module, Mapping[str, Any]], ForwardInputs]
    known: tuple[str, ...] | None = None
    reference_frame: int | None = 0
    causal: bool = False
    reorders_between: Callable[[nn.Module], tuple[str, str] | None] | None = None
    images_are_normalised: bool = False
    followers: Callable[[nn.Module], dict[str, nn.Module]] | None = None
    growth: Callable[[nn.Module, int], float] | None = None
    first_is_reference: Mapping[str, Any] = field(default_factory=dict)
    runnable: RunnableModel | None = None

    def unknown_attention(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the attention modules outside the known children, by name; some forks have more than their model."""
        if self.known is None:
            return {}
        children = (getattr(module, name, None) for name in self.known)
        known = {inner for child in children if isinstance(child, nn.Module) for inner in child.modules()}
        return {
            name: inner
            for name, inner in module.named_modules()
            if inner not in known and "attn" in name.rpartition(".")[2]
        }


def has_parts(module: object, blocks: Iterable[str], attributes: Iterable[str] = ()) -> bool:
    """Whether each of `blocks` names a ModuleList, not empty, whose blocks have an `attn`, and the attributes exist."""
    stacks = [getattr(module, name, None) for name in blocks]
    return all(hasattr(module, name) for name in attributes) and all(
        isinstance(stack, nn.ModuleList)
        and len(stack) > 0
        and all(isinstance(getattr(block, "attn", None), nn.Module) for block in stack)
        for stack in stacks
    )


def block_attention(module: nn.Module, path: str, start: int = 0, step: int = 1) -> dict[str, nn.Module]:
    """Return the attention of every `step`-th block of a ModuleList from `start` on, by name."""
    blocks: Any = module.get_submodule(path)
    return {f"{path}.{i}.attn": blocks[i].attn for i in range(start, len(blocks), step)}


def trunk_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention of the trunks of camera heads, which attends over one token of each frame, by name."""
    found: dict[str, nn.Module] = {}
    for name, stack in model.named_modules():
        if name.rpartition(".")[2] == "trunk" and isinstance(stack, (nn.ModuleList, nn.Sequential)):
            attention = ((index, getattr(block, "attn", None)) for index, block in enumerate(stack))
            found |= {f"{name}.{index}.attn": each for index, each in attention if isinstance(each, nn.Module)}
    return found


def argument(
    module: nn.Module, arguments: Mapping[str, Any], name: str, description: str, accepts: Callable[[Any], bool]
) -> Any:
    """Return an argument by name, or in a fork that names it differently the only one that `accepts` takes.

    Raises:
        TypeError: If there is no such argument, or several.
    """
    if name in arguments:
        return arguments[name]
    candidates = [value for value in arguments.values() if accepts(value)]
    if len(candidates) != 1:
        raise TypeError(
            f"a patched {type(module).__name__} must be given {description}, as the argument {name} or as the only "
            f"argument of that kind, but the arguments of this call ({', '.join(arguments) or 'none'}) hold "
            f"{len(candidates)}"
        )
    return candidates[0]


def inputs_from_images(
    module: nn.Module,
    arguments: Mapping[str, Any],
    special_tokens: int,
    patch_size: object,
    name: str = "images",
) -> ForwardInputs:
    """Read images `[B, S, 3, H, W]`, or `[S, 3, H, W]` for one sample, cut into square patches.

    Args:
        module: The module that is called.
        arguments: The arguments of its forward by name.
        special_tokens: Tokens at the start of each frame that are no patches.
        patch_size: Pixels of a patch; if it is no int, the number of frames tells how many tokens a frame has.
        name: What the module calls its images.

    Raises:
        TypeError: If there are no such images.
    """
    images = argument(module, arguments, name, "images [B, S, 3, H, W]", _are_images)
    if not isinstance(images, Tensor) or images.dim() not in (4, 5):
        description = list(images.shape) if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise TypeError(f"a patched model must be given images [B, S, 3, H, W] or [S, 3, H, W], got {description}")
    batch = images if images.dim() == 5 else images[None]
    height, width = images.shape[-2:]
    grid = (height // patch_size, width // patch_size) if isinstance(patch_size, int) else None
    return ForwardInputs(
        images=batch,
        frames=batch.shape[1],
        tokens_per_frame=None if grid is None else special_tokens + grid[0] * grid[1],
        special_tokens=special_tokens,
        patch_grid=grid,
    )


def read_images(
    module: nn.Module, arguments: Mapping[str, Any], special_tokens: str, name: str = "images"
) -> ForwardInputs:
    """Read images by the module's own `patch_size`; `special_tokens` names its attribute that counts those tokens."""
    patch_size = getattr(module, "patch_size", None)
    return inputs_from_images(module, arguments, getattr(module, special_tokens), patch_size, name)


def _are_images(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() in (4, 5) and value.shape[-3] == 3


def first_sample(result: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the first sample of each output `[B, S, ...]` that the result has, by name."""
    return {name: result[name][0] for name in names if name in result}


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
    first, last = (integer("num_special_tokens", count, 0) for count in ends)
    tokens = tokens_per_frame
    if tokens is not None:
        tokens = integer("tokens_per_frame, special tokens included,", tokens, max(1, first + last))
    stated = ForwardInputs(None, None, tokens, (first, last), integer("trailing_tokens", trailing_tokens, 0))
    read = partial(_read_stated, stated=stated)
    return ModelRecord(name, "named by the caller", _never, _never, read)


def _read_stated(module: nn.Module, arguments: Mapping[str, Any], *, stated: ForwardInputs) -> ForwardInputs:
    images = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
    # [B, S, 3, H, W] tells the number of frames; any other shape may be anything.
    frames = images.shape[1] if images is not None and images.dim() == 5 and images.shape[2] == 3 else None
    return replace(stated, images=images, frames=frames)


def _never(module: nn.Module) -> NoReturn:
    raise NotImplementedError("a model that no record knows is not looked for, its modules are named by the caller")
