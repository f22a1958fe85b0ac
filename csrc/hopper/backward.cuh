// What the backward kernels share. Each owns tiles of 128 rows and streams the columns that these rows see:
//
//                       rows     columns   owns
//   backward_keys       K, V     Q, dO     dK, dV (and adds to dQ with ACCUMULATE_QUERIES)
//   backward_queries    Q, dO    K, V      dQ
//
// so that in both scores = rows[0] columns[0]^T - lse, dP = rows[1] columns[1]^T - inner, p = exp2(scores), dS = p dP.
//
// Ordinary instructions are what the tensor cores wait for: the accumulators of dP start at -inner, so that an element
// costs one FFMA, its exponential, a product and half of two conversions.
//
// Of the first warpgroup one warp loads, and the three others copy the tiles that do not lie side by side. Two
// warpgroups compute 64 rows each.
#pragma once

#include "work.cuh"

constexpr int D = HEAD_SIZE;
constexpr int PANELS = D / 64;
constexpr int ROWS = 128;
constexpr int COLUMNS = D == 64 ? 128 : 64; // of one step
constexpr int COPYING_WARPS = 3, COMPUTING_WARPS = 8;
constexpr int LOADING_REGISTERS = 40, COMPUTING_REGISTERS = 232;
constexpr uint32 ROW_TILE = ROWS * D * sizeof(Element);
constexpr uint32 COLUMN_TILE = COLUMNS * D * sizeof(Element);
constexpr uint32 PANEL = COLUMNS * SWIZZLE_ROW; // of a column tile

struct Parameters {
  TensorMap row_maps[2];    // boxes of [64, ROWS]
  TensorMap column_maps[2]; // boxes of [64, COLUMNS]
  Tensor4 rows[2], columns[2];
  Tensor4 gradients[2];     // dK, dV, or dQ
  const float* shifts[2];   // [batch_heads, num_queries]: -lse in units of log2, and -inner
  int* next;                // the next item to be taken, 0 at first
  float* dq_sum;            // [batch_heads, PANELS, num_queries, 64], see `workspace_piece`
  Layout layout;
  int num_queries;
  float scale_log2;         // of scores
  float scale;              // of gradients[0]
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

DEVICE void load_floats(uint32 shared, float& x, float& y) {
  asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(shared) : "memory");
}

DEVICE float4 load_floats(uint32 shared) {
  float4 x;
  asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(shared)
               : "memory");
  return x;
}

// Copy one word, or write zero if not `exists`.
DEVICE void copy_word(uint32 shared, const void* global, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(exists ? 4 : 0)
               : "memory");
}

