// What the backward kernels share. Each owns tiles of 128 rows and streams the columns that these rows see:
//
//                       rows     columns   owns
//   backward_keys       K, V     Q, dO     dK, dV (and adds to dQ with ACCUMULATE_QUERIES)
//   backward_queries    Q, dO    K, V      dQ
//
// so that in both scores = rows[0] columns[0]^T, dP = rows[1] columns[1]^T, p = exp2(scores * scale_log2 - lse) and
// dS = p (dP - inner). One warpgroup loads, two compute 64 rows each.
#pragma once

#include "work.cuh"

constexpr int D = HEAD_SIZE;
constexpr int PANELS = D / 64;
constexpr int ROWS = 128;
constexpr int COLUMNS = D == 64 ? 128 : 64; // of one step
constexpr int LOADING_WARPS = 4, COMPUTING_WARPS = 8;
constexpr uint32 ROW_TILE = ROWS * D * sizeof(Element);
constexpr uint32 COLUMN_TILE = COLUMNS * D * sizeof(Element);
constexpr uint32 PANEL = COLUMNS * SWIZZLE_ROW; // of a column tile

DEVICE float infinity() { return __int_as_float(0x7f800000); }

struct Parameters {
  TensorMap row_maps[2];    // boxes of [64, ROWS]
  TensorMap column_maps[2]; // boxes of [64, COLUMNS]
  Tensor4 rows[2], columns[2];
  Tensor4 gradients[2];     // dK, dV, or dQ
  const float* lse;         // [batch_heads, num_queries], in units of log2
  const float* inner;       // [batch_heads, num_queries], dO . out - dLSE
  float* dq_sum;            // [batch_heads, PANELS, num_queries, 64], see `workspace_piece`
  Layout layout;
  int num_queries;
  float scale, scale_log2;
};

// ---- PTX that only the backward needs ----

// x [64, 64] (+)= A B; both in shared memory, read along tokens. Without ADD x is overwritten.
template <bool ADD>
DEVICE void wgmma_along_tokens(float (&x)[32], uint64 a, uint64 b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n" WGMMA(64) "{" NAMES_32 "}, %32, %33, add, 1, 1, 1, 1;\n}\n"
               : ACCUMULATORS_32(x, 0)
               : "l"(a), "l"(b), "n"(ADD ? 1 : 0));
}

// Write four 8 x 8 matrices, the places of an A operand; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void store_matrices(uint32 shared, const uint32* x) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

DEVICE void store_shared(uint32 shared, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared), "f"(x), "f"(y) : "memory");
}

DEVICE uint32 load_word(uint32 shared) {
  uint32 x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(shared) : "memory");
  return x;
}

DEVICE float4 load_floats(uint32 shared) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(shared)
               : "memory");
  return x;
}

// Add `bytes` of floats to global memory.
DEVICE void reduce_bulk(float* global, uint32 shared, uint32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(shared),
               "r"(bytes)
               : "memory");
}

DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until this thread's bulk copies have read shared memory.
DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// The same x, of which the compiler knows nothing: what follows from it is computed anew, not kept in registers.
DEVICE int forget(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- tiles ----

template <int TOKENS>
DEVICE void load_tile(uint32 shared, const TensorMap* map, uint32 barrier, const Work& work, int token) {
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel) {
    load_box(shared + panel * TOKENS * SWIZZLE_ROW, map, barrier, panel * 64, token, work.head, work.batch);
  }
}

// Each of the 4 warps copies TOKENS / 4 rows; its lane l knows the token of the l-th.
template <int TOKENS>
DEVICE void gather_tile(uint32 shared, const Tensor4& tensor, const Work& work, int token) {
  const Element* head = tensor.at(work.batch, work.head);
  const int thread = forget(threadIdx.x) % WARPGROUP, first = thread / 32 * (TOKENS / 4);
#pragma unroll 1
  for (int r = thread % 32 / 8; r < TOKENS / 4; r += 4) {
    copy_row<D>(shared, TOKENS, head, tensor.token, first + r, __shfl_sync(0xffffffff, token, r), thread);
  }
}

// Floats of columns are kept so that a thread finds the four of its places in 16 columns side by side.
DEVICE int statistic_place(int column) {
  return column / 16 * 16 + column % 8 / 2 * 4 + column % 16 / 8 * 2 + column % 2;
}

// dQ is summed up in panels of 64 floats of a token: 32-byte piece i lies at i ^ (token & 3), which frees the stores
// to shared memory of bank conflicts.
DEVICE int workspace_piece(int i, int token) { return i ^ (token & 3); }

