// The eight tile registers, each 16 rows of 64 bytes: AMX, or plain C++ if SVGGT_EMULATE_TILES is defined, so that what is
// written in tiles can be tested on any CPU.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace svggt::SVGGT_ISA {

constexpr int64_t kTile = 16;       // rows of a tile, and float32 columns
constexpr int64_t kTileDepth = 32;  // bfloat16 columns: as far as one product sums

#if defined(SVGGT_EMULATE_TILES)

struct EmulatedTiles {
  bool configured = false;
  alignas(64) unsigned char rows[8][kTile][64];
};

inline EmulatedTiles& emulated() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

// As a CPU would refuse.
inline EmulatedTiles& configured() {
  if (!emulated().configured) std::abort();
  return emulated();
}

inline float emulated_element(int tile, int64_t row, int64_t column) {
  const uint32_t bits = static_cast<uint32_t>(reinterpret_cast<uint16_t*>(emulated().rows[tile][row])[column]) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

#endif

// Lets a thread use tiles as long as it lives.
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
  std::memset(configured().rows[kTo], 0, sizeof(configured().rows[kTo]));
#else
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTo));
#endif
}

// Strides count bytes from row to row.
template <int kTo>
inline void tile_load(const void* from, int64_t stride) {
#if defined(SVGGT_EMULATE_TILES)
  for (int64_t i = 0; i < kTile; ++i)
    std::memcpy(configured().rows[kTo][i], static_cast<const char*>(from) + i * stride, 64);
#else
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTo) : "memory");
#endif
}

template <int kFrom>
inline void tile_store(void* to, int64_t stride) {
#if defined(SVGGT_EMULATE_TILES)
  for (int64_t i = 0; i < kTile; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, configured().rows[kFrom][i], 64);
#else
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kFrom) : "memory");
#endif
}

// sums += left right, float32 += bfloat16 bfloat16. Element (k, j) of the right one lies in row k / 2 at 2 j + k % 2.
template <int kSums, int kLeft, int kRight>
inline void tile_multiply_add() {
#if defined(SVGGT_EMULATE_TILES)
  float left[kTile][kTileDepth], right[kTileDepth][kTile];
  for (int64_t i = 0; i < kTile; ++i)
    for (int64_t k = 0; k < kTileDepth; ++k) {
      left[i][k] = emulated_element(kLeft, i, k);
      right[k][i] = emulated_element(kRight, k / 2, 2 * i + k % 2);
    }
  for (int64_t i = 0; i < kTile; ++i) {
    float* const sums = reinterpret_cast<float*>(configured().rows[kSums][i]);
    for (int64_t k = 0; k < kTileDepth; ++k)
      for (int64_t j = 0; j < kTile; ++j) sums[j] += left[i][k] * right[k][j];
  }
#else
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
#endif
}

}  // namespace svggt::SVGGT_ISA
