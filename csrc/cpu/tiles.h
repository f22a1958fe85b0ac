// The eight tile registers, each 16 rows of 64 bytes: AMX, or plain C++ if SVGGT_EMULATE_TILES is defined, so that what is
// written in tiles can be tested on any CPU.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace svggt::SVGGT_ISA {

constexpr int64_t kTile = 16;       // rows of a tile, and float32 columns
constexpr int64_t kTileDepth = 32;  // bfloat16 columns: as far as one product sums

#if defined(SVGGT_EMULATE_TILES)

static_assert(kLanes == kTile);

struct EmulatedTiles {
  bool configured = false;
  Ints rows[8][kTile];
};

inline EmulatedTiles& emulated() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

// The rows of a tile, if there are tiles now: a CPU would refuse, too.
inline Ints* emulated_rows(int tile) {
  if (!emulated().configured) std::abort();
  return emulated().rows[tile];
}

inline void emulated_multiply_add(int sums, int left, int right) {
  Ints* const to = emulated_rows(sums);
  for (int64_t i = 0; i < kTile; ++i) {
    Floats sum = (Floats)to[i];
    for (int64_t k = 0; k < kTile; ++k) {  // pairs: the even element in the low half, the odd one in the high half
      const Ints a = Ints{} + emulated_rows(left)[i][k], b = emulated_rows(right)[k];
      sum += (Floats)(a << 16) * (Floats)(b << 16);
      sum += (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
    }
    to[i] = (Ints)sum;
  }
}

#endif

// Lets the thread that makes it use tiles as long as it lives. Nothing between may call what uses tiles itself.
class TileRegisters {
 public:
  TileRegisters() {
#if defined(SVGGT_EMULATE_TILES)
    emulated().configured = true;
#else
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
    } const configuration;
    static_assert(sizeof(configuration) == 64);
    __asm__ volatile("ldtilecfg %0" ::"m"(configuration));
#endif
  }
  ~TileRegisters() {
#if defined(SVGGT_EMULATE_TILES)
    emulated().configured = false;
#else
    __asm__ volatile("tilerelease");
#endif
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

template <int kTo>
inline void tile_zero() {
#if defined(SVGGT_EMULATE_TILES)
  std::memset(emulated_rows(kTo), 0, sizeof(Ints) * kTile);
#else
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTo));
#endif
}

// Strides count bytes from row to row.
template <int kTo>
inline void tile_load(const void* from, int64_t stride) {
#if defined(SVGGT_EMULATE_TILES)
  for (int64_t i = 0; i < kTile; ++i)
    std::memcpy(emulated_rows(kTo) + i, static_cast<const char*>(from) + i * stride, sizeof(Ints));
#else
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTo) : "memory");
#endif
}

template <int kFrom>
inline void tile_store(void* to, int64_t stride) {
#if defined(SVGGT_EMULATE_TILES)
  for (int64_t i = 0; i < kTile; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, emulated_rows(kFrom) + i, sizeof(Ints));
#else
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kFrom) : "memory");
#endif
}

// sums += left right, float32 += bfloat16 bfloat16. Element (k, j) of the right one lies in row k / 2 at 2 j + k % 2.
template <int kSums, int kLeft, int kRight>
inline void tile_multiply_add() {
#if defined(SVGGT_EMULATE_TILES)
  emulated_multiply_add(kSums, kLeft, kRight);
#else
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
#endif
}

}  // namespace svggt::SVGGT_ISA
