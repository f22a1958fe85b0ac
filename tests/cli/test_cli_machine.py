"""`info` and `check`: what this machine offers, and whether its numbers are right."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiers import every

from svggt_kernels import backends
from svggt_kernels.backends import cpu, reference
from svggt_kernels.cli import check, main


class TestInfo:
    def test_text_names_versions_and_reasons(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info"]) == 0
        out = capsys.readouterr().out
        assert torch.__version__ in out
        assert all(name in out for name in backends.BACKENDS)
        assert "cannot run: it needs a CUDA device" in out

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["versions"]["torch"] == torch.__version__
        assert found["backends"]["cpu"]["reference"] == {"float16": None, "bfloat16": None, "float32": None}
        assert isinstance(found["backends"]["cpu"]["triton"]["float32"], str)

    def test_names_the_instruction_set_and_why_not_a_better_one(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(cpu, "unsupported", lambda *kind: None)
        monkeypatch.setattr(cpu, "instruction_set", lambda: "avx512_bf16")
        refused = SimpleNamespace(why_amx_is_unused=lambda: "the system refused them")
        monkeypatch.setattr(cpu, "extension", lambda: refused)
        assert main(["info", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["instruction_sets"] == {"avx512_bf16": None, "amx_bf16": "the system refused them"}
        assert main(["info"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["avx512_bf16", "used"] in lines
        assert "amx_bf16 not used: the system refused them".split() in lines

    def test_names_no_instruction_set_where_the_cpu_backend_is_missing(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(cpu, "unsupported", lambda *kind: "it was not built")
        assert main(["info", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["instruction_sets"] == {}


class TestCheck:
    def test_all_is_well(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert out.count(" ok") >= 3
        assert "WRONG" not in out

    @pytest.mark.parametrize("factor", every(2, [1.01, math.nan]), ids=["one percent off", "nan"])
    def test_wrong_numbers_fail(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, factor: float
    ) -> None:
        right = reference.forward
        monkeypatch.setattr(reference, "forward", lambda *x: (right(*x)[0] * factor, right(*x)[1]))
        assert main(["check", "--device", "cpu"]) == 1
        assert "At least one backend is WRONG here" in capsys.readouterr().out

    def test_wrong_gradient_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = reference.backward

        def wrong(*inputs: object) -> tuple[torch.Tensor, ...]:
            dq, dk, dv = right(*inputs)  # type: ignore[arg-type]
            return dq, dk * 1.02, dv

        monkeypatch.setattr(reference, "backward", wrong)
        verdict = check.judge("reference", torch.device("cpu"), torch.float32)
        assert not verdict.passed
        assert [name for name, ratio in verdict.ratios.items() if ratio > 2] == ["grad k"]

    def test_what_a_kernel_raises_is_the_finding(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*inputs: object) -> None:
            raise RuntimeError("the kernel fell over")

        monkeypatch.setattr(reference, "forward", broken)
        assert main(["check", "--device", "cpu"]) == 1
        assert "WRONG RuntimeError: the kernel fell over" in capsys.readouterr().out

    def test_unknown_device(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "--device", "abacus"]) == 2
        assert "--device must be auto or one of" in capsys.readouterr().err
