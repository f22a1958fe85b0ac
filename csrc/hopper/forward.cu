// Forward pass: one persistent block per multiprocessor. Macros: HEAD_SIZE; COLUMNS of a tile; STAGES of
// the ring; BFLOAT16, or it is float16; ONLINE; or UNIT_SCALE: `scale` is 1; WITH_LSE; WEIGHTED.
//
// Three warps load: rows of Q, which also hands out the work; K; V. The columns that a tile of rows sees pass as one
// stream, by the copy engine: as one box where they lie side by side, else in boxes of 8 tokens, and row by row only where
// 8 straddle runs; dense tokens come from copies in which they lie side by side. Every tile is full but the last. A
// consumer warpgroup starts S = Q K^T of a tile together with O += P V of the tile before, and turns S into P while that
// second product runs.
//
// Softmax: with ONLINE, a running maximum (Milakov and Gimelshein, arXiv 1805.02867). Without, weights are exp2(score)
// with no maximum at all, and the proof comes after: a row's sum between SMALLEST and LARGEST lost nothing to overflow or
// underflow. Its output lost nothing to overflow; nor to underflow if the sum is 1 or more, as then no weight is smaller
// than what softmax makes of it, or if no element is below SMALLEST_OUTPUT. Tiles with rows that fail are flagged, and
// done again by the ONLINE kernel.
//
// WEIGHTED: the first columns that a row sees stand for n tokens each, as if log2 n were added to their scores. It is, in
// the one tile where they end. Of the tiles before, what they added up to is multiplied by n once; with ONLINE it is the
// maximum that grows by log2 n. In the proof what is flushed to zero of such a column counts n times, and so do its
// products; but n times their number is the number of tokens that they stand for, so the bounds hold as they are. Softmax
// makes n times its weight, divided by the sum, of such a column: for "no weight is smaller" the sum must be n or more.
//
// Ordinary instructions are what the tensor cores wait for, so a score costs little more than its scale and exponential.
// The sum of a row is a column of the output: P times ones behind V. The tensor cores round sums towards zero, which over
// thousands of steps would add up, so now and then it is taken out. That sum is of weights rounded to 16 bits, as those
// that V is multiplied by: the output is divided by it, and equal values come out as they are. The LSE is not made of it,
// as weights that are alike are rounded alike; WITH_LSE adds up the weights before they are rounded, an addition a score.

#include "work.cuh"

#if !defined(WEIGHTED)
#define WEIGHTED 0
#endif

constexpr int D = HEAD_SIZE;
constexpr int PANELS = D / 64;
static_assert(COLUMNS % 32 == 0, "load_pieces takes 32 at a time");
constexpr int CONSUMERS = 3; // warpgroups of 64 rows
static_assert(STAGES > 1, "a consumer holds one tile of columns and waits for the next");
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int ROWS = 64 * CONSUMERS;
constexpr int SCORES = COLUMNS / 2; // of a thread
constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = 160; // 128 each at launch

constexpr int Q_BYTES = ROWS * D * 2;
constexpr int TILE_BYTES = COLUMNS * D * 2;
constexpr int Q_PANEL = ROWS * SWIZZLE_ROW;
constexpr int PANEL = COLUMNS * SWIZZLE_ROW;
constexpr int OUT = 32 * PANELS + 4; // of a thread: the output, and the sum of its two rows, each twice
constexpr int ONES_BYTES = 16 * SWIZZLE_ROW;
constexpr int TILES_OF_A_SUM = 8; // that the tensor cores add up
constexpr bool Q_IN_REGISTERS = D == 64; // where they suffice: the products then read half as much shared memory

#if !defined(ONLINE)
// What is flushed to zero, of at most 2^31 tokens 2^-126 each, is below 2^-55 of a sum that passes.
constexpr float SMALLEST = 9.094947017729282e-13f; // 2^-40
constexpr float LARGEST = 1.152921504606847e18f;   // 2^60
// Products that are flushed to zero, likewise, are below 2^-10 of an element that passes.
constexpr float SMALLEST_OUTPUT = 2.5849394142282115e-26f; // 2^-85
#endif

