// The kernels in tiles, bfloat16: AMX makes the products, vectors what lies between them. Compiled once, as kernel.cpp is
// for every other instruction set, and a second time in tests, where tiles are emulated.
//
// Blocks of 32 rows go through three steps: scores, weights, weights times values. A product keeps 2 x 2 tiles of sums; it
// leaves the vector units idle, and in every step of it a few vectors of the block before become weights.

#define SVGGT_TILES
#include "tiles.h"

#include <math.h>

#include <utility>

#include "operands.h"

namespace svggt::SVGGT_ISA {
namespace {

using Element = BFloat16::Element;

constexpr float kLn2 = 0.693147181f;
// So far apart that the rows of a tile do not share a cache set.
constexpr int64_t kScoresStride = kMostColumns + kTile;
constexpr int64_t kWeightsStride = kMostColumns + kTileDepth;
static_assert(kRows == 2 * kTile && kPad == kTileDepth && kMostRows % kRows == 0);

#if defined(SVGGT_EMULATE_TILES)
#define SVGGT_ALWAYS_INLINE  // left to the compiler: tests need no speed but to be compiled soon
#else
#define SVGGT_ALWAYS_INLINE __attribute__((always_inline))
#endif
#define SVGGT_INLINE inline SVGGT_ALWAYS_INLINE

struct Nothing {
  void operator()() const {}
};

// 32 x 32 elements of c = a b. Strides count elements of a and c, and pairs of b. `beside` is called twice in every step.
template <class Beside>
SVGGT_INLINE void multiply_block(const Element* a, int64_t a_stride, const Element* b, int64_t b_stride, int64_t depth,
                                 float* c, int64_t c_stride, Beside& beside) {
  const int64_t a_bytes = a_stride * sizeof(Element), b_bytes = 2 * b_stride * sizeof(Element);
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    const Element *left = a + k, *right = b + k * b_stride;
    tile_load<4>(left, a_bytes);
    tile_load<6>(right, b_bytes);
    tile_load<7>(right + 2 * kTile, b_bytes);
    tile_multiply_add<0, 4, 6>();
    tile_multiply_add<1, 4, 7>();
    beside();
    tile_load<5>(left + kTile * a_stride, a_bytes);
    tile_multiply_add<2, 5, 6>();
    tile_multiply_add<3, 5, 7>();
    beside();
  }
  const int64_t c_bytes = c_stride * sizeof(float);
  tile_store<0>(c, c_bytes);
  tile_store<1>(c + kTile, c_bytes);
  tile_store<2>(c + kTile * c_stride, c_bytes);
  tile_store<3>(c + kTile * c_stride + kTile, c_bytes);
}

// c = a b for 32 rows of a and the packed array b, depth x width.
template <class Beside>
SVGGT_INLINE void multiply(const Element* a, int64_t a_stride, const Element* b, int64_t depth, int64_t width, float* c,
                           int64_t c_stride, Beside& beside) {
  for (int64_t j = 0; j < width; j += kRows) {
    const int64_t panel = j / (kLanes * kVectors) * (kLanes * kVectors);
    multiply_block(a, a_stride, b + panel * depth + 2 * (j - panel), panel_width(panel, width), depth, c + j, c_stride,
                   beside);
  }
}

// to = [factor * to] + from for 32 rows.
SVGGT_INLINE void accumulate(const float* from, const float* factors, float* to, int64_t features) {
  for (int64_t i = 0; i < kRows; ++i) {
    const Floats factor = splat(factors ? factors[i] : 1.0f);
    for (int64_t d = i * features; d < (i + 1) * features; d += kLanes) store(to + d, factor * load(to + d) + load(from + d));
  }
}

// 2^x for x < 127, relative error 1e-4 and none where x is whole; 0 for x = -infinity, NaN for NaN.
SVGGT_INLINE Floats weight(Floats x) {
#if defined(__AVX512F__)
  const Floats r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // what is left above a whole number
#else
  x = maximum(splat(-127.0f), x);
  const Floats magic = splat(0x1.8p23f + 127), nearest = (x + magic) - magic;  // as in exp2
  const Floats whole = nearest > x ? nearest - splat(1.0f) : nearest;
  const Floats r = x - whole;
#endif
  Floats p = splat(0.0782679702f) * r + splat(0.226307682f);
  p = p * r + splat(0.695424348f);
  p = p * r + splat(1.0f);
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, x);
#else
  return p * (Floats)((Ints)(whole + magic) << 23);
#endif
}

