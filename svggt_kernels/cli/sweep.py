"""`sweep DIR`: a model on a folder of photos, dense and with several layouts, and which of them to take."""

from __future__ import annotations

import argparse
from functools import cache, partial

from ..measure.layouts import Outcome, layouts_named
from ..measure.pictures import draw_trade_offs, require_matplotlib
from ..measure.sweep import Sweep, default_names, sweep
from ..measure.wording import count, mebibytes, milliseconds, percent
from ..models.loading import LoadedModel
from .compare import load, pick_backend
from .device import pick_device
from .errors import refusals
from .evaluate import facts, facts_of_truth, heading, reference_of, said, truth_of
from .files import write_files
from .footage import Footage
from .options import similarity
from .results import as_json
from .text import stage, table

COLUMNS = (
    ("AUC@5", "auc5", "{:.3f}"),
    ("AUC@30", "auc30", "{:.3f}"),
    ("ATE", "ate", "{:.3g}"),
    ("AbsRel", "absrel", "{:.3f}"),
)


def run(arguments: argparse.Namespace) -> int:
    """Run each layout, print what came of it and which to take, write report and picture; return the exit code."""
    device = pick_device(arguments.device)
    pick_backend(arguments, device)
    compared = cache(partial(similarity, arguments))
    with refusals():
        require_matplotlib()
        truth = None if arguments.truth is None else truth_of(arguments)
    footage = Footage.of(arguments) if truth is None else Footage.of_photos(arguments.folder, truth.photos)
    with refusals():
        if arguments.layouts is not None or footage.files is not None:
            # Refused before any work.
            layouts_named(arguments.layouts or default_names(len(footage.files or ())), compared)
    model, frames, names = load(arguments, footage, device)
    reference = None if truth is None else reference_of(truth, frames)
    if truth is not None:
        print(said(truth))
    with refusals():
        swept = sweep(
            model,
            frames.to(device),
            arguments.layouts,
            compared,
            reference,
            backend=arguments.backend,
            rounds=arguments.repeats,
            stage=stage,
        )
    used, scored = frames[: swept.frames], None
    if truth is not None and reference is not None:
        scored = facts_of_truth(truth.first(swept.frames), reference.first(swept.frames))
    print(_as_text(swept, heading(model, used, device), model.warning))
    report = facts(model, used, device, swept.outcomes) | {
        "photos": names[: swept.frames],
        "photos_given": swept.asked,
        "truth": scored,
        "unit_of_ate": _unit(swept),
        "recommended": None if swept.recommended is None else swept.recommended.layout.name,
        "advice": swept.advice,
    }
    files = {"trade-offs.png": _picture(swept, model), "report.json": as_json(arguments.command_line, report).encode()}
    write_files(arguments.output, files)
    print(f"Written: {', '.join(str(arguments.output / name) for name in files)}")
    return 0


def _unit(swept: Sweep) -> str:
    return "the unit of the truth" if swept.against_truth else "the extent of dense's cameras"


def _against(swept: Sweep) -> str:
    return "against the truth" if swept.against_truth else "against dense"


def _full(outcome: Outcome) -> str:
    return "; of so few photos that is all, so it computes what dense does" if outcome.is_full else ""


def _as_text(swept: Sweep, head: str, warning: str | None) -> str:
    columns = [column for column in COLUMNS if all(column[1] in outcome.scores for outcome in swept.outcomes)]
    rows = [("", "time", "memory of a run", "pairs", *(label for label, _, _ in columns))]
    for outcome in swept.outcomes:
        cells = (words.format(outcome.scores[key]) for _, key, words in columns)
        cost = milliseconds(outcome.cost.min_ms), mebibytes(outcome.cost.peak_mib), percent(outcome.pairs)
        rows.append((outcome.layout.name, *cost, *cells))
    fewer = [f"Memory ran out with all {swept.asked} photos: these are the first."] * (swept.frames < swept.asked)
    lines = [
        "",
        head,
        *fewer,
        "",
        table(rows),
        "",
        f"  AUC, ATE and AbsRel are {_against(swept)}; ATE is in {_unit(swept)}. Time is the shortest of "
        f"{count(swept.dense.cost.runs, 'run')}.",
        *(f"  {outcome.layout.name}: {outcome.layout.sees}{_full(outcome)}" for outcome in swept.outcomes),
        "",
        swept.advice,
        *([warning] if warning else []),
    ]
    return "\n".join(lines)


def _picture(swept: Sweep, model: LoadedModel) -> bytes:
    outcomes = swept.outcomes
    costs = {"seconds": [outcome.cost.min_ms / 1000 for outcome in outcomes]}
    peaks = [outcome.cost.peak_mib for outcome in outcomes]
    if all(peak is not None for peak in peaks):
        costs["memory of a run, GiB"] = [(peak or 0) / 1024 for peak in peaks]
    costs["share of the pairs of tokens"] = [outcome.pairs for outcome in outcomes]
    figures = {f"AUC@30 {_against(swept)}": [outcome.auc30 for outcome in outcomes]}
    if "absrel" in swept.dense.scores:
        figures[f"AbsRel {_against(swept)}"] = [outcome.scores["absrel"] for outcome in outcomes]
    title = f"{model.name}, {count(swept.frames, 'photo')}: what each layout costs and keeps"
    names = [outcome.layout.name for outcome in outcomes]
    return draw_trade_offs(names, costs, figures, title=title, note=model.warning or "")
