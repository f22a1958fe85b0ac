// dK and dV: a block owns 128 keys and streams the queries that see them, so everything is computed transposed:
// S^T = K Q^T and dP^T = V dO^T, whose accumulators are, rounded, the A operands of dV += P^T dO and dK += dS^T Q.
//
// With ACCUMULATE_QUERIES the pass also adds to dQ, 5 products in place of 7 in two passes, in no fixed order.
// For dQ = dS K the two warpgroups exchange dS^T through shared memory; each then takes half of dQ.
#include "backward.cuh"

#if defined(ACCUMULATE_QUERIES)
constexpr bool ACCUMULATE = true;
#else
constexpr bool ACCUMULATE = false;
#endif

constexpr uint32 SCORES_PANEL = ROWS * SWIZZLE_ROW;    // dS^T of 64 queries
constexpr uint32 SCORES = COLUMNS / 64 * SCORES_PANEL; // one of two buffers
constexpr uint32 SUMS = 64 * 64 * sizeof(float);       // dQ of one warpgroup
constexpr uint32 EXTRA = ACCUMULATE ? 2 * SCORES + (D == 64 ? 0 : 2 * SUMS) : 0;

using KeysMemory = Memory<ACCUMULATE ? 3 : 4, ACCUMULATE || D == 128 ? 1 : 2, Shifts::OF_COLUMNS, ACCUMULATE, EXTRA>;

static_assert(sizeof(Parameters) == PARAMETER_BYTES && KeysMemory::BYTES == SHARED_BYTES, "as in backward_pass.py");

template <bool FOLDED>
struct Consumer {
  const Parameters& p;
  const KeysMemory memory;
  const uint32 index;
  Ring<KeysMemory::STAGES> stage;
  Ring<KeysMemory::ROW_BUFFERS> tile;
  Ring<2> record;
  uint32 buffer = 0;
  int length, batch_head; // of the tile
  float dk[D / 2], dv[D / 2], s[COLUMNS / 2], dp[COLUMNS / 2];

  DEVICE_MEMBER Consumer(const Parameters& p, KeysMemory memory)
      : p(p), memory(memory), index(warp_uniform(threadIdx.x / WARPGROUP - 1)) {}

  DEVICE_MEMBER uint32 rows(int i) const { return memory.row_tile(tile.index, i) + index * 64 * SWIZZLE_ROW; }