// Arrive when this thread's copies so far are done.
DEVICE void copy_arrive(uint32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
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

// dQ is summed up in panels of 64 floats of a token: 32-byte piece i lies at i ^ (token & 3), which frees the stores
// to shared memory of bank conflicts.
DEVICE int workspace_piece(int i, int token) { return i ^ (token & 3); }

// -lse and -inner. Of columns, if rows are keys, both lie in order. Of rows only -inner does, as the accumulators want it:
// a thread needs, of each 8-column block, twice that of row r and twice that of r + 8.
enum class Shifts { OF_ROWS, OF_COLUMNS };

template <Shifts SHIFTS>
struct Shift {
  static constexpr bool OF_ROWS = SHIFTS == Shifts::OF_ROWS;
  static constexpr uint32 BYTES = 2 * (OF_ROWS ? ROWS : COLUMNS) * sizeof(float);

  // Byte place of the twins of row i.
  static DEVICE_MEMBER uint32 twins(uint32 i) { return i / 16 * 128 + i % 8 * 16 + i % 16 / 8 * 8; }
};

// Shared memory: buffers of row tiles, stages of column tiles, what the kernel adds; shifts; the tokens of a stage's
// columns, and the first token of columns side by side, else -1; tokens to be copied; what to work on, what to copy;
// barriers.
template <int STAGES_, int ROW_BUFFERS_, Shifts SHIFTS, bool STAGE_TOKENS, uint32 EXTRA>
struct Memory {
  using Shift = ::Shift<SHIFTS>;
  static constexpr int STAGES = STAGES_, ROW_BUFFERS = ROW_BUFFERS_;
  static constexpr bool HAS_STAGE_TOKENS = STAGE_TOKENS;
  static constexpr uint32 STAGE = 2 * COLUMN_TILE;
  static constexpr uint32 COLUMNS_AT = ROW_BUFFERS * 2 * ROW_TILE;
  static constexpr uint32 EXTRA_AT = COLUMNS_AT + STAGES * STAGE;
  static constexpr uint32 SHIFTS_AT = EXTRA_AT + EXTRA;
  static constexpr uint32 TOKENS_AT = SHIFTS_AT + (Shift::OF_ROWS ? ROW_BUFFERS : STAGES) * Shift::BYTES;
  static constexpr uint32 FIRST_TOKENS_AT = TOKENS_AT + (STAGE_TOKENS ? STAGES * 4 * COLUMNS : 0);
  static constexpr uint32 COPIED_TOKENS_AT = FIRST_TOKENS_AT + (STAGE_TOKENS ? 16 : 0);
  static constexpr uint32 WORK_AT = COPIED_TOKENS_AT + 4 * ROWS;
  static constexpr uint32 COPY_AT = WORK_AT + 2 * 32;
  static constexpr uint32 BARRIERS_AT = COPY_AT + 32;
  static constexpr uint32 BYTES = BARRIERS_AT + 8 * (2 * STAGES + 2 * ROW_BUFFERS + (STAGE_TOKENS ? 8 : 4));
  static_assert(BYTES <= 227 * 1024);

  uint32 base;

  DEVICE_MEMBER uint32 row_tile(uint32 buffer, int i) const { return base + (2 * buffer + i) * ROW_TILE; }
  DEVICE_MEMBER uint32 column_tile(uint32 stage, int i) const {
    return base + COLUMNS_AT + stage * STAGE + i * COLUMN_TILE;
  }
  DEVICE_MEMBER uint32 extra() const { return base + EXTRA_AT; }
  DEVICE_MEMBER uint32 shifts(uint32 i) const { return base + SHIFTS_AT + i * Shift::BYTES; } // a buffer or stage
  DEVICE_MEMBER uint32 tokens(uint32 stage) const { return base + TOKENS_AT + stage * 4 * COLUMNS; }
  DEVICE_MEMBER uint32 first_token(uint32 stage) const { return base + FIRST_TOKENS_AT + 4 * stage; }
  DEVICE_MEMBER uint32 copied_tokens() const { return base + COPIED_TOKENS_AT; }
  DEVICE_MEMBER uint32 work(uint32 i) const { return base + WORK_AT + i * 32; }
  DEVICE_MEMBER uint32 copy() const { return base + COPY_AT; }
  DEVICE_MEMBER uint32 full(uint32 stage) const { return base + BARRIERS_AT + 8 * stage; }
  DEVICE_MEMBER uint32 empty(uint32 stage) const { return full(stage) + 8 * STAGES; }
  DEVICE_MEMBER uint32 rows_full(uint32 buffer) const { return full(2 * STAGES + buffer); }
  DEVICE_MEMBER uint32 rows_empty(uint32 buffer) const { return rows_full(buffer) + 8 * ROW_BUFFERS; }
  DEVICE_MEMBER uint32 work_empty(uint32 i) const { return full(2 * STAGES + 2 * ROW_BUFFERS + i); }
  DEVICE_MEMBER uint32 copy_full() const { return work_empty(2); }
  DEVICE_MEMBER uint32 copy_empty() const { return work_empty(3); }
  DEVICE_MEMBER uint32 scores_full(uint32 i) const { return work_empty(4 + i); }
  DEVICE_MEMBER uint32 scores_empty(uint32 i) const { return work_empty(6 + i); }

  DEVICE_MEMBER void initialize() const {
    if (threadIdx.x == 0) {
      for (uint32 stage = 0; stage < STAGES; ++stage) {
        barrier_init(full(stage), 1, Shift::OF_ROWS ? 0 : 32);
        barrier_init(empty(stage), COMPUTING_WARPS);
      }
      for (uint32 buffer = 0; buffer < ROW_BUFFERS; ++buffer) {
        barrier_init(rows_full(buffer), 1, Shift::OF_ROWS ? 32 : 0);
        barrier_init(rows_empty(buffer), COMPUTING_WARPS);
      }
      for (uint32 i = 0; i < 2; ++i) {
        barrier_init(work_empty(i), COMPUTING_WARPS);
        if (STAGE_TOKENS) {
          barrier_init(scores_full(i), COMPUTING_WARPS);
          barrier_init(scores_empty(i), COMPUTING_WARPS);
        }
      }
      barrier_init(copy_full(), 1);
      barrier_init(copy_empty(), COPYING_WARPS);
      barrier_init_fence();
    }
    __syncthreads();
  }
};

// ---- the loading warpgroup ----

enum NamedBarrier { COPIED = 1, WARPGROUP_DONE = 2, TURN = 4 }; // the last two for each computing warpgroup

// The warp that takes items, starts all loads, and tells the others what they are to do.
template <class Memory>
struct Loader {
  // So many column tiles go ahead of their rows, which may have to wait for the only buffer.
  static constexpr int LEAD = Memory::ROW_BUFFERS > 1 ? 0 : Memory::STAGES - 1;

  const Parameters& p;
  const Memory memory;
  const int lane;
  Ring<Memory::STAGES> stage;
  uint32 items = 0, copies = 0; // so far

  DEVICE_MEMBER Loader(const Parameters& p, Memory memory)
      : p(p), memory(memory), lane(threadIdx.x % 32) {}

  DEVICE_MEMBER uint32 buffer() const { return items % Memory::ROW_BUFFERS; }

  DEVICE_MEMBER int next_item() const { return take_item(p.layout, p.next, nullptr); }

  DEVICE_MEMBER void run() {
    int item = next_item();
    while (item >= 0) {
      const Work work(p.layout, item);
      item = next_item();
      Cursor cursor(p.layout, work.group);
      int place = 0;
#pragma unroll 1
      for (int until_rows = LEAD; place < work.columns || until_rows >= 0; --until_rows) {
        if (until_rows == 0) load_rows(work);
        if (place < work.columns) load_columns(work, cursor);
        place += COLUMNS;
      }
    }
    Work end;
    end.columns = -1;
    tell_work(end);
    __syncwarp();
    warp_arrive(memory.rows_full(buffer()));
    if (Memory::Shift::OF_ROWS) copy_arrive(memory.rows_full(buffer()));
    barrier_wait(memory.copy_empty(), copies % 2 ^ 1);
    tell_copy(0, 0, false, end);
  }

  // The computing warpgroups find it when the rows are there; with -1 columns there is no more.
  DEVICE_MEMBER void tell_work(const Work& work) {
    barrier_wait(memory.work_empty(items % 2), items / 2 % 2 ^ 1);
    barrier_wait(memory.rows_empty(buffer()), items / Memory::ROW_BUFFERS % 2 ^ 1);
    if (lane == 0) store_work(memory.work(items % 2), work);
  }

  // Have the tokens in memory.copied_tokens() copied; nothing to copy is the end.
  DEVICE_MEMBER void tell_copy(uint32 shared, uint32 barrier, bool are_columns, const Work& work) {
    __syncwarp();
    if (lane == 0) {
      store_shared(memory.copy(), make_uint4(shared, barrier, are_columns, work.batch));
      store_shared(memory.copy() + 16, make_uint4(work.head, 0, 0, 0));
    }
    __syncwarp();
    warp_arrive(memory.copy_full());
    ++copies;
  }

  DEVICE_MEMBER void load_rows(const Work& work) {
    const int lane = forget(this->lane); // what follows from it is not to be kept in registers
    tell_work(work);
    const uint32 shared = memory.row_tile(buffer(), 0), full = memory.rows_full(buffer());
    const bool is_contiguous = work.length == ROWS && work.group != p.layout.dense_group;
    if (is_contiguous) {
      __syncwarp();
      warp_arrive_expect(full, 2 * ROW_TILE);
      if (lane == 0) {
        load_tile<ROWS>(shared, &p.row_maps[0], full, work, work.start);
        load_tile<ROWS>(shared + ROW_TILE, &p.row_maps[1], full, work, work.start);
      }
    }
    if (!is_contiguous) barrier_wait(memory.copy_empty(), copies % 2 ^ 1);
#pragma unroll 1
    for (int r = lane; (Memory::Shift::OF_ROWS || !is_contiguous) && r < ROWS; r += 32) {
      const int token = r < work.length ? work.token(p.layout, r) : -1;
      if (!is_contiguous) store_shared(memory.copied_tokens() + 4 * r, token);
      if (Memory::Shift::OF_ROWS) {
        copy_shifts(memory.shifts(buffer()), r, first_shift(work) + max(token, 0), token >= 0);
      }
    }
    if (Memory::Shift::OF_ROWS) copy_arrive(full);
    if (!is_contiguous) tell_copy(shared, full, false, work);
    ++items;
  }

  DEVICE_MEMBER void load_columns(const Work& work, Cursor& cursor) {
    const int lane = forget(this->lane);
    const uint32 shared = memory.column_tile(stage.index, 0), full = memory.full(stage.index);
    barrier_wait(memory.empty(stage.index), stage.parity ^ 1);
    const int first = cursor.column();
    if (cursor.is_contiguous(COLUMNS) && !Cursor::is_dense(first)) {
      if (Memory::HAS_STAGE_TOKENS && lane == 0) store_shared(memory.first_token(stage.index), first);
      __syncwarp();
      warp_arrive_expect(full, 2 * COLUMN_TILE);
      if (lane == 0) {
        load_tile<COLUMNS>(shared, &p.column_maps[0], full, work, first);
        load_tile<COLUMNS>(shared + COLUMN_TILE, &p.column_maps[1], full, work, first);
      }
      if (!Memory::Shift::OF_ROWS) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c += 32) {
          copy_shifts(memory.shifts(stage.index), c + lane, first_shift(work) + first + lane + c, true);
        }
      }
      cursor.advance(p.layout, COLUMNS);
    } else {
      barrier_wait(memory.copy_empty(), copies % 2 ^ 1);
      cursor.advance(p.layout, lane);
#pragma unroll 1
      for (int c = lane; c < COLUMNS; c += 32) {
        const int token = cursor.token(p.layout);
        cursor.advance(p.layout, 32);
        store_shared(memory.copied_tokens() + 4 * c, token);
        if (Memory::HAS_STAGE_TOKENS) store_shared(memory.tokens(stage.index) + 4 * c, token);
        if (!Memory::Shift::OF_ROWS) {
          copy_shifts(memory.shifts(stage.index), c, first_shift(work) + max(token, 0), token >= 0);
        }
      }
      if (Memory::HAS_STAGE_TOKENS && lane == 0) store_shared(memory.first_token(stage.index), ~0u);
      tell_copy(shared, full, true, work);
      cursor.run = warp_uniform(cursor.run);
      cursor.place = warp_uniform(cursor.place);
      cursor.start = warp_uniform(cursor.start);
      cursor.length = warp_uniform(cursor.length);
    }
    if (!Memory::Shift::OF_ROWS) copy_arrive(full);
    stage.next();
  }

  DEVICE_MEMBER int64 first_shift(const Work& work) const {
    return static_cast<int64>(work.batch_head(p.layout)) * p.num_queries;
  }

  // Copy the shifts at `at` for row or column i. Without a token they are 0, as are its tiles: then dP = dS = 0.
  DEVICE_MEMBER void copy_shifts(uint32 shifts, int i, int64 at, bool exists) const {
    using Shift = typename Memory::Shift;
    if (Shift::OF_ROWS) {
      copy_word(shifts + Shift::twins(i), p.shifts[1] + at, exists);
      copy_word(shifts + Shift::twins(i) + 4, p.shifts[1] + at, exists);
    } else {
      copy_word(shifts + 4 * i, p.shifts[0] + at, exists);
      copy_word(shifts + Shift::BYTES / 2 + 4 * i, p.shifts[1] + at, exists);
    }
  }
};