struct Parameters {
  ColumnMaps k_maps, v_maps;
  Tensor4 q, k, v, out;
  float* lse;  // [B, H, N]; null without WITH_LSE
  int* next;   // the next item to be taken, 0 at first
  int* failed; // [items], then one for any of them; 0 at first. With ONLINE null to do all
  Layout layout;
  int tokens;
  float scale; // with log2(e)

  // Null without WEIGHTED.
  const int* weighted; // [groups]: how many of the columns of a group, the first, stand for n tokens each
  const float* weight; // n, log2 n
  float per_log2;      // 1 / scale: what 1 in units of log2 is as a score
};

// What lies where in shared memory.
struct Shared {
  static constexpr uint32 BARRIERS_AT = 2 * Q_BYTES + STAGES * 2 * TILE_BYTES + ONES_BYTES;
  static constexpr uint32 WORK_AT = BARRIERS_AT + 8 * (6 + 2 * STAGES);
  static constexpr uint32 BYTES = WORK_AT + 2 * 32;

  uint32 base;

  DEVICE_MEMBER uint32 q(int buffer) const { return base + buffer * Q_BYTES; }
  DEVICE_MEMBER uint32 k(int stage) const { return base + 2 * Q_BYTES + stage * 2 * TILE_BYTES; }
  DEVICE_MEMBER uint32 v(int stage) const { return k(stage) + TILE_BYTES; }
  DEVICE_MEMBER uint32 ones() const { return k(STAGES); } // 16 tokens
  DEVICE_MEMBER uint32 barriers() const { return base + BARRIERS_AT; }
  DEVICE_MEMBER uint32 q_full(int buffer) const { return barriers() + 8 * buffer; }
  DEVICE_MEMBER uint32 q_empty(int buffer) const { return barriers() + 8 * (2 + buffer); }
  DEVICE_MEMBER uint32 work_full(int buffer) const { return barriers() + 8 * (4 + buffer); }
  DEVICE_MEMBER uint32 full(int stage) const { return barriers() + 8 * (6 + stage); }
  DEVICE_MEMBER uint32 empty(int stage) const { return barriers() + 8 * (6 + STAGES + stage); }
  DEVICE_MEMBER uint32 work(int buffer) const { return base + WORK_AT + 32 * buffer; }
};

static_assert(sizeof(Parameters) == PARAMETER_BYTES && Shared::BYTES == SHARED_BYTES, "as in forward_pass.py");

// The first of three loading warps: takes items, tells all others what they are, and loads the rows of Q.
DEVICE void produce_rows(const Parameters& p, const Shared& shared) {
  for (Ring<2> ring;; ring.next()) {
#if defined(ONLINE)
    const int item = take_item(p.layout, p.next, p.failed);
#else
    const int item = take_item(p.layout, p.next, nullptr);
#endif
    Work work;
    if (item >= 0) work = Work(p.layout, item);
    else work.columns = -1;
    barrier_wait(shared.q_empty(ring.index), ring.parity ^ 1);
    if (threadIdx.x % 32 == 0) store_work(shared.work(ring.index), work);
    __syncwarp();
    warp_arrive(shared.work_full(ring.index));
    if (item < 0) break;
    copy_rows<D>(p.layout, work, ROWS, shared.q(ring.index), p.q.at(work.batch, work.head), p.q.token);
    copy_wait();
    proxy_fence();
    __syncwarp();
    warp_arrive(shared.q_full(ring.index));
  }
}

