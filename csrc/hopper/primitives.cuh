// Hopper's own instructions, one function each: mbarrier, the bulk tensor copy engine, wgmma, setmaxnreg.
// PTX ISA 8.0 and later; what each does is in the PTX manual under its name. Compiled by NVRTC, so nothing is included.
#pragma once

using uint8 = unsigned char;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__

constexpr int WARPGROUP = 128;   // threads
constexpr int SWIZZLE_ROW = 128; // bytes: a tile lies in panels of 64 16-bit columns, rows of 128 bytes, swizzled
constexpr float LN_2 = 0.69314718055994531f;

DEVICE float infinity() { return __int_as_float(0x7f800000); }

struct alignas(64) TensorMap {
  uint64 opaque[16];
};

// ---- addresses ----

DEVICE uint32 shared_address(const void* pointer) { return static_cast<uint32>(__cvta_generic_to_shared(pointer)); }

// Byte offset of the 16-byte chunk `chunk` (0 to 7) of row `row` in a panel with the 128-byte swizzle.
DEVICE uint32 swizzled(int row, int chunk) { return row * SWIZZLE_ROW + ((chunk ^ (row & 7)) << 4); }

DEVICE uint32 warp_uniform(uint32 value) { return __shfl_sync(0xffffffff, value, 0); }

// ---- mbarrier ----

// Warps arrive by their first lane. compute-sanitizer's racecheck does not see that the others were there too; for it,
// and for nothing else, all may arrive.
#if defined(EVERY_LANE_ARRIVES)
constexpr uint32 ARRIVING_LANES = 32;
#else
constexpr uint32 ARRIVING_LANES = 1;
#endif

// So many warps and, apart from them, lanes will arrive.
DEVICE void barrier_init(uint32 barrier, uint32 warps, uint32 lanes = 0) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(warps * ARRIVING_LANES + lanes) : "memory");
}

DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// This warp arrives; what its lanes did must be done, by __syncwarp where they read or wrote on their own.
DEVICE void warp_arrive(uint32 barrier) {
  if (threadIdx.x % 32 < ARRIVING_LANES) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same, and its first lane says how many bytes the copy engine will bring.
DEVICE void warp_arrive_expect(uint32 barrier, uint32 bytes) {
  const uint32 lane = threadIdx.x % 32;
  if (lane == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  } else if (lane < ARRIVING_LANES) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  }
}

