"""Weights in eight bits: small, close to what they were, and refused where they are something else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from svggt_kernels.demo.model import RoomsModel, model
from svggt_kernels.demo.model.weights import dequantise, quantise, read_weights, write_weights

SIZES = {"dim": 32, "depth": 1, "num_heads": 2}


def test_rounding_is_at_most_half_a_step_of_the_row():
    values = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    values *= torch.tensor([1e-8, 1e-3, 1.0, 30.0, 1e4, 0.0])[:, None, None, None]
    quantised, scales = quantise(values)
    assert quantised.dtype == torch.int8 and quantised.abs().flatten(1).amax(1).tolist() == [127] * 5 + [0]
    error = (dequantise(quantised, scales) - values).abs().flatten(1).amax(1)
    assert (error <= 0.5001 * values.abs().flatten(1).amax(1) / 127).all()


@torch.no_grad()
def test_a_model_comes_back_as_it_went(tmp_path: Path):
    before = RoomsModel.create(seed=3, **SIZES)
    write_weights(tmp_path / "weights", before.state_dict(), before.sizes)
    after = RoomsModel.trained(tmp_path / "weights")
    assert after.sizes == before.sizes and not after.training
    for name, value in before.state_dict().items():
        error = (after.state_dict()[name] - value).norm() / value.norm().clamp_min(1e-9)
        assert error < (0.01 if value.dim() > 1 else 1e-3), name
    images = torch.rand(3, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    expected, found = before(images), after(images)
    for name, value in expected.items():
        assert (found[name] - value).norm() < 0.05 * value.norm(), name


def test_writing_twice_gives_the_same_bytes(tmp_path: Path):
    network = RoomsModel.create(**SIZES)
    for name in "ab":
        write_weights(tmp_path / name, network.state_dict(), network.sizes)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_default_model_takes_at_most_12_megabytes(tmp_path: Path):
    """Bytes drawn evenly cannot be compressed, as weights of one size almost can."""
    network = RoomsModel()
    state = {name: torch.rand_like(value) - 0.5 for name, value in network.state_dict().items()}
    write_weights(tmp_path / "weights.npz", state, network.sizes)
    assert 10e6 < (tmp_path / "weights.npz").stat().st_size < 12e6


def test_no_weights_are_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "TRAINED", tmp_path / "trained.npz")
    with pytest.raises(FileNotFoundError, match="python -m evaluation train"):
        RoomsModel.trained()


def test_weights_of_another_kind_are_refused(tmp_path: Path):
    path = tmp_path / "weights.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="does not hold weights in eight bits"):
        read_weights(path)
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(ValueError, match="does not hold weights in eight bits"):
        read_weights(path)
    np.savez(path, sizes=np.array([{"dim": 4}], dtype=object))  # pickled
    with pytest.raises(ValueError, match="does not hold weights in eight bits"):
        read_weights(path)
    network = RoomsModel.create(**SIZES)
    write_weights(path, network.state_dict(), SIZES | {"depth": 2})
    with pytest.raises(ValueError, match="not those of this model"):
        RoomsModel.trained(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_numbers_that_eight_bits_cannot_hold_are_refused(bad: float, tmp_path: Path):
    with pytest.raises(ValueError, match=r"norm\.weight must hold finite"):
        write_weights(tmp_path / "weights.npz", {"norm.weight": torch.tensor([1.0, bad])}, SIZES)


def test_the_weights_of_the_package_are_those_that_were_measured():
    content = model.TRAINED.read_bytes()
    facts = RoomsModel.provenance()
    assert len(content) <= 12e6
    assert facts["sha256"] == hashlib.sha256(content).hexdigest()
    assert {"seed", "command", "seconds", "device", "commit", "metrics"} <= facts.keys()
    trained = RoomsModel.trained()  # without pickle, as any file of write_weights
    assert sum(parameter.numel() for parameter in trained.parameters()) == facts["parameters"]
    assert all(value.isfinite().all() for value in trained.state_dict().values())
