"""`train`: train the small model on rendered flats for a given time, in one session or several, and write its weights.

What shall make cameras and depth learnable in about 20 minutes on one GPU:

- every batch is new, and textures are rich, so that matching is possible from the first layers on;
- scenes begin with much overlap and get longer, larger and sparser (`training.curriculum`);
- one head of some global blocks is taught where each point lies in the other frames, until the middle of the training:
  attention learns to match before the pose could teach it (`training.losses`);
- each patch predicts its point in the axes of frame 0, which gives a gradient to every token (`training.network`);
- frames that nothing connects to frame 0 have no pose loss, as nobody could know their pose;
- the matrices of the blocks are stepped by Muon (`training.optimisers`), and what is kept is a mean of the weights.

A training can also begin from weights of an earlier one, at the end of that curriculum with small learning rates, and
with a layout in place of dense attention: what a sparse layout costs may come back when a model adapts to it.

A session writes to its folder `checkpoint.pt`, from which `--resume` continues as if nothing had happened; `log.csv`;
`validation.jsonl`; and when the training is done `weights.npz` and `weights.json`, see `finish`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import commit, device_name
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.model.model import TRAINED
from svggt_kernels.demo.model.weights import write_weights
from svggt_kernels.demo.scenes import SIZE

from .layouts import Dense, Layout, named
from .measuring import SceneSet
from .training.batches import Batches
from .training.losses import total_loss
from .training.network import TrainingNetwork
from .training.optimisers import Optimiser, average
from .training.schedule import Progress, match_factor, rate_factor, tuning_factor
from .training.validation import AT_THE_END, DURING, Results, as_json, validate

LOGGED_EVERY = 25
PRINTED_EVERY = 200
RECOMPILATIONS = 64
MATCH = 0.25
SHIPPED = "shipped"
CHECKPOINT, WEIGHTS, PROVENANCE = "checkpoint.pt", "weights.npz", "weights.json"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "train",
        help="train the small model on rendered flats",
        description="Trains the small model on rendered flats and writes its weights in eight bits.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder for everything that is written")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seconds", type=float, help="time of the whole training, over all sessions")
    length.add_argument("--steps", type=int, help="steps of the whole training instead: the same on every machine")
    parser.add_argument("--session", type=float, metavar="SECONDS", help="stop this session after so long, to resume")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --run")
    parser.add_argument(
        "--from",
        dest="start",
        type=lambda text: TRAINED if text == SHIPPED else Path(text),
        metavar="WEIGHTS",
        help=f"tune these weights, a weights.npz or {SHIPPED}, in place of training new ones",
    )
    parser.add_argument("--layout", default="dense", metavar="NAME", help="layout to train with (default: dense)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (default: 0)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, which takes a while at first")
    parser.add_argument("--frames", type=int, default=1152, help="frames of a step (default: 1152)")
    parser.add_argument("--shortest", type=int, default=2, help="frames of a scene at least (default: 2)")
    parser.add_argument("--longest", type=int, default=48, help="frames of a scene at most, up to 96 (default: 48)")
    parser.add_argument(
        "--match", type=float, help=f"weight of the matching loss (default: {MATCH}, and 0 with --from or a --layout)"
    )
    parser.add_argument("--matrix-rate", type=float, default=0.01, help="learning rate of Muon (default: 0.01)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of AdamW (default: 0.001)")
    parser.add_argument("--validate", type=float, default=240, help="seconds between validations (default: 240)")
    parser.add_argument("--save", type=float, default=120, help="seconds between checkpoints (default: 120)")
    parser.add_argument("--scenes", type=int, default=24, help="scenes of each set that is validated (default: 24)")
    parser.add_argument("--height", type=int, default=SIZE[0], help=f"of images (default: {SIZE[0]})")
    parser.add_argument("--width", type=int, default=SIZE[1], help=f"of images (default: {SIZE[1]})")
    parser.add_argument("--dim", type=int, help="channels of a token (default: 320)")
    parser.add_argument("--depth", type=int, help="pairs of blocks (default: 6)")
    parser.add_argument("--heads", dest="num_heads", type=int, help="attention heads (default: 5)")
    parser.set_defaults(run_command=run)


def run(options: argparse.Namespace) -> int:
    """Run one session; return the exit code."""
    checkpoint = options.run / CHECKPOINT
    if checkpoint.exists() != options.resume:
        there = "there is one; say --resume, or give another --run" if checkpoint.exists() else "there is none"
        print(f"error: --resume continues from {checkpoint}, and {there}", file=sys.stderr)
        return 2
    training = Training(options)
    if options.resume:
        training.load(checkpoint)
    if options.compile:
        training.compile()
    if training.tunes and not options.resume:
        training.validate()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        done = training.run_session()
    training.save()
    if not done:
        print(f"not done: {100 * training.progress.share():.0f} %; continue with --resume")
        return 0
    finish(training)
    return 0


class Training:
    """A training: the network, its optimiser, its batches, and where it is.

    Attributes:
        options: Of the command line.
        device: Where it trains.
        layout: By what the model attends in training.
        start: The sha256 of the file with the weights that it began from; None if those were random.
        network: The model and its further heads.
        mean: The running mean of the model's weights, which is what is kept.
        optimiser: Steps the network.
        progress: How much is done.
        batches: What each step learns from.

    Args:
        options: Of the command line.

    Raises:
        ValueError: If options contradict one another, or the weights or the layout to begin with are none.
        FileNotFoundError: If there is no file of such weights.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.layout = named(options.layout)
        self.match = _match_weight(options)
        torch.manual_seed(options.seed)
        model, self.start = _first_model(options)
        self.network = TrainingNetwork(model).to(self.device).train()
        self.mean = copy.deepcopy(self.network.model).eval().requires_grad_(False)
        self.optimiser = Optimiser(self.network, options.matrix_rate, options.rate)
        self.progress = Progress(options.seconds, options.steps)
        self.size = (options.height, options.width)
        patch_size, lengths = model.aggregator.patch_size, (options.shortest, options.longest)
        self.batches = Batches(options.seed, options.frames, lengths, self.size, patch_size, self.device)
        options.run.mkdir(parents=True, exist_ok=True)

    @property
    def tunes(self) -> bool:
        """Whether it began from weights that were trained already."""
        return self.start is not None

    def compile(self) -> None:
        """Compile the blocks, which take most of the time. Scenes of another length have other shapes.

        A layout is put in anew in each step, so global blocks would be compiled anew too; they stay as they are.
        """
        torch._dynamo.config.recompile_limit = RECOMPILATIONS
        aggregator = self.network.model.aggregator
        attends_densely = isinstance(self.layout, Dense)
        for block in (*aggregator.frame_blocks, *(aggregator.global_blocks if attends_densely else ())):
            block.compile()

    def run_session(self) -> bool:
        """Train until the training or the session ends; return whether the training is done."""
        self.progress.begin_session()
        saved = validated = time.monotonic()
        log = Log(self.options.run, self.progress)
        while self.progress.share() < 1:
            if self.options.session is not None and self.progress.session() >= self.options.session:
                return False
            log.add(self.step())
            if time.monotonic() - validated > self.options.validate:
                self.validate()
                validated = time.monotonic()
            if time.monotonic() - saved > self.options.save:
                self.save()
                saved = time.monotonic()
        return True

    def step(self) -> dict[str, Tensor | float]:
        """Train on one batch of new scenes; return what is logged."""
        progress = self.progress
        factor = (tuning_factor if self.tunes else rate_factor)(progress.share(), progress.step)
        share = self._curriculum()
        match = self.match * match_factor(share)
        batch = self.batches.draw(progress.step, share)
        with (
            self.layout.put_into(self.network.model, batch.known),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"),
        ):
            prediction = self.network(batch.images, match > 0)
        loss, parts = total_loss(prediction, batch.truth, match, batch.draws)
        self.batches.draw_ahead(progress.step + 1, self._curriculum(ahead=1))
        loss.backward()
        norm = self.optimiser.step(factor)
        average(self.mean, self.network.model, progress.step)
        progress.step += 1
        progress.frames += self.options.frames
        return {"length": float(batch.images.shape[1]), "factor": factor, "loss": loss.detach(), **parts, "norm": norm}

    def _curriculum(self, ahead: int = 0) -> float:
        """Return the share of the curriculum that the next step, or one `ahead` steps from now, is at."""
        return 1.0 if self.tunes else self.progress.share(ahead)

    def validate(self) -> None:
        """Measure the mean model on scenes that are never trained on, and add lines to validation.jsonl."""
        progress = self.progress
        line = {"step": progress.step, "seconds": round(progress.total(), 1), "frames": progress.frames}
        for layout, results in self.measured(self.mean, DURING).items():
            with open(self.options.run / "validation.jsonl", "a") as file:
                file.write(json.dumps({**line, "layout": layout, **as_json(results)}) + "\n")
            _show(layout, results, ("auc5", "auc30", "ate", "absrel"))

    def measured(self, model: RoomsModel, sets: tuple[SceneSet, ...]) -> dict[str, Results]:
        """Return the metrics of a model by layout: with dense attention, and with the layout of this training.

        Scenes have as many frames as the sets say, or as those of this training have at least.
        """
        options = self.options
        sets = tuple(replace(chosen, frames=max(chosen.frames, options.shortest)) for chosen in sets)
        layouts: list[Layout] = [Dense(), *([] if isinstance(self.layout, Dense) else [self.layout])]
        return {
            layout.name: validate(model, sets, options.scenes, self.device, self.size, layout) for layout in layouts
        }

    def save(self) -> None:
        """Write the checkpoint; the one before stays until the new one is complete."""
        progress = self.progress
        state = {
            "network": self.network.state_dict(),
            "mean": self.mean.state_dict(),
            "optimiser": self.optimiser.state(),
            "progress": {"step": progress.step, "frames": progress.frames, "elapsed": progress.total()},
            **self._identity(),
        }
        path = self.options.run / CHECKPOINT
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: If it is of a model of other sizes, or of a training with another start or layout.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ValueError(f"{path} is of a training with other {name}: {state.get(name)}, not {mine}")
        self.network.load_state_dict(state["network"])
        self.mean.load_state_dict(state["mean"])
        self.optimiser.load(state["optimiser"])
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same in all sessions of a training."""
        return {"sizes": self.network.model.sizes, "from": self.start, "layout": self.layout.name}


def _first_model(options: argparse.Namespace) -> tuple[RoomsModel, str | None]:
    """Return the model that a training begins from, and the sha256 of the file of its weights if they were trained."""
    sizes = {name: getattr(options, name) for name in ("dim", "depth", "num_heads")}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if options.start is None:
        return RoomsModel.create(options.seed, **sizes), None
    if sizes:
        raise ValueError(
            f"the weights of --from have their own sizes, and others are asked for: {sizes}; leave --dim, --depth and "
            "--heads out"
        )
    return RoomsModel.trained(options.start), hashlib.sha256(options.start.read_bytes()).hexdigest()


def _match_weight(options: argparse.Namespace) -> float:
    """Return the weight of the matching loss.

    Raises:
        ValueError: If there is one where there is nothing to match.
    """
    may_match = options.start is None and options.layout == "dense"
    if options.match and not may_match:
        raise ValueError(
            "the matching loss teaches dense attention where each point lies in all other frames, early in a training: "
            f"it goes neither with --from nor with a --layout but dense, got --match {options.match}; leave it out"
        )
    return (MATCH if may_match else 0.0) if options.match is None else options.match


def _show(layout: str, results: Results, names: Sequence[str] | None = None) -> None:
    """Print results, all metrics or those of some names."""
    for chosen, metrics in results.items():
        shown = ", ".join(f"{name} {metrics[name]}" for name in names or metrics)
        print(f"  {chosen}, {layout}: {shown}", flush=True)


class Log:
    """Means over some steps, as lines of log.csv; now and then one is printed.

    Args:
        folder: Where log.csv is.
        progress: Of the training.
    """

    COLUMNS = (
        *("step", "seconds", "frames", "length", "factor", "loss", "rotation", "centre", "view", "pair_rotation"),
        *("pair_translation", "points", "depth", "depth_error", "match", "match_hit", "norm"),
    )

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.path, self.progress = folder / "log.csv", progress
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}
        self.window = (progress.total(), progress.frames)
        if not self.path.exists():
            self._write(self.COLUMNS)

    def add(self, values: dict[str, Tensor | float]) -> None:
        """Add a step; only a line that is written waits for the device."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        step = self.progress.step
        if step % LOGGED_EVERY and step > 3:
            return
        row = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        now, frames = self.progress.total(), self.progress.frames
        row |= {"step": step, "seconds": now, "frames": frames}
        self._write([f"{row[name]:.6g}" if name in row else "" for name in self.COLUMNS])
        if step % PRINTED_EVERY == 0 or step <= 3:
            speed = (frames - self.window[1]) / max(now - self.window[0], 1e-9)
            self.window = (now, frames)
            shown = ("loss", "rotation", "centre", "points", "depth_error", "match_hit", "norm")
            parts = " ".join(f"{name} {row[name]:.3f}" for name in shown if name in row)
            print(f"{now:7.1f} s, step {step}, {speed:.0f} frames/s: {parts}", flush=True)

    def _write(self, cells: Any) -> None:
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow(cells)