// The second and third loading warps: stream the tiles of K, and of V (`offset` behind K in a stage).
DEVICE void produce_columns(const Parameters& p, const Shared& shared, const ColumnMaps& maps, const Tensor4& tensor,
                            uint32 offset) {
  Ring<2> work_ring;
  Ring<STAGES> ring;
  while (true) {
    barrier_wait(shared.work_full(work_ring.index), work_ring.parity);
    const Work work = load_work(shared.work(work_ring.index));
    warp_arrive(shared.q_empty(work_ring.index));
    if (work.columns < 0) break;
    work_ring.next();

    Cursor cursor(p.layout, work.group);
    for (int column = 0; column < work.columns; column += COLUMNS) {
      const uint32 tile = shared.k(ring.index) + offset, full = shared.full(ring.index);
      barrier_wait(shared.empty(ring.index), ring.parity ^ 1);
      if (cursor.is_contiguous(COLUMNS)) {
        warp_arrive_expect(full, TILE_BYTES);
        if (threadIdx.x % 32 == 0) {
          const int first = cursor.column();
          const TensorMap& map = Cursor::is_dense(first) ? maps.dense_tiles : maps.tiles;
#pragma unroll
          for (int i = 0; i < PANELS; ++i) {
            load_box(tile + i * PANEL, &map, full, 64 * i, first & Cursor::PLACE, work.head, work.batch);
          }
        }
      } else {
        load_pieces<D, COLUMNS>(p.layout, work, cursor, tile, maps, tensor, full);
        copy_wait();
        proxy_fence();
        __syncwarp();
        warp_arrive(full);
      }
      cursor.advance(p.layout, COLUMNS);
      ring.next();
    }
  }
}

#if defined(ONLINE)
constexpr float SLACK = 8.0f; // in units of log2

// Scores in units of log2.
DEVICE float in_log2(float x, float scale) { return x * scale; }
#endif

// Hide the columns from `columns` on.
DEVICE void hide(float (&s)[SCORES], int columns) {
  const int first = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < SCORES; ++i) {
    if (8 * (i / 4) + first + i % 2 >= columns) s[i] = -infinity();
  }
}

// What a consumer warpgroup carries from tile to tile of one row tile.
struct State {
  float s[SCORES];
  float out[OUT];
  float sum[2]; // of the weights of the thread's two rows, but for what is still in `out`
  uint32 weights[SCORES / 2];
  uint32 q[Q_IN_REGISTERS ? D / 4 : 1];
#if defined(ONLINE)
  float maximum[2]; // about that of the scores of the thread's two rows: none so far is more than 2^SLACK larger
  float shrink[2];  // by what the output so far must be multiplied
  bool shrinks;     // whether for any row of the warp it must
#endif
#if defined(WITH_LSE)
  float exact_sum[2]; // of the weights before they are rounded, of the thread's columns alone
  float excess[2];    // by what rounding made those sums too large
#endif

  DEVICE_MEMBER void reset() {
#pragma unroll
    for (int i = 0; i < OUT; ++i) out[i] = 0.0f;
    sum[0] = sum[1] = 0.0f;
#if defined(ONLINE)
    maximum[0] = maximum[1] = -infinity();
#endif
#if defined(WITH_LSE)
    exact_sum[0] = exact_sum[1] = excess[0] = excess[1] = 0.0f;
#endif
  }

  // Scores of the tile where the columns that stand for n end: `columns` of it do, and all before it.
  DEVICE_MEMBER void weigh(int columns, const Parameters& p) {
    const float added = __ldg(p.weight + 1) * p.per_log2;
    const int first = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < SCORES; ++i) {
      if (8 * (i / 4) + first + i % 2 < columns) s[i] += added;
    }
#if defined(ONLINE)
    maximum[0] += added;
    maximum[1] += added;
#elif defined(WITH_LSE)
    const float n = __ldg(p.weight);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      exact_sum[row] *= n;
      excess[row] *= n;
    }
#endif
  }

  // Scores of 64 rows and a tile of columns become weights.
  DEVICE_MEMBER void softmax(float scale) {
#if defined(ONLINE)
    float largest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int i = 0; i < SCORES; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], s[i]);
    const bool grew = in_log2(largest[0] - maximum[0], scale) > SLACK || in_log2(largest[1] - maximum[1], scale) > SLACK;
    shrinks = __any_sync(0xffffffff, grew);
    if (shrinks) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        largest[row] = fmaxf(largest[row], __shfl_xor_sync(0xffffffff, largest[row], 1));
        largest[row] = fmaxf(largest[row], __shfl_xor_sync(0xffffffff, largest[row], 2));
        shrink[row] = exp2_approx(in_log2(maximum[row] - largest[row], scale));
        maximum[row] = largest[row];
      }
    }
    const float shift[2] = {in_log2(maximum[0], scale), in_log2(maximum[1], scale)};
#pragma unroll
    for (int i = 0; i < SCORES; ++i) s[i] = exp2_approx(fmaf(s[i], scale, -shift[i / 2 % 2]));
