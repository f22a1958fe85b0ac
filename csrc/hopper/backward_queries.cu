// dQ: a block owns 128 queries and streams the keys that they see. Nothing is added up in more than one place, so the
// result is the same from run to run.
#include "backward.cuh"

using QueriesMemory = Memory<D == 64 ? 4 : 3, 2, Shifts::OF_ROWS, false, 0>;

static_assert(sizeof(Parameters) == PARAMETER_BYTES && QueriesMemory::BYTES == SHARED_BYTES, "as in backward_pass.py");

struct Consumer {
  const Parameters& p;
  const QueriesMemory memory;
  const uint32 index;
  Ring<QueriesMemory::STAGES> stage;
  Ring<QueriesMemory::ROW_BUFFERS> tile;
  Ring<2> record;
  int columns;             // from this step on
  float lse_shift[2];      // of this thread's two rows
  float dq[D / 2], s[COLUMNS / 2], dp[COLUMNS / 2];

  DEVICE_MEMBER Consumer(const Parameters& p, QueriesMemory memory)
      : p(p), memory(memory), index(warp_uniform(threadIdx.x / WARPGROUP - 1)) {}

  DEVICE_MEMBER uint32 rows(int i) const { return memory.row_tile(tile.index, i) + index * 64 * SWIZZLE_ROW; }

  DEVICE_MEMBER void run() {
    while (true) {
      barrier_wait(memory.rows_full(tile.index), tile.parity);
      const Work work = load_work(memory.work(record.index));
      columns = work.columns;
      if (columns < 0) break;
      load_lse(work);
#pragma unroll
      for (int i = 0; i < D / 2; ++i) dq[i] = 0;
      if (columns > 0) {
        barrier_wait(memory.full(stage.index), stage.parity);
        hold(dq);
        start_dp();
        multiply_scores();
        multiply_dp();
        wgmma_wait<1>();
        probabilities();
        await_next();
        while (columns > COLUMNS) step<true>();
        step<false>();
        hold(dq);
      }
      warp_arrive(memory.rows_empty(tile.index));
      tile.next();
      store_gradients(p.gradients[0], dq, p.scale, p.layout, load_work(memory.work(record.index)), index * 64);
      __syncwarp();
      warp_arrive(memory.work_empty(record.index));
      record.next();
    }
  }

  DEVICE_MEMBER void load_lse(const Work& work) {
    const float* lse = p.shifts[0] + static_cast<int64>(work.batch_head(p.layout)) * p.num_queries;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = row() + 8 * i;
      lse_shift[i] = r < work.length ? lse[work.token(p.layout, r)] : 0;
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

  DEVICE_MEMBER int row() const { return index * 64 + threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4; }

  // The accumulators of dP start at -inner. All columns start alike, but one load for four is cheaper than four moves.
  DEVICE_MEMBER void start_dp() {
    const uint32 shifts = memory.shifts(tile.index) + QueriesMemory::Shift::twins(row());
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i += 4) {
      const float4 x = load_floats(shifts);
      dp[i] = x.x, dp[i + 1] = x.y, dp[i + 2] = x.z, dp[i + 3] = x.w;
    }
    hold(dp);
  }

  // Turn scores into probabilities. Behind the last column keys and scores are 0, but p = exp2(-lse) may be infinite.
  DEVICE_MEMBER void probabilities() {
    hold(s);
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) s[i] = exp2_approx(fmaf(s[i], p.scale_log2, lse_shift[i / 2 % 2]));
    if (columns < COLUMNS) {
      const int first = forget(threadIdx.x) % 4 * 2;
#pragma unroll
      for (int i = 0; i < COLUMNS / 2; ++i) {
        if (first + i / 4 * 8 + i % 2 >= columns) s[i] = 0;
      }
    }
  }

  // Wait for the stage behind this one. The branch also keeps the assembler from moving the exponentials behind the next
  // wait for a product.
  DEVICE_MEMBER void await_next() const {
    if (columns > COLUMNS) {
      Ring<QueriesMemory::STAGES> next = stage;
      next.next();
      barrier_wait(memory.full(next.index), next.parity);
    }
  }

  // This stage's probabilities are there, dP is under way, and the next stage is loaded. With MORE that holds for the
  // next when it returns.
  template <bool MORE>
  DEVICE_MEMBER void step() {
    const uint32 now = stage.index;
    stage.next();
    columns -= COLUMNS;
    wgmma_wait<0>();
    hold(dp);
    uint32 ds[COLUMNS / 4];
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; ++i) ds[i] = pack(s[2 * i] * dp[2 * i], s[2 * i + 1] * dp[2 * i + 1]);
    hold(ds);
    take_turn(index);
    if (MORE) multiply_scores();
    wgmma_fence();
    multiply_add(dq, ds, memory.column_tile(now, 0));
    wgmma_commit();
    if (MORE) {
      start_dp();
      multiply_dp();
      pass_turn(index);
      wgmma_wait<2>();
      probabilities();
      await_next();
    } else {
      pass_turn(index);
    }
    wgmma_wait<MORE ? 1 : 0>();
    hold(ds);
    warp_arrive(memory.empty(now));
  }
};

extern "C" __global__ void __launch_bounds__(384, 1) backward_queries(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const QueriesMemory memory{shared_address(shared)};
  if (memory.base % 1024 != 0) __trap(); // tiles lie in the 128-byte swizzle, whose pattern is that long
  memory.initialize();
  if (threadIdx.x < WARPGROUP) {
    give_registers<LOADING_REGISTERS>();
    load(p, memory);
  } else {
    take_registers<COMPUTING_REGISTERS>();
    begin_turns();
    Consumer(p, memory).run();
    end_turns();
  }
}
