"""The Triton kernels. Every program owns one tile of rows, so results do not depend on the order of programs.

A program walks the columns its rows see: the full tiles of its runs, then the dense columns from a compact copy, then
the tails of its runs. Full and dense tiles are read through tensor descriptors where the device has TMA (DESCRIPTORS;
without it `k_tiles` and its like are None). Tails are read by pointer under a mask: a descriptor would also read what
lies behind the run, and NaN there would survive a product with zero.

Forward: online softmax (Milakov and Gimelshein, arXiv 1805.02867) in tiles as in FlashAttention-2 (Dao, arXiv
2307.08691, algorithm 1). Backward: two passes (rows own dQ; columns own dK and dV), which costs 7 products in place of
5 and needs neither atomics nor a float32 copy of dQ.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Counts differ from layout to layout: specialising on them would only compile the same kernel again. So does the number
# of tokens, which is the stride from head to head of the LSE.
COUNTS = ["num_row_tiles", "num_first", "dense_group", "num_dense", "heads", "batch_heads", "lse_head"]


@triton.jit
def _row_tile(rows_ptr, dense_rows_ptr, num_row_tiles, num_first, dense_group, batch_heads, ROWS: tl.constexpr):
    """(Batch, head) of this program; of its row tile the group, the tokens [ROWS] (int64) and which of them exist.

    The first tiles are those of all heads, the others come head after head.
    """
    pid = tl.program_id(0)
    num_others = num_row_tiles - num_first
    beyond = pid - num_first * batch_heads
    is_first = beyond < 0
    tile = tl.where(is_first, pid // batch_heads, num_first + beyond % tl.maximum(num_others, 1))
    batch_head = tl.where(is_first, pid % batch_heads, beyond // tl.maximum(num_others, 1))
    group = tl.load(rows_ptr + tile * 3)
    start = tl.load(rows_ptr + tile * 3 + 1)
    length = tl.load(rows_ptr + tile * 3 + 2)
    place = tl.arange(0, ROWS)
    exists = place < length
    gathered = tl.load(dense_rows_ptr + start + place, mask=exists & (group == dense_group), other=0)
    tokens = tl.where(group == dense_group, gathered, start + place)
    return batch_head, group, tl.where(exists, tokens, 0).to(tl.int64), exists


@triton.jit
def _full_tile(tiles, ptr, b, h, start, token, COLUMNS: tl.constexpr, D: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Tokens start to start + COLUMNS of one head, [COLUMNS, D]."""
    if DESCRIPTORS:
        x = tiles.load([b, h, start, 0]).reshape(COLUMNS, D)
    else:
        tokens = start.to(tl.int64) + tl.arange(0, COLUMNS)
        x = tl.load(ptr + tokens[:, None] * token + tl.arange(0, D)[None, :])
    return x


