// Attention over the visible key tokens of frames, on Apple GPUs: the forward pass, and the backward without atomics.
//
// One source serves every variant. Three macros come before it: ELEMENT is half, bfloat or float; HEAD_SIZE is 64 or
// 128; BACKWARD is 0 or 1. It is C++14 and needs Metal 3.1; 3.2 and 4.0 take it too.
//
// A threadgroup of four simdgroups owns a tile of 32 rows of one head, each simdgroup a strip of 8 of them. It walks
// the runs of columns that these rows see, a tile of columns at a time: the columns go to threadgroup memory, all else
// is held in registers as float. In the forward pass and for the gradient of q, rows are queries and columns are keys;
// for the gradients of k and v it is the other way round, along the transposed layout.
//
// The host describes the work:
//   tiles[t]   (start, count, first run, end of runs): the rows of a tile, 32 at most, and the runs that they see
//   runs[r]    (start, count): columns
// A start of 0 or more means the tokens start, start + 1, ...; a start below 0 means those that a list of tokens names
// from entry ~start on.
//
// The loop is that of FlashAttention-2 (Dao, 2023), with the tiles in threadgroup memory as Apple's MLX has them.

#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

using namespace metal;

#define UNROLL _Pragma("clang loop unroll(full)")

constant constexpr int SIMDGROUPS = 4;
constant constexpr int THREADS = 32 * SIMDGROUPS;
constant constexpr int COLUMNS = HEAD_SIZE == 64 ? 32 : 16;
constant constexpr int COLUMN_BLOCKS = COLUMNS / 8;
constant constexpr int BLOCKS = HEAD_SIZE / 8;

// Elements between two columns in threadgroup memory: 16 bytes more than a column has, so that banks differ.
constant constexpr int LINE = HEAD_SIZE + 16 / int(sizeof(ELEMENT));

constant constexpr float LOG2_E = 1.44269504088896340736f;
constant constexpr float LN_2 = 0.69314718055994530942f;

// The score of a column that does not exist: below all others. Finite, as fast math may assume that nothing is infinite.
constant constexpr float HIDDEN = -3.40282347e+38f;

struct Strides {
  long batch, head, token;
};

// What a lane holds of an 8x8 matrix: row `row`, columns `column` and `column + 1`.
struct Place {
  int row, column;
};

METAL_FUNC Place place_of(uint lane) {
  const int quad = int(lane) / 4;
  return Place{(quad & 4) + int(lane) / 2 % 4, (quad & 2) * 2 + int(lane) % 2 * 2};
}

METAL_FUNC long token_at(int start, int i, const device int* named) {
  return start >= 0 ? long(start) + i : long(named[~start + i]);
}

METAL_FUNC long head_offset(const constant Strides& strides, uint3 group) {
  return long(group.z) * strides.batch + long(group.y) * strides.head;
}

template <typename T>
METAL_FUNC float power_of_2(float x) {
  return fast::exp2(x);
}

template <>
METAL_FUNC float power_of_2<float>(float x) {
  return precise::exp2(x);
}

// The four lanes that hold a row differ in bits 0 and 3.
METAL_FUNC float row_max(float2 x) {
  const float pair = max(x.x, x.y);
  const float half_row = max(pair, simd_shuffle_xor(pair, ushort(1)));
  return max(half_row, simd_shuffle_xor(half_row, ushort(8)));
}

METAL_FUNC float row_sum(float2 x) {
  const float pair = x.x + x.y;
  const float half_row = pair + simd_shuffle_xor(pair, ushort(1));
  return half_row + simd_shuffle_xor(half_row, ushort(8));
}

// sum += a b, all three 8x8 matrices.
METAL_FUNC void multiply_add(thread float2& sum, float2 a, float2 b) {
  simdgroup_matrix<float, 8, 8> left, right, result;
  reinterpret_cast<thread float2&>(left.thread_elements()) = a;
  reinterpret_cast<thread float2&>(right.thread_elements()) = b;
  reinterpret_cast<thread float2&>(result.thread_elements()) = sum;
  simdgroup_multiply_accumulate(result, left, right, result);
  sum = reinterpret_cast<thread float2&>(result.thread_elements());
}

