// The part of Metal's standard library that our shader uses, for CUDA: a warp is a simdgroup, shared memory is
// threadgroup memory. It comes before the shader's text and needs no header, so that NVRTC takes it.

#define METAL_FUNC __device__ __forceinline__
#define INFINITY __int_as_float(0x7f800000)
#define float2 FloatPair  // CUDA's own has no operators

using ushort = unsigned short;
using uint = unsigned int;

namespace metal {

struct half {
  ushort bits;
  half() = default;
  __device__ explicit half(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  __device__ operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};

struct bfloat {
  ushort bits;
  bfloat() = default;
  __device__ explicit bfloat(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  __device__ operator float() const { return __int_as_float(int(bits) << 16); }
};

struct float2 {
  float x, y;
  float2() = default;
  __device__ explicit float2(float a) : x(a), y(a) {}
  __device__ float2(float a, float b) : x(a), y(b) {}
  __device__ float2& operator+=(float2 other) {
    x += other.x, y += other.y;
    return *this;
  }
  __device__ float2& operator*=(float factor) {
    x *= factor, y *= factor;
    return *this;
  }
};
METAL_FUNC float2 operator+(float2 a, float2 b) { return float2(a.x + b.x, a.y + b.y); }
METAL_FUNC float2 operator-(float2 a, float2 b) { return float2(a.x - b.x, a.y - b.y); }
METAL_FUNC float2 operator*(float2 a, float b) { return float2(a.x * b, a.y * b); }
METAL_FUNC float2 operator*(float2 a, float2 b) { return float2(a.x * b.x, a.y * b.y); }

METAL_FUNC float2 max(float2 a, float2 b) { return float2(fmaxf(a.x, b.x), fmaxf(a.y, b.y)); }

namespace precise {
METAL_FUNC float exp2(float x) { return exp2f(x); }
METAL_FUNC float log2(float x) { return log2f(x); }
}  // namespace precise
namespace fast {
METAL_FUNC float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
}  // namespace fast

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
METAL_FUNC void threadgroup_barrier(mem_flags) { __syncthreads(); }
METAL_FUNC float simd_shuffle_xor(float x, ushort mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

template <class T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  __device__ float2& thread_elements() { return held; }
  float2 held;
};
using FloatMatrix = simdgroup_matrix<float, 8, 8>;

// Lane l holds row 4 l4 + 2 l2 + l1 and columns 4 l3 + 2 l0 and the next, where l4 ... l0 are its bits.
METAL_FUNC void simdgroup_multiply_accumulate(
    FloatMatrix& d, const FloatMatrix& a, const FloatMatrix& b, const FloatMatrix& c) {
  const uint lane = threadIdx.x % 32;
  const uint row_lanes = lane & 22, column_lanes = lane & 9;
  float2 sum = c.held;
#pragma unroll
  for (uint i = 0; i < 8; i++) {
    const uint left = row_lanes + i / 4 * 8 + i / 2 % 2, right = i / 4 * 16 + i % 4 * 2 + column_lanes;
    const float factor = __shfl_sync(0xffffffffu, i % 2 ? a.held.y : a.held.x, left);
    sum.x = fmaf(factor, __shfl_sync(0xffffffffu, b.held.x, right), sum.x);
    sum.y = fmaf(factor, __shfl_sync(0xffffffffu, b.held.y, right), sum.y);
  }
  d.held = sum;
}

}  // namespace metal
