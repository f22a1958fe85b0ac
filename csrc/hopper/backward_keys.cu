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
#if defined(TAKE_TURNS) // only one warpgroup at a time computes exponentials, while the other multiplies
constexpr bool TURNS = true;
#else
constexpr bool TURNS = false;
#endif

constexpr uint32 SCORES_PANEL = ROWS * SWIZZLE_ROW;    // dS^T of 64 queries
constexpr uint32 SCORES = COLUMNS / 64 * SCORES_PANEL; // one of two buffers
constexpr uint32 SUMS = 64 * 64 * sizeof(float);       // dQ of one warpgroup
constexpr uint32 EXTRA = ACCUMULATE ? 2 * SCORES + (D == 64 ? 0 : 2 * SUMS) : 0;

using KeysMemory = Memory<3, true, EXTRA>;

enum NamedBarrier { SCORES_WRITTEN = 1, WARPGROUP_DONE = 2, TURN = 4 };

struct Consumer {
  const Parameters& p;
  const KeysMemory memory;
  const uint32 index;
  Ring<KeysMemory::STAGES> stage;
  Ring<1> tile;
  uint32 buffer = 0;
  int length, batch_head; // of the tile
  float dk[D / 2], dv[D / 2], s[COLUMNS / 2], dp[COLUMNS / 2];

  DEVICE_MEMBER Consumer(const Parameters& p, KeysMemory memory)
      : p(p), memory(memory), index(warp_uniform(threadIdx.x / WARPGROUP - 1)) {}

  DEVICE_MEMBER uint32 rows(int i) const { return memory.row_tile(i) + index * 64 * SWIZZLE_ROW; }

  DEVICE_MEMBER void run() {
    if (TURNS && index == 1) named_arrive(TURN, 2 * WARPGROUP);
    for (int item = blockIdx.x; item < p.layout.num_row_tiles * p.layout.batch_heads; item += gridDim.x) {
#pragma unroll
      for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0;
      const Work at_start(p.layout, item);
      length = warp_uniform(at_start.length);
      batch_head = warp_uniform(at_start.batch * p.layout.heads + at_start.head);
      int columns = warp_uniform(at_start.columns);
      if (columns > 0) {
        barrier_wait(memory.rows_full(), tile.parity);
        tile.next();
        barrier_wait(memory.full(stage.index), stage.parity);
        hold(dk);
        hold(dv);
        wgmma_fence();
        multiply(s, rows(0), memory.column_tile(stage.index, 0));
        wgmma_commit();
        multiply(dp, rows(1), memory.column_tile(stage.index, 1));
        wgmma_commit();
        wgmma_wait<1>();
        for (; columns > COLUMNS; columns -= COLUMNS) step<true>();
        step<false>();
        hold(dk);
        hold(dv);
        release(memory.rows_empty());
      }
      const Work work(p.layout, forget(item));
      store_gradients(p.gradients[0], dk, p.scale, p.layout, work, index * 64);
      store_gradients(p.gradients[1], dv, 1, p.layout, work, index * 64);
    }
  }

  // The scores of this stage are done and dP is under way; with MORE so are those of the next when it returns.
  template <bool MORE>
  DEVICE_MEMBER void step() {
    const uint32 now = stage.index, statistics = memory.statistics(now) + threadIdx.x % 4 * 16;
    stage.next();

    hold(s);
    if (TURNS) named_sync(TURN + index, 2 * WARPGROUP);
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; ++k) {
      const float4 x = load_floats(statistics + 64 * k);
      const float lse[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) s[8 * k + i] = exp2_approx(s[8 * k + i] * p.scale_log2 - lse[i / 4 * 2 + i % 2]);
    }
    // The branch in this wait also keeps the assembler from moving the exponentials behind the next.
    if (MORE) barrier_wait(memory.full(stage.index), stage.parity);
    wgmma_wait<0>();
    hold(dp);
    uint32 probabilities[COLUMNS / 4], ds[COLUMNS / 4];
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; ++k) {
      const float4 x = load_floats(statistics + KeysMemory::STATISTIC + 64 * k);
      const float inner[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int at = 8 * k + i, column = i / 4 * 2;
        probabilities[at / 2] = pack(s[at], s[at + 1]);
        ds[at / 2] = pack(s[at] * (dp[at] - inner[column]), s[at + 1] * (dp[at + 1] - inner[column + 1]));
      }
    }
    if (ACCUMULATE && length < ROWS) hide_rows(ds);
    if (TURNS) named_arrive(TURN + 1 - index, 2 * WARPGROUP);

    hold(probabilities);
    hold(ds);
    wgmma_fence();
    multiply_add(dv, probabilities, memory.column_tile(now, 1));
    wgmma_commit();
    multiply_add(dk, ds, memory.column_tile(now, 0));
    wgmma_commit();
    float dq[32];
    int token = 0;
    if (ACCUMULATE) {
      write_scores(ds);
      bulk_wait_read(); // of the step before: from here on the other buffer is free
      proxy_fence();
      named_sync(SCORES_WRITTEN, 2 * WARPGROUP);
      multiply_scores(dq);
      wgmma_commit();
      token = token_of_row(now);
    }
    wgmma_wait<1>();
    hold(probabilities);
    if (MORE) {
      wgmma_fence();
      multiply(s, rows(0), memory.column_tile(stage.index, 0));
      wgmma_commit();
    }
    wgmma_wait<MORE ? 1 : 0>();
    hold(ds);
    release(memory.empty(now));
    if (ACCUMULATE) {
      hold(dq);
      add_to_queries(dq, token);
      buffer ^= 1;
    }
    if (MORE) {
      wgmma_fence();
      multiply(dp, rows(1), memory.column_tile(stage.index, 1));
      wgmma_commit();
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
  DEVICE_MEMBER void multiply_scores(float (&dq)[32]) const {
    const uint64 a = descriptor(scores() + (D == 64 ? index * SCORES_PANEL : 0));
    const uint64 b = descriptor(memory.row_tile(0) + (D == 64 ? 0 : index * ROWS * SWIZZLE_ROW));
    wgmma_fence();
    wgmma_along_tokens<false>(dq, a, b);
#pragma unroll
    for (int k = 1; k < ROWS / 16; ++k) wgmma_along_tokens<true>(dq, a + k * ALONG_TOKENS, b + k * ALONG_TOKENS);
  }

  // Lane l knows the query of row l % 16 of its warp's part of dq.
  DEVICE_MEMBER int token_of_row(uint32 now) const {
    const int row = (D == 64 ? index * 64 : 0) + threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 16;
    return load_word(memory.statistics(now) + 2 * KeysMemory::STATISTIC + 4 * row);
  }

  // The sums leave through shared memory: at head size 64 where this warpgroup's half of dS^T was.
  DEVICE_MEMBER void add_to_queries(const float (&dq)[32], int token) const {
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
    const bool side_by_side = token == __shfl_sync(0xffffffff, token, 0) + lane % 16;
    if (__all_sync(0xffffffff, side_by_side)) {
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
    give_registers<40>();
    produce(p, memory);
  } else {
    take_registers<232>();
    Consumer(p, memory).run();
    bulk_wait_read();
  }
}