#elif defined(UNIT_SCALE)
#pragma unroll
    for (int i = 0; i < SCORES; ++i) s[i] = exp2_approx(s[i]);
#else
    // ptxas would put all multiplications before the first exponential, whose unit then idles. So each group of them
    // waits for a weight of the group before, whose sign is a zero that ptxas does not know.
    constexpr int GROUP = 8;
    float zero = 0.0f;
#pragma unroll
    for (int i = 0; i < SCORES; ++i) {
      if (i > 0 && i % GROUP == 0) zero = __uint_as_float(__float_as_uint(s[i - GROUP]) >> 31);
      s[i] = exp2_approx(fmaf(s[i], scale, zero));
    }
#endif
#if defined(WITH_LSE)
    add_exactly();
#endif
  }

#if defined(WITH_LSE)
  // Add the weights of a tile, four at a time and compensated from tile to tile (Kahan, 1965), so that the error does not
  // grow with the number of tiles.
  DEVICE_MEMBER void add_exactly() {
#if defined(ONLINE)
    if (shrinks) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        exact_sum[row] *= shrink[row];
        excess[row] *= shrink[row];
      }
    }
#endif
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float tile = -excess[row];
#pragma unroll
      for (int i = 2 * row; i < SCORES; i += 8) tile += (s[i] + s[i + 1]) + (s[i + 4] + s[i + 5]);
      const float sum = exact_sum[row] + tile;
      excess[row] = (sum - exact_sum[row]) - tile;
      exact_sum[row] = sum;
    }
  }
#endif

  // Take the row sums out of the output.
  DEVICE_MEMBER void take_sums() {
    sum[0] += out[OUT - 4];
    sum[1] += out[OUT - 2];
#pragma unroll
    for (int i = OUT - 4; i < OUT; ++i) out[i] = 0.0f;
  }

#if defined(WITH_LSE)
  // The LSE of a row, in all four threads that hold it.
  DEVICE_MEMBER float log_sum(int row, float scale) const {
    float sum = exact_sum[row];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
#if defined(ONLINE)
    return (log2_approx(sum) + in_log2(maximum[row], scale)) * LN_2;
#else
    return log2_approx(sum) * LN_2;
#endif
  }
#endif
};

// Read the A operand of the scores where it does not stay in shared memory; lane l addresses row l % 16.
DEVICE void load_q(State& state, uint32 q_rows) {
  if constexpr (Q_IN_REGISTERS) {
    const int row = threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 16, half = threadIdx.x % 32 / 16;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      load_matrices(state.q + 4 * step, q_rows + step / 4 * Q_PANEL + swizzled(row, step % 4 * 2 + half));
    }
  }
}

// Columns 16 step to 16 step + 15 of Q, in registers or in shared memory.
DEVICE auto q_operand(const State& state, uint64 q, int step) {
  if constexpr (Q_IN_REGISTERS) return state.q + 4 * step;
  else return q + step / 4 * (Q_PANEL >> 4) + step % 4 * ALONG_D;
}

// S = Q K^T.
DEVICE void start_scores(State& state, uint64 q, uint64 k) {
  wgmma_along_d<false>(state.s, q_operand(state, q, 0), k);
#pragma unroll
  for (int step = 1; step < D / 16; ++step) {
    wgmma_along_d<true>(state.s, q_operand(state, q, step), k + step / 4 * (PANEL >> 4) + step % 4 * ALONG_D);
  }
}

// The descriptor of a tile of V moves by this; as it moves, its distance to the ones shrinks.
DEVICE constexpr uint64 moved(uint64 by) { return by - (by << LEADING_SHIFT); }

// O += P V, and the row sums with the last panel.
DEVICE void start_output(State& state, uint64 v) {
#pragma unroll
  for (int step = 0; step < COLUMNS / 16; ++step) {
    const uint32* weights = state.weights + 4 * step;
#pragma unroll
    for (int i = 0; i < PANELS - 1; ++i) {
      wgmma_64x64(state.out + 32 * i, weights, v + moved(i * (PANEL >> 4) + step * ALONG_TOKENS));
    }
    constexpr int LAST = PANELS - 1;
    wgmma_64x72(state.out + 32 * LAST, weights, v + moved(LAST * (PANEL >> 4) + step * ALONG_TOKENS));
  }
}

