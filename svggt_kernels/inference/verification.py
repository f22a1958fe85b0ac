"""Is a forward of our own what the module computes? Compared with the module's own forward in float64."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..proof import BUDGET, error_ratio
from .settings import TABLES

DOUBT = 0.02
"""How far the model's own forward in float32 may be from that in float64, as a part of the result."""

NO_MEMORY = "there was no memory to compare it with the model's own forward"
NOT_FINITE = "an output of the model's forward is not finite, which proves nothing"
ANOTHER = "the model's forward in float64 is another than in float32, or it is random, so that nothing can be proven"


@dataclass(frozen=True)
class Verification:
    """What a comparison found.

    Attributes:
        reason: Why the forward of our own may not run; None if it may.
        ratio: The largest error over that of the module's own forward; at most `BUDGET` is right.
        seconds: How long it took.
        gib: Device memory that it took at most, beside what was there; 0 where that was no new peak.
    """

    reason: str | None
    ratio: float
    seconds: float
    gib: float

    @property
    def is_final(self) -> bool:
        """Whether another comparison would find the same; not so where memory or finite numbers were missing."""
        return self.reason not in (NO_MEMORY, NOT_FINITE)


def unpatched_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares its parameters and buffers, without hooks and forwards put on it."""
    return _unpatched(module, {})


def _unpatched(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in known:
        return known[module]
    duplicate = known[module] = object.__new__(type(module))
    nn.Module.__init__(duplicate)
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers"):
            duplicate.__dict__[name].update(value)
        elif name not in TABLES and name != "forward":
            duplicate.__dict__[name] = copy.deepcopy(value)
    for name, inner in module._modules.items():
        duplicate._modules[name] = None if inner is None else _unpatched(inner, known)
    return duplicate


def wider_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a module that computes in `dtype`, each of its modules widened only while it runs.

    So the parameters of one module at a time exist twice, and nothing is written to the module's own.
    """
    duplicate = unpatched_copy(module)
    for inner in duplicate.modules():
        narrow = [
            (table, name, tensor)
            for table in (inner._parameters, inner._buffers)
            for name, tensor in table.items()
            if tensor is not None and tensor.is_floating_point()
        ]
        if narrow:
            inner.register_forward_pre_hook(_Widen(narrow, dtype), prepend=True)
            inner.register_forward_hook(_Narrow(narrow), always_call=True)
    return duplicate


Entries = list[tuple[dict[str, Any], str, Tensor]]


class _Widen:
    def __init__(self, entries: Entries, dtype: torch.dtype) -> None:
        self.entries, self.dtype = entries, dtype

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        for table, name, tensor in self.entries:
            wide = tensor.detach().to(self.dtype)
            table[name] = nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


class _Narrow:
    def __init__(self, entries: Entries) -> None:
        self.entries = entries

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        for table, name, tensor in self.entries:
            table[name] = tensor


def verify(
    module: nn.Module,
    own: Callable[..., Any],
    read: Callable[[Any], Sequence[Tensor]],
    inputs: Sequence[Any],
    before_own: Callable[[], object] = lambda: None,
) -> Verification:
    """Compare a forward of our own with that of a module, under the autocast that is on.

    The module's forward in float64, without autocast and module by module, is exact. The root mean square error of each
    tensor of `own` may be at most `BUDGET` times that of the module's own forward, twice: of `own` in float64 against
    the module in float32, which tells formulas apart that bfloat16 would not, and of both as they run. An error counts
    as at least one rounding of the result. A module in float64 is compared in float32.

    Args:
        module: The module; nothing is written to it.
        own: The forward of our own; takes a module like this one, and `inputs`.
        read: Picks the tensors to compare from what a forward returns.
        inputs: Arguments of the forward; nested lists of tensors, too. They are converted for the dtype that computes.
        before_own: Called before `own` runs as it will: waits for what may be compiled while all else runs.
    """
    device = next(module.parameters()).device
    started, before, earlier_peak = time.perf_counter(), 0, 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before, earlier_peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    try:
        with torch.no_grad():
            reason, ratio = _compare(module, own, read, inputs, before_own)
    except torch.OutOfMemoryError:
        reason, ratio = NO_MEMORY, float("nan")
    except Exception as error:  # a forward of others may raise anything on a copy
        reason, ratio = f"it could not be compared with the forward of {type(module).__name__}: {error}", float("nan")
    gib = 0.0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        gib = (peak - before) / 2**30 if peak > earlier_peak else 0.0
    return Verification(reason, ratio, time.perf_counter() - started, gib)


