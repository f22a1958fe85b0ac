"""Settings of modules: what a verification holds for, and what a snapshot notices."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from doubles.vggt import DIM, Attention, Block, Rotary
from torch import nn

from svggt_kernels.inference.settings import Snapshot, is_plain, settings_of, tensors_of


class Tempered(Attention):
    """A class of this file, which tests may change."""

    factors = [1.0]  # noqa: RUF012


def block_of() -> Block:
    block = Block(Rotary())
    block.attn.__class__ = Tempered
    block.attn.sizes, block.attn.options = [1, [2, 3]], {"temperature": 1.0}
    block.attn.rope.frequency_cache = {}
    block.register_buffer("offset", torch.zeros(3))
    return block.eval()


def put(path: str, value: object):
    name, _, attribute = path.rpartition(".")
    return lambda block: setattr(block.get_submodule(name), attribute, value)


class Other(Attention):
    pass


CHANGES = {
    "an attribute": put("attn.num_heads", 4),
    "a new attribute": put("attn.temperature", 2.0),
    "a list in place": lambda block: block.attn.sizes.append(3),
    "a list in a list": lambda block: block.attn.sizes[1].append(3),
    "a dict in place": lambda block: block.attn.options.update(temperature=2.0),
    "a submodule": put("mlp.act", nn.SiLU().eval()),
    "a new submodule": put("attn.adapter", nn.Linear(2, 2).eval()),
    "a parameter of another shape": put("norm1.weight", nn.Parameter(torch.ones(1))),
    "dtypes": lambda block: block.attn.half(),
    "a buffer": put("offset", torch.zeros(4)),
    "training mode": lambda block: block.mlp.train(),
    "a hook": lambda block: block.mlp.register_forward_hook(lambda *_: None),
    "a hook before": lambda block: block.mlp.register_forward_pre_hook(lambda *_: None),
    "a forward": put("mlp.forward", lambda x: x),
    "a class": put("attn.__class__", Other),
    "an attribute of a class": lambda block: setattr(Tempered, "temperature", 2.0),
    "a list of a class": lambda block: Tempered.factors.append(2.0),
}


@pytest.fixture(autouse=True)
def class_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Tempered, "factors", [1.0])
    yield
    if "temperature" in vars(Tempered):
        del Tempered.temperature


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_noticed(kind: str):
    block = block_of()
    before, snapshot = settings_of(block), Snapshot(block)
    assert snapshot.holds() and settings_of(block) == before
    CHANGES[kind](block)
    assert not snapshot.holds()
    assert settings_of(block) != before


def test_a_forward_of_a_class_that_is_replaced_is_noticed(monkeypatch: pytest.MonkeyPatch):
    block = block_of()
    before, snapshot = settings_of(block), Snapshot(block)
    monkeypatch.setattr(Attention, "attend", lambda self, q, k, v: v)
    assert not snapshot.holds() and settings_of(block) != before


def test_caches_are_no_settings():
    block = block_of()
    before, snapshot = settings_of(block), Snapshot(block)
    block.attn.rope.frequency_cache["key"] = torch.ones(2)
    assert snapshot.holds() and settings_of(block) == before


@pytest.mark.parametrize("written", ["attn.qkv.weight", "offset"])
def test_values_written_in_place_end_a_snapshot_and_are_no_settings(written: str):
    block = block_of()
    before, snapshot = settings_of(block), Snapshot(block)
    with torch.no_grad():
        block.state_dict()[written].add_(1)
    assert not snapshot.holds() and settings_of(block) == before


def test_replaced_parameters_are_noticed_and_have_the_same_settings():
    block = block_of()
    before, snapshot = settings_of(block), Snapshot(block)
    block.norm1.weight = nn.Parameter(torch.full((DIM,), 2.0))
    assert not snapshot.holds() and settings_of(block) == before


def test_equal_modules_have_equal_settings():
    block = block_of()
    twin = copy.deepcopy(block)
    assert settings_of(block) == settings_of(twin) and hash(settings_of(block)) == hash(settings_of(twin))
    twin.norm1.eps = 1e-6
    assert settings_of(block) != settings_of(twin)


def test_what_can_neither_be_copied_nor_compared_can_be_held():
    block = block_of()
    block.locks, block.weights = [threading.Lock()], torch.ones(2)
    snapshot = Snapshot(block)
    assert snapshot.holds()
    block.weights = torch.ones(2)
    assert not snapshot.holds()


def test_plain_values():
    assert all(map(is_plain, (1, None, "a", torch.float32, (1, [2.0]), {"a": [1]})))
    assert not any(map(is_plain, (object(), [torch.ones(1)], {"a": object()}, nn.Identity())))


def test_tensors_are_those_of_the_modules_each_once():
    block = block_of()
    block.mlp.twin = block.mlp
    block.attn.tied = block.attn.qkv.weight
    block.mlp.register_buffer("unsaved", torch.zeros(2), persistent=False)
    expected = {id(tensor) for tensor in (*block.parameters(), *block.buffers())}
    found = [id(tensor) for tensor in tensors_of(block)]
    assert len(found) == len(set(found)) and set(found) == expected
