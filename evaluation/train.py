"""`train`: train the small model on rendered flats for a given time, in one session or several, and write its weights.

What shall make cameras and depth learnable in about 20 minutes on one GPU:

- every batch is new, and textures are rich, so that matching is possible from the first layers on;
- scenes begin with much overlap and get longer, larger and sparser (`training.curriculum`);
- one head of some global blocks is taught where each point lies in the other frames, until the middle of the training:
  attention learns to match before the pose could teach it (`training.losses`);
- each patch predicts its point in the axes of frame 0, which gives a gradient to every token (`training.network`);
- frames that nothing connects to frame 0 have no pose loss, as nobody could know their pose;
- the matrices of the blocks are stepped by Muon (`training.optimisers`), and what is kept is a mean of the weights.

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import commit, device_name
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.model.weights import write_weights
from svggt_kernels.demo.scenes import SIZE

from .training.batches import Batches
from .training.losses import total_loss
from .training.network import TrainingNetwork
from .training.optimisers import Optimiser, average
from .training.schedule import Progress, match_factor, rate_factor
from .training.validation import AT_THE_END, DURING, as_json, validate

LOGGED_EVERY = 25
PRINTED_EVERY = 200
RECOMPILATIONS = 64
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
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (default: 0)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, which takes a while at first")
    parser.add_argument("--frames", type=int, default=1152, help="frames of a step (default: 1152)")
    parser.add_argument("--longest", type=int, default=48, help="frames of a scene at most, up to 96 (default: 48)")
    parser.add_argument("--match", type=float, default=0.25, help="weight of the matching loss (default: 0.25)")
    parser.add_argument("--matrix-rate", type=float, default=0.01, help="learning rate of Muon (default: 0.01)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of AdamW (default: 0.001)")
    parser.add_argument("--validate", type=float, default=240, help="seconds between validations (default: 240)")
    parser.add_argument("--save", type=float, default=120, help="seconds between checkpoints (default: 120)")
    parser.add_argument("--scenes", type=int, default=24, help="scenes of each set that is validated (default: 24)")
    parser.add_argument("--height", type=int, default=SIZE[0], help=f"of images (default: {SIZE[0]})")
    parser.add_argument("--width", type=int, default=SIZE[1], help=f"of images (default: {SIZE[1]})")
    parser.add_argument("--dim", type=int, default=320, help="channels of a token (default: 320)")
    parser.add_argument("--depth", type=int, default=6, help="pairs of blocks (default: 6)")
    parser.add_argument("--heads", type=int, default=5, help="attention heads (default: 5)")
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
        network: The model and its further heads.
        mean: The running mean of the model's weights, which is what is kept.
        optimiser: Steps the network.
        progress: How much is done.
        batches: What each step learns from.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.manual_seed(options.seed)
        sizes = {"dim": options.dim, "depth": options.depth, "num_heads": options.heads}
        model = RoomsModel.create(options.seed, **sizes)
        self.network = TrainingNetwork(model).to(self.device).train()
        self.mean = copy.deepcopy(self.network.model).eval().requires_grad_(False)
        self.optimiser = Optimiser(self.network, options.matrix_rate, options.rate)
        self.progress = Progress(options.seconds, options.steps)
        self.size = (options.height, options.width)
        patch_size = model.aggregator.patch_size
        self.batches = Batches(options.seed, options.frames, options.longest, self.size, patch_size, self.device)
        options.run.mkdir(parents=True, exist_ok=True)

    def compile(self) -> None:
        """Compile the blocks, which take most of the time. Scenes of another length have other shapes."""
        torch._dynamo.config.recompile_limit = RECOMPILATIONS
        aggregator = self.network.model.aggregator
        for block in (*aggregator.frame_blocks, *aggregator.global_blocks):
            block.compile()

    def run_session(self) -> bool:
        """Train until the training or the session ends; return whether the training is done."""
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
        options, progress = self.options, self.progress
        share = progress.share()
        factor, match = rate_factor(share, progress.step), options.match * match_factor(share)
        batch = self.batches.draw(progress.step, share)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            prediction = self.network(batch.images, match > 0)
        loss, parts = total_loss(prediction, batch.truth, match, batch.draws)
        self.batches.draw_ahead(progress.step + 1, progress.share(ahead=1))
        loss.backward()
        norm = self.optimiser.step(factor)
        average(self.mean, self.network.model, progress.step)
        progress.step += 1
        progress.frames += options.frames
        return {"length": float(batch.images.shape[1]), "factor": factor, "loss": loss.detach(), **parts, "norm": norm}

    def validate(self) -> None:
        """Measure the mean model on scenes that are never trained on, and add a line to validation.jsonl."""
        results = validate(self.mean, DURING, self.options.scenes, self.device, self.size)
        progress = self.progress
        line = {"step": progress.step, "seconds": round(progress.total(), 1), "frames": progress.frames}
        with open(self.options.run / "validation.jsonl", "a") as file:
            file.write(json.dumps({**line, **as_json(results)}) + "\n")
        for name, metrics in results.items():
            shown = ", ".join(f"{metric} {metrics[metric]}" for metric in ("auc5", "auc30", "ate", "absrel"))
            print(f"  {name}: {shown}", flush=True)

    def save(self) -> None:
        """Write the checkpoint; the one before stays until the new one is complete."""
        progress = self.progress
        state = {
            "network": self.network.state_dict(),
            "mean": self.mean.state_dict(),
            "optimiser": self.optimiser.state(),
            "progress": {"step": progress.step, "frames": progress.frames, "elapsed": progress.total()},
            "sizes": self.network.model.sizes,
        }
        path = self.options.run / CHECKPOINT
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: If it is of a model of other sizes.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["sizes"] != self.network.model.sizes:
            raise ValueError(f"{path} is of a model of other sizes: {state['sizes']}, not {self.network.model.sizes}")
        self.network.load_state_dict(state["network"])
        self.mean.load_state_dict(state["mean"])
        self.optimiser.load(state["optimiser"])
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)


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
    results = validate(written, AT_THE_END, options.scenes, training.device, training.size)
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
        "scenes": options.scenes,
        "metrics": as_json(results),
    }
    (options.run / PROVENANCE).write_text(json.dumps(facts, indent=2) + "\n")
    for name, metrics in results.items():
        print(f"  {name}: " + ", ".join(f"{metric} {interval}" for metric, interval in metrics.items()))
    print(f"{path}: {facts['bytes'] / 1e6:.1f} MB, {facts['parameters'] / 1e6:.1f} M parameters")
