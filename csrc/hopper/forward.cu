// Forward pass: one persistent block per multiprocessor. Macros: HEAD_SIZE; CONSUMERS, warpgroups of 64 rows; COLUMNS of a
// tile; STAGES of the ring; BFLOAT16, or it is float16; ONLINE.
//
// Three warps load: rows of Q, which also hands out the work; K; V. The columns that a tile of rows sees pass as one
// stream, by the copy engine where they lie side by side, row by row where a tile spans runs or dense tokens: every tile
// is full but the last. A consumer warpgroup starts S = Q K^T of a tile together with O += P V of the tile before, and
// turns S into P while that second product runs.
//
// Softmax: with ONLINE, a running maximum (Milakov and Gimelshein, arXiv 1805.02867). Without, weights are exp2(score)
// with no maximum at all, and the proof comes after: a row whose sum lies between SMALLEST and LARGEST lost nothing to
// overflow or underflow. Rows that fail are flagged, and their items done again by the ONLINE kernel. Without ONLINE the
// scale is multiplied into Q, which rounds it to bfloat16 once more: an error of 2^-9 of each product, so of a few
// thousandths of a weight for the scores that the proof lets pass.

#include "work.cuh"

constexpr int D = HEAD_SIZE;
constexpr int PANELS = D / 64;
static_assert(COLUMNS % 32 == 0, "copy_columns takes 32 at a time");
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int ROWS = 64 * CONSUMERS;
constexpr int SCORES = COLUMNS / 2; // of a thread
constexpr int PRODUCER_REGISTERS = CONSUMERS >= 3 ? 32 : 24;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 4 ? 112 : CONSUMERS == 3 ? 160 : 240;

constexpr int Q_BYTES = ROWS * D * 2;
constexpr int TILE_BYTES = COLUMNS * D * 2;
constexpr int Q_PANEL = ROWS * SWIZZLE_ROW;
constexpr int PANEL = COLUMNS * SWIZZLE_ROW;

// What is flushed to zero, at most 2^31 columns of 2^-126, is below 2^-55 of a sum that passes.
constexpr float SMALLEST = 9.094947017729282e-13f; // 2^-40
constexpr float LARGEST = 1.152921504606847e18f;   // 2^60

struct Parameters {
  TensorMap k_map, v_map;
  Tensor4 q, k, v, out;
  float* lse;      // [B, H, N]
  int* next;       // the next item to be taken, 0 at first
  int* any_failed; // 0 at first
  uint8* flags;    // [items, 4 CONSUMERS]: warps whose rows failed; null to do all items
  Layout layout;
  int tokens;
  float scale; // with log2(e)
};

// What lies where in shared memory.
struct Shared {
  uint32 base;

  DEVICE_MEMBER uint32 q(int buffer) const { return base + buffer * Q_BYTES; }
  DEVICE_MEMBER uint32 k(int stage) const { return base + 2 * Q_BYTES + stage * 2 * TILE_BYTES; }
  DEVICE_MEMBER uint32 v(int stage) const { return k(stage) + TILE_BYTES; }
  DEVICE_MEMBER uint32 barriers() const { return base + 2 * Q_BYTES + STAGES * 2 * TILE_BYTES; }
  DEVICE_MEMBER uint32 q_full(int buffer) const { return barriers() + 8 * buffer; }
  DEVICE_MEMBER uint32 q_empty(int buffer) const { return barriers() + 8 * (2 + buffer); }
  DEVICE_MEMBER uint32 work_full(int buffer) const { return barriers() + 8 * (4 + buffer); }
  DEVICE_MEMBER uint32 full(int stage) const { return barriers() + 8 * (6 + stage); }
  DEVICE_MEMBER uint32 empty(int stage) const { return barriers() + 8 * (6 + STAGES + stage); }
  DEVICE_MEMBER uint32 work(int buffer) const { return barriers() + 8 * (6 + 2 * STAGES) + 32 * buffer; }
};

// Position in a ring of N places, and the parity of its round.
template <int N>
struct Ring {
  int place = 0;
  uint32 parity = 0;

  DEVICE_MEMBER void advance() {
    if (++place == N) {
      place = 0;
      parity ^= 1;
    }
  }
};

