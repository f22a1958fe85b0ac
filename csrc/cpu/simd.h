// The little that the kernels need beyond compiler vector types, for the instruction set that this is compiled for.
// SVGGT_ISA names it; everything lies in a namespace of that name.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernel.h"

namespace svggt::SVGGT_ISA {

// kRows: rows that one product takes at once; row tiles are padded to a multiple of it. kPad: tokens and features of packed
// arrays are padded with zeros to a multiple of it. kLanes * kVectors: columns of a panel of a packed array.
#if defined(SVGGT_TILES)
constexpr int64_t kRows = 32;
constexpr int64_t kPad = 32;
constexpr int kLanes = 16;
constexpr int kVectors = 4;
#else
constexpr int64_t kRows = 6;
constexpr int64_t kPad = 16;
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kVectors = 4;  // kRows * kVectors accumulators in 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kVectors = 2;
#else
constexpr int kLanes = 4;
constexpr int kVectors = 2;
#endif
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Floats splat(float x) { return x - Floats{}; }

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }

// The second operand where one is NaN. Compilers do not make one instruction of the plain form.
inline Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// Folds the lanes of x into one by `combine`, halves first.
template <class Combine>
inline float reduce(Floats x, Combine combine) {
  float lanes[kLanes];
  store(lanes, x);
#pragma GCC unroll 8
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}

inline float reduce_maximum(Floats x) {
  return reduce(x, [](float a, float b) { return a > b ? a : b; });
}

inline float reduce_sum(Floats x) {
  return reduce(x, [](float a, float b) { return a + b; });
}

// 2^x for x < 127: 0 where 2^x is below the normal numbers of float32, NaN where x is NaN. kDegree 5 errs by 1e-7, 3 by
// 1e-4, relative; the coefficients are minimax on [-1/2, 1/2] with 2^0 = 1 exact.
template <int kDegree>
inline Floats exp2(Floats x) {
  // A sum with it keeps the nearest integer in its low bits, plus 127: the exponent field of a float, 0 for -127.
  const Floats magic = splat(0x1.8p23f + 127);
#if defined(__AVX512F__)
  const __mmask16 is_normal = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);
#else
  x = maximum(splat(-127.0f), x);
#endif
  const Floats shifted = x + magic, nearest = shifted - magic;
  const Floats r = x - nearest;
  Floats p;
  if constexpr (kDegree == 5) {
    p = splat(0.00132647269f) * r + splat(0.00967151266f);
    p = p * r + splat(0.0555073374f);
    p = p * r + splat(0.240222421f);
    p = p * r + splat(0.693146978f);
  } else {
    static_assert(kDegree == 3);
    p = splat(0.0550089286f) * r + splat(0.24221096f);
    p = p * r + splat(0.693282928f);
  }
  p = p * r + splat(1.0f);
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(is_normal, p, nearest);
#else
  return p * (Floats)((Ints)shifted << 23);
#endif
}

// What depends on the dtype of operands: how many consecutive elements of the summed axis a lane holds, the product of
// such lanes, and rounding; `store_across` makes kPairs rows the summed axis.
struct Float32 {
  using Element = float;
  static constexpr int kPairs = 1;
  static constexpr int kDegree = 5;
  using Operand = Floats;
  static Operand broadcast(const Element* from) { return splat(*from); }
  static Operand load(const Element* from) { return SVGGT_ISA::load(from); }
  static Floats multiply_add(Operand a, Operand b, Floats c) { return a * b + c; }
  static void store(Element* to, Floats x) { SVGGT_ISA::store(to, x); }
  static void store_across(Element* to, const Floats* rows) { SVGGT_ISA::store(to, rows[0]); }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  using Element = uint16_t;
  static constexpr int kPairs = 2;
  static constexpr int kDegree = 3;
  using Operand = __m512bh;
  static Operand broadcast(const Element* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Operand load(const Element* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Floats multiply_add(Operand a, Operand b, Floats c) { return _mm512_dpbf16_ps(c, a, b); }
  static void store(Element* to, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
  }
  static void store_across(Element* to, const Floats* rows) {
    const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rows[0]));
    const __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rows[1]));
    _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
};
#elif defined(SVGGT_EMULATE_TILES)
struct BFloat16 {
  using Element = uint16_t;
  static constexpr int kPairs = 2;
  static void store(Element* to, Floats x) {
    const Ints bits = (Ints)x, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<Element>(rounded[i]);
  }
};
#endif

}  // namespace svggt::SVGGT_ISA