// Two vectors as 32 consecutive elements.
SVGGT_INLINE void store_pair(Element* to, Floats first, Floats second) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
#else
  BFloat16::store(to, first);
  BFloat16::store(to + kLanes, second);
#endif
}

// Element (0, j) of two rows to 2 j, element (1, j) to 2 j + 1. Halfway is rounded away from 0, which costs less.
SVGGT_INLINE void store_across(Element* to, Floats even, Floats odd) {
  const Ints half = Ints{} + 0x8000u;
  const Ints pairs = (((Ints)even + half) >> 16) | (((Ints)odd + half) & 0xffff0000u);
  std::memcpy(to, &pairs, sizeof(pairs));
}

// Of two vectors of groups of 2 * kHalf lanes, lane by lane the larger one of the halves of each group: groups of kHalf
// lanes, of a and of b in turn.
template <int kHalf>
SVGGT_INLINE Floats fold(Floats a, Floats b) {
  Ints low;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / kHalf;
    low[lane] = (group % 2 ? kLanes : 0) + group / 2 * 2 * kHalf + lane % kHalf;
  }
#if defined(__AVX512F__)
  return maximum(_mm512_permutex2var_ps(a, (__m512i)low, b), _mm512_permutex2var_ps(a, (__m512i)(low + kHalf), b));
#else
  Floats halves[2];
  for (int half = 0; half < 2; ++half)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int from = low[lane] + half * kHalf;
      halves[half][lane] = from < kLanes ? a[from] : b[from - kLanes];
    }
  return maximum(halves[0], halves[1]);
#endif
}

// The largest lane of each of 16 vectors, in their order.
SVGGT_INLINE Floats maxima(Floats* rows) {
  for (int i = 0; i < 8; ++i) rows[i] = fold<8>(rows[i], rows[i + 8]);
  for (int i = 0; i < 4; ++i) rows[i] = fold<4>(rows[i], rows[i + 4]);
  for (int i = 0; i < 2; ++i) rows[i] = fold<2>(rows[i], rows[i + 2]);
  return fold<1>(rows[0], rows[1]);
}

// Elements that a call of `beside` makes at a head size of 64, so that both products of a block take all of them.
constexpr int64_t kBeside = 128;

int64_t units_beside(int64_t features, int64_t unit) {
  const int64_t units = kBeside * 64 / (features * unit);
  return units > 1 ? units : 1;
}

// Makes the weights of 32 rows for one tile of columns of their scores, 32 at a time.
class Softmax {
 public:
  explicit Softmax(int64_t features) : units_(units_beside(features, kRows)) {}

  // Takes new scores. `most` holds the largest score of each row so far in units of log2; updates it, and sets `rescale` by
  // how much what was found with the old maximum shrinks, as the sums will at the end.
  void start(const float* scores, Element* weights, int64_t width, float factor, float* most, RowSum* sums,
             float* rescale) {
    scores_ = scores, weights_ = weights, width_ = width, factor_ = factor, sums_ = sums, rescale_ = rescale, row_ = 0,
    column_ = 0;
    for (int64_t row = 0; row < kRows; row += kLanes) {
      Floats top[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const float* const from = scores + (row + i) * kScoresStride;
        top[i] = load(from);
        for (int64_t j = kLanes; j < width; j += kLanes) top[i] = maximum(load(from + j), top[i]);
      }
      const Floats before = load(most + row), now = maximum(before, maxima(top) * splat(factor));
      store(most + row, now);
      store(most_ + row, now);
      store(rescale + row, exp2<5>(before - now));
    }
    sum_ = Floats{};
  }

  SVGGT_INLINE void operator()() { make(units_); }

  SVGGT_INLINE void finish() { make(kRows * kMostColumns); }

