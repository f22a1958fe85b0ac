"""The benchmarks: what a case is, what counts as useful, and that nothing wrong is ever timed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re

import pytest
import torch

from benchmarks import attention, attention_report, covisibility, models, record, repeat
from benchmarks.__main__ import main
from benchmarks.attention import inputs
from benchmarks.cases import GROUPS, Case, select
from benchmarks.check import Budget, check_forward, check_gradients, explicit, explicit_gradients
from benchmarks.peers import PEERS, Contender, backend
from svggt_kernels import block_sparse_attention
from svggt_kernels.measure.cost import Cost
from svggt_kernels.sources import Core, Scene

CPU = torch.device("cpu")
BAND = Case.parse("s8-p9-band1-h3")


# Cases


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s64-p1374-band2", Case(64, 1374, "band2")),
        ("s8-p64-dense", Case(8, 64, "dense")),
        ("s8-p64-scattered3-special5", Case(8, 64, "scattered3", special=5)),
        ("s8-p64-loop1-hd128-h4", Case(8, 64, "loop1", head_size=128, heads=4)),
        ("s8-p64-dense-h4-log2", Case(8, 64, "dense", heads=4, log2=True)),
        ("s12-p29-core2+6@3-h4", Case(12, 29, "core2+6@3", heads=4)),
        ("s12-p29-core2+all@2-hd32", Case(12, 29, "core2+all@2", head_size=32)),
        ("s1-p1-star0-special1-hd32-h2-b3", Case(1, 1, "star0", 1, 32, 2, 3)),
    ],
)
def test_name_gives_the_case_and_the_case_its_name(name, expected):
    assert Case.parse(name) == expected
    assert expected.name == name


@pytest.mark.parametrize(
    "name",
    ["", "s64", "s64-p1374", "s64-p1374-band", "s64-p1374-dense2", "s0-p4-dense", "s4-p0-dense", "s4-p4-ring1",
     "s4-p5-core1+2@2", "s4-p9-core1+2@0", "s4-p9-core1+2", "s4-p9-band1+2@2", "s4-p9-core1+2@2-special1",
     "s4-p4-dense-special5", "s4-p4-dense-h0", "s4-p4-dense-h2-h3", "x-s4-p4-dense", "s4-p4-dense-q7"],
)  # fmt: skip
def test_bad_name_is_refused(name):
    with pytest.raises(ValueError):
        Case.parse(name)


def test_bad_name_is_told_the_grammar():
    with pytest.raises(ValueError, match=r"like s64-p1374-band2 .*got 's64'; graphs are dense, .*; -log2 at the end"):
        Case.parse("s64")


def test_graphs():
    def edges(name):
        return {tuple(edge) for edge in Case.parse(name).visible.nonzero().tolist()}

    band = {(i, j) for i in range(5) for j in range(5) if abs(i - j) <= 1}
    assert edges("s5-p1-band1") == band
    assert edges("s5-p1-loop1") == band | {(0, 4), (4, 0)}
    shuffled = Case.parse("s5-p1-shuffled1").visible
    assert sorted(shuffled.sum(1).tolist()) == [2, 2, 3, 3, 3]
    assert edges("s5-p1-shuffled1") not in (band, set())
    assert edges("s5-p1-star1") == band | {(0, j) for j in range(5)} | {(i, 0) for i in range(5)}
    assert edges("s5-p1-dense") == {(i, j) for i in range(5) for j in range(5)}
    assert edges("s5-p1-band0") == {(i, i) for i in range(5)}
    itself = {(i, i) for i in range(5)}
    assert edges("s5-p1-core2") == itself | {(i, j) for i in range(5) for j in (0, 4)}
    assert edges("s5-p1-first2") == itself | {(i, j) for i in range(5) for j in (0, 1)}


def test_scattered_graph_is_the_one_of_its_seed():
    visible = Case.parse("s40-p1-scattered3").visible
    generator = torch.Generator().manual_seed(0)
    expected = torch.eye(40, dtype=torch.bool)
    for i in range(40):
        drawn = torch.randperm(40, generator=generator)[:3]
        expected[i, drawn] = expected[drawn, i] = True
    assert torch.equal(visible, expected)


def test_published_cases():
    names = [case.name for group in GROUPS.values() for case in group]
    assert len(names) == len(set(names))
    for tokens in (1374, 1041, 893, 782):
        for graph in ("band2", "scattered6", "dense"):
            assert f"s64-p{tokens}-{graph}" in names
    assert max(math.prod(case.shape) for case in GROUPS["large"]) > 2**31
    assert select(["cpu", "s4-p4-dense", GROUPS["cpu"][0].name]) == [*GROUPS["cpu"], Case(4, 4, "dense")]


# Useful work


def test_useful_work_by_hand():
    case = Case(frames=3, tokens=2, graph="band1", head_size=4, heads=5, batch=2)
    assert case.visible_pairs == 7 * 2 * 2
    assert case.dense_pairs == 6 * 6
    assert case.ideal_speedup == 36 / 28
    assert case.useful_flops("fwd") == 4 * 4 * 5 * 2 * 28
    assert case.useful_flops("bwd") == 2.5 * 4 * 4 * 5 * 2 * 28
    assert case.useful_flops("fwd+bwd") == 3.5 * 4 * 4 * 5 * 2 * 28


@pytest.mark.parametrize("name", ["s4-p3-band1-special1", "s5-p4-scattered1-special2", "s3-p2-band0-special2"])
def test_visible_pairs_are_those_of_the_mask(name):
    case = Case.parse(name)
    token = torch.arange(case.frames * case.tokens)
    frame, special = token // case.tokens, token % case.tokens < case.special
    mask = case.visible[frame][:, frame] | special[:, None] | special
    assert case.visible_pairs == int(mask.sum())
    assert torch.equal(case.layout().to_dense(), mask)


@pytest.mark.parametrize("name", ["s9-p17-core2+3@2", "s7-p10-core1+all@3", "s3-p29-core3+2@2", "s5-p6-core1+2@4"])
def test_visible_pairs_at_a_stride_are_those_of_the_layout(name):
    case = Case.parse(name)
    assert case.visible_pairs == int(case.layout().to_dense().sum())
    assert case.edges == int(case.visible.sum() + case.visible_coarsely.sum())
    assert case.patch_grid == {17: (3, 4), 10: (1, 5), 29: (4, 6), 6: (1, 1)}[case.tokens]
    if name.startswith("s9"):
        graph = Core(2, by=None, coarse=3, stride=2).graph(Scene(9))
        assert torch.equal(case.visible, graph.full.to_dense())
        assert torch.equal(case.visible | case.visible_coarsely, graph.united().to_dense())


def test_peers_leave_strides_out():
    case = Case.parse("s9-p17-core2+3@2-h2")
    q, *_ = inputs(case, CPU, torch.float32)
    assert "seen at a stride" in PEERS["sdpa-gather"].obstacle(case, q)
    assert backend("reference").obstacle(case, q) is None


# Checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["s8-p9-band1-h3", "s5-p20-scattered1-special3-h2", "s3-p33-star0-h1-b2-hd32-log2", "s9-p17-core2+3@2-h2"]
)
def test_right_contender_passes(name, dtype):
    case = Case.parse(name)
    q, k, v, grad = _trainable(case, dtype)
    contender = PEERS["sdpa-gather"] if case.special == case.stride == 0 else backend("reference")
    assert contender.obstacle(case, q) is None
    assert check_forward(contender, case, q, k, v) is None
    assert check_gradients(contender, case, q, k, v, grad) is None


@pytest.mark.parametrize("name", ["s3-p7-dense-h2", "s3-p7-dense-h2-log2"])
def test_explicit_formula_is_the_reference(name):
    case = Case.parse(name)
    q, k, v, grad = _trainable(case, torch.float64)
    out, lse = block_sparse_attention(q, k, v, case.layout(), scale=case.scale, backend="reference", return_lse=True)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    every = torch.arange(q.shape[2])
    with torch.no_grad():
        gradients_ours = explicit_gradients(q[0], k[0], v[0], grad[0], every, case.scale)
        ours = *explicit(q[0], k[0], v[0], case.scale), *gradients_ours
    for actual, expected in zip(ours, (out, lse, *gradients), strict=True):
        torch.testing.assert_close(actual, expected[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("factor", "passes"), [(1.95, True), (2.05, False), (math.nan, False)])
@pytest.mark.parametrize("rows", [slice(None), slice(3, 4)], ids=["all rows", "one row"])
def test_budget_is_twice_the_plain_error(rows, factor, passes):
    exact = torch.randn(2, 50, 8, dtype=torch.float64)
    plain = exact + 1e-3 * torch.randn_like(exact).sign()
    actual = plain.clone()
    actual[:, rows] = exact[:, rows] + factor * (plain - exact)[:, rows]
    budget = Budget("out")
    budget.add(actual, plain, exact)
    assert (budget.exceeded() is None) == passes


def test_plain_error_counts_as_at_least_one_rounding():
    exact = 1 + torch.rand(1, 50, 8, dtype=torch.float64)
    budget = Budget("out")
    budget.add(exact.float() * (1 + 2**-24), exact.clone(), exact)
    assert budget.exceeded() is None
    budget.add(exact.float() * (1 + 2**-21), exact.clone(), exact)
    assert "out: the error against float64" in budget.exceeded()


def _dense(case, q, k, v):
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _spoiled(spoil):
    def prepare(case, q, k, v):
        layout = case.layout()

        def call():
            out = block_sparse_attention(q, k, v, layout, backend="reference")
            return spoil(case, out)

        return call

    return prepare


def _at(index, value):
    def spoil(case, out):
        mask = torch.zeros_like(out, dtype=torch.bool)
        mask[index] = True
        return torch.where(mask, out * value, out)

    return spoil


def _missing_tail(case, q, k, v):
    layout = dataclasses.replace(case, tokens=case.tokens).layout()
    last = torch.arange(q.shape[2]) % case.tokens == case.tokens - 1

    def call():
        gone = torch.where(last[:, None], torch.full_like(k, -10.0), k)
        return block_sparse_attention(q, gone, v, layout, backend="reference")

    return call


def _without_weights(case, q, k, v):
    """What a key at a stride stands for is left out."""
    layout = Case.parse("s9-p17-core2+3@2-h2").layout()
    parts = tuple(dataclasses.replace(part, weight=1.0) for part in layout.parts)
    return lambda: block_sparse_attention(q, k, v, dataclasses.replace(layout, parts=parts), backend="reference")


def test_keys_at_a_stride_without_their_weight_are_wrong():
    case = Case.parse("s9-p17-core2+3@2-h2")
    q, k, v, _ = inputs(case, CPU, torch.float32)
    wrong = Contender("wrong", "no weights", lambda case, q: None, _without_weights, strides=True)
    assert check_forward(wrong, case, q, k, v).startswith("out: the error")
    keys_zero = check_forward(wrong, case, q, torch.zeros_like(k), v)
    assert keys_zero is not None


WRONG = {
    "sees everything": _dense,
    "one token of each frame misread": _missing_tail,
    "scaled by 1.001": _spoiled(lambda case, out: out * 1.001),
    "NaN in one place": _spoiled(_at((0, 0, 0, 0), float("nan"))),
    "one row of an unsampled frame and head": _spoiled(_at((0, 1, 5 * BAND.tokens), 0.5)),
    "rows of another frame": _spoiled(lambda case, out: out.roll(case.tokens, 2)),
    "lower precision": _spoiled(lambda case, out: out.bfloat16().float()),
    "wrong dtype": _spoiled(lambda case, out: out.double()),
    "wrong shape": _spoiled(lambda case, out: out[:, :, 1:]),
    "raises": _spoiled(lambda case, out: 1 / 0),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_contender_is_never_timed(wrong, monkeypatch):
    monkeypatch.setattr(attention, "repeated", lambda *_: pytest.fail("a wrong contender was timed"))
    [line] = _lines(Contender("wrong", wrong, lambda case, q: None, WRONG[wrong]), ["fwd"])
    assert line["check"] == "failed"
    assert line["reason"]
    measured = "ms_median", "ms_spread", "useful_tflops", "fraction_of_ideal", "peak_mib", "ms_per_edge", "extra_mib"
    assert [line[key] for key in measured] == [None] * 7


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, which):
        ctx.which = which
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        spoiled = grad.clone()
        spoiled[:, :, : BAND.tokens] *= 1 + 1e-3 * ctx.which
        return spoiled, None


@pytest.mark.parametrize("which", [0, 1, 2], ids=["dQ", "dK", "dV"])
def test_wrong_gradient_is_never_timed(which, monkeypatch):
    def prepare(case, *qkv):
        layout = case.layout()

        def call():
            spoiled = [_WrongGradient.apply(x, int(which == i)) for i, x in enumerate(qkv)]
            return block_sparse_attention(*spoiled, layout, backend="reference")

        return call

    wrong = Contender("wrong", "its forward is right", lambda case, q: None, prepare)
    monkeypatch.setattr(attention, "repeated", lambda *_: pytest.fail("a wrong contender was timed"))
    [line] = _lines(wrong, ["bwd"])
    assert line["check"] == "failed"
    assert line["reason"].startswith(("dQ", "dK", "dV")[which])


def test_wrong_lse_is_refused():
    right = backend("reference")
    wrong = dataclasses.replace(right, lse=lambda *args: right.lse(*args) * math.log2(math.e))
    q, k, v, _ = attention.inputs(BAND, CPU, torch.float32)
    assert check_forward(wrong, BAND, q, k, v).startswith("LSE")


# Lines


def test_peer_that_cannot_run_is_named_with_its_reason(tmp_path, capsys):
    file = tmp_path / "out.jsonl"
    arguments = "attention --cases s2-p4-band0-h1 s2-p4-dense-h1 --backends --device cpu".split()
    assert main([*arguments, "--output", str(file), "--peers", "all"]) == 0
    printed = capsys.readouterr().out
    ran = {json.loads(line)["backend"] for line in file.read_text().splitlines()}
    assert ran == {"sdpa-dense-flash", "sdpa-gather"}
    for name in set(PEERS) - ran:
        assert f"\n{name}: not run: " in printed
    assert (
        "sdpa-dense-flash: not run: it has no sparsity; name a dense case (1 of these: s2-p4-band0-h1, fwd" in printed
    )


def test_lines_are_complete_and_valid(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SVGGT_COMMIT", "0123abc")
    file = tmp_path / "deep" / "out.jsonl"
    command = "attention --cases s4-p8-band1-h2 s4-p8-dense-h2 --backends reference --direction fwd bwd fwd+bwd"
    command += " --dtype bf16 --device cpu --seconds 0.01"
    assert main([*command.split(), "--output", str(file)]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["case"], line["direction"]) for line in lines] == [
        (case, direction) for case in ("s4-p8-dense-h2", "s4-p8-band1-h2") for direction in ("fwd", "bwd", "fwd+bwd")
    ]
    for line in lines:
        assert tuple(line) == attention.KEYS
        low, high = line["ms_spread"]
        assert 0 < low <= line["ms_median"] <= high
        case = Case.parse(line["case"])
        work = case.useful_flops(line["direction"])
        assert line["useful_tflops"] == pytest.approx(work / (line["ms_median"] * 1e-3) / 1e12)
        assert line["density"] == case.density
        assert line["shape"] == [1, 2, 32, 64]
        assert (line["backend"], line["dtype"], line["check"], line["commit"]) == (
            "reference",
            "bfloat16",
            "passed",
            "0123abc",
        )
        assert line["peak_mib"] is line["extra_mib"] is line["softmax"] is line["gradients"] is None
        assert line["edges"] == case.edges
        assert line["ms_per_edge"] * case.edges == pytest.approx(line["ms_median"])
        assert line["torch"] == torch.__version__
        assert "threads" in line["device"]
        assert line["command"] == f"python -m benchmarks {command}"
    assert len({line["run"] for line in lines}) == 1
    for dense, band in zip(lines[:3], lines[3:], strict=True):
        ideal = Case.parse(band["case"]).ideal_speedup
        assert dense["fraction_of_ideal"] == 1
        assert band["fraction_of_ideal"] == pytest.approx(dense["ms_median"] / band["ms_median"] / ideal)
    assert "s4-p8-band1-h2" in capsys.readouterr().out


def test_fraction_of_ideal_needs_the_dense_case_of_the_same_run():
    [line] = _lines(backend("reference"), ["fwd"])
    assert line["fraction_of_ideal"] is None
    assert line["ms_median"] > 0


def test_fraction_of_ideal_compares_q_of_one_kind(monkeypatch):
    times = iter([8.0, 4.0, 1.0, 0.25])
    monkeypatch.setattr(attention, "repeated", lambda *_: Cost.of([next(times)], None))
    names = ("s8-p9-dense-h3", "s8-p9-dense-h3-log2", "s8-p9-band1-h3", "s8-p9-band1-h3-log2")
    lines = _lines(backend("reference"), ["fwd"], [Case.parse(name) for name in names])
    assert [line["case"] for line in lines] == list(names)
    ideal = BAND.ideal_speedup
    assert [line["fraction_of_ideal"] for line in lines] == pytest.approx([1, 1, 8 / ideal, 16 / ideal])


def test_failed_check_is_the_exit_status(tmp_path, monkeypatch):
    monkeypatch.setitem(PEERS, "sdpa-gather", dataclasses.replace(PEERS["sdpa-gather"], prepare=_dense))
    file = tmp_path / "out.jsonl"
    arguments = "attention --cases s8-p9-band1-h3 --backends --peers sdpa-gather --device cpu --output".split()
    assert main([*arguments, str(file)]) == 1
    [line] = [json.loads(line) for line in file.read_text().splitlines()]
    assert tuple(line) == (*attention.KEYS, "reason")


@pytest.mark.parametrize("command", ["attention", "model"])
def test_list_names_the_cases(command, capsys):
    assert main([command, "--list"]) == 0
    names = capsys.readouterr().out
    published = GROUPS["p1374"] if command == "attention" else models.PUBLISHED
    assert all(case.name in names for case in published)


@pytest.mark.parametrize("arguments", ["attention --cases nonsense", "model --cases vggt-1b-100f-3n"])
def test_unknown_case_is_named(arguments, tmp_path, capsys):
    assert main([*arguments.split(), "--device", "cpu", "--output", str(tmp_path / "out.jsonl")]) == 2
    assert arguments.split()[-1] in capsys.readouterr().err


def test_an_unknown_device_is_named(capsys):
    assert main("attention --cases s2-p8-dense-h1 --device gpu".split()) == 2
    assert "--device must be cuda, cpu or mps, got 'gpu'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the request can be met")
@pytest.mark.parametrize(("request_", "status"), [("--backends triton --device cpu", 1), ("--device cuda", 2)])
def test_a_request_that_measures_nothing_is_no_success(tmp_path, request_: str, status: int):
    arguments = ["attention", "--cases", "s2-p8-dense-h1", *request_.split(), "--output", str(tmp_path / "out.jsonl")]
    assert main(arguments) == status


def test_checked_in_results_are_complete():
    for file in sorted(record.RESULTS.glob("*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            if file.name.startswith("covisibility"):
                assert tuple(line) == covisibility.KEYS[line["case"]], file.name
                continue
            if file.name.startswith("metal-cuda"):  # what tests/metal/cuda/run.sh prints
                assert line["passed"] and {"case", "device", "torch", "commit", "command"} <= set(line), file.name
                continue
            keys = models.KEYS if "system" in line else repeat.KEYS if "times" in line else attention.KEYS
            # Older lines lack what was not there to be told apart or measured yet.
            later = {"softmax", "gradients", "edges", "ms_per_edge", "extra_mib", "special_tokens"} - set(line)
            keys = tuple(key for key in keys if key not in later)
            assert tuple(line)[: len(keys)] == keys, file.name


@pytest.mark.parametrize(("direction", "tensors"), [("fwd", 1), ("bwd", 5), ("fwd+bwd", 4)])
def test_extra_memory_is_what_lies_beyond_inputs_and_results(direction, tensors, monkeypatch):
    q = 3 * 9 * 8 * 64 * 4 / 2**20  # MiB of one tensor of the case
    in_call = {"fwd": 1, "bwd": 3, "fwd+bwd": 4}[direction]  # the rest is held when the call is timed
    monkeypatch.setattr(attention, "repeated", lambda *_: Cost.of([1.0], in_call * q + 0.25))
    held = iter([7.0, 7.0 + (tensors - in_call) * q + 0.5])
    monkeypatch.setattr(attention, "allocated_mib", lambda device: next(held))
    [line] = _lines(backend("reference"), [direction])
    assert line["extra_mib"] == pytest.approx(0.75)


def test_scaling_cases_have_their_neighbours():
    for case in GROUPS["scaling"]:
        inner = case.visible.sum(1)[case.frames // 2]
        assert inner - 1 == min(2 * int(case.graph.removeprefix("band")), case.frames - 1)
    assert {case.frames for case in GROUPS["scaling"]} >= {16, 2000}


# Repeatability


class _Drifting(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x, where):
        ctx.where = where
        _Drifting.calls += 1
        return x + 1e-3 * (where == "fwd" and _Drifting.calls == 3)

    @staticmethod
    def backward(ctx, grad):
        return grad + 1e-3 * (ctx.where == "bwd" and _Drifting.calls == 3), None


@pytest.mark.parametrize("drifting", ["fwd", "lse", "bwd", None])
def test_one_differing_bit_is_seen(drifting):
    lse_calls = itertools.count(1)

    def prepare(case, q, k, v):
        _Drifting.calls = 0
        call = backend("reference").prepare(case, q, k, v)
        return lambda: _Drifting.apply(call(), drifting)

    def lse(case, q, k, v):
        return torch.nextafter(q[..., 0], q[..., 0] + (drifting == "lse" and next(lse_calls) == 3))

    unstable = Contender("unstable", "differs once", lambda case, q: None, prepare, lse=lse)
    source = dict.fromkeys(("device", "torch", "triton", "commit", "command", "run", "date"), "")
    lines, _ = repeat.repeat([BAND], unstable, ["fwd", "bwd"], 4, CPU, torch.float32, source, lambda line: None)
    assert [line["bitwise_equal"] for line in lines] == [drifting not in ("fwd", "lse"), drifting != "bwd"]
    for line in lines:
        assert tuple(line)[: len(repeat.KEYS)] == repeat.KEYS
        assert (line["check"], "reason" in line) == (("passed", False) if line["bitwise_equal"] else ("failed", True))


def test_repeat_writes_lines(tmp_path, capsys):
    file = tmp_path / "out.jsonl"
    command = "repeat --cases s4-p8-band1-h2 --backend reference --times 3 --direction fwd --device cpu --output"
    assert main([*command.split(), str(file)]) == 0
    [line] = [json.loads(line) for line in file.read_text().splitlines()]
    assert (line["case"], line["backend"], line["times"], line["bitwise_equal"]) == (
        "s4-p8-band1-h2",
        "reference",
        3,
        True,
    )
    assert "s4-p8-band1-h2" in capsys.readouterr().out


# Report


def _fabricated(run="r1", date="2026-01-01", **changed):
    case = Case.parse(changed.get("case", "s8-p9-band1-h3"))
    line = dict.fromkeys(attention.KEYS) | {
        "case": case.name,
        "direction": "fwd",
        "backend": "triton",
        "density": case.density,
        "edges": case.edges,
        "ms_median": 2.0,
        "useful_tflops": 345.678,
        "extra_mib": 1.0,
        "check": "passed",
        "run": run,
        "date": date,
    }
    return line | changed


def test_report_shows_the_latest_run(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    lines = [
        _fabricated(ms_median=9.0, run="r0", date="2025-12-31"),
        _fabricated(),
        _fabricated(backend="hopper", softmax="online", case="s16-p9-band1-h3", extra_mib=None),
        _fabricated(backend="hopper", softmax="bounded", gradients="accumulated", direction="bwd"),
        _fabricated(backend="fa4-block-sparse", check="failed", reason="dQ: wrong", ms_median=None, useful_tflops=None),
        {"system": "upstream", "run": "r2", "date": "2027"},
    ]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, part in zip(files, (lines[:2], lines[2:]), strict=True):
        file.write_text("".join(json.dumps(line) + "\n" for line in part))
    folder = tmp_path / "deep" / "report"
    assert main(["report", "--results", *map(str, files), "--output", str(folder)]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "report.md"), str(folder / "report.png")]
    text = (folder / "report.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| s")]
    assert len(table) == 4
    assert "| 345.7 |" in table[0]
    assert "| hopper, online |" in table[1]
    assert "| hopper, bounded, accumulated |" in table[2]
    assert "- fa4-block-sparse on s8-p9-band1-h3, fwd: dQ: wrong" in text
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [line["run"] for line in attention_report.read(files, "r0")] == ["r0"]


def test_report_compares_edges_of_the_most_common_problem_only():
    lines = [_fabricated(), _fabricated(case="s8-p9-dense-h3"), _fabricated(case="s8-p10-band1-h3")]
    assert attention_report.problem(lines) == (9, 0, 64, 3, 1, False)


def test_report_keeps_q_in_log2_apart(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="the figure needs matplotlib")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, **_: drawn.append(self))
    cases = [f"s8-p9-{graph}-h3{log2}" for graph in ("dense", "band1", "band2") for log2 in ("", "-log2")]
    lines = [_fabricated(case=case, useful_tflops=2.0 if "log2" in case else 1.0) for case in cases]
    lines.append(_fabricated(case="s16-p9-band1-h3", useful_tflops=1.0))
    table, _ = attention_report.write(lines, tmp_path)
    density, edges, _ = drawn[0].axes
    series = {line.get_label(): list(line.get_ydata()) for line in density.lines}
    assert series == {"triton": [1.0] * 4, "triton, log2": [2.0] * 3}
    assert [line.get_label() for line in edges.lines] == ["triton"]
    assert table.read_text().count("| triton, log2 |") == 3


@pytest.mark.parametrize("content", [None, "", '{"system": "upstream", "run": "r", "date": "2026"}\n'])
def test_report_of_nothing_is_refused(content, tmp_path, capsys):
    file = tmp_path / "out.jsonl"
    if content is not None:
        file.write_text(content)
    assert main(["report", "--results", str(file), "--output", str(tmp_path)]) == 2
    assert str(file) in capsys.readouterr().err


def test_report_reads_what_its_command_writes_here(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    monkeypatch.setattr("benchmarks.__main__.RESULTS", tmp_path)
    assert main(["report"]) == 2
    command = re.search("`python -m benchmarks (.*) --output (.*)`", capsys.readouterr().err)
    assert main([command[1], *"--cases s2-p4-band0-h1 --backends reference --seconds 0.01".split()]) == 0
    assert [str(file) for file in tmp_path.iterdir()] == [command[2]]
    assert main(["report"]) == 0


def _trainable(case, dtype):
    q, k, v, grad = attention.inputs(case, CPU, dtype)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def _lines(contender, directions, cases=(BAND,)):
    source = dict.fromkeys(("device", "torch", "triton", "commit", "command", "run", "date"), "")
    runner = attention.Runner(CPU, torch.float32, source, lambda line: None, seconds=0.01)
    runner.run(cases, [contender], directions)
    return runner.lines