// A place in a ring of stages, or of one buffer.
template <int STAGES>
struct Ring {
  uint32 index = 0, parity = 0;

  DEVICE_MEMBER void next() {
    if (++index == STAGES) index = 0, parity ^= 1;
  }
};

// Shared memory: row tiles, stages of column tiles, stages of statistics, what the kernel adds, barriers.
template <int STAGES_, bool STATISTICS, uint32 EXTRA>
struct Memory {
  static constexpr int STAGES = STAGES_;
  static constexpr bool HAS_STATISTICS = STATISTICS;
  static constexpr uint32 STATISTIC = COLUMNS * sizeof(float);
  static constexpr uint32 STAGE = 2 * COLUMN_TILE;
  static constexpr uint32 STATISTICS_STAGE = STATISTICS ? 3 * STATISTIC : 0; // lse, inner, tokens
  static constexpr uint32 COLUMNS_AT = 2 * ROW_TILE;
  static constexpr uint32 EXTRA_AT = COLUMNS_AT + STAGES * STAGE;
  static constexpr uint32 STATISTICS_AT = EXTRA_AT + EXTRA;
  static constexpr uint32 BARRIERS_AT = STATISTICS_AT + STAGES * STATISTICS_STAGE;
  static constexpr uint32 BYTES = BARRIERS_AT + 8 * (2 * STAGES + 2);
  static_assert(BYTES <= 227 * 1024);

  uint32 base;

  DEVICE_MEMBER uint32 row_tile(int i) const { return base + i * ROW_TILE; }
  DEVICE_MEMBER uint32 column_tile(uint32 stage, int i) const {
    return base + COLUMNS_AT + stage * STAGE + i * COLUMN_TILE;
  }
  DEVICE_MEMBER uint32 extra() const { return base + EXTRA_AT; }
  DEVICE_MEMBER uint32 statistics(uint32 stage) const { return base + STATISTICS_AT + stage * STATISTICS_STAGE; }
  DEVICE_MEMBER uint32 full(uint32 stage) const { return base + BARRIERS_AT + 8 * stage; }
  DEVICE_MEMBER uint32 empty(uint32 stage) const { return full(stage) + 8 * STAGES; }
  DEVICE_MEMBER uint32 rows_full() const { return full(2 * STAGES); }
  DEVICE_MEMBER uint32 rows_empty() const { return full(2 * STAGES + 1); }

  DEVICE_MEMBER void initialize() const {
    if (threadIdx.x == 0) {
      for (uint32 stage = 0; stage < STAGES; ++stage) {
        barrier_init(full(stage), LOADING_WARPS);
        barrier_init(empty(stage), COMPUTING_WARPS);
      }
      barrier_init(rows_full(), LOADING_WARPS);
      barrier_init(rows_empty(), COMPUTING_WARPS);
      barrier_init_fence();
    }
    __syncthreads();
  }
};

// ---- the loading warpgroup ----

// Fill the tiles of two tensors and arrive; `token` is that of the row gather_tile gives this thread.
template <int TOKENS>
DEVICE void fill(
    const TensorMap (&maps)[2], const Tensor4 (&tensors)[2], uint32 shared, uint32 barrier, const Work& work,
    bool is_contiguous, int token) {
  constexpr uint32 TILE = TOKENS * D * sizeof(Element);
  if (!is_contiguous) {
    gather_tile<TOKENS>(shared, tensors[0], work, token);
    gather_tile<TOKENS>(shared + TILE, tensors[1], work, token);
    copy_wait();
    proxy_fence();
  }
  __syncwarp();
  const int thread = threadIdx.x % WARPGROUP;
  if (is_contiguous && thread == 0) {
    barrier_arrive_expect(barrier, 2 * TILE);
    load_tile<TOKENS>(shared, &maps[0], barrier, work, token);
    load_tile<TOKENS>(shared + TILE, &maps[1], barrier, work, token);
  } else if (thread % 32 == 0) {
    barrier_arrive(barrier);
  }
}

