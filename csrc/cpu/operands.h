// How operands lie in memory, for the kernels of kernel.cpp and tiles.cpp: packed columns, rows, sums of gradients.
#pragma once

#include <math.h>
#include <sched.h>

#include "simd.h"

namespace svggt::SVGGT_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;

template <class T>
inline T* row_of(const Tokens& tokens, int64_t i) {
  return reinterpret_cast<T*>(tokens.data) + (tokens.index ? tokens.index[i] : i) * tokens.stride;
}

// How wide the panel is that starts at `column` of a packed array.
inline int64_t panel_width(int64_t column, int64_t width) {
  const int64_t left = width - column;
  return left < kLanes * kVectors ? left : kLanes * kVectors;
}

// Packed arrays are cut into panels of up to kLanes * kVectors columns; a panel holds, for each step of kPairs elements
// along the summed axis, those elements of its first column, of its second, and so on.
template <class Type>
void pack_by_token(const Tokens& tokens, int64_t head_size, char* packed) {
  using Element = typename Type::Element;
  struct Step {
    Element elements[Type::kPairs];
  };
  const int64_t width = round_up(tokens.count, kPad), steps = round_up(head_size, kPad) / Type::kPairs;
  const int64_t whole_steps = head_size / Type::kPairs, rest = head_size % Type::kPairs;
  Step* to = reinterpret_cast<Step*>(packed);
  for (int64_t first = 0; first < width; first += kLanes * kVectors) {
    const int64_t panel = panel_width(first, width);
    for (int64_t lane = 0; lane < panel; ++lane) {
      const int64_t token = first + lane;
      int64_t step = 0;
      if (token < tokens.count) {
        const Element* from = row_of<Element>(tokens, token);
        for (; step < whole_steps; ++step)
          std::memcpy(to + step * panel + lane, from + step * Type::kPairs, sizeof(Step));
        if (rest) to[step++ * panel + lane] = {from[head_size - 1]};
      }
      for (; step < steps; ++step) to[step * panel + lane] = {};
    }
    to += panel * steps;
  }
}

template <class Type>
void pack_by_feature(const Tokens& tokens, int64_t head_size, char* packed) {
  using Element = typename Type::Element;
  constexpr int kPairs = Type::kPairs;
  const int64_t width = round_up(head_size, kPad), depth = round_up(tokens.count, kPad);
  Element* to = reinterpret_cast<Element*>(packed);
  for (int64_t first = 0; first < width; first += kLanes * kVectors) {
    const int64_t panel = panel_width(first, width);
    const int64_t here = head_size - first < panel ? head_size - first : panel;
    for (int64_t token = 0; token < depth; token += kPairs, to += panel * kPairs) {
      if (here < panel || token + kPairs > tokens.count) std::memset(to, 0, panel * kPairs * sizeof(Element));
      const Element* from[kPairs];
      for (int half = 0; half < kPairs; ++half)
        from[half] = token + half < tokens.count ? row_of<Element>(tokens, token + half) + first : nullptr;
      if (from[kPairs - 1])
        for (int64_t lane = 0; lane < here; ++lane)
          for (int half = 0; half < kPairs; ++half) to[lane * kPairs + half] = from[half][lane];
      else if (from[0])
        for (int64_t lane = 0; lane < here; ++lane) to[lane * kPairs] = from[0][lane];
    }
  }
}

// Rows of a tile as products read them, padded with zeros to kRows and kPad.
template <class Type>
void copy_rows(const Tokens& tokens, int64_t head_size, typename Type::Element* to) {
  using Element = typename Type::Element;
  const int64_t width = round_up(head_size, kPad), rows = round_up(tokens.count, kRows);
  std::memset(to, 0, rows * width * sizeof(Element));
  for (int64_t i = 0; i < tokens.count; ++i) {
    std::memcpy(to + i * width, row_of<Element>(tokens, i), head_size * sizeof(Element));
  }
}

// Writes results times a factor.
template <class Type>
void write_rows(const float* from, float factor, const Tokens& tokens, int64_t head_size) {
  using Element = typename Type::Element;
  const int64_t width = round_up(head_size, kPad);
  for (int64_t i = 0; i < tokens.count; ++i) {
    Element* to = row_of<Element>(tokens, i);
    for (int64_t d = 0; d < head_size; d += kLanes) {
      Element rounded[kLanes];
      Type::store(rounded, load(from + i * width + d) * splat(factor));
      const int64_t left = head_size - d;
      std::memcpy(to + d, rounded, (left < kLanes ? left : kLanes) * sizeof(Element));
    }
  }
}

// The sum of the weights of a row, in kLanes parts. Each tile of columns is summed apart, and what the addition of a tile
// rounds off is added with the next tile (Kahan, 1965), so that the error does not grow with the number of tiles.
struct RowSum {
  Floats parts;
  Floats excess;  // by how much `parts` is too large

  // Adds a tile after `factor` times what there is.
  void add(Floats tile, float factor) {
    const Floats before = parts * splat(factor), added = tile - excess * splat(factor);
    parts = before + added;
    excess = (parts - before) - added;
  }
};

// The end of a forward pass: divides each row of `out` by its sum, and writes it and its LSE. A sum is 0 only where the row
// sees nothing; `unit` is that of `most`, the largest scores, in natural logarithms.
template <class Type>
void finish_rows(const RowTile& tile, int64_t head_size, float* out, const RowSum* sums, const float* most, float unit) {
  const int64_t features = round_up(head_size, kPad);
  for (int64_t i = 0; i < tile.rows[0].count; ++i) {
    const float sum = reduce_sum(sums[i].parts);
    *row_of<float>(tile.lse, i) = sum == 0 ? -HUGE_VALF : most[i] * unit + ::logf(sum);
    if (sum != 0)
      for (int64_t d = 0; d < features; d += kLanes)
        store(out + i * features + d, load(out + i * features + d) / splat(sum));
  }
  write_rows<Type>(out, 1, tile.results[0], head_size);
}

// Numbers of tokens, contiguous but for their index.
inline void pack_statistics(const Tokens& tokens, int64_t, char* packed) {
  float* to = reinterpret_cast<float*>(packed);
  const float* from = reinterpret_cast<const float*>(tokens.data);
  for (int64_t i = 0; i < round_up(tokens.count, kPad); ++i)
    to[i] = i < tokens.count ? from[tokens.index ? tokens.index[i] : i] : 0;
}

// The memory a task works in, cut from one block.
class Scratch {
 public:
  explicit Scratch(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(memory_);
    memory_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return taken;
  }

 private:
  char* memory_;
};

// Adds to the gradients of column tile `t` after `rank` tiles of rows have: all add in their order, whichever thread is
// first, so that sums round in the same way every time.
inline void add_in_turn(const Columns& columns, int64_t t, int32_t rank, const float* gradients, int64_t features) {
  int32_t* turn = columns.turns + t;
  while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != rank) sched_yield();
  float* sums = columns.gradients + columns.tiles[t].offset * features;
  for (int64_t i = 0; i < round_up(columns.tiles[t].count, kPad) * features; i += kLanes)
    store(sums + i, load(sums + i) + load(gradients + i));
  __atomic_store_n(turn, rank + 1, __ATOMIC_RELEASE);
}

}  // namespace
}  // namespace svggt::SVGGT_ISA
