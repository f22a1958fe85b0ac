// dQ: a block owns 128 queries and streams the keys that they see. Nothing is added up in more than one place, so the
// result is the same from run to run.
#include "backward.cuh"

using QueriesMemory = Memory<4, false, 0>;

struct Consumer {
  const Parameters& p;
  const QueriesMemory memory;
  const uint32 index;
  Ring<QueriesMemory::STAGES> stage;
  Ring<1> tile;
  int columns;             // from this step on
  float lse[2], inner[2];  // of this thread's two rows
  float dq[D / 2], s[COLUMNS / 2], dp[COLUMNS / 2];

  DEVICE_MEMBER Consumer(const Parameters& p, QueriesMemory memory)
      : p(p), memory(memory), index(warp_uniform(threadIdx.x / WARPGROUP - 1)) {}

  DEVICE_MEMBER uint32 rows(int i) const { return memory.row_tile(i) + index * 64 * SWIZZLE_ROW; }

  DEVICE_MEMBER void run() {
    for (int item = blockIdx.x; item < p.layout.num_row_tiles * p.layout.batch_heads; item += gridDim.x) {
#pragma unroll
      for (int i = 0; i < D / 2; ++i) dq[i] = 0;
      columns = start(item);
      if (columns > 0) {
        barrier_wait(memory.rows_full(), tile.parity);
        tile.next();
        barrier_wait(memory.full(stage.index), stage.parity);
        hold(dq);
        wgmma_fence();
        multiply(s, rows(0), memory.column_tile(stage.index, 0));
        wgmma_commit();
        multiply(dp, rows(1), memory.column_tile(stage.index, 1));
        wgmma_commit();
        wgmma_wait<1>();
        probabilities();
        while (columns > COLUMNS) step<true>();
        step<false>();
        hold(dq);
        release(memory.rows_empty());
      }
      store_gradients(p.gradients[0], dq, p.scale, p.layout, Work(p.layout, forget(item)), index * 64);
    }
  }

  // Read the statistics of this thread's rows; how many columns they see.
  DEVICE_MEMBER int start(int item) {
    const Work work(p.layout, item);
    const int64 head = static_cast<int64>(work.batch * p.layout.heads + work.head) * p.num_queries;
    const int thread = forget(threadIdx.x);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = index * 64 + thread % WARPGROUP / 32 * 16 + half * 8 + thread % 32 / 4;
      const int64 at = head + (row < work.length ? work.token(p.layout, row) : 0);
      lse[half] = row < work.length ? p.lse[at] : infinity();
      inner[half] = row < work.length ? p.inner[at] : 0;
    }
    return warp_uniform(work.columns);
  }

  // Turn scores into probabilities. Behind the last column keys and scores are 0, but p = exp2(-lse) must be 0.
  DEVICE_MEMBER void probabilities() {
    hold(s);
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) s[i] = exp2_approx(s[i] * p.scale_log2 - lse[i / 2 % 2]);
    if (columns < COLUMNS) {
      const int first = forget(threadIdx.x) % 4 * 2;
#pragma unroll
      for (int i = 0; i < COLUMNS / 2; ++i) {
        if (first + i / 4 * 8 + i % 2 >= columns) s[i] = 0;
      }
    }
  }

  // This stage's probabilities are there and dP is under way; with MORE those of the next are when it returns.
  template <bool MORE>
  DEVICE_MEMBER void step() {
    const uint32 now = stage.index;
    stage.next();
    columns -= COLUMNS;
    wgmma_wait<0>();
    hold(dp);
    uint32 ds[COLUMNS / 4];
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; ++i) {
      const float shift = inner[i % 2];
      ds[i] = pack(s[2 * i] * (dp[2 * i] - shift), s[2 * i + 1] * (dp[2 * i + 1] - shift));
    }
    hold(ds);
    if (MORE) {
      barrier_wait(memory.full(stage.index), stage.parity);
      wgmma_fence();
      multiply(s, rows(0), memory.column_tile(stage.index, 0));
      wgmma_commit();
    } else {
      wgmma_fence();
    }
    multiply_add(dq, ds, memory.column_tile(now, 0));
    wgmma_commit();
    if (MORE) {
      multiply(dp, rows(1), memory.column_tile(stage.index, 1));
      wgmma_commit();
      wgmma_wait<2>();
      probabilities();
    }
    wgmma_wait<MORE ? 1 : 0>();
    hold(ds);
    release(memory.empty(now));
  }
};

extern "C" __global__ void __launch_bounds__(384, 1) backward_queries(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const QueriesMemory memory{shared_address(shared)};
  memory.initialize();
  if (threadIdx.x < WARPGROUP) {
    give_registers<40>();
    produce(p, memory);
  } else {
    take_registers<232>();
    Consumer(p, memory).run();
  }
}