// The products of 8 rows with 8 columns, of which `lines` is the first.
METAL_FUNC float2 inner_products(const thread float2* rows, const threadgroup ELEMENT* lines, Place at) {
  const threadgroup ELEMENT* line = lines + at.column * LINE + at.row;
  float2 sum = float2(0.0f);
  UNROLL
  for (int d = 0; d < BLOCKS; d++) {
    multiply_add(sum, rows[d], float2(float(line[d * 8]), float(line[LINE + d * 8])));
  }
  return sum;
}

// Adds to 8 rows the sums of a tile's columns, each with its weight. A tile is summed apart: the error of float grows with
// the number of terms that one sum takes up one after the other.
METAL_FUNC void add_weighted(
    thread float2* rows, const thread float2* weights, const threadgroup ELEMENT* lines, Place at) {
  const threadgroup ELEMENT* line = lines + at.row * LINE + at.column;
  UNROLL
  for (int d = 0; d < BLOCKS; d++) {
    float2 sum = float2(0.0f);
    UNROLL
    for (int c = 0; c < COLUMN_BLOCKS; c++) {
      const int i = c * 8 * LINE + d * 8;
      multiply_add(sum, weights[c], float2(float(line[i]), float(line[i + 1])));
    }
    rows[d] += sum;
  }
}

// Scores in units of log2, from products; those behind `count` are hidden.
METAL_FUNC float2 scores_of(float2 products, float factor, int column, int count) {
  return float2(column < count ? products.x * factor : HIDDEN, column + 1 < count ? products.y * factor : HIDDEN);
}

METAL_FUNC void clear(thread float2* rows) {
  UNROLL
  for (int d = 0; d < BLOCKS; d++) {
    rows[d] = float2(0.0f);
  }
}

// Reads what the lane holds of a row; zeros if there is no such row.
METAL_FUNC void load_row(thread float2* row, const device ELEMENT* x, bool exists, Place at) {
  UNROLL
  for (int d = 0; d < BLOCKS; d++) {
    const int i = d * 8 + at.column;
    row[d] = exists ? float2(float(x[i]), float(x[i + 1])) : float2(0.0f);
  }
}

METAL_FUNC void store_row(device ELEMENT* x, const thread float2* row, float factor, Place at) {
  UNROLL
  for (int d = 0; d < BLOCKS; d++) {
    const int i = d * 8 + at.column;
    x[i] = ELEMENT(row[d].x * factor);
    x[i + 1] = ELEMENT(row[d].y * factor);
  }
}

// Copies columns first ... first + count - 1 of a run, and zeros up to a full tile; what lies behind is never read.
METAL_FUNC void load_columns(
    threadgroup ELEMENT* lines,
    const device ELEMENT* x,
    long stride,
    int start,
    int first,
    int count,
    const device int* named,
    int index) {
  constexpr int PIECE = 8;
  constexpr int PIECES = HEAD_SIZE / PIECE;
  for (int i = index; i < COLUMNS * PIECES; i += THREADS) {
    const int column = i / PIECES;
    const int d = i % PIECES * PIECE;
    threadgroup ELEMENT* line = lines + column * LINE + d;
    if (column < count) {
      const device ELEMENT* source = x + token_at(start, first + column, named) * stride + d;
      UNROLL
      for (int j = 0; j < PIECE; j++) {
        line[j] = source[j];
      }
    } else {
      UNROLL
      for (int j = 0; j < PIECE; j++) {
        line[j] = ELEMENT(0.0f);
      }
    }
  }
}

#if !BACKWARD

struct ForwardStrides {
  Strides q, k, v, out;
};

