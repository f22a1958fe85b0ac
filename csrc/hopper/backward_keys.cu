// dK and dV: a block owns 128 keys and streams the queries that see them, so everything is computed transposed:
// S^T = K Q^T and dP^T = V dO^T, whose accumulators are, rounded, the A operands of dV += P^T dO and dK += dS^T Q.
//
// With ACCUMULATE_QUERIES the pass also adds to dQ, 5 products in place of 7 in two passes, in no fixed order.
// For dQ = dS K the two warpgroups exchange dS^T through shared memory; each takes half of dQ, a step late, so that
// they need not be in step: one computes exponentials while the tensor cores are the other's.
#include "backward.cuh"

#if defined(ACCUMULATE_QUERIES)
constexpr bool ACCUMULATE = true;
#else
constexpr bool ACCUMULATE = false;
#endif

constexpr uint32 SCORES_PANEL = ROWS * SWIZZLE_ROW;    // dS^T of 64 queries
constexpr uint32 SCORES = COLUMNS / 64 * SCORES_PANEL; // one of two buffers
constexpr uint32 SUMS = 64 * 64 * sizeof(float);       // dQ of one warpgroup
constexpr uint32 SUMS_ROW = 64 * sizeof(float);
constexpr uint32 SCATTERED = 1u << 31; // joined to tokens that do not lie side by side; with it, -1 is none
constexpr bool IN_PLACE = D == 64; // dQ leaves through where the half of dS^T was that it came from
constexpr uint32 EXTRA = ACCUMULATE ? 2 * SCORES + (IN_PLACE ? 0 : 2 * SUMS) : 0;
constexpr int STAGES = ACCUMULATE ? 3 : 4;

using KeysMemory = Memory<STAGES, ACCUMULATE || D == 128 ? 1 : 2, Shifts::OF_COLUMNS, ACCUMULATE, EXTRA>;

static_assert(sizeof(Parameters) == PARAMETER_BYTES && KeysMemory::BYTES == SHARED_BYTES, "as in backward_pass.py");

struct Consumer {
  const Parameters& p;
  const KeysMemory memory;
  const uint32 index;
  Ring<KeysMemory::STAGES> stage;
  Ring<KeysMemory::ROW_BUFFERS> tile;
  Ring<2> record;
  int length; // of the tile
  // Only with ACCUMULATE_QUERIES:
  const uint32 scores_to; // where this lane writes dS^T first, but for the buffer
  Ring<2> scores;         // buffers of dS^T
  float* dq_sum;          // of the tile's head
  uint32 token;           // of row lane % 16 of this warp's part of dQ of the step before, see `SCATTERED`
  float dk[D / 2], dv[D / 2], s[COLUMNS / 2], dp[COLUMNS / 2];

  DEVICE_MEMBER Consumer(const Parameters& p, KeysMemory memory)
      : p(p), memory(memory), index(warp_uniform(threadIdx.x / WARPGROUP - 1)), scores_to(scores_row()) {}

  DEVICE_MEMBER uint32 rows(int i) const { return memory.row_tile(tile.index, i) + index * 64 * SWIZZLE_ROW; }

  DEVICE_MEMBER void run() {
    while (true) {
      barrier_wait(memory.rows_full(tile.index), tile.parity);
      const Work work = load_work(memory.work(record.index));
      if (work.columns < 0) break;
      length = work.length;
      const int panel = work.batch_head(p.layout) * PANELS + (D == 64 ? 0 : index);
      dq_sum = p.dq_sum + static_cast<int64>(panel) * p.num_queries * 64;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0;
      int columns = work.columns;
      if (columns > 0) {
        barrier_wait(memory.full(stage.index), stage.parity);
        hold(dk);
        hold(dv);
        token = ~0u;
        start_dp();
        multiply_scores();
        multiply_dp();
        wgmma_wait<1>();
        for (; columns > COLUMNS; columns -= COLUMNS) step<true>();
        step<false>();
        if (ACCUMULATE) add_last();
        hold(dk);
        hold(dv);
      }
      warp_arrive(memory.rows_empty(tile.index));
      tile.next();
      const Work again = load_work(memory.work(record.index)); // not to keep it in registers
      store_gradients(p.gradients[0], dk, p.scale, p.layout, again, index * 64);
      store_gradients(p.gradients[1], dv, 1, p.layout, again, index * 64);
      __syncwarp();
      warp_arrive(memory.work_empty(record.index));
      record.next();
    }
  }

  DEVICE_MEMBER void multiply_scores() {
    wgmma_fence();
    multiply<false>(s, rows(0), memory.column_tile(stage.index, 0));
    wgmma_commit();
  }