def _compare(
    module: nn.Module,
    own: Callable[..., Any],
    read: Callable[[Any], Sequence[Tensor]],
    inputs: Sequence[Any],
    before_own: Callable[[], object],
) -> tuple[str | None, float]:
    subject = unpatched_copy(module)
    if any(parameter.dtype == torch.float64 for parameter in module.parameters()):
        subject, inputs = copy.deepcopy(subject).float(), _converted(inputs, torch.float32)
    device, tensors = next(module.parameters()).device.type, [*subject.parameters(), *subject.buffers(), inputs]
    is_single = not torch.is_autocast_enabled(device) and _is_in(torch.float32, tensors)
    plain = read(subject(*inputs))
    with torch.autocast(device, enabled=False):
        exact = read(wider_copy(subject, torch.float64)(*_converted(inputs, torch.float64)))
        plain_single = plain
        if not is_single:
            plain_single = read(wider_copy(subject, torch.float32)(*_converted(inputs, torch.float32)))
        ours_wide = read(own(wider_copy(subject, torch.float64), *_converted(inputs, torch.float64)))
    before_own()
    ours = read(own(subject, *inputs))
    formula, formula_ratio = _within_budget(
        [x.float() for x in plain_single], [x.float() for x in ours_wide], exact, DOUBT
    )
    if formula is not None:
        return formula, formula_ratio
    reason, ratio = _within_budget(plain, ours, exact)
    return reason, max(formula_ratio, ratio) if reason is None else ratio


def _within_budget(
    plain: Sequence[Tensor], ours: Sequence[Tensor], exact: Sequence[Tensor], doubt: float = float("inf")
) -> tuple[str | None, float]:
    """Return why results of our own are not those of the model's forward, or None, and the largest ratio of errors.

    An error of the model's own forward above `doubt` times the result says that its float64 is no reference.
    """
    if not len(plain) == len(ours) == len(exact):
        return f"it returns {len(ours)} tensors, the model's forward {len(plain)}", float("nan")
    worst = 0.0
    for index, (their, our, reference) in enumerate(zip(plain, ours, exact, strict=True)):
        if our.shape != their.shape or our.dtype != their.dtype:
            what = f"{our.dtype} {list(our.shape)}, not {their.dtype} {list(their.shape)}"
            return f"its output {index} is {what}", float("nan")
        if not (reference.isfinite().all() and their.isfinite().all()):
            return NOT_FINITE, float("nan")
        rounding = (reference.to(their.dtype).double() - reference).norm()
        if (their.double() - reference).norm() > doubt * reference.norm() + rounding:
            return ANOTHER, float("nan")
        ratio = error_ratio(our, their, reference)
        worst = max(worst, ratio)
        if not ratio <= BUDGET:
            return (
                f"its output {index} is {ratio:.3g} times as far from float64 as that of the model's forward, where "
                f"{BUDGET:g} times is allowed: the model computes something else",
                ratio,
            )
    return None, worst


def _is_in(dtype: torch.dtype, value: Any) -> bool:
    """Whether all floating-point tensors in nested lists and tuples are in a dtype."""
    if isinstance(value, Tensor):
        return value.dtype == dtype or not value.is_floating_point()
    return all(_is_in(dtype, each) for each in value) if isinstance(value, (list, tuple)) else True


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """Return nested lists and tuples with their floating-point tensors in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(_converted(each, dtype) for each in value) if isinstance(value, (list, tuple)) else value
