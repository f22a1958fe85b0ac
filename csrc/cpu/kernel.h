// What the build of kernel.cpp or tiles.cpp for one instruction set offers to block_sparse_attention.cpp. Plain data only:
// code in a header would be compiled for every instruction set, and the linker would keep one copy for all of them.
#pragma once

#include <cstdint>

namespace svggt {

// The most tokens of a tile of rows, and of columns.
constexpr int64_t kMostRows = 192;
constexpr int64_t kMostColumns = 512;

constexpr int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Some tokens of one head, `stride` elements apart; token i lies at place `index[i]` if there is an index.
struct Tokens {
  char* data;
  int64_t stride;
  const int64_t* index;
  int64_t count;
};

// A tile of columns; `offset` says where it lies in packed arrays, in tokens.
struct ColumnTile {
  int64_t offset;
  int64_t count;
};

struct Range {
  int64_t begin;
  int64_t end;
};

// The columns of a row tile: ranges of tiles, and the packed arrays of one head. `by_token` holds one token per lane and
// makes scores, `by_feature` one feature per lane and makes results. Forward: by_token K, by_feature V. Backward: Q and dO
// in both, the statistics of the queries, and where dQ / scale adds up. There `turns` counts for each tile of columns the
// row tiles that have added to it, and `ranks` says, for one after the other of the tiles, how many come first.
struct Columns {
  const Range* runs;
  int64_t num_runs;
  const ColumnTile* tiles;
  const char* by_token[2];
  const char* by_feature[2];
  const float* lse;
  const float* inner;
  float* gradients;
  int32_t* turns;
  const int32_t* ranks;
};

// A tile of rows. Forward: rows is Q, results the output, and `lse` is written. Backward: K and V, then dK and dV.
struct RowTile {
  Tokens rows[2];
  Tokens results[2];
  Tokens lse;
};

// One kernel family: an instruction set and a dtype. Tokens and features of packed arrays are padded with zeros to a
// multiple of `pad`. `scratch` holds `scratch_bytes(head_size)`, aligned to 64 bytes. `write_gradients` writes what
// `backward` added up for a tile of columns, times a factor.
struct Kernels {
  int64_t pad;
  int64_t element_bytes;
  void (*pack_by_token)(const Tokens& tokens, int64_t head_size, char* packed);
  void (*pack_by_feature)(const Tokens& tokens, int64_t head_size, char* packed);
  void (*pack_statistics)(const Tokens& tokens, int64_t head_size, char* packed);
  int64_t (*scratch_bytes)(int64_t head_size);
  void (*forward)(const RowTile&, const Columns&, int64_t head_size, float scale, char* scratch);
  void (*backward)(const RowTile&, const Columns&, int64_t head_size, float scale, char* scratch);
  void (*write_gradients)(const float* from, float factor, const Tokens& tokens, int64_t head_size);
};

}  // namespace svggt