#if defined(ONLINE)
DEVICE bool failed(const Parameters& p, int item) {
  const uint32* flags = reinterpret_cast<const uint32*>(p.flags) + item * CONSUMERS;
  uint32 any = 0;
#pragma unroll
  for (int i = 0; i < CONSUMERS; ++i) any |= flags[i];
  return any != 0;
}
#endif

DEVICE int num_items(const Parameters& p) { return p.layout.num_row_tiles * p.layout.batch_heads; }

// The next item to work on, for a whole warp; num_items if there is none.
DEVICE int next_item(const Parameters& p) {
  while (true) {
    const int item = min(warp_uniform(threadIdx.x % 32 == 0 ? atomicAdd(p.next, 1) : 0), num_items(p));
#if defined(ONLINE)
    if (item < num_items(p) && p.flags != nullptr && !failed(p, item)) continue;
#endif
    return item;
  }
}

#if !defined(ONLINE)
// Multiply a tile of Q by the scale, so that scores need no multiplication: it is rounded to 16 bits as Q itself was.
DEVICE void scale_rows(uint32 q, float scale) {
#pragma unroll 2
  for (int i = threadIdx.x % 32; i < Q_BYTES / 16; i += 32) {
    uint4 x = load_shared(q + 16 * i);
    x.x = scaled(x.x, scale);
    x.y = scaled(x.y, scale);
    x.z = scaled(x.z, scale);
    x.w = scaled(x.w, scale);
    store_shared(q + 16 * i, x);
  }
}
#endif

// The first of three loading warps: takes items, tells all others what they are, and loads the rows of Q.
DEVICE void produce_rows(const Parameters& p, const Shared& shared) {
  const bool signals = threadIdx.x % 32 == 0;
  for (Ring<2> ring;; ring.advance()) {
    const int item = next_item(p);
    const bool exists = item < num_items(p);
    const Work work = exists ? Work(p.layout, item) : Work();
    barrier_wait(shared.q_empty(ring.place), ring.parity ^ 1);
    if (signals) {
      const uint32 record = shared.work(ring.place);
      store_shared(record, make_uint4(exists ? item : -1, work.group, work.start, work.length));
      store_shared(record + 16, make_uint4(work.batch, work.head, work.columns, 0));
      barrier_arrive(shared.work_full(ring.place));
    }
    if (!exists) break;
    copy_rows<D>(p.layout, work, ROWS, shared.q(ring.place), p.q.at(work.batch, work.head), p.q.token);
    copy_wait();
#if !defined(ONLINE)
    __syncwarp();
    scale_rows(shared.q(ring.place), p.scale);
#endif
    proxy_fence();
    __syncwarp();
    if (signals) barrier_arrive(shared.q_full(ring.place));
  }
}

// Read what produce_rows wrote; false if there is no more work.
DEVICE bool read_work(const Shared& shared, int buffer, Work& work, int& item) {
  const uint4 a = load_shared(shared.work(buffer)), b = load_shared(shared.work(buffer) + 16);
  item = warp_uniform(a.x);
  work.group = warp_uniform(a.y);
  work.start = warp_uniform(a.z);
  work.length = warp_uniform(a.w);
  work.batch = warp_uniform(b.x);
  work.head = warp_uniform(b.y);
  work.columns = warp_uniform(b.z);
  return item >= 0;
}

// The second and third loading warps: stream the tiles of K, and of V (`offset` behind K in a stage).
DEVICE void produce_columns(const Parameters& p, const Shared& shared, const TensorMap& map, const Tensor4& tensor,
                            uint32 offset) {
  const bool signals = threadIdx.x % 32 == 0;
  Ring<2> work_ring;
  Ring<STAGES> ring;
  Work work;
  int item;
  while (true) {
    barrier_wait(shared.work_full(work_ring.place), work_ring.parity);
    const bool exists = read_work(shared, work_ring.place, work, item);
    if (signals) barrier_arrive(shared.q_empty(work_ring.place));
    if (!exists) break;
    work_ring.advance();

    const Element* head = tensor.at(work.batch, work.head);
    Cursor cursor(p.layout, work.group);
    for (int column = 0; column < work.columns; column += COLUMNS) {
      const uint32 tile = shared.k(ring.place) + offset, full = shared.full(ring.place);
      barrier_wait(shared.empty(ring.place), ring.parity ^ 1);
      if (cursor.is_contiguous(COLUMNS)) {
        if (signals) {
          barrier_arrive_expect(full, TILE_BYTES);
#pragma unroll
          for (int i = 0; i < PANELS; ++i) {
            load_box(tile + i * PANEL, &map, full, 64 * i, cursor.start + cursor.place, work.head, work.batch);
          }
        }
      } else {
        copy_columns<D>(p.layout, work.group, cursor, COLUMNS, tile, head, tensor.token);
        copy_wait();
        proxy_fence();
        __syncwarp();
        if (signals) barrier_arrive(full);
      }
      cursor.advance(p.layout, work.group, COLUMNS);
      ring.advance();
    }
  }
}

