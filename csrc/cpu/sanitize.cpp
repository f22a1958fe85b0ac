// A program that runs forward and backward on random layouts, to be built with sanitizers: every instruction set that
// this CPU has, on one thread and on several, with arrays of exactly the size that is promised. Results must be the same
// bit for bit, and tokens that nobody sees are NaN, which must not show.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "block_sparse_attention.h"
#include "kernel.h"

namespace {

using svggt::Dtype;

constexpr int64_t kBatch = 2, kHeads = 2;

std::mt19937 random_bits(0);

int64_t random_int(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(random_bits);
}

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// Tables of a layout and the memory they lie in. Pieces of random length, a third of which nobody sees, then the dense
// tokens, in reverse order.
struct Layout {
  int64_t rows = 0, columns = 0;
  std::vector<int64_t> row_tiles, offsets{0}, runs, column_tiles, dense_rows, dense_columns;
  std::vector<bool> seen;  // columns that some row sees

  Layout(int64_t most_columns) {
    const int64_t groups = random_int(1, 5);
    for (int64_t piece = random_int(1, 6); piece > 0; --piece) {
      const int64_t length = random_int(1, most_columns);
      if (random_int(0, 2)) column_tiles.insert(column_tiles.end(), {columns, length, 0});
      columns += length;
    }
    const int64_t dense = random_int(0, 5), ordinary = static_cast<int64_t>(column_tiles.size()) / 3;
    for (int64_t i = 0; i < dense; ++i) dense_columns.push_back(columns + dense - 1 - i);
    columns += dense;
    if (dense) column_tiles.insert(column_tiles.end(), {0, dense, 1});
    seen.assign(columns, false);
    for (int64_t group = 0; group <= groups; ++group) {
      const bool is_dense = group == groups;
      const int64_t length = random_int(is_dense ? 0 : 1, svggt::kMostRows);
      if (length) row_tiles.insert(row_tiles.end(), {group, is_dense ? 0 : rows, length});
      for (int64_t i = 0; is_dense && i < length; ++i) dense_rows.push_back(rows + length - 1 - i);
      rows += length;
      if (ordinary && random_int(0, 3)) {
        const int64_t first = random_int(0, ordinary - 1);
        add_run(first, random_int(first, ordinary), length > 0);
      }
      if (dense) add_run(ordinary, ordinary + 1, length > 0);
      offsets.push_back(static_cast<int64_t>(runs.size()) / 2);
    }
  }

  svggt::Walk walk() const {
    const auto table = [](const std::vector<int64_t>& x) -> svggt::Table {
      return {x.data(), static_cast<int64_t>(x.size())};
    };
    return {table(row_tiles), table(offsets), table(runs), table(column_tiles), table(dense_rows), table(dense_columns)};
  }

 private:
  void add_run(int64_t first, int64_t last, bool has_rows) {
    runs.insert(runs.end(), {first, last});
    for (int64_t t = first; has_rows && t < last; ++t) {
      const int64_t* tile = column_tiles.data() + 3 * t;
      for (int64_t i = tile[0]; i < tile[0] + tile[1]; ++i) seen[tile[2] ? dense_columns[i] : i] = true;
    }
  }
};

// A contiguous tensor [B, H, N, D] of one dtype.
class Array {
 public:
  Array(int64_t tokens, int64_t head_size, Dtype dtype)
      : tokens_(tokens), head_size_(head_size), bytes_(dtype == Dtype::float32 ? 4 : 2),
        memory_(kBatch * kHeads * tokens * head_size * bytes_) {}

  void fill(const std::vector<bool>* seen = nullptr) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < static_cast<int64_t>(memory_.size()) / bytes_; ++i) {
      const bool hidden = seen && !(*seen)[i / head_size_ % tokens_];
      const float x = hidden ? NAN : normal(random_bits);
      // The high half of a float is a bfloat16.
      std::memcpy(memory_.data() + i * bytes_, reinterpret_cast<const char*>(&x) + 4 - bytes_, bytes_);
    }
  }

  svggt::Tensor tensor() {
    return {memory_.data(), kHeads * tokens_ * head_size_, tokens_ * head_size_, head_size_};
  }

  bool operator==(const Array& other) const { return memory_ == other.memory_; }

  bool has_nan() const {
    for (int64_t i = 0; i < static_cast<int64_t>(memory_.size()); i += bytes_) {
      float x = 0;
      std::memcpy(reinterpret_cast<char*>(&x) + 4 - bytes_, memory_.data() + i, bytes_);
      if (std::isnan(x)) return true;
    }
    return false;
  }

 private:
  int64_t tokens_, head_size_, bytes_;
  std::vector<char> memory_;
};

using Results = std::vector<Array>;

// Output and LSE, or the gradients of queries, keys and values, on some threads.
Results run_forward(const Layout& layout, Array& q, Array& k, Array& v, int64_t head_size,
                    const svggt::Options& options) {
  Results results{{layout.rows, head_size, options.dtype}, {layout.rows, 1, Dtype::float32}};
  svggt::forward(q.tensor(), k.tensor(), v.tensor(), results[0].tensor(), results[1].tensor(), layout.walk(),
                 {kBatch, kHeads, layout.rows, layout.columns, head_size}, 0.3f, options);
  return results;
}

// The rows of the layout are keys here, its columns queries.
Results run_backward(const Layout& layout, Array& q, Array& k, Array& v, Array& grad, Array& lse, Array& inner,
                     int64_t head_size, const svggt::Options& options) {
  Results results{{layout.columns, head_size, options.dtype},
                  {layout.rows, head_size, options.dtype},
                  {layout.rows, head_size, options.dtype}};
  svggt::backward(q.tensor(), k.tensor(), v.tensor(), grad.tensor(), lse.tensor(), inner.tensor(), results[0].tensor(),
                  results[1].tensor(), results[2].tensor(), layout.walk(),
                  {kBatch, kHeads, layout.rows, layout.columns, head_size}, 0.3f, options);
  return results;
}

void check(const std::string& instruction_set, Dtype dtype) {
  const int64_t head_size = std::vector<int64_t>{1, 20, 64, 130}[random_int(0, 3)];
  const Layout layout(random_int(0, 1) ? 20 : svggt::kMostColumns);
  Array rows[2] = {{layout.rows, head_size, dtype}, {layout.rows, head_size, dtype}};
  Array columns[2] = {{layout.columns, head_size, dtype}, {layout.columns, head_size, dtype}};
  Array statistics[2] = {{layout.columns, 1, Dtype::float32}, {layout.columns, 1, Dtype::float32}};
  for (Array& array : rows) array.fill();
  for (Array& array : columns) array.fill(&layout.seen);
  for (Array& array : statistics) array.fill(&layout.seen);
  const auto both = [&](int threads) {
    const svggt::Options options{instruction_set, dtype, threads};
    Results results = run_forward(layout, rows[0], columns[0], columns[1], head_size, options);
    for (Array& gradient : run_backward(layout, columns[0], rows[0], rows[1], columns[1], statistics[0], statistics[1],
                                        head_size, options))
      results.push_back(gradient);
    return results;
  };
  const Results expected = both(1);
  for (const Array& result : expected) require(!result.has_nan(), "what is not visible does not show");
  for (int threads : {2, 5}) require(both(threads) == expected, "any number of threads gives the same bits");
}

}  // namespace

int main() {
  for (const std::string& instruction_set : svggt::instruction_sets())
    for (Dtype dtype : {Dtype::float32, Dtype::bfloat16})
      if (svggt::supports(instruction_set, dtype))
        for (int i = 0; i < 10; ++i) check(instruction_set, dtype);
  return 0;
}
