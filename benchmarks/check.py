"""Correctness before speed: compares a contender with explicit attention in float64, by an error budget.

The budget: the error against float64 may be at most twice the error of a plain implementation in the same dtype, as
root mean square over all that is compared, and again over the worst row alone (gradients: the worst frame, as rounding
of one inner product moves a whole row of dQ). The plain implementation is softmax(q k^T scale) v with every
intermediate rounded to the dtype, and for the gradients the textbook formula, with exp(scores - LSE) for the softmax as
in any implementation that does not keep it. Its error counts as at least that of rounding the exact result once.

At full size not everything can be compared in float64. What is compared:

- the output, and the LSE where offered, of the sampled frames (first, last and two between) in the first and last head;
- the output of *every* row of every head with all keys set to zero, where each row is the mean of the values it sees:
  a tile that is missed, repeated or read across a frame's edge changes some row;
- the gradients of q, k and v in the sampled frames and heads, summed over all queries that see them.

Which tokens see which is worked out here from the case, not asked of the layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Case
from .peers import Contender

MAX_SCORES = 2**26
"""Scores held at once by the explicit formula."""


class Rows(NamedTuple):
    """Successive query tokens of one frame and the key tokens that all of them see, with what is added to scores."""

    frame: int
    rows: slice
    keys: Tensor  # [n] int64, ascending
    added: Tensor | None = None  # [n], log of how many tokens each key stands for, where that may differ from 1


def check_forward(contender: Contender, case: Case, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why the contender's forward is wrong, or None if it passes."""
    with torch.no_grad(), contender.chosen():
        out = contender.prepare(case, q, k, v)()
        if out.shape != q.shape or out.dtype != q.dtype:
            return f"the output must be {q.dtype} {list(q.shape)}, got {out.dtype} {list(out.shape)}"
        outputs = {"out": out}
        if contender.lse is not None:
            outputs["LSE"] = contender.lse(case, q, k, v)
        sampled = _sampled_frames(case)
        budgets = {name: Budget(name) for name in outputs}
        q_, k_, v_ = (_sampled_heads(x) for x in (q, k, v))
        actual = {name: _sampled_heads(x) for name, x in outputs.items()}
        for frame, rows, keys, added in _groups(case, q.device):
            if frame not in sampled:
                continue
            part = q_[:, rows], k_[:, keys], v_[:, keys]
            plain, exact = explicit(*part, case.scale, added), explicit(*(x.double() for x in part), case.scale, added)
            budgets["out"].add(actual["out"][:, rows], plain[0], exact[0])
            if "LSE" in actual:
                budgets["LSE"].add(actual["LSE"][:, rows, None], plain[1][..., None], exact[1][..., None])
        del outputs, actual, out
        return _first(budgets.values()) or _check_every_row(contender, case, q, k, v)