// Scores of 64 rows and a tile of columns become weights; `sum` and `maximum` belong to the thread's two rows.
struct Softmax {
  float sum[2];
#if defined(ONLINE)
  float maximum[2]; // of the unscaled scores
#endif

  DEVICE_MEMBER void reset() {
    sum[0] = sum[1] = 0.0f;
#if defined(ONLINE)
    maximum[0] = maximum[1] = -__int_as_float(0x7f800000);
#endif
  }

  // Hide the columns from `columns` on.
  DEVICE_MEMBER void hide(float (&s)[SCORES], int columns) const {
    const int first = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < SCORES; ++i) {
      if (8 * (i / 4) + first + i % 2 >= columns) s[i] = -__int_as_float(0x7f800000);
    }
  }

  // Returns by what the output so far shrinks, for each of the two rows.
  DEVICE_MEMBER float2 apply(float (&s)[SCORES], float scale) {
    float2 shrink = {1.0f, 1.0f};
#if defined(ONLINE)
    float shift[2], largest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int i = 0; i < SCORES; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], s[i]);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      largest[row] = fmaxf(largest[row], __shfl_xor_sync(0xffffffff, largest[row], 1));
      largest[row] = fmaxf(largest[row], __shfl_xor_sync(0xffffffff, largest[row], 2));
      shift[row] = largest[row] * scale;
      (row == 0 ? shrink.x : shrink.y) = exp2_approx(maximum[row] * scale - shift[row]);
      maximum[row] = largest[row];
    }
    sum[0] *= shrink.x;
    sum[1] *= shrink.y;
#endif
#pragma unroll
    for (int i = 0; i < SCORES; ++i) {
#if defined(ONLINE)
      s[i] = fmaf(s[i], scale, -shift[i / 2 % 2]);
#endif
      s[i] = exp2_approx(s[i]);
      sum[i / 2 % 2] += s[i];
    }
    return shrink;
  }

  DEVICE_MEMBER void finish() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sum[row] += __shfl_xor_sync(0xffffffff, sum[row], 1);
      sum[row] += __shfl_xor_sync(0xffffffff, sum[row], 2);
    }
  }

  DEVICE_MEMBER float log_sum(int row, float scale) const {
#if defined(ONLINE)
    return (log2_approx(sum[row]) + maximum[row] * scale) * LN_2;
#else
    return log2_approx(sum[row]) * LN_2;
#endif
  }
};

DEVICE void start_scores(float (&s)[SCORES], uint64 q, uint64 k) {
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    const uint64 a = q + (step / 4) * (Q_PANEL >> 4) + (step % 4) * ALONG_D;
    const uint64 b = k + (step / 4) * (PANEL >> 4) + (step % 4) * ALONG_D;
    if (step == 0) {
      wgmma_along_d<false>(s, a, b);
    } else {
      wgmma_along_d<true>(s, a, b);
    }
  }
}

DEVICE void start_output(float (&out)[32 * PANELS], const uint32 (&weights)[SCORES / 2], uint64 v) {
#pragma unroll
  for (int step = 0; step < COLUMNS / 16; ++step) {
#pragma unroll
    for (int i = 0; i < PANELS; ++i) {
      wgmma_64x64(out + 32 * i, weights + 4 * step, v + i * (PANEL >> 4) + step * ALONG_TOKENS);
    }
  }
}