template <class Memory>
DEVICE void produce(const Parameters& p, const Memory memory) {
  const int thread = threadIdx.x % WARPGROUP, column = thread / 32 * (COLUMNS / 4) + thread % (COLUMNS / 4);
  Ring<Memory::STAGES> stage;
  Ring<1> tile;
  for (int item = blockIdx.x; item < p.layout.num_row_tiles * p.layout.batch_heads; item += gridDim.x) {
    const Work work(p.layout, item);
    if (work.columns == 0) continue;
    barrier_wait(memory.rows_empty(), tile.parity ^ 1);
    fill<ROWS>(
        p.row_maps, p.rows, memory.row_tile(0), memory.rows_full(), work,
        work.length == ROWS && work.group != p.layout.dense_group,
        thread < work.length ? work.token(p.layout, thread) : -1);
    tile.next();

    Cursor cursor(p.layout, work.group);
    for (int place = 0; place < work.columns; place += COLUMNS) {
      const bool is_contiguous = cursor.is_contiguous(COLUMNS);
      Cursor mine = cursor;
      mine.advance(p.layout, work.group, column);
      const int token = mine.token(p.layout);
      cursor.advance(p.layout, work.group, COLUMNS);
      float lse = infinity(), inner = 0; // behind the end p = exp2(-inf) = 0
      if (Memory::HAS_STATISTICS && token >= 0) {
        const int64 at = static_cast<int64>(work.batch * p.layout.heads + work.head) * p.num_queries + token;
        lse = p.lse[at];
        inner = p.inner[at];
      }
      barrier_wait(memory.empty(stage.index), stage.parity ^ 1);
      if (Memory::HAS_STATISTICS) {
        const uint32 statistics = memory.statistics(stage.index);
        store_shared(statistics + 4 * statistic_place(column), __float_as_uint(lse));
        store_shared(statistics + Memory::STATISTIC + 4 * statistic_place(column), __float_as_uint(inner));
        store_shared(statistics + 2 * Memory::STATISTIC + 4 * column, token);
      }
      fill<COLUMNS>(
          p.column_maps, p.columns, memory.column_tile(stage.index, 0), memory.full(stage.index), work, is_contiguous,
          token);
      stage.next();
    }
  }
}

// ---- the computing warpgroups ----

// This warp has done with what the barrier guards.
DEVICE void release(uint32 barrier) {
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// x [64, COLUMNS] = A B^T of 64 rows and a column tile.
DEVICE void multiply(float (&x)[COLUMNS / 2], uint32 rows, uint32 columns) {
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel) {
    const uint64 a = descriptor(rows + panel * ROWS * SWIZZLE_ROW), b = descriptor(columns + panel * PANEL);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (panel == 0 && k == 0) {
        wgmma_along_d<false>(x, a, b);
      } else {
        wgmma_along_d<true>(x, a + k * ALONG_D, b + k * ALONG_D);
      }
    }
  }
}

// x [64, D] += A B of A in registers, [64, COLUMNS], and a column tile.
DEVICE void multiply_add(float (&x)[D / 2], const uint32 (&a)[COLUMNS / 4], uint32 columns) {
#pragma unroll
  for (int k = 0; k < COLUMNS / 16; ++k) {
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
      wgmma_64x64(&x[32 * panel], &a[4 * k], descriptor(columns + panel * PANEL) + k * ALONG_TOKENS);
    }
  }
}

// Of the words of 4 lanes in 4 places, lane l gets those in place l, in the order of the lanes.
DEVICE uint4 transpose_quad(uint32 x0, uint32 x1, uint32 x2, uint32 x3) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const uint32 y0 = __shfl_xor_sync(0xffffffff, odd ? x0 : x1, 1), y1 = __shfl_xor_sync(0xffffffff, odd ? x2 : x3, 1);
  if (odd) x0 = y0, x2 = y1;
  else x1 = y0, x3 = y1;
  const uint32 z0 = __shfl_xor_sync(0xffffffff, high ? x0 : x2, 2), z1 = __shfl_xor_sync(0xffffffff, high ? x1 : x3, 2);
  return high ? make_uint4(z0, z1, x2, x3) : make_uint4(x0, x1, z0, z1);
}

// Write factor * x [64, D], the gradients of rows `first` to `first` + 63 of the tile.
DEVICE void store_gradients(
    const Tensor4& out, const float (&x)[D / 2], float factor, const Layout& layout, const Work& work, int first) {
  const int thread = forget(threadIdx.x) % WARPGROUP, quad = thread % 32 / 4;
  Element* head = out.at(work.batch, work.head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + thread / 32 * 16 + half * 8 + quad;
    Element* to = head + (row < work.length ? work.token(layout, row) * out.token : 0) + thread % 4 * 8;
#pragma unroll
    for (int i = 0; i < D / 8; i += 4) {
      uint32 y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 4 * (i + j) + 2 * half;
        y[j] = pack(factor * x[at], factor * x[at + 1]);
      }
      const uint4 piece = transpose_quad(y[0], y[1], y[2], y[3]);
      if (row < work.length) *reinterpret_cast<uint4*>(to + 8 * i) = piece;
    }
  }
}