 private:
  SVGGT_INLINE void make(int64_t units) {
    while (units > 0 && row_ < kRows) {
      const float* const from = scores_ + row_ * kScoresStride;
      Element* const to = weights_ + row_ * kWeightsStride;
      const Floats factor = splat(factor_), most = splat(most_[row_]);
      const int64_t stop = column_ + units * kRows, end = stop < width_ ? stop : width_;
      units -= (end - column_) / kRows;
      Floats sum = sum_;
      for (int64_t j = column_; j < end; j += 2 * kLanes) {
        const Floats first = weight(load(from + j) * factor - most);
        const Floats second = weight(load(from + j + kLanes) * factor - most);
        sum += first + second;
        store_pair(to + j, first, second);
      }
      sum_ = sum, column_ = end;
      if (end < width_) continue;
      sums_[row_].add(sum, rescale_[row_]);
      sum_ = Floats{}, column_ = 0, ++row_;
    }
  }

  int64_t units_;
  const float* scores_ = nullptr;
  Element* weights_ = nullptr;
  RowSum* sums_ = nullptr;
  const float* rescale_ = nullptr;
  int64_t width_ = 0;
  float factor_ = 0;
  float most_[kRows];
  Floats sum_ = {};  // of the row in this tile so far
  int64_t row_ = kRows;
  int64_t column_ = 0;
};

int64_t scratch_bytes(int64_t head_size) {
  const int64_t features = round_up(head_size, kPad);
  const int64_t tile = kMostRows * features * sizeof(float), block = kRows * features * sizeof(float);
  const int64_t scores = kRows * kScoresStride * sizeof(float), weights = kRows * kWeightsStride * sizeof(Element);
  const int64_t slopes = kMostRows * kScoresStride * sizeof(Element), columns = kMostColumns * features * sizeof(float);
  const int64_t rows = kMostRows * (sizeof(float) + sizeof(RowSum));
  return 4 * tile + block + 4 * scores + 4 * weights + slopes + columns + rows;
}

void forward(const RowTile& tile, const Columns& columns, int64_t head_size, float scale, char* memory) {
  const TileRegisters registers;
  Scratch scratch(memory);
  const int64_t features = round_up(head_size, kPad), rows = round_up(tile.rows[0].count, kRows);
  Element* queries = scratch.take<Element>(rows * features);
  float* out = scratch.take<float>(rows * features);
  float* product = scratch.take<float>(kRows * features);
  float* most = scratch.take<float>(rows);
  RowSum* sums = scratch.take<RowSum>(rows);
  copy_rows<BFloat16>(tile.rows[0], head_size, queries);
  for (int64_t i = 0; i < rows; ++i) most[i] = -HUGE_VALF;
  std::memset(sums, 0, rows * sizeof(RowSum));
  std::memset(out, 0, rows * features * sizeof(float));

  // Weights times values, of the block before last and of the last one.
  struct Block {
    float* scores;
    Element* weights;
    const Element* values;
    int64_t width;
    float* out;
    float rescale[kRows];
  } blocks[2] = {};
  for (Block& block : blocks) {
    block.scores = scratch.take<float>(kRows * kScoresStride);
    block.weights = scratch.take<Element>(kRows * kWeightsStride);
  }
  Block *next = &blocks[0], *last = &blocks[1];
  Softmax softmax(features);
  const auto add_values = [&](const Block& block, auto& beside) SVGGT_ALWAYS_INLINE {
    if (!block.values) return;
    multiply(block.weights, kWeightsStride, block.values, block.width, features, product, features, beside);
    accumulate(product, block.rescale, block.out, features);
  };
  for (int64_t r = 0; r < columns.num_runs; ++r)
    for (int64_t t = columns.runs[r].begin; t < columns.runs[r].end; ++t) {
      const ColumnTile column = columns.tiles[t];
      const int64_t width = round_up(column.count, kPad);
      const auto* keys = reinterpret_cast<const Element*>(columns.by_token[0]) + column.offset * features;
      const auto* values = reinterpret_cast<const Element*>(columns.by_feature[0]) + column.offset * features;
      for (int64_t row = 0; row < rows; row += kRows) {
        multiply(queries + row * features, features, keys, features, width, next->scores, kScoresStride, softmax);
        add_values(*next, softmax);
        softmax.finish();
        for (int64_t i = 0; i < kRows; ++i)
          for (int64_t j = column.count; j < width; ++j) next->scores[i * kScoresStride + j] = -HUGE_VALF;
        next->values = values, next->width = width, next->out = out + row * features;
        softmax.start(next->scores, next->weights, width, scale * kLog2E, most + row, sums + row, next->rescale);
        std::swap(next, last);
      }
    }
  const Nothing nothing;
  add_values(*next, softmax);
  softmax.finish();
  add_values(*last, nothing);

  finish_rows<BFloat16>(tile, head_size, out, sums, most, kLn2);
}