// What a consumer warpgroup carries from tile to tile of one row tile.
struct State {
  float s[SCORES];
  float out[32 * PANELS];
  uint32 weights[SCORES / 2];
  float2 shrink;
  Softmax softmax;
};

// Wait for the last O += P V, release its stage, and turn S into the next P.
DEVICE void finish_output(State& state, uint32 empty) {
  wgmma_wait<0>();
  hold(state.weights);
  hold(state.out);
  if (empty != 0 && threadIdx.x % 32 == 0) barrier_arrive(empty);
#if defined(ONLINE)
#pragma unroll
  for (int i = 0; i < 32 * PANELS; ++i) state.out[i] *= i / 2 % 2 == 0 ? state.shrink.x : state.shrink.y;
#endif
#pragma unroll
  for (int i = 0; i < SCORES / 2; ++i) state.weights[i] = pack(state.s[2 * i], state.s[2 * i + 1]);
  hold(state.weights);
  hold(state.out);
}

// All tiles of columns of one row tile, `left` columns in all.
DEVICE void sweep(const Parameters& p, const Shared& shared, uint32 q_rows, State& state, Ring<STAGES>& ring, int left) {
  const uint64 q = descriptor(q_rows), k = descriptor(shared.k(0)), v = descriptor(shared.v(0));
  constexpr int STAGE = 2 * TILE_BYTES >> 4; // from descriptor to descriptor
  barrier_wait(shared.full(ring.place), ring.parity);
  wgmma_fence();
  start_scores(state.s, q, k + ring.place * STAGE);
  wgmma_commit();
  wgmma_wait<0>();
  hold(state.s);
  if (left < COLUMNS) state.softmax.hide(state.s, left);
  state.shrink = state.softmax.apply(state.s, p.scale);
  // ptxas moves a wait up within straight code, so the wait for the output stands at the loop's head, behind a branch.
  uint32 empty = 0;
  for (left -= COLUMNS; left > 0; left -= COLUMNS) {
    const int stage = ring.place;
    ring.advance();
    finish_output(state, empty);
    barrier_wait(shared.full(ring.place), ring.parity);
    wgmma_fence();
    start_scores(state.s, q, k + ring.place * STAGE);
    wgmma_commit();
    start_output(state.out, state.weights, v + stage * STAGE);
    wgmma_commit();
    empty = shared.empty(stage);
    wgmma_wait<1>();
    hold(state.s);
    if (left < COLUMNS) state.softmax.hide(state.s, left);
    state.shrink = state.softmax.apply(state.s, p.scale);
  }
  finish_output(state, empty);
  wgmma_fence();
  start_output(state.out, state.weights, v + ring.place * STAGE);
  wgmma_commit();
  wgmma_wait<0>();
  hold(state.weights);
  hold(state.out);
  if (threadIdx.x % 32 == 0) barrier_arrive(shared.empty(ring.place));
  ring.advance();
}