@triton.jit
def _dense_tile(
    tiles, ptr, b, h, batch_head, i, num_dense, TAIL: tl.constexpr, D: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """Tile i of the compact copy of the dense columns, [TAIL, D]; zeros behind the last."""
    if DESCRIPTORS:
        x = tiles.load([b, h, i * TAIL, 0]).reshape(TAIL, D)
    else:
        place = i * TAIL + tl.arange(0, TAIL)
        row = batch_head.to(tl.int64) * num_dense + place
        x = tl.load(ptr + row[:, None] * D + tl.arange(0, D)[None, :], mask=(place < num_dense)[:, None], other=0.0)
    return x


@triton.jit
def _num_dense_tiles(group, dense_group, num_dense, TAIL: tl.constexpr):
    """Tiles of dense columns that a group sees; the run of the dense group holds them already."""
    return tl.where(group == dense_group, 0, tl.cdiv(num_dense, TAIL))


@triton.jit
def _tail(i, tail_start_ptr, tail_length_ptr, TAIL: tl.constexpr):
    """Tokens [TAIL] (int64) of tail i and which of them belong to it."""
    place = tl.arange(0, TAIL)
    exists = place < tl.load(tail_length_ptr + i)
    return tl.load(tail_start_ptr + i).to(tl.int64) + place, exists


@triton.jit
def _attend(q, k, v, exists, score_max, score_sum, excess, out, scale, MASKED: tl.constexpr):
    """One step of the online softmax; scores in units of log2.

    `excess` is by what rounding made the sum too large (Kahan, 1965); without, errors of many tiles would add up.
    """
    s = tl.dot(q, k.T, input_precision="ieee")
    if MASKED:
        s = tl.where(exists[None, :], s, -float("inf"))
    new_max = tl.maximum(score_max, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new_max[:, None])
    shrink = tl.exp2(score_max - new_max)
    score_sum *= shrink
    of_tile = tl.sum(p, 1) - excess * shrink
    new_sum = score_sum + of_tile
    excess = (new_sum - score_sum) - of_tile
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return new_max, new_sum, excess, out


@triton.jit(do_not_specialize=COUNTS)
def forward(
    q_ptr, k_ptr, v_ptr, k_dense_ptr, v_dense_ptr, k_tiles, v_tiles, k_dense_tiles, v_dense_tiles, out_ptr, lse_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch, out_head, out_token,
    lse_head,
    rows_ptr, full_offsets_ptr, full_start_ptr, tail_offsets_ptr, tail_start_ptr, tail_length_ptr,
    dense_rows_ptr,
    num_row_tiles, num_first, dense_group, num_dense, heads, batch_heads, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Write out and LSE of one tile of queries."""
    batch_head, group, rows, exists = _row_tile(
        rows_ptr, dense_rows_ptr, num_row_tiles, num_first, dense_group, batch_heads, ROWS
    )
    b, h = batch_head // heads, batch_head % heads
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    d = tl.arange(0, D)
    q_ptr += b64 * q_batch + h64 * q_head
    k_ptr += b64 * k_batch + h64 * k_head
    v_ptr += b64 * v_batch + h64 * v_head
    q = tl.load(q_ptr + rows[:, None] * q_token + d[None, :], mask=exists[:, None], other=0.0)
    score_max = tl.full([ROWS], -float("inf"), tl.float32)
    score_sum = tl.zeros([ROWS], tl.float32)
    excess = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    scale_log2 = scale * LOG2_E

    for i in tl.range(tl.load(full_offsets_ptr + group), tl.load(full_offsets_ptr + group + 1)):
        start = tl.load(full_start_ptr + i)
        k = _full_tile(k_tiles, k_ptr, b, h, start, k_token, COLUMNS, D, DESCRIPTORS)
        v = _full_tile(v_tiles, v_ptr, b, h, start, v_token, COLUMNS, D, DESCRIPTORS)
        score_max, score_sum, excess, out = _attend(
            q, k, v, None, score_max, score_sum, excess, out, scale_log2, MASKED=False
        )

    for i in tl.range(_num_dense_tiles(group, dense_group, num_dense, TAIL)):
        k = _dense_tile(k_dense_tiles, k_dense_ptr, b, h, batch_head, i, num_dense, TAIL, D, DESCRIPTORS)
        v = _dense_tile(v_dense_tiles, v_dense_ptr, b, h, batch_head, i, num_dense, TAIL, D, DESCRIPTORS)
        visible = i * TAIL + tl.arange(0, TAIL) < num_dense
        score_max, score_sum, excess, out = _attend(
            q, k, v, visible, score_max, score_sum, excess, out, scale_log2, MASKED=True
        )

    for i in tl.range(tl.load(tail_offsets_ptr + group), tl.load(tail_offsets_ptr + group + 1)):
        columns, visible = _tail(i, tail_start_ptr, tail_length_ptr, TAIL)
        k = tl.load(k_ptr + columns[:, None] * k_token + d[None, :], mask=visible[:, None], other=0.0)
        v = tl.load(v_ptr + columns[:, None] * v_token + d[None, :], mask=visible[:, None], other=0.0)
        score_max, score_sum, excess, out = _attend(
            q, k, v, visible, score_max, score_sum, excess, out, scale_log2, MASKED=True
        )

    saw_nothing = score_sum == 0.0
    score_sum = tl.where(saw_nothing, 1.0, score_sum)
    out = out / score_sum[:, None]
    lse = tl.where(saw_nothing, -float("inf"), (score_max + tl.log2(score_sum)) * LN_2)
    out_ptr += b64 * out_batch + h64 * out_head
    tl.store(out_ptr + rows[:, None] * out_token + d[None, :], out.to(out_ptr.dtype.element_ty), mask=exists[:, None])
    tl.store(lse_ptr + batch_head.to(tl.int64) * lse_head + rows, lse, mask=exists)


@triton.jit(do_not_specialize=["tokens", "heads"])
def inner_products(
    grad_ptr, out_ptr, grad_lse_ptr, inner_ptr,
    grad_batch, grad_head, grad_token, out_batch, out_head, out_token, tokens, heads,
    HAS_GRAD_LSE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write dO . out - dLSE of ROWS tokens of one head."""
    tiles_per_head = tl.cdiv(tokens, ROWS)
    batch_head = (tl.program_id(0) // tiles_per_head).to(tl.int64)
    b, h = batch_head // heads, batch_head % heads
    rows = tl.program_id(0) % tiles_per_head * ROWS + tl.arange(0, ROWS).to(tl.int64)
    exists = rows < tokens
    d = tl.arange(0, D)
    grad = tl.load(
        grad_ptr + b * grad_batch + h * grad_head + rows[:, None] * grad_token + d[None, :],
        mask=exists[:, None],
        other=0.0,
    )
    out = tl.load(
        out_ptr + b * out_batch + h * out_head + rows[:, None] * out_token + d[None, :], mask=exists[:, None], other=0.0
    )
    inner = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        inner -= tl.load(grad_lse_ptr + batch_head * tokens + rows, mask=exists, other=0.0)
    tl.store(inner_ptr + batch_head * tokens + rows, inner, mask=exists)


@triton.jit
def _query_step(q, grad, lse, inner, k, v, exists, dq, scale, MASKED: tl.constexpr):
    """Add what one tile of keys gives to dQ; lse in units of log2."""
    p = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale - lse[:, None])
    if MASKED:
        p = tl.where(exists[None, :], p, 0.0)
    ds = p * (tl.dot(grad, v.T, input_precision="ieee") - inner[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=COUNTS)
def backward_queries(
    q_ptr, k_ptr, v_ptr, grad_ptr, k_dense_ptr, v_dense_ptr, k_tiles, v_tiles, k_dense_tiles, v_dense_tiles,
    lse_ptr, inner_ptr, dq_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch, grad_head, grad_token,
    dq_batch, dq_head, dq_token, lse_head,
    rows_ptr, full_offsets_ptr, full_start_ptr, tail_offsets_ptr, tail_start_ptr, tail_length_ptr,
    dense_rows_ptr,
    num_row_tiles, num_first, dense_group, num_dense, heads, batch_heads, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Write dQ of one tile of queries."""
    batch_head, group, rows, exists = _row_tile(
        rows_ptr, dense_rows_ptr, num_row_tiles, num_first, dense_group, batch_heads, ROWS
    )
    b, h = batch_head // heads, batch_head % heads
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    d = tl.arange(0, D)
    q_ptr += b64 * q_batch + h64 * q_head
    k_ptr += b64 * k_batch + h64 * k_head
    v_ptr += b64 * v_batch + h64 * v_head
    grad_ptr += b64 * grad_batch + h64 * grad_head
    q = tl.load(q_ptr + rows[:, None] * q_token + d[None, :], mask=exists[:, None], other=0.0)
    grad = tl.load(grad_ptr + rows[:, None] * grad_token + d[None, :], mask=exists[:, None], other=0.0)
    statistics = batch_head.to(tl.int64) * lse_head + rows
    lse = tl.load(lse_ptr + statistics, mask=exists, other=0.0) * LOG2_E
    inner = tl.load(inner_ptr + statistics, mask=exists, other=0.0)
    dq = tl.zeros([ROWS, D], tl.float32)
    scale_log2 = scale * LOG2_E

    for i in tl.range(tl.load(full_offsets_ptr + group), tl.load(full_offsets_ptr + group + 1)):
        start = tl.load(full_start_ptr + i)
        k = _full_tile(k_tiles, k_ptr, b, h, start, k_token, COLUMNS, D, DESCRIPTORS)
        v = _full_tile(v_tiles, v_ptr, b, h, start, v_token, COLUMNS, D, DESCRIPTORS)
        dq = _query_step(q, grad, lse, inner, k, v, None, dq, scale_log2, MASKED=False)

    for i in tl.range(_num_dense_tiles(group, dense_group, num_dense, TAIL)):
        k = _dense_tile(k_dense_tiles, k_dense_ptr, b, h, batch_head, i, num_dense, TAIL, D, DESCRIPTORS)
        v = _dense_tile(v_dense_tiles, v_dense_ptr, b, h, batch_head, i, num_dense, TAIL, D, DESCRIPTORS)
        visible = i * TAIL + tl.arange(0, TAIL) < num_dense
        dq = _query_step(q, grad, lse, inner, k, v, visible, dq, scale_log2, MASKED=True)

    for i in tl.range(tl.load(tail_offsets_ptr + group), tl.load(tail_offsets_ptr + group + 1)):
        columns, visible = _tail(i, tail_start_ptr, tail_length_ptr, TAIL)
        k = tl.load(k_ptr + columns[:, None] * k_token + d[None, :], mask=visible[:, None], other=0.0)
        v = tl.load(v_ptr + columns[:, None] * v_token + d[None, :], mask=visible[:, None], other=0.0)
        dq = _query_step(q, grad, lse, inner, k, v, visible, dq, scale_log2, MASKED=True)

    dq_ptr += b64 * dq_batch + h64 * dq_head
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + rows[:, None] * dq_token + d[None, :], dq, mask=exists[:, None])


@triton.jit
def _key_step(k, v, q, grad, lse, inner, exists, dk, dv, scale, MASKED: tl.constexpr):
    """Add what one tile of queries gives to dK and dV; lse in units of log2."""
    p = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale - lse[None, :])
    if MASKED:
        p = tl.where(exists[None, :], p, 0.0)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    ds = p * (tl.dot(v, grad.T, input_precision="ieee") - inner[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def backward_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, q_dense_ptr, grad_dense_ptr, q_tiles, grad_tiles, q_dense_tiles, grad_dense_tiles,
    lse_ptr, inner_ptr, dk_ptr, dv_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch, grad_head, grad_token,
    dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token, lse_head,
    rows_ptr, full_offsets_ptr, full_start_ptr, tail_offsets_ptr, tail_start_ptr, tail_length_ptr,
    dense_rows_ptr, dense_columns_ptr,
    num_row_tiles, num_first, dense_group, num_dense, heads, batch_heads, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Write dK and dV of one tile of keys; the tables are those of the transposed layout."""
    batch_head, group, rows, exists = _row_tile(
        rows_ptr, dense_rows_ptr, num_row_tiles, num_first, dense_group, batch_heads, ROWS
    )
    b, h = batch_head // heads, batch_head % heads
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    d = tl.arange(0, D)
    q_ptr += b64 * q_batch + h64 * q_head
    k_ptr += b64 * k_batch + h64 * k_head
    v_ptr += b64 * v_batch + h64 * v_head
    grad_ptr += b64 * grad_batch + h64 * grad_head
    k = tl.load(k_ptr + rows[:, None] * k_token + d[None, :], mask=exists[:, None], other=0.0)
    v = tl.load(v_ptr + rows[:, None] * v_token + d[None, :], mask=exists[:, None], other=0.0)
    dk = tl.zeros([ROWS, D], tl.float32)
    dv = tl.zeros([ROWS, D], tl.float32)
    scale_log2 = scale * LOG2_E
    lse_ptr += batch_head.to(tl.int64) * lse_head
    inner_ptr += batch_head.to(tl.int64) * lse_head
    column = tl.arange(0, COLUMNS)

    for i in tl.range(tl.load(full_offsets_ptr + group), tl.load(full_offsets_ptr + group + 1)):
        start = tl.load(full_start_ptr + i)
        q = _full_tile(q_tiles, q_ptr, b, h, start, q_token, COLUMNS, D, DESCRIPTORS)
        grad = _full_tile(grad_tiles, grad_ptr, b, h, start, grad_token, COLUMNS, D, DESCRIPTORS)
        lse = tl.load(lse_ptr + start + column) * LOG2_E
        inner = tl.load(inner_ptr + start + column)
        dk, dv = _key_step(k, v, q, grad, lse, inner, None, dk, dv, scale_log2, MASKED=False)

    for i in tl.range(_num_dense_tiles(group, dense_group, num_dense, TAIL)):
        q = _dense_tile(q_dense_tiles, q_dense_ptr, b, h, batch_head, i, num_dense, TAIL, D, DESCRIPTORS)
        grad = _dense_tile(grad_dense_tiles, grad_dense_ptr, b, h, batch_head, i, num_dense, TAIL, D, DESCRIPTORS)
        place = i * TAIL + tl.arange(0, TAIL)
        sees = place < num_dense
        columns = tl.load(dense_columns_ptr + place, mask=sees, other=0)
        lse = tl.load(lse_ptr + columns, mask=sees, other=0.0) * LOG2_E
        inner = tl.load(inner_ptr + columns, mask=sees, other=0.0)
        dk, dv = _key_step(k, v, q, grad, lse, inner, sees, dk, dv, scale_log2, MASKED=True)

    for i in tl.range(tl.load(tail_offsets_ptr + group), tl.load(tail_offsets_ptr + group + 1)):
        columns, sees = _tail(i, tail_start_ptr, tail_length_ptr, TAIL)
        q = tl.load(q_ptr + columns[:, None] * q_token + d[None, :], mask=sees[:, None], other=0.0)
        grad = tl.load(grad_ptr + columns[:, None] * grad_token + d[None, :], mask=sees[:, None], other=0.0)
        lse = tl.load(lse_ptr + columns, mask=sees, other=0.0) * LOG2_E
        inner = tl.load(inner_ptr + columns, mask=sees, other=0.0)
        dk, dv = _key_step(k, v, q, grad, lse, inner, sees, dk, dv, scale_log2, MASKED=True)

    dk_ptr += b64 * dk_batch + h64 * dk_head
    dv_ptr += b64 * dv_batch + h64 * dv_head
    tl.store(
        dk_ptr + rows[:, None] * dk_token + d[None, :], (dk * scale).to(dk_ptr.dtype.element_ty), mask=exists[:, None]
    )
    tl.store(dv_ptr + rows[:, None] * dv_token + d[None, :], dv.to(dv_ptr.dtype.element_ty), mask=exists[:, None])