// Wait for the last O += P V, release its stage, and turn S into the next P. With `weight` the output so far is multiplied
// by what it points to.
DEVICE void finish_output(State& state, uint32 empty, bool takes_sums, [[maybe_unused]] const float* weight) {
  wgmma_wait<0>();
  hold(state.weights);
  hold(state.out);
  if (empty != 0) warp_arrive(empty);
  if (takes_sums) state.take_sums(); // unconditional, it would make ptxas serialize the products
#if defined(ONLINE)
  if (state.shrinks) {
    state.sum[0] *= state.shrink[0];
    state.sum[1] *= state.shrink[1];
#pragma unroll
    for (int i = 0; i < OUT; ++i) state.out[i] *= state.shrink[i / 2 % 2];
  }
#else
  if (weight != nullptr) {
    const float n = __ldg(weight);
    state.sum[0] *= n;
    state.sum[1] *= n;
#pragma unroll
    for (int i = 0; i < OUT; ++i) state.out[i] *= n;
  }
#endif
#pragma unroll
  for (int i = 0; i < SCORES / 2; ++i) state.weights[i] = pack(state.s[2 * i], state.s[2 * i + 1]);
  hold(state.weights);
  hold(state.out);
}

// Leave a tile of columns to the others.
DEVICE void skip(const Shared& shared, Ring<STAGES>& ring) {
  barrier_wait(shared.full(ring.index), ring.parity);
  warp_arrive(shared.empty(ring.index));
  ring.next();
}

// The tiles of columns of one row tile, `left` columns in all, of which the first `weighted` stand for n each.
DEVICE void sweep(const Parameters& p, const Shared& shared, uint32 q_rows, State& state, Ring<STAGES>& ring, int left,
                  int weighted) {
  // The tile where those end; if they end with the last tile, that.
  [[maybe_unused]] const uint32 border = min(weighted, left - 1) / COLUMNS;
  constexpr int STAGE = 2 * TILE_BYTES >> 4; // from descriptor to descriptor
  const uint64 q = descriptor(q_rows), k = descriptor(shared.k(0));
  const uint64 v = descriptor(shared.v(0), shared.ones() - shared.v(0));
  load_q(state, q_rows);
  barrier_wait(shared.full(ring.index), ring.parity);
  wgmma_fence();
  start_scores(state, q, k + ring.index * STAGE);
  wgmma_commit();
  wgmma_wait<0>();
  hold(state.s);
  if (left < COLUMNS) hide(state.s, left);
  if (WEIGHTED && border == 0) state.weigh(weighted, p);
  state.softmax(p.scale);
  // ptxas moves a wait up within straight code, so the wait for the output stands at the loop's head, behind a branch.
  uint32 empty = 0, tiles = 0;
  for (left -= COLUMNS; left > 0; left -= COLUMNS) {
    const int stage = ring.index;
    ring.next();
    const float* weight = WEIGHTED && tiles == border ? p.weight : nullptr;
    ++tiles; // not the ring, whose place depends on other work
    finish_output(state, empty, tiles % TILES_OF_A_SUM == 0, weight);
    barrier_wait(shared.full(ring.index), ring.parity);
    wgmma_fence();
    start_scores(state, q, k + ring.index * STAGE);
    wgmma_commit();
    start_output(state, v + stage * moved(STAGE));
    wgmma_commit();
    empty = shared.empty(stage);
    wgmma_wait<1>();
    hold(state.s);
    if (left < COLUMNS) hide(state.s, left);
    if (WEIGHTED && tiles == border) state.weigh(weighted - border * COLUMNS, p);
    state.softmax(p.scale);
  }
  finish_output(state, empty, false, WEIGHTED && tiles == border ? p.weight : nullptr);
  wgmma_fence();
  start_output(state, v + ring.index * moved(STAGE));
  wgmma_commit();
  wgmma_wait<0>();
  hold(state.weights);
  hold(state.out);
  state.take_sums();
  warp_arrive(shared.empty(ring.index));
  ring.next();
}