  DEVICE_MEMBER void multiply_dp() {
    wgmma_fence();
    multiply<true>(dp, rows(1), memory.column_tile(stage.index, 1));
    wgmma_commit();
  }

  // -lse, or -inner if `i`, of this thread's first column of a stage.
  DEVICE_MEMBER uint32 shifts(uint32 stage, int i) const {
    return memory.shifts(stage) + i * KeysMemory::Shift::BYTES / 2 + threadIdx.x % 4 * 8;
  }

  // The accumulators of dP of this stage start at -inner.
  DEVICE_MEMBER void start_dp() {
    const uint32 from = shifts(stage.index, 1);
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i += 2) load_floats(from + i / 4 * 32, dp[i], dp[i + 1]);
    hold(dp);
  }

  DEVICE_MEMBER void probabilities(uint32 now) {
    const uint32 from = shifts(now, 0);
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i += 4) {
      float x[2];
      load_floats(from + i * 8, x[0], x[1]);
#pragma unroll
      for (int k = 0; k < 4; ++k) s[i + k] = exp2_approx(fmaf(s[i + k], p.scale_log2, x[k % 2]));
    }
  }

  // The scores of this stage are done and dP is under way; with MORE so are those of the next when it returns.
  //
  // dQ is that of the step before. At a tile's first step that is none of this tile: the product is formed even so, as
  // the assembler serializes products that are not always issued, and, without a token, added to nothing.
  template <bool MORE>
  DEVICE_MEMBER void step() {
    const uint32 now = stage.index;
    stage.next();

    hold(s);
    probabilities(now);
    // The branch in this wait also keeps the assembler from moving the exponentials behind the next.
    if (MORE) barrier_wait(memory.full(stage.index), stage.parity);
    wgmma_wait<0>();
    hold(dp);
    uint32 weights[COLUMNS / 4], ds[COLUMNS / 4];
#pragma unroll
    for (int i = COLUMNS / 4 - 1; i >= 0; --i) { // this order spares the assembler registers
      weights[i] = pack(s[2 * i], s[2 * i + 1]);
      ds[i] = pack(s[2 * i] * dp[2 * i], s[2 * i + 1] * dp[2 * i + 1]);
    }
    if (ACCUMULATE && length < ROWS) hide_rows(ds);

    hold(weights);
    hold(ds);
    float dq[32];
    if (!ACCUMULATE) take_turn(index);
    wgmma_fence();
    multiply_add(dv, weights, memory.column_tile(now, 1));
    wgmma_commit();
    multiply_add(dk, ds, memory.column_tile(now, 0));
    wgmma_commit();
    if (ACCUMULATE) {
      write_scores(ds);
      start_dq(dq);
    }
    if (!ACCUMULATE) pass_turn(index);
    wgmma_wait<1>(); // for dv, and dk if dq is behind it
    hold(weights);
    if (MORE) multiply_scores();
    if (ACCUMULATE) {
      hold(ds);
      const uint32 next = read_token(now);
      warp_arrive(memory.empty(now));
      wgmma_wait<MORE ? 1 : 0>();
      hold(dq);
      if (!IN_PLACE) warp_arrive(memory.scores_empty(scores.index));
      add_dq(dq, scores.index);
      token = next;
    } else {
      wgmma_wait<MORE ? 1 : 0>();
      hold(ds);
      warp_arrive(memory.empty(now));
    }
    if (MORE) {
      start_dp();
      multiply_dp();
      wgmma_wait<1>();
    }
    if (ACCUMULATE && IN_PLACE) {
      bulk_wait_read();
      __syncwarp();
      warp_arrive(memory.scores_empty(scores.index));
    }
  }

  // Zero keys behind the tile's end: their scores are 0, so p = exp2(-lse) may be infinite, and times zero no zero.
  DEVICE_MEMBER void hide_rows(uint32 (&ds)[COLUMNS / 4]) const {
    const int thread = forget(threadIdx.x), row = index * 64 + thread % WARPGROUP / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; ++i) {
      if (row + i % 2 * 8 >= length) ds[i] = 0;
    }
  }

  DEVICE_MEMBER uint32 scores_row() const {
    const int lane = threadIdx.x % 32, row = index * 64 + threadIdx.x % WARPGROUP / 32 * 16 + lane % 16;
    return memory.extra() + swizzled(row, lane / 16);
  }

  // Tell dS^T of this step to the other warpgroup, when both have done with what was in the buffer. Each step frees the
  // buffer of the one before, the very first step too, so the phases of buffer 1 are one ahead.
  DEVICE_MEMBER void write_scores(const uint32 (&ds)[COLUMNS / 4]) {
    const uint32 to = (D == 64 ? scores_to : scores_row()) + scores.index * SCORES; // 128 leaves no register
    barrier_wait(memory.scores_empty(scores.index), scores.parity ^ scores.index ^ 1);
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; ++k) store_matrices((to ^ (k % 4 * 32)) + k / 4 * SCORES_PANEL, &ds[4 * k]);
    proxy_fence();
    __syncwarp();
    warp_arrive(memory.scores_full(scores.index));
    scores.next();
  }

  // dq = dS K of the step before the one just written: 64 queries, all of d, or at head size 128 all queries, 64 of d.
  DEVICE_MEMBER void start_dq(float (&dq)[32]) const {
    barrier_wait(memory.scores_full(scores.index), scores.parity ^ 1);
    multiply_dq(dq, scores.index);
  }

  DEVICE_MEMBER void multiply_dq(float (&dq)[32], uint32 buffer) const {
    const uint64 a = descriptor(memory.extra() + buffer * SCORES + (D == 64 ? index * SCORES_PANEL : 0));
    const uint64 b = descriptor(memory.row_tile(tile.index, 0) + (D == 64 ? 0 : index * ROWS * SWIZZLE_ROW));
    wgmma_fence();
    wgmma_along_tokens<false>(dq, a, b);
#pragma unroll
    for (int k = 1; k < ROWS / 16; ++k) wgmma_along_tokens<true>(dq, a + k * ALONG_TOKENS, b + k * ALONG_TOKENS);
    wgmma_commit();
  }

  DEVICE_MEMBER uint32 read_token(uint32 now) const {
    const int row = (D == 64 ? index * 64 : 0) + threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 16;
    const int first = warp_uniform(load_word(memory.first_token(now)));
    const uint32 token = first >= 0 ? first + row : load_word(memory.tokens(now) + 4 * row) | SCATTERED;
    __syncwarp();
    return token;
  }

  // Where this warp's part of dq leaves through, 16 rows.
  DEVICE_MEMBER uint32 sums(uint32 buffer) const {
    const uint32 all = memory.extra() + (IN_PLACE ? buffer : 2) * SCORES;
    return all + index * SUMS + threadIdx.x % WARPGROUP / 32 * (16 * SUMS_ROW);
  }

  DEVICE_MEMBER void add_dq(const float (&dq)[32], uint32 buffer) const {
    const uint32 lane = threadIdx.x % 32;
    const uint32 first = sums(buffer) + lane / 4 * SUMS_ROW + lane % 4 * 8;
    bulk_wait_read(); // of the sums before
    if (IN_PLACE) named_sync(WARPGROUP_DONE + index, WARPGROUP);
    else __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int owner = __shfl_sync(0xffffffff, token, 8 * half + lane / 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32 to = (first ^ workspace_piece(i % 4, owner) * 32) + i / 4 * 128 + half * 8 * SUMS_ROW;
        store_shared(to, dq[4 * i + 2 * half], dq[4 * i + 2 * half + 1]);
      }
    }
    proxy_fence();
    __syncwarp();
    float* to = dq_sum + static_cast<int64>(token & ~SCATTERED) * 64;
    if (token < SCATTERED) {
      if (lane == 0) reduce_bulk(to, sums(buffer), 16 * SUMS_ROW);
    } else if (lane < 16 && token != ~0u) {
      reduce_bulk(to, sums(buffer) + lane * SUMS_ROW, SUMS_ROW);
    }
    bulk_commit();
  }

  // dQ of the tile's last step. The next tile's first step frees the buffer.
  DEVICE_MEMBER void add_last() const {
    const uint32 last = scores.index ^ 1;
    barrier_wait(memory.scores_full(last), scores.parity ^ last);
    float dq[32];
    multiply_dq(dq, last);
    wgmma_wait<0>();
    hold(dq);
    add_dq(dq, last);
  }
};

extern "C" __global__ void __launch_bounds__(384, 1) backward_keys(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const KeysMemory memory{shared_address(shared)};
  if (memory.base % 1024 != 0) __trap(); // tiles lie in the 128-byte swizzle, whose pattern is that long
  memory.initialize();
  if (threadIdx.x < WARPGROUP) {
    give_registers<LOADING_REGISTERS>();
    load(p, memory);
  } else {
    take_registers<COMPUTING_REGISTERS>();
    if (!ACCUMULATE) begin_turns();
    Consumer(p, memory).run();
    if (ACCUMULATE) bulk_wait_read();
    else end_turns();
  }
}
