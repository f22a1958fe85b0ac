// The kernels in vectors, compiled once for each instruction set: SVGGT_ISA names it, compiler flags select it.
//
// A tile of rows meets its columns tile by tile. Six rows at a time go through all steps while their scores lie in the
// first-level cache; the packed columns stay in the second-level cache for all rows of the tile. A product takes rows
// broadcast element by element and columns a vector at a time, 6 rows x kVectors vectors in registers.

#include <float.h>
#include <math.h>

#include <utility>

#include "operands.h"

namespace svggt::SVGGT_ISA {
namespace {

// Slopes are kept for all rows of a tile, so far apart that those of consecutive rows do not share a cache set.
constexpr int64_t kSlopesStride = kMostColumns + kPad;

// The left operand of a product: element (i, k) lies at i * row + k * step, where a step is kPairs elements of the sum.
template <class Element>
struct Left {
  const Element* data;
  int64_t row;
  int64_t step;
};

// What a product has to do beside: nothing.
struct Nothing {
  void operator()() const {}
};

// One panel of c = [factor * c] + a b for kRows rows; without factors c is overwritten. `beside` is called in every step.
// The product is summed apart and then added: sums over many tiles round less often so.
template <class Type, int kWide, class Beside>
inline void multiply_panel(Left<typename Type::Element> a, const typename Type::Element* b, int64_t depth, float* c,
                           int64_t c_stride, const float* factors, Beside& beside) {
  Floats sums[kRows][kWide] = {};
#pragma GCC unroll 2
  for (int64_t step = 0; step < depth / Type::kPairs; ++step) {
    beside();
    typename Type::Operand columns[kWide];
#pragma GCC unroll 8
    for (int j = 0; j < kWide; ++j) columns[j] = Type::load(b + (step * kWide + j) * Type::kPairs * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const typename Type::Operand row = Type::broadcast(a.data + i * a.row + step * a.step);
#pragma GCC unroll 8
      for (int j = 0; j < kWide; ++j) sums[i][j] = Type::multiply_add(row, columns[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kWide; ++j) {
      float* const to = c + i * c_stride + j * kLanes;
      store(to, factors ? splat(factors[i]) * load(to) + sums[i][j] : sums[i][j]);
    }
}

// The same, for a panel whose width is known when it runs: kWide vectors or fewer.
template <class Type, int kWide = kVectors, class Beside>
inline void multiply_panel_of(int64_t vectors, Left<typename Type::Element> a, const typename Type::Element* b,
                              int64_t depth, float* c, int64_t c_stride, const float* factors, Beside& beside) {
  if constexpr (kWide > 1)
    if (vectors < kWide)
      return multiply_panel_of<Type, kWide - 1>(vectors, a, b, depth, c, c_stride, factors, beside);
  multiply_panel<Type, kWide>(a, b, depth, c, c_stride, factors, beside);
}

// c = [factor * c] + a b for kRows rows of a and the packed array b, depth x width.
template <class Type, class Beside>
void multiply(Left<typename Type::Element> a, const typename Type::Element* b, int64_t depth, int64_t width, float* c,
              int64_t c_stride, const float* factors, Beside& beside) {
  for (int64_t first = 0; first < width; first += kLanes * kVectors)
    multiply_panel_of<Type>(panel_width(first, width) / kLanes, a, b + first * depth, depth, c + first, c_stride,
                            factors, beside);
}

template <class Type>
void multiply(Left<typename Type::Element> a, const typename Type::Element* b, int64_t depth, int64_t width, float* c,
              int64_t c_stride, const float* factors) {
  const Nothing nothing;
  multiply<Type>(a, b, depth, width, c, c_stride, factors, nothing);
}

// kRows rows of a plain array, from the first on.
template <class Type>
Left<typename Type::Element> rows_of(const typename Type::Element* first, int64_t stride) {
  return {first, stride, Type::kPairs};
}

// Hides the padding behind the last of `count` columns.
inline void hide_padding(float* scores, int64_t count) {
  const int64_t width = round_up(count, kPad);
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t j = count; j < width; ++j) scores[i * kMostColumns + j] = -HUGE_VALF;
}

int64_t scratch_bytes(int64_t head_size) {
  const int64_t tile = kMostRows * round_up(head_size, kPad) * sizeof(float);
  const int64_t scores = kRows * kMostColumns * sizeof(float);
  const int64_t slopes = kMostRows * kSlopesStride * sizeof(float);
  const int64_t columns = kMostColumns * round_up(head_size, kPad) * sizeof(float);
  const int64_t rows = kMostRows * (sizeof(float) + sizeof(RowSum));
  return 5 * tile + 6 * scores + slopes + columns + rows;
}

// The weights of kRows rows for one tile of columns, made of their scores a vector at a time.
template <class Type>
class Softmax {
 public:
  using Element = typename Type::Element;

  Softmax(float* scores, Element* weights) : scores_(scores), weights_(weights) {}

  // Takes new scores. Updates the largest score of each row, and sets `rescale` by how much what was found with the old
  // maximum shrinks, as the sums will at the end.
  void start(int64_t width, float factor, float* most, RowSum* sums, float* rescale) {
    width_ = width, factor_ = factor, sums_ = sums, rescale_ = rescale, row_ = 0, column_ = 0;
    for (int i = 0; i < kRows; ++i) {
      Floats top = load(scores_ + i * kMostColumns);
      for (int64_t j = kLanes; j < width; j += kLanes) top = maximum(load(scores_ + i * kMostColumns + j), top);
      const float before = most[i], here = reduce_maximum(top);
      most[i] = before > here ? before : here;
      most_[i] = most[i];
      rescale[i] = ::exp2f((before - most[i]) * factor);
      tile_sums_[i] = Floats{};
    }
  }

  // Makes the weights of the next vector, if there is one.
  void operator()() {
    if (column_ == width_) return;
    const int64_t place = row_ * kMostColumns + column_;
    const Floats p = exp2<Type::kDegree>((load(scores_ + place) - splat(most_[row_])) * splat(factor_));
    tile_sums_[row_] += p;
    Type::store(weights_ + place, p);
    if (++row_ == kRows) row_ = 0, column_ += kLanes;
  }

  void finish() {
    while (column_ < width_) (*this)();
    for (int i = 0; i < kRows; ++i) sums_[i].add(tile_sums_[i], rescale_[i]);
  }

 private:
  float* scores_;
  Element* weights_;
  int64_t width_ = 0;
  float factor_ = 0;
  float most_[kRows];
  Floats tile_sums_[kRows];
  RowSum* sums_ = nullptr;
  const float* rescale_ = nullptr;
  int64_t row_ = 0;
  int64_t column_ = 0;
};

template <class Type>
void forward(const RowTile& tile, const Columns& columns, int64_t head_size, float scale, char* memory) {
  using Element = typename Type::Element;
  Scratch scratch(memory);
  const int64_t features = round_up(head_size, kPad), rows = round_up(tile.rows[0].count, kRows);
  Element* queries = scratch.take<Element>(rows * features);
  float* out = scratch.take<float>(rows * features);
  float* most = scratch.take<float>(rows);  // the largest score of each row so far
  RowSum* sums = scratch.take<RowSum>(rows);
  float* scores = scratch.take<float>(kRows * kMostColumns);
  copy_rows<Type>(tile.rows[0], head_size, queries);
  for (int64_t i = 0; i < rows; ++i) most[i] = -HUGE_VALF;
  std::memset(sums, 0, rows * sizeof(RowSum));
  std::memset(out, 0, rows * features * sizeof(float));

  // Weights times values, beside which the weights of the next rows are made.
  struct Product {
    Element* weights;
    const Element* values;
    int64_t width;
    float* out;
    float rescale[kRows];
  } products[2] = {};
  for (Product& product : products) product.weights = scratch.take<Element>(kRows * kMostColumns);
  Product *next = &products[0], *due = &products[1];
  const auto run = [&](const Product& product, auto& beside) {
    multiply<Type>(rows_of<Type>(product.weights, kMostColumns), product.values, product.width, features, product.out,
                   features, product.rescale, beside);
  };
  for (int64_t r = 0; r < columns.num_runs; ++r)
    for (int64_t t = columns.runs[r].begin; t < columns.runs[r].end; ++t) {
      const ColumnTile column = columns.tiles[t];
      const int64_t width = round_up(column.count, kPad);
      const auto* keys = reinterpret_cast<const Element*>(columns.by_token[0]) + column.offset * features;
      const auto* values = reinterpret_cast<const Element*>(columns.by_feature[0]) + column.offset * features;
      for (int64_t row = 0; row < rows; row += kRows) {
        multiply<Type>(rows_of<Type>(queries + row * features, features), keys, features, width, scores, kMostColumns,
                       nullptr);
        hide_padding(scores, column.count);
        next->values = values, next->width = width, next->out = out + row * features;
        Softmax<Type> softmax(scores, next->weights);
        softmax.start(width, scale * kLog2E, most + row, sums + row, next->rescale);
        if (due->values) run(*due, softmax);
        softmax.finish();
        std::swap(next, due);
      }
    }
  const Nothing nothing;
  if (due->values) run(*due, nothing);

  finish_rows<Type>(tile, head_size, out, sums, most, scale);
}

// Weights and slopes of kRows keys for one tile of queries, made of scores and of V dO^T a vector at a time. Slopes are
// the gradients of the unscaled scores, divided by the scale.
template <class Type>
class Slopes {
 public:
  using Element = typename Type::Element;

  // `across` is where the slopes of the first key lie in an array that is read across keys.
  Slopes(const float* scores, const float* products, Element* weights, Element* slopes, Element* across, int64_t rows,
         int64_t width, const float* lse, const float* inner, float scale)
      : scores_(scores), products_(products), weights_(weights), slopes_(slopes), across_(across), lse_(lse),
        inner_(inner), scale_(scale), rows_(rows), width_(width) {}

  // Makes the next vectors, of kPairs keys, if there are any left.
  void operator()() {
    if (column_ == width_) return;
    Floats slopes[Type::kPairs];
#pragma GCC unroll 2
    for (int i = 0; i < Type::kPairs; ++i) {
      const int64_t place = (row_ + i) * kMostColumns + column_;
      // Rounded as in the forward pass, so that a lone key has weight 1; the maximum keeps the compiler from fusing.
      const Floats score = maximum(splat(-FLT_MAX), load(scores_ + place) * splat(scale_));
      const Floats p = exp2<Type::kDegree>((score - load(lse_ + column_)) * splat(kLog2E));
      slopes[i] = row_ + i < rows_ ? p * (load(products_ + place) - load(inner_ + column_)) : Floats{};
      Type::store(weights_ + place, p);
      Type::store(slopes_ + place, slopes[i]);
    }
    Type::store_across(across_ + row_ * kSlopesStride + column_ * Type::kPairs, slopes);
    row_ += Type::kPairs;
    if (row_ == kRows) row_ = 0, column_ += kLanes;
  }

  void finish() {
    while (column_ < width_) (*this)();
  }

 private:
  const float* scores_;
  const float* products_;
  Element* weights_;
  Element* slopes_;
  Element* across_;
  const float* lse_;
  const float* inner_;
  float scale_;
  int64_t rows_;
  int64_t width_;
  int64_t row_ = 0;
  int64_t column_ = 0;
};

template <class Type>
void backward(const RowTile& tile, const Columns& columns, int64_t head_size, float scale, char* memory) {
  using Element = typename Type::Element;
  Scratch scratch(memory);
  const int64_t features = round_up(head_size, kPad), rows = round_up(tile.rows[0].count, kRows);
  const int64_t depth = round_up(tile.rows[0].count, kPad);
  Element* operands[2];  // K and V
  float* results[2];     // dK and dV
  for (int i = 0; i < 2; ++i) {
    operands[i] = scratch.take<Element>(rows * features);
    copy_rows<Type>(tile.rows[i], head_size, operands[i]);
    results[i] = scratch.take<float>(rows * features);
    std::memset(results[i], 0, rows * features * sizeof(float));
  }
  Element* keys = scratch.take<Element>(depth * features);
  pack_by_feature<Type>(tile.rows[0], head_size, reinterpret_cast<char*>(keys));
  Element* across = scratch.take<Element>(kMostRows * kSlopesStride);
  std::memset(across, 0, kMostRows * kSlopesStride * sizeof(Element));
  float* column_gradients = scratch.take<float>(kMostColumns * features);
  float* scores = scratch.take<float>(kRows * kMostColumns);
  float* products = scratch.take<float>(kRows * kMostColumns);  // V dO^T

  // Slopes times queries and weights times dO, beside which those of the next keys are made.
  struct Product {
    Element* slopes;
    Element* weights;
    int64_t row;
  } buffers[2];
  for (Product& product : buffers)
    product = {scratch.take<Element>(kRows * kMostColumns), scratch.take<Element>(kRows * kMostColumns), 0};
  Product *next = &buffers[0], *due = &buffers[1];
  const float ones[kRows] = {1, 1, 1, 1, 1, 1};
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
      const auto run = [&](const Product& product, auto& beside) {
        multiply<Type>(rows_of<Type>(product.slopes, kMostColumns), by_feature[0], width, features,
                       results[0] + product.row * features, features, ones, beside);
        multiply<Type>(rows_of<Type>(product.weights, kMostColumns), by_feature[1], width, features,
                       results[1] + product.row * features, features, ones, beside);
      };
      for (int64_t row = 0; row < rows; row += kRows) {
        multiply<Type>(rows_of<Type>(operands[0] + row * features, features), by_token[0], features, width, scores,
                       kMostColumns, nullptr);
        multiply<Type>(rows_of<Type>(operands[1] + row * features, features), by_token[1], features, width, products,
                       kMostColumns, nullptr);
        next->row = row;
        Slopes<Type> slopes(scores, products, next->weights, next->slopes, across + row * kSlopesStride,
                            tile.rows[0].count - row, width, columns.lse + column.offset, columns.inner + column.offset,
                            scale);
        if (row) run(*due, slopes);
        slopes.finish();
        std::swap(next, due);
      }
      const Nothing nothing;
      run(*due, nothing);
      for (int64_t i = 0; i < width; i += kRows)
        multiply<Type>({across + i * Type::kPairs, Type::kPairs, kSlopesStride * Type::kPairs}, keys, depth, features,
                       column_gradients + i * features, features, nullptr);
      add_in_turn(columns, t, *ranks++, column_gradients, features);
    }

  write_rows<Type>(results[0], scale, tile.results[0], head_size);
  write_rows<Type>(results[1], 1, tile.results[1], head_size);
}

template <class Type>
constexpr Kernels kernels_of() {
  return {kPad,           sizeof(typename Type::Element), pack_by_token<Type>, pack_by_feature<Type>,
          pack_statistics, scratch_bytes,                 forward<Type>,       backward<Type>,
          write_rows<Type>};
}

}  // namespace

extern const Kernels float32 = kernels_of<Float32>();
#if defined(__AVX512BF16__)
extern const Kernels bfloat16 = kernels_of<BFloat16>();
#endif

}  // namespace svggt::SVGGT_ISA