  DEVICE_MEMBER void run() {
    while (true) {
      barrier_wait(memory.rows_full(tile.index), tile.parity);
      const Work work = read_work(memory, record.index);
      if (work.columns < 0) break;
      length = work.length;
      batch_head = work.batch * p.layout.heads + work.head;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0;
      int columns = work.columns;
      if (columns > 0) {
        barrier_wait(memory.full(stage.index), stage.parity);
        hold(dk);
        hold(dv);
        start_dp();
        multiply_scores();
        multiply_dp();
        wgmma_wait<1>();
        for (; columns > COLUMNS; columns -= COLUMNS) step<true>();
        step<false>();
        hold(dk);
        hold(dv);
      }
      release(memory.rows_empty(tile.index));
      tile.next();
      const Work again = read_work(memory, record.index); // not to keep it in registers
      store_gradients(p.gradients[0], dk, p.scale, p.layout, again, index * 64);
      store_gradients(p.gradients[1], dv, 1, p.layout, again, index * 64);
      __syncwarp();
      release(memory.work_empty(record.index));
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

  // The accumulators of dP of this stage start at -inner.
  DEVICE_MEMBER void start_dp() {
    const uint32 shifts = memory.shifts(stage.index) + threadIdx.x % 4 * 16;
    if (FOLDED) {
#pragma unroll
      for (int i = 0; i < COLUMNS / 8; ++i) {
        const float4 x = load_floats(shifts + 64 * i);
        dp[4 * i] = x.x, dp[4 * i + 1] = x.y, dp[4 * i + 2] = x.z, dp[4 * i + 3] = x.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < COLUMNS / 16; ++i) {
        const float4 x = load_floats(shifts + KeysMemory::Shift::BYTES / 2 + 64 * i);
        dp[8 * i] = dp[8 * i + 2] = x.x, dp[8 * i + 1] = dp[8 * i + 3] = x.y;
        dp[8 * i + 4] = dp[8 * i + 6] = x.z, dp[8 * i + 5] = dp[8 * i + 7] = x.w;
      }
    }
    hold(dp);
  }

  // Scale the scores and subtract lse, if that is not folded.
  DEVICE_MEMBER void shift_scores(uint32 now) {
    const uint32 shifts = memory.shifts(now) + threadIdx.x % 4 * 16;
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; ++k) {
      const float4 x = load_floats(shifts + 64 * k);
      const float shift[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) s[8 * k + i] = fmaf(s[8 * k + i], p.score_scale, shift[i / 4 * 2 + i % 2]);
    }
  }

  // The scores of this stage are done and dP is under way; with MORE so are those of the next when it returns.
  template <bool MORE>
  DEVICE_MEMBER void step() {
    const uint32 now = stage.index;
    stage.next();

    hold(s);
    if (!FOLDED) shift_scores(now);
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) s[i] = exp2_approx(s[i]);
    // The branch in this wait also keeps the assembler from moving the exponentials behind the next.
    if (MORE) barrier_wait(memory.full(stage.index), stage.parity);
    wgmma_wait<0>();
    hold(dp);
    uint32 probabilities[COLUMNS / 4], ds[COLUMNS / 4];
#pragma unroll
    for (int i = COLUMNS / 4 - 1; i >= 0; --i) { // this order spares the assembler registers
      probabilities[i] = pack(s[2 * i], s[2 * i + 1]);
      ds[i] = pack(s[2 * i] * dp[2 * i], s[2 * i + 1] * dp[2 * i + 1]);
    }
    if (!FOLDED && ACCUMULATE && length < ROWS) hide_rows(ds);

    hold(probabilities);
    hold(ds);
    wgmma_fence();
    multiply_add(dv, probabilities, memory.column_tile(now, 1));
    wgmma_commit();
    multiply_add(dk, ds, memory.column_tile(now, 0));
    wgmma_commit();
    float dq[32];
    int first = 0, token = 0;
    if (ACCUMULATE) {
      write_scores(ds);
      bulk_wait_read(); // of the step before: from here on the other buffer is free
      proxy_fence();
      named_sync(SCORES_WRITTEN, 2 * WARPGROUP);
      multiply_ds(dq);
      wgmma_commit();
      const int row = first_query() + threadIdx.x % 16;
      first = warp_uniform(load_word(memory.first_token(now)));
      token = first < 0 ? load_word(memory.tokens(now) + 4 * row) : first + row;
    }
    wgmma_wait<1>();
    hold(probabilities);
    if (MORE) multiply_scores();
    wgmma_wait<MORE ? 1 : 0>();
    hold(ds);
    release(memory.empty(now));
    if (ACCUMULATE) {
      hold(dq);
      add_to_queries(dq, token, first >= 0);
      buffer ^= 1;
    }
    if (MORE) {
      start_dp();
      multiply_dp();
      wgmma_wait<1>();
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

  DEVICE_MEMBER uint32 scores() const { return memory.extra() + buffer * SCORES; }

  DEVICE_MEMBER void write_scores(const uint32 (&ds)[COLUMNS / 4]) const {
    const int lane = threadIdx.x % 32, row = index * 64 + threadIdx.x % WARPGROUP / 32 * 16 + lane % 16;
    const uint32 first = scores() + swizzled(row, lane / 16);
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; ++k) {
      store_matrices((first ^ (k % 4 * 32)) + k / 4 * SCORES_PANEL, &ds[4 * k]);
    }
  }

  // dq = dS K: 64 queries, all of d, or at head size 128 all queries, 64 of d.
  DEVICE_MEMBER void multiply_ds(float (&dq)[32]) const {
    const uint64 a = descriptor(scores() + (D == 64 ? index * SCORES_PANEL : 0));
    const uint64 b = descriptor(memory.row_tile(tile.index, 0) + (D == 64 ? 0 : index * ROWS * SWIZZLE_ROW));
    wgmma_fence();
    wgmma_along_tokens<false>(dq, a, b);
#pragma unroll
    for (int k = 1; k < ROWS / 16; ++k) wgmma_along_tokens<true>(dq, a + k * ALONG_TOKENS, b + k * ALONG_TOKENS);
  }

  // Of this warp's part of dq.
  DEVICE_MEMBER int first_query() const { return (D == 64 ? index * 64 : 0) + threadIdx.x % WARPGROUP / 32 * 16; }

  // Lane l knows the token of row l % 16. The sums leave through shared memory: at head size 64 where this warpgroup's
  // half of dS^T was.
  DEVICE_MEMBER void add_to_queries(const float (&dq)[32], int token, bool is_contiguous) const {
    const int lane = threadIdx.x % 32, quad = lane / 4;
    const uint32 rows = (D == 64 ? scores() : memory.extra() + 2 * SCORES) + index * SUMS +
                        threadIdx.x % WARPGROUP / 32 * (16 * 256);
    if (D == 64) named_sync(WARPGROUP_DONE + index, WARPGROUP);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 8 * half + quad, owner = __shfl_sync(0xffffffff, token, row);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        store_shared(rows + row * 256 + workspace_piece(i, owner) * 32 + lane % 4 * 8, dq[4 * i + 2 * half],
                     dq[4 * i + 2 * half + 1]);
      }
    }
    proxy_fence();
    const int64 panel = static_cast<int64>(batch_head) * PANELS + (D == 64 ? 0 : index);
    float* sum = p.dq_sum + (panel * p.num_queries + token) * 64;
    if (is_contiguous) {
      if (lane == 0) reduce_bulk(sum, rows, 16 * 256);
    } else if (lane < 16 && token >= 0) {
      reduce_bulk(sum, rows + lane * 256, 256);
    }
    bulk_commit();
  }
};

extern "C" __global__ void __launch_bounds__(384, 1) backward_keys(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const KeysMemory memory{shared_address(shared)};
  memory.initialize();
  if (threadIdx.x < WARPGROUP) {
    give_registers<LOADING_REGISTERS>();
    load(p, memory);
  } else {
    take_registers<COMPUTING_REGISTERS>();
    if (is_folded(p.any_unfolded)) Consumer<true>(p, memory).run();
    else Consumer<false>(p, memory).run();
    if (ACCUMULATE) bulk_wait_read();
  }
}
