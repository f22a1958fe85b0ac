// Block-sparse attention on the CPU, forward and backward: what bindings.cpp offers to Python.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace svggt {

enum class Dtype { float32, bfloat16 };

// A tensor [B, H, N, D] whose features are contiguous; strides count elements.
struct Tensor {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t token_stride;
};

struct Shape {
  int64_t batch;
  int64_t heads;
  int64_t rows;
  int64_t columns;
  int64_t head_size;
};

struct Table {
  const int64_t* data;
  int64_t size;
};

// Who sees whom, as backends/cpu/tables.py makes it. A row tile is (group, start, length); the rows of the last group are
// entries of dense_rows. A group sees the runs offsets[group] : offsets[group + 1], each a range (first, last) of column
// tiles. A column tile is (start, length, dense); dense ones count entries of dense_columns.
struct Walk {
  Table row_tiles;
  Table offsets;
  Table runs;
  Table column_tiles;
  Table dense_rows;
  Table dense_columns;
};

// Instruction sets that this CPU can run, best first; the last one runs everywhere.
std::vector<std::string> instruction_sets();

// Why AMX is not used though this CPU has it; empty if it is, or if the CPU has none.
std::string why_amx_is_unused();

// Whether kernels for a dtype exist for an instruction set.
bool supports(const std::string& instruction_set, Dtype dtype);

// How to run: on at most `threads` threads, to the same bits for any number of them.
struct Options {
  std::string instruction_set;
  Dtype dtype;
  int threads;
};

// Writes out [B, H, N, D] and lse, float32 [B, H, N]. Both functions throw std::invalid_argument if the walk
// does not fit the shape, or there is no such kernel.
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, const Walk& walk,
             const Shape& shape, float scale, const Options& options);

// Writes dk and dv, and dq where a column tile covers it. The rows of the walk and of the shape are keys, the columns
// queries; `inner` is dO . out - dLSE, float32 [B, H, N] like lse, tokens contiguous in both.
void backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& grad, const Tensor& lse,
              const Tensor& inner, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Walk& walk,
              const Shape& shape, float scale, const Options& options);

}  // namespace svggt
