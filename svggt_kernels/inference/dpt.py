"""VGGT's DPT heads (arXiv 2103.13413), run with the modules' own parameters but few passes over their maps.

The tokens of four layers become maps, which are fused from the coarsest to the finest, up to the size of the image.
What is computed is upstream's, up to rounding, at inference only. Three things make it cheaper:

- Biases, ReLUs and sums go with the convolutions and the upsampling.
- The 1x1 convolution after each fusion runs before the upsampling, on a quarter of the pixels. They commute, as the
  weights of an interpolation sum to 1.
- Maps of a finer layer are made when the coarser ones are done.

A residual unit adds max(0, x) to what it computes, not x: upstream's ReLU works in place on what is added later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import convolve_relu, layer_norm, predict, upsample
from .settings import attributes_of, is_plain

SIGNED = {"exp": False, "inv_log": True}
"""Activations of the values that are known, and whether such values have a sign."""

CONFIDENCE = "expp1"
METHODS = ("_forward_impl", "_apply_pos_embed", "scratch_forward")
LEAVES = (nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.ReLU, nn.Identity)
MOST_VALUES = 2**31 - 1
"""Of the last map that is convolved: PyTorch splits a convolution of more, but not one with its ReLU."""

Size = tuple[int, int]


def obstacle(head: Any) -> str | None:
    """Return why a module is not a head that `ReadyHead` can run, or None if it may be: verification tells.

    What a head holds must be of types that the formula knows, and have no more to it than what its settings say.
    """
    if getattr(head, "feature_only", False):
        return "it returns feature maps, no values"
    for name, known in (("activation", tuple(SIGNED)), ("conf_activation", (CONFIDENCE,))):
        if (value := getattr(head, name, None)) not in known:
            return f"its {name} is {value!r}, not {' or '.join(map(repr, known))}"
    if type(getattr(head, "norm", None)) is not nn.LayerNorm or head.norm.weight is None or head.norm.bias is None:
        return "its norm is not LayerNorm with weight and bias"
    if not isinstance(getattr(head, "patch_size", None), int):
        return "it does not say its patch_size"
    if any(name in vars(head) for name in METHODS):
        return "one of its methods was replaced"
    for path, module in head.named_modules():
        where, has_tensors = path or "it", bool(module._parameters or module._buffers)
        if type(module) not in LEAVES and (has_tensors or not module._modules):
            what = ", ".join([*module._parameters, *module._buffers]) or "a " + type(module).__name__
            return f"{where} holds {what}, which the fused head does not know"
        for name, value in attributes_of(module).items():
            if not is_plain(value):
                return f"{where} holds {name} of {type(value).__name__}, in which anything may be"
    return None


Table = tuple[Tensor, Tensor]
"""What is added to each column of a map, `[W, C]`, and to each row, `[H, C]`."""


def position_tables(head: Any, image: Sequence[int], like: Tensor) -> list[Table]:
    """Return what a head adds to the pixels of its projected layers, and of its last map, by where these are.

    Upstream computes it anew for every few frames; here the head's own method computes it once. It depends on a pixel's
    column in some channels and on its row in the others, so that two small tables hold it.

    Args:
        head: A head for which `obstacle` is None.
        image: H and W of the images.
        like: A tensor of the tables' dtype, on their device.

    Raises:
        ValueError: If what it adds is no such sum.
    """
    maps = [(project.out_channels, *_grid(head, image)) for project in head.projects]
    maps.append((head.scratch.output_conv1.out_channels, *_size(head, image)))
    return [_position_table(head, image, like.new_zeros(1, *each)) for each in maps]


def _position_table(head: Any, image: Sequence[int], nothing: Tensor) -> Table:
    height, width = image
    added = (head._apply_pos_embed(nothing, width, height) if head.pos_embed else nothing)[0]
    of_row = (added == added[:, :, :1]).all(1).all(1)
    of_column = (added == added[:, :1]).all(1).all(1)
    if not (of_row | of_column).all():
        raise ValueError("what it adds to pixels is no sum over their columns and rows")
    return (added[:, 0].mT * ~of_row).contiguous(), (added[:, :, 0].mT * of_row).contiguous()


class ReadyHead:
    """A head for one call, its weights as convolutions want them: channels-last.

    Args:
        head: A head for which `obstacle` is None.
        tables: What `position_tables` says about the images of the call.
        dtype: In which all is computed.
    """

    def __init__(self, head: Any, tables: Sequence[Table], dtype: torch.dtype) -> None:
        self.head, self.dtype = head, dtype
        *projected, self._last_table = tables
        self._added = [
            (columns + rows[:, None] + project.bias).to(dtype).movedim(2, 0)
            for (columns, rows), project in zip(projected, head.projects, strict=True)
        ]
        convolutions = [each for each in head.modules() if isinstance(each, (nn.Conv2d, nn.ConvTranspose2d))]
        self._weights = {
            each: each.weight.to(dtype).contiguous(memory_format=torch.channels_last) for each in convolutions
        }
        self._biases: dict[nn.Module, Any] = {
            each: None if each.bias is None else each.bias.to(dtype) for each in convolutions
        }

    def __call__(self, layers: Any, images: Tensor, first_patch: int) -> tuple[Tensor, Tensor]:
        """Return what the head's forward does: values `[B, S, H, W, K]` and their confidence `[B, S, H, W]`.

        Args:
            layers: Outputs `[B, S, P, C]` of layers by their index, in a list or a dict; those that the head reads are
                tensors.
            images: `[B, S, 3, H, W]`, of which only the shape matters.
            first_patch: The first token of a frame that is a patch.
        """
        B, S, _, *image = images.shape
        grid, size = _grid(self.head, image), _size(self.head, image)
        read = [layers[index][:, :, first_patch:].flatten(0, 1) for index in self.head.intermediate_layer_idx]
        together = max(1, MOST_VALUES // (self.head.scratch.output_conv1.out_channels * size[0] * size[1]))
        parts = zip(*(tokens.split(together) for tokens in read), strict=True)
        results = zip(*(self._run(tokens, grid, size) for tokens in parts), strict=True)
        values, confidence = (torch.cat(of_frames).unflatten(0, (B, S)) for of_frames in results)
        return values, confidence

    def _run(self, tokens: Sequence[Tensor], grid: Size, size: Size) -> tuple[Tensor, Tensor]:
        """Return the values of some frames `[N, H, W, K]` and their confidence.

        Args:
            tokens: Patch tokens `[N, P, C]` of each layer.
            grid: How many patches lie below and beside each other.
            size: H and W.
        """
        scratch = self.head.scratch
        fused, bias = self._fuse(scratch.refinenet4, self._map(3, tokens[3], grid))
        for level in (2, 1, 0):
            block = getattr(scratch, f"refinenet{level + 1}")
            x = self._map(level, tokens[level], grid)
            coarser = upsample(fused, (x.shape[2], x.shape[3]), bias, x)
            x = self._convolve_relu(block.resConfUnit1.conv2, self._convolve_relu(block.resConfUnit1.conv1, x), coarser)
            fused, bias = self._fuse(block, x)
        height, width = fused.shape[2:]
        fused = self._convolve(scratch.output_conv1, upsample(fused, (2 * height, 2 * width), bias), None)
        fused = upsample(fused, size, self._biases[scratch.output_conv1], positions=self._last_table)
        hidden, _, last = scratch.output_conv2
        fused = self._convolve_relu(hidden, fused)
        results = predict(fused, self._weights[last], self._biases[last], SIGNED[self.head.activation])
        # cuDNN's ReLU makes 0 of NaN.
        broken = ~torch.stack([each.isfinite().flatten(1).all(1) for each in tokens]).all(0)
        for result in results:
            result.masked_fill_(broken.view(-1, *[1] * (result.dim() - 1)), torch.nan)
        return results

    def _map(self, level: int, tokens: Tensor, grid: Size) -> Tensor:
        """Return the map of a layer that is fused, `[N, C', h, w]`, at least 0, from its tokens `[N, P, C]`."""
        x = layer_norm(tokens.to(self.dtype), self.head.norm, self.dtype).mT.unflatten(2, grid)
        x = self._convolve(self.head.projects[level], x, None).add_(self._added[level])
        resize = self.head.resize_layers[level]
        if not isinstance(resize, nn.Identity):
            x = self._convolve(resize, x, self._biases[resize])
        return self._convolve_relu(getattr(self.head.scratch, f"layer{level + 1}_rn"), x)

    def _fuse(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a fusion makes of the sum of its inputs, no less than 0, and the bias that is to be added to it.

        Upstream upsamples before the last convolution, the bias of the one before it included.
        """
        last, out = block.resConfUnit2.conv2, block.out_conv
        x = self._convolve(last, self._convolve_relu(block.resConfUnit2.conv1, x), None).add_(x)
        bias = torch.addmv(self._biases[out], self._weights[out].flatten(1), self._biases[last])
        return self._convolve(out, x, None), bias

    def _convolve_relu(self, conv: nn.Conv2d, x: Tensor, plus: Tensor | None = None) -> Tensor:
        return convolve_relu(x, conv, self._weights[conv], self._biases[conv], plus)

    def _convolve(self, conv: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self._weights[conv]
        if isinstance(conv, nn.ConvTranspose2d):
            padding = (conv.padding, conv.output_padding)
            return F.conv_transpose2d(x, weight, bias, conv.stride, *padding, conv.groups, conv.dilation)  # type: ignore[arg-type]
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def launches(head: Any) -> Iterator[partial[Any]]:
    """Yield a call of each kernel of a head for which `obstacle` is None, on few pixels, so that it is compiled."""
    norm, scratch, last = head.norm, head.scratch, head.scratch.output_conv2[-1]
    like = norm.weight.detach()
    yield partial(layer_norm, like.new_zeros(1, 4, len(like)), norm, like.dtype)
    fused, hidden = scratch.refinenet1.out_conv.out_channels, scratch.output_conv1.out_channels
    for channels, added in ((fused, "none"), (fused, "map"), (hidden, "positions")):
        x, bias, line = like.new_zeros(1, channels, 2, 2), like.new_zeros(channels), like.new_zeros(4, channels)
        plus = like.new_zeros(1, channels, 4, 4) if added == "map" else None
        yield partial(upsample, x, (4, 4), bias, plus, (line, line) if added == "positions" else None)
    x = like.new_zeros(1, last.in_channels, 2, 2)
    yield partial(predict, x, last.weight, last.bias, SIGNED[head.activation])


def _grid(head: Any, image: Sequence[int]) -> Size:
    """Return how many patches lie below and beside each other."""
    return image[0] // head.patch_size, image[1] // head.patch_size


def _size(head: Any, image: Sequence[int]) -> Size:
    """Return H and W of what the head returns."""
    rows, columns = _grid(head, image)
    return int(rows * head.patch_size / head.down_ratio), int(columns * head.patch_size / head.down_ratio)
