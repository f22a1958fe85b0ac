"""What backward runs again: which forward it belongs to, and what cannot be run again is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from doubles import FAMILY, images
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from svggt_kernels import CovisibilityGraph, patch

FRAMES = 6
PICTURES = images(FRAMES)
FULL, BAND = CovisibilityGraph.all_visible(FRAMES), CovisibilityGraph.sequential(FRAMES, 1)


def ring(step: int) -> CovisibilityGraph:
    """Equally many edges for every step."""
    return CovisibilityGraph.from_pairs(FRAMES, [(i, (i + d) % FRAMES) for i in range(FRAMES) for d in (step, -step)])


class Checkpointed(nn.Module):
    """A module whose forward is run again in backward; several, one in another, if `times` is more than 1."""

    def __init__(self, inner: nn.Module, reentrant: bool, times: int = 1) -> None:
        super().__init__()
        self.inner, self.reentrant, self.times = inner, reentrant, times

    def forward(self, x: Tensor) -> Tensor:
        run = self.inner
        for _ in range(self.times):
            run = _again(run, self.reentrant)
        return run(x)


def _again(run, reentrant: bool):
    return lambda x: checkpoint(run, x, use_reentrant=reentrant)


def model_with(kind: str | None) -> nn.Module:
    """VGGT in eval mode with blocks that are checkpointed."""
    model = FAMILY["vggt"].create()
    if kind is not None:
        for blocks in (model.aggregator.frame_blocks, model.aggregator.global_blocks):
            for i, block in enumerate(blocks):
                blocks[i] = Checkpointed(block, kind != "plain", 2 if kind == "nested" else 1)
                blocks[i].attn = block.attn
    return model


def gradients(kind: str | None, graphs: tuple[CovisibilityGraph, ...], *, together: bool) -> Tensor:
    model, queue, losses = model_with(kind), [], []
    with patch(model, covisibility=lambda _: queue.pop(0)):
        for graph, weight in zip(graphs, (1.0, -0.5, 0.25), strict=False):
            queue.append(graph)
            losses.append(weight * model(PICTURES.clone().requires_grad_()).square().sum())
            if not together:
                losses.pop().backward()
        if together:
            torch.stack(losses).sum().backward()
    return torch.cat([p.grad.flatten() for p in dict.fromkeys(model.parameters()) if p.grad is not None])


@pytest.mark.parametrize("kind", ["plain", "reentrant", "nested"])
@pytest.mark.parametrize("together", [False, True], ids=["a backward each", "one backward"])
@pytest.mark.parametrize("graphs", [(ring(1), ring(2)), (FULL, BAND, ring(2))], ids=["as many edges", "more"])
def test_same_images_with_other_graphs(kind: str, together: bool, graphs: tuple[CovisibilityGraph, ...]):
    expected = gradients(None, graphs, together=False)
    assert not torch.allclose(gradients(None, graphs[::-1], together=False), expected)
    torch.testing.assert_close(gradients(kind, graphs, together=together), expected)


class OwnCheckpoint(nn.Module):
    """An attention that checkpoints its core."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None]
        return checkpoint(F.scaled_dot_product_attention, q, q, q, use_reentrant=self.reentrant)[:, 0]


class WithoutGradients(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None]
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, q, q)[:, 0] + x


@pytest.mark.parametrize("attention", [OwnCheckpoint(False), OwnCheckpoint(True), WithoutGradients()])
def test_a_checkpoint_inside_a_patched_module_is_refused(attention: nn.Module):
    model, x = nn.Sequential(attention), torch.randn(1, 12, 8)
    with patch(model, modules=["0"], tokens_per_frame=4, covisibility="all"):
        with pytest.raises(RuntimeError, match=r"0 runs its attention inside an activation checkpoint of its own"):
            model(x.requires_grad_())
        with torch.no_grad():
            model(x)


def test_a_forward_during_the_backward_of_another():
    """What is run again while another forward runs, in the same thread, belongs to its own forward."""
    model = model_with("plain")
    queue = [BAND, FULL]
    expected = gradients("plain", (BAND,), together=False)
    with patch(model, covisibility=lambda _: queue.pop(0)):
        loss = model(PICTURES.clone().requires_grad_()).square().sum()
        model.aggregator.global_blocks[1].register_forward_hook(lambda *_: loss.backward() if not queue else None)
        with torch.no_grad():
            model(PICTURES)
    actual = torch.cat([p.grad.flatten() for p in dict.fromkeys(model.parameters()) if p.grad is not None])
    torch.testing.assert_close(actual, expected)


def test_an_undo_that_backward_would_miss_is_told():
    """A reentrant checkpoint runs blocks again, dense by then; one that is not reentrant notices by itself."""
    model = model_with("reentrant")
    with pytest.warns(UserWarning, match=r"undone before backward has run.*call backward\(\) first"):
        with patch(model, covisibility=BAND):
            model(PICTURES.clone().requires_grad_())
    with patch(model, covisibility=BAND):
        model(PICTURES.clone().requires_grad_()).sum().backward()
    model = model_with("plain")
    with patch(model, covisibility=BAND):
        out = model(PICTURES.clone().requires_grad_()).sum()
    with pytest.raises(CheckpointError):
        out.backward()