DEVICE void consume(const Parameters& p, const Shared& shared) {
  const int consumer = warp_uniform(threadIdx.x / WARPGROUP) - 1;
  const int warp = warp_uniform(threadIdx.x % WARPGROUP / 32), lane = threadIdx.x % 32;
  const bool signals = lane == 0;
  Ring<2> q_ring;
  Ring<STAGES> ring;
  State state;

  while (true) {
    barrier_wait(shared.work_full(q_ring.place), q_ring.parity);
    Work work;
    int item;
    if (!read_work(shared, q_ring.place, work, item)) break;
    barrier_wait(shared.q_full(q_ring.place), q_ring.parity);
    const uint32 q_rows = shared.q(q_ring.place) + consumer * 64 * SWIZZLE_ROW;
    state.softmax.reset();
#pragma unroll
    for (int i = 0; i < 32 * PANELS; ++i) state.out[i] = 0.0f;

    if (work.length <= 64 * consumer) {
      for (int column = 0; column < work.columns; column += COLUMNS) {
        barrier_wait(shared.full(ring.place), ring.parity);
        if (signals) barrier_arrive(shared.empty(ring.place));
        ring.advance();
      }
    } else if (work.columns > 0) {
      sweep(p, shared, q_rows, state, ring, work.columns);
    }

    read_work(shared, q_ring.place, work, item); // again, not to keep it in registers
    const int num_rows = work.length - 64 * consumer;
    Softmax& softmax = state.softmax;
    float(&out)[32 * PANELS] = state.out;
    softmax.finish();
    const bool saw_nothing = work.columns == 0;
#if !defined(ONLINE)
    // Infinity and NaN times zero is NaN, and NaN stays.
    float zero = 0.0f;
#pragma unroll
    for (int i = 0; i < 32 * PANELS; ++i) zero = fmaf(out[i], 0.0f, zero);
#endif
    bool row_failed = false;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int r = 16 * warp + lane / 4 + 8 * row;
#if !defined(ONLINE)
      const bool proven = zero == 0.0f && softmax.sum[row] >= SMALLEST && softmax.sum[row] <= LARGEST;
      row_failed |= r < num_rows && !saw_nothing && !proven;
#endif
      const float inverse = saw_nothing ? 0.0f : 1.0f / softmax.sum[row];
#pragma unroll
      for (int i = 0; i < 32 * PANELS; i += 4) {
        out[i + 2 * row] *= inverse;
        out[i + 2 * row + 1] *= inverse;
      }
      if (lane % 4 == 0 && r < num_rows) {
        const int64 head = static_cast<int64>(work.batch) * p.layout.heads + work.head;
        p.lse[head * p.tokens + work.token(p.layout, 64 * consumer + r)] =
            saw_nothing ? -__int_as_float(0x7f800000) : softmax.log_sum(row, p.scale);
      }
    }
#if !defined(ONLINE)
    const bool any_failed = __any_sync(0xffffffff, row_failed);
    if (signals) {
      p.flags[(static_cast<int64>(item) * CONSUMERS + consumer) * 4 + warp] = any_failed;
      if (any_failed) *p.any_failed = 1;
    }
#endif

    // The rows of Q that the warp read are its own: it stages its output there, to store 16 bytes a thread.
    if (num_rows > 0) {
      named_sync(1 + consumer, WARPGROUP);
#pragma unroll
      for (int i = 0; i < 8 * PANELS; ++i) {
        const uint32 panel = q_rows + (i / 8) * Q_PANEL + 4 * (lane % 4);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          store_shared(panel + swizzled(16 * warp + lane / 4 + 8 * row, i % 8),
                       pack(out[4 * i + 2 * row], out[4 * i + 2 * row + 1]));
        }
      }
      __syncwarp();
      Element* head = p.out.at(work.batch, work.head);
#pragma unroll
      for (int i = 0; i < 4 * PANELS; ++i) {
        const int r = 16 * warp + 4 * (i % 4) + lane / 8, panel = i / 4;
        if (r < num_rows) {
          const uint4 piece = load_shared(q_rows + panel * Q_PANEL + swizzled(r, lane % 8));
          const int64 token = work.token(p.layout, 64 * consumer + r);
          *reinterpret_cast<uint4*>(head + token * p.out.token + panel * 64 + lane % 8 * 8) = piece;
        }
      }
      __syncwarp();
    }
    if (signals) barrier_arrive(shared.q_empty(q_ring.place));
    q_ring.advance();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward(const __grid_constant__ Parameters p) {
  extern __shared__ uint8 memory[];
  const Shared shared{(shared_address(memory) + 1023) & ~1023u};
#if defined(ONLINE)
  if (__syncthreads_and(p.flags != nullptr && *p.any_failed == 0)) return;
#endif
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.work_full(i), 1);
      barrier_init(shared.q_full(i), 1);
      barrier_init(shared.q_empty(i), 4 * CONSUMERS + 2);
    }
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(shared.full(i), 2);
      barrier_init(shared.empty(i), 4 * CONSUMERS);
    }
    barrier_init_fence();
    prefetch_map(&p.k_map);
    prefetch_map(&p.v_map);
  }
  __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    give_registers<PRODUCER_REGISTERS>();
    const int warp = warp_uniform(threadIdx.x / 32);
    if (warp == 0) {
      produce_rows(p, shared);
    } else if (warp == 1) {
      produce_columns(p, shared, p.k_map, p.k, 0);
    } else if (warp == 2) {
      produce_columns(p, shared, p.v_map, p.v, TILE_BYTES);
    }
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(p, shared);
  }
}