// The warps that copy tokens from anywhere, 4 at a time.
template <class Memory>
DEVICE void copy_tokens(const Parameters& p, const Memory memory) {
  const int thread = threadIdx.x - 32, lane = thread % 32;
  for (Ring<1> copy;; copy.next()) {
    barrier_wait(memory.copy_full(), copy.parity);
    const uint4 what = load_shared(memory.copy());
    const uint32 shared = what.x, barrier = what.y;
    if (barrier == 0) break;
    const bool are_columns = what.z;
    const int batch = what.w, head = load_word(memory.copy() + 16), tokens = are_columns ? COLUMNS : ROWS;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const Tensor4& tensor = are_columns ? p.columns[i] : p.rows[i];
      const Element* from = tensor.at(batch, head);
      const uint32 to = shared + i * (are_columns ? COLUMN_TILE : ROW_TILE);
#pragma unroll 2
      for (int r = thread / 8; r < tokens; r += 4 * COPYING_WARPS) {
        copy_row<D>(to, tokens, from, tensor.token, r, load_word(memory.copied_tokens() + 4 * r), lane);
      }
    }
    __syncwarp();
    warp_arrive(memory.copy_empty());
    copy_wait();
    proxy_fence();
    named_sync(COPIED, 32 * COPYING_WARPS);
    if (thread < 32) warp_arrive(barrier);
  }
}

