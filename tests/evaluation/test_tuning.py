"""Training with a layout from weights that exist: gradients, where it begins, how it continues, and what is refused."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import pytest
import torch
from tiers import every
from torch import Tensor

from evaluation import train
from evaluation.__main__ import main
from evaluation.layouts import Dense, Known, named
from evaluation.measuring import SceneSet
from evaluation.training.losses import total_loss
from evaluation.training.network import TrainingNetwork
from evaluation.training.schedule import tuning_factor
from evaluation.training.truth import Truth
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.model.model import TRAINED
from svggt_kernels.demo.model.weights import write_weights
from svggt_kernels.demo.scenes import Draws, Scenes, make_scenes
from svggt_kernels.patching import Patch

SIZE = (28, 42)
SIZES = {"dim": 32, "depth": 2, "num_heads": 2}
WORDS = "--frames 8 --shortest 4 --longest 4 --height 28 --width 42 --scenes 1 --device cpu".split()


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """Two scenes of four frames."""
    return make_scenes(2, 4, Draws(0), families="walk", rooms=1, difficulty=0.0, size=SIZE)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.npz"
    write_weights(path, RoomsModel.create(5, **SIZES).state_dict(), SIZES)
    return path


def options(folder: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_parser(parser.add_subparsers())
    return parser.parse_args(["train", "--run", str(folder), *WORDS, *words])


def gradients(name: str, model: RoomsModel, known: Known) -> list[Tensor]:
    """The gradients in float64 of a sum over samples of a function of the model's tokens."""
    model.zero_grad()
    with named(name).put_into(model, known):
        layers, _ = model.aggregator(known.scenes.images.double())
    weight = torch.linspace(-1, 1, layers[-1][0].numel(), dtype=torch.float64).view_as(layers[-1][0])
    (layers[-1].square() * weight).sum().backward()
    return [parameter.grad.clone() for parameter in model.aggregator.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", ["core-4", "core-9-evenly", "nearest-3"])
def test_the_gradients_of_a_full_graph_are_the_dense_ones(name: str, scenes: Scenes):
    model = RoomsModel.create(**SIZES).double()
    known = Known(scenes, 0)
    for found, expected in zip(gradients(name, model, known), gradients("dense", model, known), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["core-2", "core-2-covering", "core-2-evenly", "core-2-overlap", "core-2-random", "nearest-1", "random-1"]
)
def test_each_sample_of_a_batch_attends_by_its_own_graph(name: str, scenes: Scenes):
    model, known = RoomsModel.create(**SIZES).double(), Known(scenes, 0)
    alone = [gradients(name, model, scene) for scene in known.each]
    both, dense = gradients(name, model, known), gradients("dense", model, known)
    for found, first, second in zip(both, *alone, strict=True):
        torch.testing.assert_close(found, first + second, rtol=1e-9, atol=1e-9)
    assert max((a - b).abs().max() for a, b in zip(both, dense, strict=True)) > 1e-3


def test_every_parameter_learns_through_a_layout(scenes: Scenes):
    network = TrainingNetwork(RoomsModel.create(**SIZES)).train()
    with named("core-2").put_into(network.model, Known(scenes, 0)):
        prediction = network(scenes.images, False)
    loss, _ = total_loss(prediction, Truth.of(scenes, 14), 0.0, Draws(0))
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    with pytest.raises(ValueError, match="is not patched"):
        Patch.of(network.model.aggregator)


def test_a_tuning_begins_with_the_weights_and_at_the_end_of_the_curriculum(tmp_path: Path, weights: Path):
    tuning = train.Training(options(tmp_path, "--from", str(weights), "--layout", "core-2", "--steps", "9"))
    written = RoomsModel.trained(weights)
    for model in (tuning.network.model, tuning.mean):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), written.parameters(), strict=True))
    asked = []
    draw = tuning.batches.draw
    tuning.batches.draw = lambda step, share: asked.append(share) or draw(step, share)
    logged = tuning.step()
    assert asked == [1.0] and "match" not in logged and logged["length"] == 4
    assert logged["factor"] == tuning_factor(0.0, 0) < 0.01
    assert tuning_factor(0.5, 1000) == pytest.approx(0.1) and tuning_factor(1.0, 1000) == 0 == tuning_factor(1.1, 1000)
    assert options(tmp_path, "--from", "shipped", "--steps", "1").start == TRAINED


