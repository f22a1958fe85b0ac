"""The command line: `python -m benchmarks attention`, `model`, `repeat`, `report` and `model-report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from svggt_kernels.backends import BACKENDS

from . import attention, attention_report, model_report, models, repeat
from .cases import GROUPS, WORK, Case, select
from .peers import PEERS, backend, names
from .record import RESULTS, Line, provenance, table, write

Ran = tuple[list[Line], list[str], dict[str, str]]
"""The lines of a run, what was not run and why, and the columns of the table."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if a check failed or nothing was measured, or 2 for a wrong request."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    if options.command in ("report", "model-report"):
        return _report(options)
    if options.list:
        print(options.listing())
        return 0
    try:
        device = torch.device(options.device or _default_device())
    except RuntimeError:
        print(f"error: --device must be cuda, cpu or mps, got {options.device!r}", file=sys.stderr)
        return 2
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda needs a CUDA device, and PyTorch sees none here", file=sys.stderr)
        return 2
    dtype = DTYPES[options.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    file = options.output or _lines_of(options.command, device.type)
    try:
        cases = options.select(options.cases)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    source = provenance(arguments, device)
    lines, not_run, columns = options.run(options, cases, device, dtype, source, lambda line: write(line, file))
    print(table(lines, columns))
    for line in lines:
        if line.get("reason"):
            print(f"{line['case']}, {line.get('backend')}: {line['reason']}")
    print(*not_run, f"{len(lines)} lines added to {file}", sep="\n")
    return int(not lines or any(line["check"] == "failed" for line in lines))


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _lines_of(command: str, device_type: str) -> Path:
    """Return where a command adds its lines, and its report reads them."""
    return RESULTS / f"{command}-{device_type}.jsonl"


def _report(options: argparse.Namespace) -> int:
    try:
        if options.command == "report":
            lines = attention_report.read(options.results, options.run)
            files = attention_report.write(lines, options.output, options.direction)
        else:
            files = model_report.write(model_report.read(options.results), options.output)
    except ImportError as error:
        print(f"error: the figure needs matplotlib: pip install -e '.[viz]' ({error})", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*files, sep="\n")
    return 0


def _run_attention(options: argparse.Namespace, cases: list[Case], *setting: Any) -> Ran:
    peers = list(PEERS) if "all" in options.peers else options.peers
    contenders = [backend(name) for name in options.backends] + [PEERS[name] for name in peers]
    runner = attention.Runner(*setting, options.seconds)
    runner.run(cases, contenders, options.direction)
    not_run = [f"{reason} ({len(what)} of these: {what[0]} ...)" for reason, what in runner.not_run.items()]
    return runner.lines, not_run, attention.COLUMNS


def _run_model(options: argparse.Namespace, cases: list[models.ModelCase], *setting: Any) -> Ran:
    runner = models.ModelRunner(*setting, options.repeats, options.aggregator)
    for case in cases:
        runner.run(case, options.systems, backend=options.backend, special_tokens=options.special_tokens)
    return runner.lines, runner.not_run, models.COLUMNS


def _run_repeat(options: argparse.Namespace, cases: list[Case], *setting: Any) -> Ran:
    contender = PEERS.get(options.backend) or backend(options.backend)
    return *repeat.repeat(cases, contender, options.direction, options.times, *setting), repeat.COLUMNS


def _list_attention() -> str:
    lines = []
    for group, cases in GROUPS.items():
        lines.append(f"{group}:")
        lines += [
            f"  {case.name:32} [B, H, N, D] = {list(case.shape)}, density {case.density:.4f}, "
            f"ideal speed-up {case.ideal_speedup:.2f}"
            for case in cases
        ]
    contenders = [*map(backend, names()), *PEERS.values()]
    return "\n".join([*lines, "backends and peers:", *(f"  {c.name:20} {c.about}" for c in contenders)])


def _list_models() -> str:
    return "\n".join(f"{case.name:28} {case.about}" for case in models.PUBLISHED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("attention", help="the operator and its peers, on named cases")
    one.add_argument("--cases", nargs="+", default=["cpu"], help="groups or names of cases, see --list")
    one.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=names())
    one.add_argument("--peers", nargs="*", default=[], choices=[*PEERS, "all"])
    one.add_argument("--direction", nargs="+", default=["fwd"], choices=WORK)
    one.add_argument("--seconds", type=float, default=1.0, help="time to repeat each measurement")
    one.set_defaults(select=select, run=_run_attention, listing=_list_attention)

    two = commands.add_parser("model", help="a whole model, patched and not")
    two.add_argument("--cases", nargs="+", default=["toy-16f-4n"], help="names like vggt-1b-100f-10n, see --list")
    two.add_argument("--systems", nargs="+", default=["upstream", "svggt"], choices=[*models.SYSTEMS, *models.FASTVGGT])
    two.add_argument("--backend", choices=BACKENDS, help="backend of the patched model; chosen by default")
    two.add_argument("--special-tokens", default="dense", choices=("dense", "masked"))
    two.add_argument("--repeats", type=int, default=3, help="timed runs after one warm-up; the median counts")
    two.add_argument(
        "--no-aggregator",
        dest="aggregator",
        action="store_false",
        help="do not time the aggregator on its own too, which takes as many runs again",
    )
    two.set_defaults(select=lambda names: [*map(models.ModelCase.parse, names)], run=_run_model, listing=_list_models)

    three = commands.add_parser("repeat", help="is a backend bitwise repeatable?")
    three.add_argument("--cases", nargs="+", default=["cpu"], help="groups or names of cases, see --list")
    three.add_argument("--backend", required=True, choices=[*names(), *PEERS])
    three.add_argument("--times", type=int, default=100, help="how often each case is run (100)")
    three.add_argument("--direction", nargs="+", default=["fwd", "bwd"], choices=repeat.DIRECTIONS)
    three.set_defaults(select=select, run=_run_repeat, listing=_list_attention)

    four = commands.add_parser("report", help="a Markdown table and a figure of one run of `attention`")
    four.add_argument("--results", type=Path, nargs="+", default=[_lines_of("attention", _default_device())])
    four.add_argument("--run", help="id of the run; by default the latest in the results")
    four.add_argument("--direction", default="fwd", choices=WORK, help="what the figure shows (fwd)")
    four.add_argument("--output", type=Path, default=RESULTS, help="folder for report.md and report.png")

    five = commands.add_parser("model-report", help="a Markdown table and a figure of the latest lines of `model`")
    five.add_argument("--results", type=Path, nargs="+", default=[_lines_of("model", _default_device())])
    five.add_argument("--output", type=Path, default=RESULTS, help="folder for models.md and models.png")

    for command in (one, two, three):
        command.add_argument("--list", action="store_true", help="show the cases and leave")
        command.add_argument("--device", help="cuda, cpu or mps; CUDA where there is one")
        command.add_argument("--dtype", choices=DTYPES, help="by default bf16, on the CPU fp32")
        command.add_argument(
            "--output", type=Path, help="JSON lines are appended here; by default in benchmarks/results"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