template <class Memory>
DEVICE void load(const Parameters& p, const Memory memory) {
  if (threadIdx.x < 32) Loader<Memory>(p, memory).run();
  else copy_tokens(p, memory);
}

// ---- the computing warpgroups ----

// The two take turns at the tensor cores, so that while one issues products the other computes exponentials; left alone
// they fall into step, and then both wait for either. The turn of warpgroup `index` is a hardware barrier that it waits
// at and the other arrives at.
DEVICE void take_turn(uint32 index) { named_sync(TURN + index, 2 * WARPGROUP); }

DEVICE void pass_turn(uint32 index) {
  asm volatile("bar.arrive %0, %1;" ::"r"(TURN + (index ^ 1)), "r"(2 * WARPGROUP) : "memory");
}

// Before the first turn, which is that of warpgroup 0, and after the last, which it is then offered: by both.
DEVICE void begin_turns() {
  if (threadIdx.x >= 2 * WARPGROUP) pass_turn(1);
}

DEVICE void end_turns() {
  if (threadIdx.x < 2 * WARPGROUP) take_turn(0);
}

// x [64, COLUMNS] (+)= A B^T of 64 rows and a column tile.
template <bool ADD>
DEVICE void multiply(float (&x)[COLUMNS / 2], uint32 rows, uint32 columns) {
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel) {
    const uint64 a = descriptor(rows + panel * ROWS * SWIZZLE_ROW), b = descriptor(columns + panel * PANEL);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (panel == 0 && k == 0) {
        wgmma_along_d<ADD>(x, a, b);
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