DEVICE void barrier_expect(uint32 barrier, uint32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE bool barrier_try(uint32 barrier, uint32 parity) {
  uint32 done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// Wait until the phase of this parity has completed; a fresh barrier counts as having completed parity 1.
DEVICE void barrier_wait(uint32 barrier, uint32 parity) {
  while (!barrier_try(barrier, parity)) {
  }
}

// ---- hardware barriers among some of the threads of a block; 0 belongs to __syncthreads ----

DEVICE void named_sync(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// ---- copies to and from shared memory ----

// Make this thread's ordinary writes to shared memory visible to wgmma and to the copy engine.
DEVICE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Read one box at (d, token, head, batch); its bytes count towards the barrier's transaction.
DEVICE void load_box(uint32 shared, const TensorMap* map, uint32 barrier, int d, int token, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(shared), "l"(map), "r"(barrier), "r"(d), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

// Copy 16 bytes, or write 16 zero bytes if not `exists`; `global` must be readable either way.
DEVICE void copy_chunk(uint32 shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}

DEVICE void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

DEVICE void store_shared(uint32 shared, uint32 value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

DEVICE void store_shared(uint32 shared, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

DEVICE uint32 load_word(uint32 shared) {
  uint32 x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(shared) : "memory");
  return x;
}

DEVICE uint4 load_shared(uint32 shared) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(shared)
               : "memory");
  return value;
}

// Read four 8 x 8 matrices, the places of an A operand; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(uint32* x, uint32 shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared)
               : "memory");
}

// ---- registers ----

template <int REGISTERS>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- arithmetic ----

DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats as a pair of the kernel's 16-bit type, `low` in the lower half.
DEVICE uint32 pack(float low, float high) {
  uint32 pair;
#if defined(BFLOAT16)
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}

// ---- wgmma: 64 x N x 16 products of 16-bit types, accumulated in float32 ----
//
// A tile of n tokens lies as D / 64 panels `[n, 64]` with the 128-byte swizzle. It is read along d ("K-major", a step of
// 16 moves 32 bytes) or along tokens ("MN-major", a step of 16 moves 16 rows). Groups of 8 rows are 1024 bytes apart.
//
// Accumulator of 64 x N: thread `lane` of warp `w` holds, for each 8-column block i, columns 8 i + 2 (lane % 4) + {0, 1}
// of rows 16 w + lane / 4 (places 4 i, 4 i + 1) and of 8 rows below (places 4 i + 2, 4 i + 3).

constexpr int LEADING_SHIFT = 16;

// `leading`: bytes from a panel to the next, read along tokens; not used with one panel.
DEVICE uint64 descriptor(uint32 shared, uint32 leading = 16) {
  constexpr uint64 SWIZZLE_128 = 1ull << 62;
  constexpr uint64 STRIDE = static_cast<uint64>(1024 >> 4) << 32;
  return SWIZZLE_128 | STRIDE | static_cast<uint64>(leading >> 4) << LEADING_SHIFT | ((shared & 0x3ffff) >> 4);
}

constexpr uint64 ALONG_D = 32 >> 4;                     // descriptor step of 16 along d
constexpr uint64 ALONG_TOKENS = 16 * SWIZZLE_ROW >> 4;  // descriptor step of 16 along tokens

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most PENDING of the committed groups are unfinished.
template <int PENDING>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Registers of an unfinished product: the compiler must neither move nor reuse them across this point.
template <int N>
DEVICE void hold(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

template <int N>
DEVICE void hold(uint32 (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

#if defined(BFLOAT16)
#define WGMMA(N) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 "
#else
#define WGMMA(N) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 "
#endif

#define ACCUMULATORS_4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define ACCUMULATORS_16(x, i) \
  ACCUMULATORS_4(x, i), ACCUMULATORS_4(x, i + 4), ACCUMULATORS_4(x, i + 8), ACCUMULATORS_4(x, i + 12)
#define ACCUMULATORS_32(x, i) ACCUMULATORS_16(x, i), ACCUMULATORS_16(x, i + 16)

#define NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_36 NAMES_32 ", %32, %33, %34, %35"
#define NAMES_48 NAMES_36 ", %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// x [64, N] (+)= A B^T; A in shared memory or in registers, B in shared memory, both read along d. Without ADD x is
// overwritten.
template <bool ADD>
DEVICE void wgmma_along_d(float (&x)[64], uint64 a, uint64 b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n" WGMMA(128) "{" NAMES_64 "}, %64, %65, add, 1, 1, 0, 0;\n}\n"
               : ACCUMULATORS_32(x, 0), ACCUMULATORS_32(x, 32)
               : "l"(a), "l"(b), "n"(ADD ? 1 : 0));
}

template <bool ADD>
DEVICE void wgmma_along_d(float (&x)[32], uint64 a, uint64 b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n" WGMMA(64) "{" NAMES_32 "}, %32, %33, add, 1, 1, 0, 0;\n}\n"
               : ACCUMULATORS_32(x, 0)
               : "l"(a), "l"(b), "n"(ADD ? 1 : 0));
}

template <bool ADD>
DEVICE void wgmma_along_d(float (&x)[48], const uint32* a, uint64 b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %53, 0;\n" WGMMA(96) "{" NAMES_48 "}, {%48, %49, %50, %51}, %52, add, 1, 1, 0;\n}\n"
               : ACCUMULATORS_32(x, 0), ACCUMULATORS_16(x, 32)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD ? 1 : 0));
}

// x [64, 72] += A B; A in registers, B in shared memory, read along tokens; its columns from 64 on lie where the
// descriptor's leading offset says.
DEVICE void wgmma_64x72(float* x, const uint32* a, uint64 b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" WGMMA(72) "{" NAMES_36 "}, {%36, %37, %38, %39}, %40, add, 1, 1, 1;\n}\n"
               : ACCUMULATORS_32(x, 0), ACCUMULATORS_4(x, 32)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// x [64, 64] += A B; A in registers, B in shared memory, read along tokens.
DEVICE void wgmma_64x64(float* x, const uint32* a, uint64 b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" WGMMA(64) "{" NAMES_32 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}\n"
               : ACCUMULATORS_32(x, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