@pytest.mark.parametrize("name", every(3, ["core-2", "nearest-1", "random-1"]))
def test_a_tuning_continues_exactly(name: str, tmp_path: Path, weights: Path):
    words = ("--steps", "4", "--from", str(weights), "--layout", name)
    whole = train.Training(options(tmp_path / "whole", *words))
    losses = [whole.step()["loss"] for _ in range(4)]
    first = train.Training(options(tmp_path / "parts", *words))
    parts = [first.step()["loss"] for _ in range(2)]
    first.save()
    second = train.Training(options(tmp_path / "parts", *words))
    second.load(tmp_path / "parts" / train.CHECKPOINT)
    parts += [second.step()["loss"] for _ in range(2)]
    assert torch.equal(torch.stack(parts), torch.stack(losses))
    for mine, other in ((second.network, whole.network), (second.mean, whole.mean)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    dense = train.Training(options(tmp_path / "dense", "--steps", "4", "--from", str(weights)))
    assert not torch.equal(dense.step()["loss"], losses[0])


def test_the_command_tells_what_it_began_from_and_with_which_layout(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for sets in ("DURING", "AT_THE_END"):
        monkeypatch.setattr(train, sets, (SceneSet("room", 1, 3), SceneSet("walk", 1, 5)))
    command = ["train", "--run", str(tmp_path), *WORDS, "--steps", "2", "--from", str(weights)]
    assert main([*command, "--layout", "core-2", "--session", "0"]) == 0
    assert main([*command, "--layout", "core-3", "--resume"]) == 2
    assert "of a training with other layout: core-2, not core-3" in capsys.readouterr().err
    assert main([*command, "--layout", "core-2", "--resume"]) == 0
    before = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["frames"], line["layout"]) for line in before] == [(0, 0, "dense"), (0, 0, "core-2")]
    facts = json.loads((tmp_path / train.PROVENANCE).read_text())
    assert facts["from"] == hashlib.sha256(weights.read_bytes()).hexdigest() and facts["layout"] == "core-2"
    dense, sparse = facts["metrics"], facts["metrics_with_layout"]
    # No scene is shorter than those of the training.
    assert list(dense) == list(sparse) == ["room-1r-4f", "walk-1r-5f"]
    assert all(list(line)[4:] == list(dense) for line in before)
    assert dense["room-1r-4f"]["absrel"] != sparse["room-1r-4f"]["absrel"]
    assert before[0]["walk-1r-5f"]["absrel"] != before[1]["walk-1r-5f"]["absrel"]
    assert "walk-1r-5f, core-2: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layout", "core-2", "--match", "0.25"], "the matching loss teaches dense attention"),
        (["--from", "shipped", "--match", "0.25"], "the matching loss teaches dense attention"),
        (["--from", "shipped", "--dim", "64"], "weights of --from have their own sizes"),
        (["--from", "weights.npz"], "there are no trained weights at weights.npz"),
        (["--layout", "cores"], "is no layout"),
        (["--shortest", "5"], "none of these is from 5 to 4"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str, tmp_path: Path, capsys):
    assert main(["train", "--run", str(tmp_path / "run"), *WORDS, "--steps", "1", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_layout_from_nothing_has_no_matching_loss(tmp_path: Path):
    words = ("--dim", "32", "--depth", "1", "--heads", "2", "--steps", "1")
    sparse = train.Training(options(tmp_path, *words, "--layout", "core-2"))
    assert sparse.match == 0 and "match" not in sparse.step() and not sparse.tunes
    dense = train.Training(options(tmp_path, *words))
    assert dense.match == train.MATCH and isinstance(dense.layout, Dense)