// Makes the weights and slopes of 32 keys for one tile of queries of their scores and of V dO^T, two keys and 32 queries at
// a time. Slopes are the gradients of the unscaled scores, divided by the scale.
class Slopes {
 public:
  explicit Slopes(int64_t features) : units_(units_beside(features, 4 * kLanes)) {}

  // `across` is where the slopes of the first key lie in an array that is read across keys.
  void start(const float* scores, const float* products, Element* weights, Element* slopes, Element* across,
             int64_t rows, int64_t width, const float* lse, const float* inner, float scale) {
    scores_ = scores, products_ = products, weights_ = weights, slopes_ = slopes, across_ = across, lse_ = lse,
    inner_ = inner, factor_ = scale * kLog2E, rows_ = rows, width_ = width, row_ = 0, column_ = 0;
  }

  SVGGT_INLINE void operator()() { make(units_); }

  SVGGT_INLINE void finish() { make(kRows * kMostColumns); }

 private:
  SVGGT_INLINE void make(int64_t units) {
    while (units > 0 && row_ < kRows) {
      const int64_t stop = column_ + units * 2 * kLanes, end = stop < width_ ? stop : width_;
      units -= (end - column_) / (2 * kLanes);
      for (int64_t j = column_; j < end; j += 2 * kLanes) step(row_, j);
      column_ = end;
      if (end == width_) column_ = 0, row_ += 2;
    }
  }

  SVGGT_INLINE void step(int64_t row, int64_t column) {
    const Floats factor = splat(factor_);
    Floats slopes[2][2];
    for (int i = 0; i < 2; ++i) {
      const int64_t place = (row + i) * kScoresStride + column, to = (row + i) * kWeightsStride + column;
      Floats weights[2];
      for (int j = 0; j < 2; ++j) {
        const Floats lse = load(lse_ + column + j * kLanes) * splat(kLog2E);
        const Floats inner = load(inner_ + column + j * kLanes);
        weights[j] = weight(load(scores_ + place + j * kLanes) * factor - lse);
        slopes[i][j] = row + i < rows_ ? weights[j] * (load(products_ + place + j * kLanes) - inner) : Floats{};
      }
      store_pair(weights_ + to, weights[0], weights[1]);
      store_pair(slopes_ + to, slopes[i][0], slopes[i][1]);
    }
    for (int j = 0; j < 2; ++j)
      store_across(across_ + row * kScoresStride + 2 * (column + j * kLanes), slopes[0][j], slopes[1][j]);
  }

  int64_t units_;
  const float* scores_ = nullptr;
  const float* products_ = nullptr;
  Element* weights_ = nullptr;
  Element* slopes_ = nullptr;
  Element* across_ = nullptr;
  const float* lse_ = nullptr;
  const float* inner_ = nullptr;
  float factor_ = 0;
  int64_t rows_ = 0;
  int64_t width_ = 0;
  int64_t row_ = kRows;
  int64_t column_ = 0;
};

