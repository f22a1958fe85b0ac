// What a block works on: tiles of rows of one head, and the stream of columns that these rows see.
#pragma once

#include "primitives.cuh"

using Element = unsigned short; // the bits of a bfloat16 or float16

// A tensor `[B, H, N, D]`; strides in elements, that of d is 1.
struct Tensor4 {
  Element* data;
  int64 batch, head, token;

  DEVICE_MEMBER Element* at(int b, int h) const { return data + b * batch + h * head; }
};

// The layout as the kernels walk it. Columns of group g: its runs, one after the other.
struct Layout {
  const int* rows;          // [num_row_tiles, 3]: group, start, length
  const int* columns;       // [groups]: how many columns the group sees
  const int* run_offsets;   // [groups + 1]
  const int* run_start;     // first column of a run, see `Cursor::column`
  const int* run_length;
  const int* dense_rows;    // tokens of the rows of the dense group
  const int* dense_columns; // tokens
  int num_row_tiles, num_first, dense_group, heads, batch_heads;

  // Items are row tiles of a head. The first tiles, the longest, come for all heads before the others, head after head.
  DEVICE_MEMBER int num_items() const { return num_row_tiles * batch_heads; }

  DEVICE_MEMBER int batch_head(int item) const {
    const int beyond = item - num_first * batch_heads;
    return beyond < 0 ? item % batch_heads : beyond / (num_row_tiles - num_first);
  }

  DEVICE_MEMBER int row_tile(int item) const {
    const int beyond = item - num_first * batch_heads;
    return beyond < 0 ? item / batch_heads : num_first + beyond % (num_row_tiles - num_first);
  }
};

// A place in a ring of N, and the parity of its round.
template <int N>
struct Ring {
  uint32 index = 0, parity = 0;

  DEVICE_MEMBER void next() {
    if (++index == N) index = 0, parity ^= 1;
  }
};

// One row tile of one head.
struct Work {
  int item, group, start, length, batch, head, columns;

  DEVICE_MEMBER Work() {}

  DEVICE_MEMBER Work(const Layout& layout, int item) : item(item) {
    const int tile = layout.row_tile(item), batch_head = layout.batch_head(item);
    group = layout.rows[3 * tile];
    start = layout.rows[3 * tile + 1];
    length = layout.rows[3 * tile + 2];
    batch = batch_head / layout.heads;
    head = batch_head % layout.heads;
    columns = layout.columns[group];
  }

  DEVICE_MEMBER int batch_head(const Layout& layout) const { return batch * layout.heads + head; }

  // Token of row r < length.
  DEVICE_MEMBER int token(const Layout& layout, int r) const {
    return group == layout.dense_group ? layout.dense_rows[start + r] : start + r;
  }
};

// Take the next item, with a whole warp; -1 if there is none. With `marks`, a number for each item, only of those marked.
DEVICE int take_item(const Layout& layout, int* next, const int* marks) {
  while (true) {
    const int item = warp_uniform(threadIdx.x % 32 == 0 ? atomicAdd(next, 1) : 0);
    if (item >= layout.num_items()) return -1;
    if (marks == nullptr || marks[item] != 0) return item;
  }
}

// Work passes from the warp that takes it to the others through 32 bytes of shared memory.
DEVICE void store_work(uint32 shared, const Work& work) {
  store_shared(shared, make_uint4(work.columns, work.length, work.batch, work.head));
  store_shared(shared + 16, make_uint4(work.group, work.start, work.item, 0));
}

DEVICE Work load_work(uint32 shared) {
  const uint4 x = load_shared(shared), y = load_shared(shared + 16);
  Work work;
  work.columns = warp_uniform(x.x);
  work.length = warp_uniform(x.y);
  work.batch = warp_uniform(x.z);
  work.head = warp_uniform(x.w);
  work.group = warp_uniform(y.x);
  work.start = warp_uniform(y.y);
  work.item = warp_uniform(y.z);
  return work;
}

// A place in the stream of columns of one group.
struct Cursor {
  int run, end, place, start, length;

  DEVICE_MEMBER Cursor(const Layout& layout, int group) {
    run = layout.run_offsets[group] - 1;
    end = layout.run_offsets[group + 1];
    place = 0;
    next(layout);
    advance(layout, 0);
  }

  DEVICE_MEMBER void next(const Layout& layout) {
    ++run;
    start = run < end ? layout.run_start[run] : NONE;
    length = run < end ? layout.run_length[run] : 0x7fffffff;
  }

  DEVICE_MEMBER void advance(const Layout& layout, int columns) {
    place += columns;
    while (place >= length) {
      place -= length;
      next(layout);
    }
  }