def check_gradients(contender: Contender, case: Case, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> str | None:
    """Return why the contender's gradients are wrong, or None if they pass.

    Args:
        contender: What is under test.
        case: The problem.
        q: Queries `[B, H, N, D]` that require a gradient.
        k: Keys, likewise.
        v: Values, likewise.
        grad: Gradient of the output `[B, H, N, D]`.
    """
    with contender.chosen():
        actual = torch.autograd.grad(contender.prepare(case, q, k, v)(), (q, k, v), grad)
    for name, gradient in zip(("dQ", "dK", "dV"), actual, strict=True):
        if not bool(gradient.isfinite().all()):
            return f"{name} is not finite everywhere"
    with torch.no_grad():
        sampled = _sampled_frames(case)
        wanted = torch.zeros(case.frames, case.tokens, dtype=torch.bool, device=q.device)
        wanted[list(sampled)] = True
        wanted = wanted.flatten()
        place = wanted.cumsum(0) - 1  # of each wanted token among those wanted
        q_, k_, v_, grad_ = (_sampled_heads(x) for x in (q, k, v, grad))
        budgets = [Budget(name) for name in ("dQ", "dK", "dV")]
        plain_sums = [torch.zeros_like(x[:, wanted], dtype=_accumulator(x)) for x in (k_, v_)]
        exact_sums = [torch.zeros_like(x[:, wanted], dtype=torch.float64) for x in (k_, v_)]
        for frame, rows, keys, added in _groups(case, q.device):
            columns = wanted[keys].nonzero()[:, 0]
            if frame not in sampled and len(columns) == 0:
                continue
            part = q_[:, rows], k_[:, keys], v_[:, keys], grad_[:, rows]
            plain = explicit_gradients(*part, columns, case.scale, added)
            exact = explicit_gradients(*(x.double() for x in part), columns, case.scale, added)
            if frame in sampled:
                dq = _sampled_heads(actual[0])[:, rows]
                budgets[0].add(dq.flatten(1), plain[0].flatten(1), exact[0].flatten(1))
            for sums, parts in ((plain_sums, plain), (exact_sums, exact)):
                for total, addend in zip(sums, parts[1:], strict=True):
                    total.index_add_(1, place[keys[columns]], addend)
        for budget, gradient, plain_sum, exact_sum in zip(budgets[1:], actual[1:], plain_sums, exact_sums, strict=True):
            compared = _sampled_heads(gradient)[:, wanted], plain_sum.to(q.dtype), exact_sum
            budget.add(*(x.unflatten(1, (-1, case.tokens)).flatten(2) for x in compared))
        return _first(budgets)


def explicit(
    q: Tensor,  # [h, m, D]
    k: Tensor,  # [h, n, D]
    v: Tensor,  # [h, n, D]
    scale: float,
    added: Tensor | None = None,  # [n]
) -> tuple[Tensor, Tensor]:
    """Return output `[h, m, D]` and LSE `[h, m]` of every row on every key, each intermediate in the inputs' dtype."""
    outs, lses = [], []
    for rows in _chunks(q, k):
        scores = _scores(q[:, rows], k, scale, added)
        outs.append(scores.softmax(-1) @ v)
        lses.append(scores.to(_accumulator(q)).logsumexp(-1))
    return torch.cat(outs, 1), torch.cat(lses, 1)


def explicit_gradients(
    q: Tensor,  # [h, m, D]
    k: Tensor,  # [h, n, D]
    v: Tensor,  # [h, n, D]
    grad: Tensor,  # [h, m, D]
    columns: Tensor,  # [c]
    scale: float,
    added: Tensor | None = None,  # [n]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what these rows give to the gradients: dQ `[h, m, D]`, dK and dV `[h, c, D]` of the keys `columns`.

    Each intermediate is in the inputs' dtype; dK and dV are summed over the rows in float32 or better.
    """
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x[:, columns], dtype=_accumulator(q)) for x in (k, v))
    for rows in _chunks(q, k):
        scores = _scores(q[:, rows], k, scale, added)
        p = (scores - scores.to(_accumulator(q)).logsumexp(-1, keepdim=True)).exp().to(q.dtype)
        inner = (grad[:, rows] * (scores.softmax(-1) @ v)).sum(-1, keepdim=True)
        ds = p * (grad[:, rows] @ v.mT - inner) * scale
        dq[:, rows] = ds @ k
        dk += ds[:, :, columns].mT @ q[:, rows]
        dv += p[:, :, columns].mT @ grad[:, rows]
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, scale: float, added: Tensor | None) -> Tensor:
    scores = q @ k.mT * scale
    return scores if added is None else scores + added.to(scores.dtype)


class Budget:
    """Errors of one quantity over all the places compared, of the contender and of the plain implementation."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.total = torch.zeros(3, dtype=torch.float64)  # squared errors: contender, plain, exact rounded once
        self.worst = torch.zeros(3, dtype=torch.float64)  # mean squared error of the worst row, likewise

    def add(
        self,
        actual: Tensor,  # [..., D]
        plain: Tensor,  # [..., D]
        exact: Tensor,  # [..., D]
    ) -> None:
        """Compare more rows; `plain` and `exact` may be broadcast to `actual`."""
        rounded = exact.to(actual.dtype)
        errors = torch.stack([(x.double() - exact).expand_as(actual) for x in (actual, plain, rounded)])
        squares = errors.square().flatten(1, -2)
        self.total = self.total.to(squares.device) + squares.sum((1, 2))
        self.worst = torch.maximum(self.worst.to(squares.device), squares.mean(2).amax(1))

    def exceeded(self) -> str | None:
        """Return by how much the budget is exceeded, or None if it holds; NaN never holds."""
        for place, squares in (("over all rows", self.total), ("at the worst place", self.worst)):
            error, plain, rounded = squares.sqrt().tolist()
            if not error <= 2 * max(plain, rounded):
                return (
                    f"{self.name}: the error against float64 {place} may be at most 2x that of a plain "
                    f"implementation, got {error / max(plain, rounded, 1e-300):.3g}x"
                )
        return None


def _check_every_row(contender: Contender, case: Case, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    keys_zero = torch.zeros_like(k)
    out = contender.prepare(case, q, keys_zero, v)().flatten(0, 1)
    v = v.flatten(0, 1)
    budget = Budget("out of every row, keys zero")
    for _, rows, keys, added in _groups(case, q.device):
        values = v[:, keys]
        zero = torch.zeros_like(values[:, :1])
        plain, _ = explicit(zero, torch.zeros_like(values), values, 1.0, added)
        exact = values.mean(1, keepdim=True, dtype=torch.float64)
        if added is not None:
            exact = (added.softmax(0)[:, None] * values).sum(1, keepdim=True)
        budget.add(out[:, rows], plain, exact)
    return budget.exceeded()


def _groups(case: Case, device: torch.device) -> Iterator[Rows]:
    """Yield all rows of the case in groups that see the same keys, by the definition of correct."""
    token = torch.arange(case.frames * case.tokens, device=device)
    frame_of, place = token // case.tokens, token % case.tokens
    visible = case.visible.to(device)
    for frame in range(case.frames):
        first = frame * case.tokens
        if case.stride:
            in_full, coarsely = (x[frame].to(device).double() for x in (case.visible, case.visible_coarsely))
            weights = (in_full[:, None] + coarsely[:, None] * case.weights_of_frame.to(device)).flatten()
            keys = weights.nonzero()[:, 0]
            yield Rows(frame, slice(first, first + case.tokens), keys, weights[keys].log())
            continue
        if case.special:
            yield Rows(frame, slice(first, first + case.special), token)
        if case.special < case.tokens:
            keys = (visible[frame][frame_of] | (place < case.special)).nonzero()[:, 0]
            yield Rows(frame, slice(first + case.special, first + case.tokens), keys)


def _chunks(q: Tensor, k: Tensor) -> list[slice]:
    """Return slices of the rows of q so small that their scores against k fit the limit."""
    step = max(1, MAX_SCORES // (q.shape[0] * max(1, k.shape[1])))
    return [slice(start, start + step) for start in range(0, q.shape[1], step)]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sampled_frames(case: Case) -> set[int]:
    last = case.frames - 1
    return {0, last // 3, last // 2, last}


def _sampled_heads(x: Tensor) -> Tensor:
    """Return the first and the last head of `[B, H, ...]` as `[2, ...]`, or the only one as `[1, ...]`."""
    return x[:1, 0] if x.shape[:2] == (1, 1) else torch.stack([x[0, 0], x[-1, -1]])


def _first(budgets: Iterable[Budget]) -> str | None:
    return next((reason for budget in budgets if (reason := budget.exceeded()) is not None), None)