// Adds up dQ / scale feature by feature, [features x queries] for each tile of queries: so slopes are its right operand
// as they are, and the keys its left one.
void backward(const RowTile& tile, const Columns& columns, int64_t head_size, float scale, char* memory) {
  const TileRegisters registers;
  Scratch scratch(memory);
  const int64_t features = round_up(head_size, kPad), rows = round_up(tile.rows[0].count, kRows);
  Element* operands[2];  // K and V
  float* results[2];     // dK and dV
  for (int i = 0; i < 2; ++i) {
    operands[i] = scratch.take<Element>(rows * features);
    copy_rows<BFloat16>(tile.rows[i], head_size, operands[i]);
    results[i] = scratch.take<float>(rows * features);
    std::memset(results[i], 0, rows * features * sizeof(float));
  }
  Element* keys = scratch.take<Element>(rows * features);  // [features x keys]
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < features; ++d) keys[d * rows + i] = operands[0][i * features + d];
  Element* across = scratch.take<Element>(rows * kScoresStride);
  float* column_gradients = scratch.take<float>(kMostColumns * features);
  float* product = scratch.take<float>(kRows * features);

  struct Block {
    float* scores;
    float* products;  // V dO^T
    Element* weights;
    Element* slopes;
    int64_t row;
  } blocks[2];
  for (Block& block : blocks) {
    block.scores = scratch.take<float>(kRows * kScoresStride);
    block.products = scratch.take<float>(kRows * kScoresStride);
    block.weights = scratch.take<Element>(kRows * kWeightsStride);
    block.slopes = scratch.take<Element>(kRows * kWeightsStride);
  }
  Slopes slopes(features);
  const Nothing nothing;
  const int32_t* ranks = columns.ranks;

  for (int64_t r = 0; r < columns.num_runs; ++r)
    for (int64_t t = columns.runs[r].begin; t < columns.runs[r].end; ++t) {
      const ColumnTile column = columns.tiles[t];
      const int64_t width = round_up(column.count, kPad);
      const Element *by_token[2], *by_feature[2];
      for (int i = 0; i < 2; ++i) {
        by_token[i] = reinterpret_cast<const Element*>(columns.by_token[i]) + column.offset * features;
        by_feature[i] = reinterpret_cast<const Element*>(columns.by_feature[i]) + column.offset * features;
      }
      // Slopes times queries and weights times dO.
      const auto add_results = [&](const Block& block, auto& beside) SVGGT_ALWAYS_INLINE {
        const Element* const left[2] = {block.slopes, block.weights};
        for (int i = 0; i < 2; ++i) {
          multiply(left[i], kWeightsStride, by_feature[i], width, features, product, features, beside);
          accumulate(product, nullptr, results[i] + block.row * features, features);
        }
      };
      Block *next = &blocks[0], *last = &blocks[1];
      for (int64_t row = 0; row < rows; row += kRows) {
        multiply(operands[0] + row * features, features, by_token[0], features, width, next->scores, kScoresStride,
                 slopes);
        multiply(operands[1] + row * features, features, by_token[1], features, width, next->products, kScoresStride,
                 slopes);
        if (row >= 2 * kRows) add_results(*next, slopes);
        slopes.finish();
        next->row = row;
        slopes.start(next->scores, next->products, next->weights, next->slopes, across + row * kScoresStride,
                     tile.rows[0].count - row, width, columns.lse + column.offset, columns.inner + column.offset,
                     scale);
        std::swap(next, last);
      }
      if (rows > kRows) add_results(*next, slopes);
      slopes.finish();
      add_results(*last, nothing);
      for (int64_t d = 0; d < features; d += kRows)
        for (int64_t j = 0; j < width; j += kRows)
          multiply_block(keys + d * rows, rows, across + 2 * j, kScoresStride, rows, column_gradients + d * width + j,
                         width, nothing);
      add_in_turn(columns, t, *ranks++, column_gradients, features);
    }

  write_rows<BFloat16>(results[0], scale, tile.results[0], head_size);
  write_rows<BFloat16>(results[1], 1, tile.results[1], head_size);
}

void write_gradients(const float* from, float factor, const Tokens& tokens, int64_t head_size) {
  const int64_t width = round_up(tokens.count, kPad);
  for (int64_t i = 0; i < tokens.count; ++i) {
    Element* const to = row_of<Element>(tokens, i);
    for (int64_t d = 0; d < head_size; d += kLanes) {
      Floats x = {};
      const int64_t left = head_size - d < kLanes ? head_size - d : kLanes;
      for (int64_t j = 0; j < left; ++j) x[j] = from[(d + j) * width + i];
      Element rounded[kLanes];
      BFloat16::store(rounded, x * splat(factor));
      std::memcpy(to + d, rounded, left * sizeof(Element));
    }
  }
}

}  // namespace

extern const Kernels bfloat16 = {kPad,          sizeof(Element), pack_by_token<BFloat16>, pack_by_feature<BFloat16>,
                                 pack_statistics, scratch_bytes,   forward,                 backward,
                                 write_gradients};

}  // namespace svggt::SVGGT_ISA