def finish(training: Training) -> None:
    """Write the weights in eight bits and, beside them, where they come from and how accurate they are.

    What is measured is the model that is read back from the file.
    """
    options, progress = training.options, training.progress
    path = options.run / WEIGHTS
    write_weights(path, training.mean.state_dict(), training.mean.sizes)
    written = RoomsModel.trained(path).to(training.device)
    results, layout = training.measured(written, AT_THE_END), training.layout.name
    facts = {
        "seed": options.seed,
        "command": shlex.join(["python", "-m", "evaluation", *options.arguments]),
        "seconds": round(progress.total(), 1),
        "steps": progress.step,
        "frames": progress.frames,
        "device": device_name(training.device),
        "torch": torch.__version__,
        "commit": commit(),
        "parameters": sum(parameter.numel() for parameter in written.parameters()),
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "from": training.start,
        "layout": layout,
        "scenes": options.scenes,
        "metrics": as_json(results["dense"]),
    }
    if layout != "dense":
        facts["metrics_with_layout"] = as_json(results[layout])
    (options.run / PROVENANCE).write_text(json.dumps(facts, indent=2) + "\n")
    for name, by_set in results.items():
        _show(name, by_set)
    print(f"{path}: {facts['bytes'] / 1e6:.1f} MB, {facts['parameters'] / 1e6:.1f} M parameters")
