// What the backward pass does token by token, before and after the kernels that walk the layout.
// Threads: any multiple of D / 8 a block, D / 8 for each of batch_heads * tokens.
#include "backward.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int LANES = D / 8; // of one token, 16 bytes each

struct InnerParameters {
  Tensor4 out, grad;
  const float* lse;      // [batch_heads, tokens], natural logarithm
  const float* grad_lse; // the same, or null
  float* shifts[2];      // as in Parameters
  int tokens, heads, batch_heads;
};

struct ConvertParameters {
  const float* dq_sum; // as in Parameters
  Tensor4 dq;
  int tokens, heads, batch_heads;
  float scale;
};

#if defined(BACKWARD_INNER)
static_assert(sizeof(InnerParameters) == PARAMETER_BYTES, "as in backward_pass.py");
#else
static_assert(sizeof(ConvertParameters) == PARAMETER_BYTES, "as in backward_pass.py");
#endif

// The token of these lanes: the `row`-th of all, and its place.
struct Place {
  int64 row;
  int batch, head, batch_head, token, lane;
  bool exists;

  DEVICE_MEMBER Place(int tokens, int heads, int batch_heads) {
    const int64 thread = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    row = thread / LANES;
    lane = threadIdx.x % LANES;
    exists = row < static_cast<int64>(batch_heads) * tokens;
    if (!exists) row = 0;
    batch_head = static_cast<int>(row / tokens);
    token = static_cast<int>(row % tokens);
    batch = batch_head / heads;
    head = batch_head % heads;
  }

  DEVICE_MEMBER uint4* piece(const Tensor4& x) const {
    return reinterpret_cast<uint4*>(x.at(batch, head) + token * x.token + lane * 8);
  }
};

DEVICE float low(uint32 pair) {
#if defined(BFLOAT16)
  return __uint_as_float(pair << 16);
#else
  float x;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}\n" : "=f"(x) : "r"(pair));
  return x;
#endif
}

DEVICE float high(uint32 pair) {
#if defined(BFLOAT16)
  return __uint_as_float(pair & 0xffff0000);
#else
  return low(pair >> 16);
#endif
}

DEVICE float dot(uint32 x, uint32 y) { return low(x) * low(y) + high(x) * high(y); }

// -inner = dLSE - dO . out, and -lse in units of log2, such that p is 0 in a row that sees nothing.
extern "C" __global__ void backward_inner(const __grid_constant__ InnerParameters p) {
  const Place place(p.tokens, p.heads, p.batch_heads);
  const uint4 x = *place.piece(p.out), y = *place.piece(p.grad);
  float sum = dot(x.x, y.x) + dot(x.y, y.y) + dot(x.z, y.z) + dot(x.w, y.w);
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  if (place.exists && place.lane == 0) {
    const float lse = p.lse[place.row] * LOG2_E;
    p.shifts[0][place.row] = lse == -infinity() ? lse : -lse;
    p.shifts[1][place.row] = (p.grad_lse ? p.grad_lse[place.row] : 0) - sum;
  }
}

// dQ = scale * its sum, in the 16-bit type.
extern "C" __global__ void backward_convert(const __grid_constant__ ConvertParameters p) {
  const Place place(p.tokens, p.heads, p.batch_heads);
  if (!place.exists) return;
  const int panel = place.lane / 8, piece = workspace_piece(place.lane % 8, place.token);
  const int64 row = (static_cast<int64>(place.batch_head) * PANELS + panel) * p.tokens + place.token;
  const float4* from = reinterpret_cast<const float4*>(p.dq_sum + row * 64 + piece * 8);
  const float4 a = from[0], b = from[1];
  const float s = p.scale;
  *place.piece(p.dq) =
      make_uint4(pack(s * a.x, s * a.y), pack(s * a.z, s * a.w), pack(s * b.x, s * b.y), pack(s * b.z, s * b.w));
}