  // Whether the next `columns` are of one run.
  DEVICE_MEMBER bool is_contiguous(int columns) const { return run < end && place + columns <= length; }

  // What is here: a token; or a place among the dense columns, with the highest bit; or behind the last column, NONE.
  DEVICE_MEMBER int column() const { return run < end ? start + place : NONE; }

  static constexpr int PLACE = 0x7fffffff, NONE = -1;

  static DEVICE_MEMBER bool is_dense(int column) { return column < NONE; }

  // The token of a column, or -1.
  static DEVICE_MEMBER int token(const Layout& layout, int column) {
    return is_dense(column) ? layout.dense_columns[column & PLACE] : column;
  }

  DEVICE_MEMBER int token(const Layout& layout) const { return token(layout, column()); }
};

// Copy tokens of one head into panels of `rows` rows at `shared`; zeros where `token` is -1. Thread `thread` of `THREADS`
// calls it for each row r = thread / 8, + THREADS / 8, ... with the row's token.
template <int D>
DEVICE void copy_row(uint32 shared, int rows, const Element* head, int64 stride, int r, int token, int thread) {
  const Element* source = head + (token < 0 ? 0 : token * stride);
  const int chunk = thread % 8;
#pragma unroll
  for (int panel = 0; panel < D / 64; ++panel) {
    copy_chunk(shared + panel * rows * SWIZZLE_ROW + swizzled(r, chunk), source + panel * 64 + chunk * 8, token >= 0);
  }
}

constexpr int PIECE = 8; // tokens: where the swizzle's pattern begins anew

// Where the copy engine finds columns: all tokens, and a copy of the dense columns alone; in boxes of a tile of columns,
// and of [64, PIECE].
struct ColumnMaps {
  TensorMap tiles, dense_tiles, pieces, dense_pieces;
};

// Load the next TOKENS tokens from `cursor` on into panels of as many rows, by one warp; zeros behind the last column.
// Pieces whose tokens lie side by side come by the copy engine and count towards `barrier`, others row by row.
template <int D, int TOKENS>
DEVICE void load_pieces(const Layout& layout, const Work& work, Cursor cursor, uint32 shared, const ColumnMaps& maps,
                        const Tensor4& tensor, uint32 barrier) {
  const int lane = threadIdx.x % 32;
  const Element* head = tensor.at(work.batch, work.head);
  cursor.advance(layout, lane);
#pragma unroll 1 // few registers
  for (int first = 0; first < TOKENS; first += 32) {
    const int column = cursor.column();
    cursor.advance(layout, 32);
    const int first_column = __shfl_sync(0xffffffff, column, lane / PIECE * PIECE);
    const bool follows = column == (first_column == Cursor::NONE ? Cursor::NONE : first_column + lane % PIECE);
    uint32 split = 0; // a bit for each piece, at its first lane
    const uint32 following = __ballot_sync(0xffffffff, follows);
#pragma unroll
    for (int i = 0; i < 32; i += PIECE) split |= (following >> i & 0xff) == 0xff ? 0 : 1u << i;
    if (lane == 0) barrier_expect(barrier, (32 / PIECE - __popc(split)) * D / 64 * PIECE * SWIZZLE_ROW);
    __syncwarp();
    if (lane % PIECE == 0 && (split >> lane & 1) == 0) {
#pragma unroll
      for (int panel = 0; panel < D / 64; ++panel) {
        // Before the first token there are zeros, too.
        load_box(shared + (panel * TOKENS + first + lane) * SWIZZLE_ROW,
                 Cursor::is_dense(column) ? &maps.dense_pieces : &maps.pieces, barrier, 64 * panel,
                 column == Cursor::NONE ? -PIECE : column & Cursor::PLACE, work.head, work.batch);
      }
    }
    const int token = split != 0 ? Cursor::token(layout, column) : -1;
    for (; split != 0; split &= split - 1) {
      const int piece = __ffs(split) - 1;
#pragma unroll
      for (int r = lane / 8; r < PIECE; r += 4) {
        copy_row<D>(shared, TOKENS, head, tensor.token, first + piece + r, __shfl_sync(0xffffffff, token, piece + r), lane);
      }
    }
  }
}

// Copy the rows of a tile likewise; zeros from work.length on.
template <int D>
DEVICE void copy_rows(const Layout& layout, const Work& work, int rows, uint32 shared, const Element* head, int64 stride) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1 // few registers
  for (int r = lane / 8; r < rows; r += 4) {
    copy_row<D>(shared, rows, head, stride, r, r < work.length ? work.token(layout, r) : -1, lane);
  }
}