DEVICE void consume(const Parameters& p, const Shared& shared) {
  const int consumer = warp_uniform(threadIdx.x / WARPGROUP) - 1;
  const int warp = warp_uniform(threadIdx.x % WARPGROUP / 32), lane = threadIdx.x % 32;
  Ring<2> q_ring;
  Ring<STAGES> ring;
  State state;

  while (true) {
    barrier_wait(shared.work_full(q_ring.index), q_ring.parity);
    Work work = load_work(shared.work(q_ring.index));
    if (work.columns < 0) break;
    barrier_wait(shared.q_full(q_ring.index), q_ring.parity);
    const uint32 q_rows = shared.q(q_ring.index) + consumer * 64 * SWIZZLE_ROW;
    state.reset();

    if (work.length <= 64 * consumer) {
      for (int left = work.columns; left > 0; left -= COLUMNS) skip(shared, ring);
    } else if (work.columns > 0) {
      sweep(p, shared, q_rows, state, ring, work.columns, WEIGHTED ? warp_uniform(p.weighted[work.group]) : 0);
    }

    work = load_work(shared.work(q_ring.index)); // again, not to keep it in registers
    const int num_rows = work.length - 64 * consumer;
    const bool saw_nothing = work.columns == 0;
    float(&out)[OUT] = state.out;
#if !defined(ONLINE)
    // Infinity and NaN times zero is NaN, and NaN stays.
    float zero = 0.0f;
#pragma unroll
    for (int i = 0; i < 32 * PANELS; ++i) zero = fmaf(out[i], 0.0f, zero);
    bool row_failed = false;
#endif
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      [[maybe_unused]] const int r = 16 * warp + lane / 4 + 8 * row;
#if !defined(ONLINE)
      bool proven = zero == 0.0f && state.sum[row] >= SMALLEST && state.sum[row] <= LARGEST;
      if (state.sum[row] < (WEIGHTED ? __ldg(p.weight) : 1.0f)) {
#pragma unroll
        for (int i = 2 * row; i < 32 * PANELS; i += 4) {
          proven &= fminf(fabsf(out[i]), fabsf(out[i + 1])) >= SMALLEST_OUTPUT;
        }
      }
      row_failed |= r < num_rows && !saw_nothing && !proven;
#endif
      const float inverse = saw_nothing ? 0.0f : 1.0f / state.sum[row];
#pragma unroll
      for (int i = 0; i < 32 * PANELS; i += 4) {
        out[i + 2 * row] *= inverse;
        out[i + 2 * row + 1] *= inverse;
      }
#if defined(WITH_LSE)
      const float lse = saw_nothing ? -infinity() : state.log_sum(row, p.scale);
      if (lane % 4 == 0 && r < num_rows) {
        const int64 head = work.batch_head(p.layout);
        p.lse[head * p.tokens + work.token(p.layout, 64 * consumer + r)] = lse;
      }
#endif
    }
#if !defined(ONLINE)
    if (__any_sync(0xffffffff, row_failed) && lane == 0) {
      p.failed[work.item] = 1;
      p.failed[p.layout.num_items()] = 1;
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
    warp_arrive(shared.q_empty(q_ring.index));
    q_ring.next();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(1024) uint8 memory[];
  const Shared shared{shared_address(memory)};
  if (shared.base % 1024 != 0) __trap(); // tiles lie in the 128-byte swizzle, whose pattern is that long
#if defined(ONLINE)
  if (__syncthreads_and(p.failed != nullptr && p.failed[p.layout.num_items()] == 0)) return;
#endif
  for (int i = threadIdx.x; i < ONES_BYTES / 4; i += THREADS) store_shared(shared.ones() + 4 * i, pack(1.0f, 1.0f));
  proxy_fence();
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
    prefetch_map(&p.k_maps.tiles);
    prefetch_map(&p.v_maps.tiles);
  }
  __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    give_registers<PRODUCER_REGISTERS>();
    const int warp = warp_uniform(threadIdx.x / 32);
    if (warp == 0) {
      produce_rows(p, shared);
    } else if (warp == 1) {
      produce_columns(p, shared, p.k_maps, p.k, 0);
    } else if (warp == 2) {
      produce_columns(p, shared, p.v_maps, p.v, TILE_BYTES);
    }
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(p, shared);
  }
}