// out = softmax(scale q k^T) v and lse = log sum exp(scale q k^T), over the visible keys.
[[kernel, max_total_threads_per_threadgroup(THREADS)]] void attention_forward(
    const device ELEMENT* q [[buffer(0)]],
    const device ELEMENT* k [[buffer(1)]],
    const device ELEMENT* v [[buffer(2)]],
    device ELEMENT* out [[buffer(3)]],
    device float* lse [[buffer(4)]],
    const device int4* tiles [[buffer(5)]],
    const device int2* runs [[buffer(6)]],
    const device int* row_tokens [[buffer(7)]],
    const device int* column_tokens [[buffer(8)]],
    const constant ForwardStrides& strides [[buffer(9)]],
    const constant long& num_queries [[buffer(10)]],
    const constant float& scale [[buffer(11)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]],
    uint strip [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup ELEMENT k_lines[COLUMNS * LINE];
  threadgroup ELEMENT v_lines[COLUMNS * LINE];

  const int index = int(strip * 32 + lane);
  const Place at = place_of(lane);
  const int4 tile = tiles[group.x];
  const int row = int(strip) * 8 + at.row;
  const bool exists = row < tile.y;
  const long query = exists ? token_at(tile.x, row, row_tokens) : 0;
  const device ELEMENT* k_head = k + head_offset(strides.k, group);
  const device ELEMENT* v_head = v + head_offset(strides.v, group);

  float2 q_row[BLOCKS], out_row[BLOCKS];
  load_row(q_row, q + head_offset(strides.q, group) + query * strides.q.token, exists, at);
  clear(out_row);
  float highest = HIDDEN;       // of the row's scores so far, which are in units of log2
  float2 total = float2(0.0f);  // of the weights that the lane has had, relative to the highest score
  float2 excess = float2(0.0f);  // by how much that is too large

  for (int r = tile.z; r < tile.w; r++) {
    const int2 run = runs[r];
    for (int first = 0; first < run.y; first += COLUMNS) {
      const int count = min(COLUMNS, run.y - first);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      load_columns(k_lines, k_head, strides.k.token, run.x, first, count, column_tokens, index);
      load_columns(v_lines, v_head, strides.v.token, run.x, first, count, column_tokens, index);
      threadgroup_barrier(mem_flags::mem_threadgroup);

      float2 weights[COLUMN_BLOCKS];
      float2 largest = float2(highest);
      UNROLL
      for (int c = 0; c < COLUMN_BLOCKS; c++) {
        const float2 products = inner_products(q_row, k_lines + c * 8 * LINE, at);
        weights[c] = scores_of(products, scale * LOG2_E, c * 8 + at.column, count);
        largest = max(largest, weights[c]);
      }
      float2 tile_total = float2(0.0f);
      const float higher = row_max(largest);
      const float shrink = power_of_2<ELEMENT>(highest - higher);
      highest = higher;

      UNROLL
      for (int d = 0; d < BLOCKS; d++) {
        out_row[d] *= shrink;
      }
      UNROLL
      for (int c = 0; c < COLUMN_BLOCKS; c++) {
        weights[c].x = power_of_2<ELEMENT>(weights[c].x - highest);
        weights[c].y = power_of_2<ELEMENT>(weights[c].y - highest);
        tile_total += weights[c];
      }
      // What an addition rounds off is added with the next tile (Kahan, 1965).
      const float2 before = total * shrink;
      const float2 added = tile_total - excess * shrink;
      total = before + added;
      excess = (total - before) - added;
      add_weighted(out_row, weights, v_lines, at);
    }
  }

  const float row_total = row_sum(total);
  if (exists) {
    const bool sees = row_total != 0.0f;  // also where it is NaN
    device ELEMENT* out_token = out + head_offset(strides.out, group) + query * strides.out.token;
    store_row(out_token, out_row, sees ? 1.0f / row_total : 0.0f, at);
    if (at.column == 0) {
      const long head = long(group.z) * groups.y + group.y;
      lse[head * num_queries + query] = sees ? (highest + precise::log2(row_total)) * LN_2 : -INFINITY;
    }
  }
}

#else

struct QueryStrides {
  Strides q, k, v, out, grad, dq;
};

// dq = scale p (grad v^T - inner) k, with p = exp(scale q k^T - lse) and inner = grad . out - grad_lse, also written.
[[kernel, max_total_threads_per_threadgroup(THREADS)]] void attention_backward_queries(
    const device ELEMENT* q [[buffer(0)]],
    const device ELEMENT* k [[buffer(1)]],
    const device ELEMENT* v [[buffer(2)]],
    const device ELEMENT* out [[buffer(3)]],
    const device ELEMENT* grad [[buffer(4)]],
    const device float* lse [[buffer(5)]],
    const device float* grad_lse [[buffer(6)]],
    device float* inner [[buffer(7)]],
    device ELEMENT* dq [[buffer(8)]],
    const device int4* tiles [[buffer(9)]],
    const device int2* runs [[buffer(10)]],
    const device int* row_tokens [[buffer(11)]],
    const device int* column_tokens [[buffer(12)]],
    const constant QueryStrides& strides [[buffer(13)]],
    const constant long& num_queries [[buffer(14)]],
    const constant float& scale [[buffer(15)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]],
    uint strip [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup ELEMENT k_lines[COLUMNS * LINE];
  threadgroup ELEMENT v_lines[COLUMNS * LINE];

  const int index = int(strip * 32 + lane);
  const Place at = place_of(lane);
  const int4 tile = tiles[group.x];
  const int row = int(strip) * 8 + at.row;
  const bool exists = row < tile.y;
  const long query = exists ? token_at(tile.x, row, row_tokens) : 0;
  const long statistic = (long(group.z) * groups.y + group.y) * num_queries + query;
  const device ELEMENT* k_head = k + head_offset(strides.k, group);
  const device ELEMENT* v_head = v + head_offset(strides.v, group);

  float2 q_row[BLOCKS], grad_row[BLOCKS], dq_row[BLOCKS];
  load_row(q_row, q + head_offset(strides.q, group) + query * strides.q.token, exists, at);
  load_row(grad_row, grad + head_offset(strides.grad, group) + query * strides.grad.token, exists, at);

  // The output is needed only here, so the gradient's registers hold it first.
  load_row(dq_row, out + head_offset(strides.out, group) + query * strides.out.token, exists, at);
  float2 sum = float2(0.0f);
  UNROLL
  for (int d = 0; d < BLOCKS; d++) {
    sum += dq_row[d] * grad_row[d];
  }
  const float row_inner = row_sum(sum) - (exists ? grad_lse[statistic] : 0.0f);
  const float row_lse = exists ? lse[statistic] * LOG2_E : 0.0f;
  clear(dq_row);

  for (int r = tile.z; r < tile.w; r++) {
    const int2 run = runs[r];
    for (int first = 0; first < run.y; first += COLUMNS) {
      const int count = min(COLUMNS, run.y - first);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      load_columns(k_lines, k_head, strides.k.token, run.x, first, count, column_tokens, index);
      load_columns(v_lines, v_head, strides.v.token, run.x, first, count, column_tokens, index);
      threadgroup_barrier(mem_flags::mem_threadgroup);

      float2 changes[COLUMN_BLOCKS];
      UNROLL
      for (int c = 0; c < COLUMN_BLOCKS; c++) {
        const float2 products = inner_products(q_row, k_lines + c * 8 * LINE, at);
        const float2 scores = scores_of(products, scale * LOG2_E, c * 8 + at.column, count);
        const float2 grads = inner_products(grad_row, v_lines + c * 8 * LINE, at);
        changes[c].x = power_of_2<ELEMENT>(scores.x - row_lse) * (grads.x - row_inner);
        changes[c].y = power_of_2<ELEMENT>(scores.y - row_lse) * (grads.y - row_inner);
      }
      add_weighted(dq_row, changes, k_lines, at);
    }
  }

  if (exists) {
    store_row(dq + head_offset(strides.dq, group) + query * strides.dq.token, dq_row, scale, at);
    if (at.column == 0) {
      inner[statistic] = row_inner;
    }
  }
}

struct KeyStrides {
  Strides q, k, v, grad, dk, dv;
};

// dv = p^T grad and dk = scale (p (grad v^T - inner))^T q: rows are keys, columns are the queries that see them.
[[kernel, max_total_threads_per_threadgroup(THREADS)]] void attention_backward_keys(
    const device ELEMENT* q [[buffer(0)]],
    const device ELEMENT* k [[buffer(1)]],
    const device ELEMENT* v [[buffer(2)]],
    const device ELEMENT* grad [[buffer(3)]],
    const device float* lse [[buffer(4)]],
    const device float* inner [[buffer(5)]],
    device ELEMENT* dk [[buffer(6)]],
    device ELEMENT* dv [[buffer(7)]],
    const device int4* tiles [[buffer(8)]],
    const device int2* runs [[buffer(9)]],
    const device int* row_tokens [[buffer(10)]],
    const device int* column_tokens [[buffer(11)]],
    const constant KeyStrides& strides [[buffer(12)]],
    const constant long& num_queries [[buffer(13)]],
    const constant float& scale [[buffer(14)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]],
    uint strip [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup ELEMENT q_lines[COLUMNS * LINE];
  threadgroup ELEMENT grad_lines[COLUMNS * LINE];
  threadgroup float column_lse[COLUMNS];
  threadgroup float column_inner[COLUMNS];

  const int index = int(strip * 32 + lane);
  const Place at = place_of(lane);
  const int4 tile = tiles[group.x];
  const int row = int(strip) * 8 + at.row;
  const bool exists = row < tile.y;
  const long key = exists ? token_at(tile.x, row, row_tokens) : 0;
  const long statistics = (long(group.z) * groups.y + group.y) * num_queries;
  const device ELEMENT* q_head = q + head_offset(strides.q, group);
  const device ELEMENT* grad_head = grad + head_offset(strides.grad, group);

  float2 k_row[BLOCKS], v_row[BLOCKS], dk_row[BLOCKS], dv_row[BLOCKS];
  load_row(k_row, k + head_offset(strides.k, group) + key * strides.k.token, exists, at);
  load_row(v_row, v + head_offset(strides.v, group) + key * strides.v.token, exists, at);
  clear(dk_row);
  clear(dv_row);

  for (int r = tile.z; r < tile.w; r++) {
    const int2 run = runs[r];
    for (int first = 0; first < run.y; first += COLUMNS) {
      const int count = min(COLUMNS, run.y - first);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      load_columns(q_lines, q_head, strides.q.token, run.x, first, count, column_tokens, index);
      load_columns(grad_lines, grad_head, strides.grad.token, run.x, first, count, column_tokens, index);
      if (index < COLUMNS) {
        const bool column_exists = index < count;
        const long query = statistics + (column_exists ? token_at(run.x, first + index, column_tokens) : 0);
        column_lse[index] = column_exists ? lse[query] * LOG2_E : 0.0f;
        column_inner[index] = column_exists ? inner[query] : 0.0f;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);

      float2 weights[COLUMN_BLOCKS], changes[COLUMN_BLOCKS];
      UNROLL
      for (int c = 0; c < COLUMN_BLOCKS; c++) {
        const int column = c * 8 + at.column;
        const float2 products = inner_products(k_row, q_lines + c * 8 * LINE, at);
        weights[c] = scores_of(products, scale * LOG2_E, column, count);
        weights[c].x = power_of_2<ELEMENT>(weights[c].x - column_lse[column]);
        weights[c].y = power_of_2<ELEMENT>(weights[c].y - column_lse[column + 1]);
        const float2 grads = inner_products(v_row, grad_lines + c * 8 * LINE, at);
        changes[c].x = weights[c].x * (grads.x - column_inner[column]);
        changes[c].y = weights[c].y * (grads.y - column_inner[column + 1]);
      }
      add_weighted(dv_row, weights, grad_lines, at);
      add_weighted(dk_row, changes, q_lines, at);
    }
  }

  if (exists) {
    store_row(dk + head_offset(strides.dk, group) + key * strides.dk.token, dk_row, scale, at);
    store_row(dv + head_offset(strides.dv, group) + key * strides.dv.token, dv_row, 1.0f, at);
  }
}

#endif
