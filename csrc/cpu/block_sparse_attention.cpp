// Checks, packing and threads. The columns of all heads are packed first; then every tile of rows is one task.

#include "block_sparse_attention.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#include "kernel.h"

namespace svggt {

#if defined(SVGGT_HAS_BASELINE)
namespace baseline {
extern const Kernels float32;
}
#endif
#if defined(SVGGT_HAS_AVX2)
namespace avx2 {
extern const Kernels float32;
}
#endif
#if defined(SVGGT_HAS_AVX512)
namespace avx512 {
extern const Kernels float32;
}
#endif
#if defined(SVGGT_HAS_AMX_BF16)
namespace amx_bf16 {
extern const Kernels bfloat16;
}
#endif
#if defined(SVGGT_HAS_AVX512_BF16)
namespace avx512_bf16 {
extern const Kernels float32;
extern const Kernels bfloat16;
}  // namespace avx512_bf16
#endif

namespace {

struct InstructionSet {
  const char* name;
  bool runs_here;
  const Kernels* float32;
  const Kernels* bfloat16;
};

#if defined(__x86_64__)
// And AVX-512-BF16, which the kernels use beside it.
bool has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kTileBFloat16 = 1u << 22, kTiles = 1u << 24, kVectorBFloat16 = 1u << 5;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kTileBFloat16) && (edx & kTiles) &&
         __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kVectorBFloat16);
}
#else
bool has_amx() { return false; }
#endif

// Linux keeps tile registers from a process until it asks for them, as they make the state of every thread larger; what a
// process may use, its children may. The first call asks.
const std::string& why_no_tiles() {
  static const std::string why = [] {
    if (!has_amx()) return std::string("this CPU has none");
#if !defined(SVGGT_HAS_AMX_BF16)
    return std::string("the compiler that built the kernels does not know them (GCC does from version 11 on)");
#elif defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return std::string();
    return std::string("the system refused them to this process: ") + std::strerror(errno);
#else
    return std::string("they are used on Linux only");
#endif
  }();
  return why;
}

const std::vector<InstructionSet>& known() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#if defined(SVGGT_EMULATE_TILES)
    found.push_back({"amx_bf16", true, nullptr, &amx_bf16::bfloat16});
#endif
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    [[maybe_unused]] const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                             __builtin_cpu_supports("avx512vl");
#if defined(SVGGT_HAS_AVX512_BF16)
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(SVGGT_HAS_AMX_BF16) && !defined(SVGGT_EMULATE_TILES)
    const bool has_tiles = has_bf16 && why_no_tiles().empty();
    found.push_back({"amx_bf16", has_tiles, &avx512_bf16::float32, &amx_bf16::bfloat16});
#endif
    found.push_back({"avx512_bf16", has_bf16, &avx512_bf16::float32, &avx512_bf16::bfloat16});
#endif
#if defined(SVGGT_HAS_AVX512)
    found.push_back({"avx512", has_avx512, &avx512::float32, nullptr});
#endif
#if defined(SVGGT_HAS_AVX2)
    found.push_back({"avx2", has_avx2, &avx2::float32, nullptr});
#endif
#endif
#if defined(SVGGT_HAS_BASELINE)
    found.push_back({"baseline", true, &baseline::float32, nullptr});
#endif
    return found;
  }();
  return sets;
}

const Kernels* find(const std::string& instruction_set, Dtype dtype) {
  for (const InstructionSet& set : known())
    if (set.runs_here && instruction_set == set.name) return dtype == Dtype::float32 ? set.float32 : set.bfloat16;
  return nullptr;
}

const Kernels& kernels_for(const Options& options) {
  const Kernels* kernels = find(options.instruction_set, options.dtype);
  if (!kernels)
    throw std::invalid_argument("instruction_set must be one that this CPU can run and that has kernels for the dtype, got " +
                                options.instruction_set);
  return *kernels;
}

// Calls work(worker, i) for every i below `count`. Threads take the next i when they are free, so that cheap and costly
// ones balance. They live for one call: starting them takes microseconds, and they neither spin beside torch's own
// threads nor survive a fork.
template <class Work>
void run_parallel(int threads, int64_t count, const Work& work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
  const auto take = [&](int worker) {
    try {
      for (int64_t i = next++; i < count; i = next++) work(worker, i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  try {
    for (int worker = 1; worker < std::min<int64_t>(threads, count); ++worker) others.emplace_back(take, worker);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started do the work.
  }
  take(0);
  for (std::thread& thread : others) thread.join();
  if (error) std::rethrow_exception(error);
}

// Memory aligned to a large page, not initialised.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : memory_(static_cast<char*>(::operator new(bytes, kAlignment))) {
#if defined(__linux__)
    // The first touch of small pages would take as long as packing.
    madvise(memory_.get(), bytes, MADV_HUGEPAGE);
#endif
  }
  char* data() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{2 << 20};
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<char, Free> memory_;
};

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("the tables of a layout must fit it: ") + what);
}

// The tables as the kernels read them, after every index in them was checked.
class CheckedWalk {
 public:
  CheckedWalk(const Walk& walk, const Shape& shape, int64_t pad) : walk_(walk) {
    require(walk.row_tiles.size % 3 == 0 && walk.column_tiles.size % 3 == 0 && walk.runs.size % 2 == 0,
            "row and column tiles have 3 entries each and runs 2");
    require(walk.offsets.size >= 2, "there is at least one group");
    for (const auto& [dense, tokens] : {std::pair{walk.dense_rows, shape.rows}, {walk.dense_columns, shape.columns}})
      for (int64_t i = 0; i < dense.size; ++i)
        require(dense.data[i] >= 0 && dense.data[i] < tokens, "dense tokens are tokens");
    const int64_t num_tiles = walk.column_tiles.size / 3, num_runs = walk.runs.size / 2;
    int64_t offset = 0;
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t* tile = walk.column_tiles.data + 3 * t;
      require(tile[2] == 0 || tile[2] == 1, "a column tile is dense, 1, or not, 0");
      check_range(tile[0], tile[1], kMostColumns, tile[2] ? walk.dense_columns.size : shape.columns);
      columns_.push_back({offset, tile[1]});
      offset += round_up(tile[1], pad);
    }
    packed_tokens_ = offset;
    for (int64_t r = 0; r < num_runs; ++r) {
      const Range run{walk.runs.data[2 * r], walk.runs.data[2 * r + 1]};
      require(0 <= run.begin && run.begin <= run.end && run.end <= num_tiles, "runs are ranges of column tiles");
      runs_.push_back(run);
    }
    for (int64_t g = 0; g + 1 < walk.offsets.size; ++g) {
      const int64_t begin = walk.offsets.data[g], end = walk.offsets.data[g + 1];
      require(0 <= begin && begin <= end && end <= num_runs, "offsets ascend and count runs");
    }
    for (int64_t t = 0; t < num_row_tiles(); ++t) {
      const int64_t* tile = walk.row_tiles.data + 3 * t;
      require(tile[0] >= 0 && tile[0] + 1 < walk.offsets.size, "row tiles belong to a group");
      check_range(tile[1], tile[2], kMostRows, is_dense(tile[0]) ? walk.dense_rows.size : shape.rows);
    }
  }

  int64_t num_row_tiles() const { return walk_.row_tiles.size / 3; }
  int64_t num_column_tiles() const { return static_cast<int64_t>(columns_.size()); }
  int64_t packed_tokens() const { return packed_tokens_; }
  const ColumnTile& column_tile(int64_t t) const { return columns_[t]; }

  // For each row tile, and each column tile it sees in turn: how many row tiles before it see that column tile.
  std::vector<std::vector<int32_t>> ranks() const {
    std::vector<std::vector<int32_t>> ranks(num_row_tiles());
    std::vector<int32_t> before(columns_.size());
    for (int64_t t = 0; t < num_row_tiles(); ++t) {
      const Columns columns = columns_of(t);
      for (int64_t r = 0; r < columns.num_runs; ++r)
        for (int64_t c = columns.runs[r].begin; c < columns.runs[r].end; ++c) ranks[t].push_back(before[c]++);
    }
    return ranks;
  }

  // The tokens of row tile t or column tile t of one head of a tensor.
  Tokens rows(int64_t t, const Tensor& tensor, const Shape& shape, int64_t head, int64_t element_bytes) const {
    const int64_t* tile = walk_.row_tiles.data + 3 * t;
    return tokens(tensor, shape, head, element_bytes, tile[1], tile[2], is_dense(tile[0]) ? &walk_.dense_rows : nullptr);
  }
  Tokens columns(int64_t t, const Tensor& tensor, const Shape& shape, int64_t head, int64_t element_bytes) const {
    const int64_t* tile = walk_.column_tiles.data + 3 * t;
    return tokens(tensor, shape, head, element_bytes, tile[0], tile[1], tile[2] ? &walk_.dense_columns : nullptr);
  }

  Columns columns_of(int64_t row_tile) const {
    const int64_t group = walk_.row_tiles.data[3 * row_tile];
    const int64_t begin = walk_.offsets.data[group], end = walk_.offsets.data[group + 1];
    return {runs_.data() + begin, end - begin, columns_.data(), {}, {}, nullptr, nullptr, nullptr, nullptr, nullptr};
  }

 private:
  bool is_dense(int64_t group) const { return group == walk_.offsets.size - 2; }

  static void check_range(int64_t start, int64_t length, int64_t most, int64_t size) {
    require(0 <= start && 1 <= length && length <= most && start <= size - length, "tiles lie inside and are not too long");
  }

  static Tokens tokens(const Tensor& tensor, const Shape& shape, int64_t head, int64_t element_bytes, int64_t start,
                       int64_t length, const Table* index) {
    const int64_t offset = head / shape.heads * tensor.batch_stride + head % shape.heads * tensor.head_stride +
                           (index ? 0 : start * tensor.token_stride);
    return {static_cast<char*>(tensor.data) + offset * element_bytes, tensor.token_stride,
            index ? index->data + start : nullptr, length};
  }

  Walk walk_;
  std::vector<ColumnTile> columns_;
  std::vector<Range> runs_;
  int64_t packed_tokens_ = 0;
};

// Columns of all heads, packed for the kernels by `pack`; a token takes `token_bytes` there.
class Packed {
 public:
  using Pack = void (*)(const Tokens& tokens, int64_t head_size, char* packed);

  Packed(Pack pack, int64_t token_bytes, const Tensor& tensor, int64_t element_bytes, const CheckedWalk& walk,
         const Shape& shape, int threads)
      : head_bytes_(walk.packed_tokens() * token_bytes), buffer_(shape.batch * shape.heads * head_bytes_) {
    const int64_t tiles = walk.num_column_tiles();
    run_parallel(threads, shape.batch * shape.heads * tiles, [&](int, int64_t i) {
      const int64_t head = i / tiles, tile = i % tiles;
      const Tokens tokens = walk.columns(tile, tensor, shape, head, element_bytes);
      pack(tokens, shape.head_size, buffer_.data() + head * head_bytes_ + walk.column_tile(tile).offset * token_bytes);
    });
  }

  const char* head(int64_t head) const { return buffer_.data() + head * head_bytes_; }
  const float* floats(int64_t head) const { return reinterpret_cast<const float*>(this->head(head)); }

 private:
  int64_t head_bytes_;
  Buffer buffer_;
};

// What all three functions share: the kernels, the checked tables, and how to pack columns and find rows with them.
struct Pass {
  const Kernels& kernels;
  const CheckedWalk walk;
  const Shape& shape;
  const Options& options;

  Pass(const Walk& tables, const Shape& shape, const Options& options)
      : kernels(kernels_for(options)), walk(tables, shape, kernels.pad), shape(shape), options(options) {}

  // Features of a token in packed arrays.
  int64_t features() const { return round_up(shape.head_size, kernels.pad); }

  Packed by_token(const Tensor& tensor) const { return packed(kernels.pack_by_token, tensor); }
  Packed by_feature(const Tensor& tensor) const { return packed(kernels.pack_by_feature, tensor); }
  Packed statistics(const Tensor& tensor) const {
    return Packed(kernels.pack_statistics, sizeof(float), tensor, sizeof(float), walk, shape, options.threads);
  }

  Tokens rows(int64_t tile, const Tensor& tensor, int64_t head) const {
    return walk.rows(tile, tensor, shape, head, kernels.element_bytes);
  }
  Tokens row_statistics(int64_t tile, const Tensor& tensor, int64_t head) const {
    return walk.rows(tile, tensor, shape, head, sizeof(float));
  }

  // Calls work(tile, head, scratch) for every row tile of every head, the costliest tiles first.
  template <class Work>
  void for_each_tile(const Work& work) const {
    const int64_t heads = shape.batch * shape.heads, tasks = heads * walk.num_row_tiles();
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(options.threads, tasks));
    const int64_t bytes = round_up(kernels.scratch_bytes(shape.head_size), 64);
    const Buffer scratch(threads * bytes);
    run_parallel(static_cast<int>(threads), tasks,
                 [&](int worker, int64_t i) { work(i / heads, i % heads, scratch.data() + worker * bytes); });
  }

 private:
  Packed packed(Packed::Pack pack, const Tensor& tensor) const {
    return Packed(pack, features() * kernels.element_bytes, tensor, kernels.element_bytes, walk, shape, options.threads);
  }
};

// Sums for the columns of all heads, float32, packed; all 0 at first.
class Sums {
 public:
  explicit Sums(const Pass& pass)
      : pass_(pass), features_(pass.features()), heads_(pass.shape.batch * pass.shape.heads),
        buffer_(heads_ * pass.walk.packed_tokens() * features_ * sizeof(float)) {
    for_each_tile([&](float* sums, int64_t, int64_t tile) {
      std::fill_n(sums, round_up(pass_.walk.column_tile(tile).count, pass_.kernels.pad) * features_, 0.0f);
    });
  }

  float* head(int64_t head) const {
    return reinterpret_cast<float*>(buffer_.data()) + head * pass_.walk.packed_tokens() * features_;
  }

  // Writes the sums times a factor to the columns of a tensor.
  void write(const Tensor& tensor, float factor) const {
    for_each_tile([&](float* sums, int64_t head, int64_t tile) {
      const Tokens tokens = pass_.walk.columns(tile, tensor, pass_.shape, head, pass_.kernels.element_bytes);
      pass_.kernels.write_gradients(sums, factor, tokens, pass_.shape.head_size);
    });
  }

 private:
  template <class Work>
  void for_each_tile(const Work& work) const {
    const int64_t tiles = pass_.walk.num_column_tiles();
    run_parallel(pass_.options.threads, heads_ * tiles, [&](int, int64_t i) {
      const int64_t head = i / tiles, tile = i % tiles;
      work(this->head(head) + pass_.walk.column_tile(tile).offset * features_, head, tile);
    });
  }

  const Pass& pass_;
  int64_t features_;
  int64_t heads_;
  Buffer buffer_;
};

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : known())
    if (set.runs_here) names.emplace_back(set.name);
  return names;
}

std::string why_amx_is_unused() { return has_amx() ? why_no_tiles() : std::string(); }

bool supports(const std::string& instruction_set, Dtype dtype) { return find(instruction_set, dtype) != nullptr; }

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, const Walk& walk,
             const Shape& shape, float scale, const Options& options) {
  const Pass pass(walk, shape, options);
  const Packed keys = pass.by_token(k), values = pass.by_feature(v);
  pass.for_each_tile([&](int64_t t, int64_t head, char* scratch) {
    Columns columns = pass.walk.columns_of(t);
    columns.by_token[0] = keys.head(head);
    columns.by_feature[0] = values.head(head);
    const RowTile tile{{pass.rows(t, q, head)}, {pass.rows(t, out, head)}, pass.row_statistics(t, lse, head)};
    pass.kernels.forward(tile, columns, shape.head_size, scale, scratch);
  });
}

void backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& grad, const Tensor& lse,
              const Tensor& inner, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Walk& walk,
              const Shape& shape, float scale, const Options& options) {
  const Pass pass(walk, shape, options);
  const Packed queries = pass.by_token(q), grads = pass.by_token(grad);
  const Packed query_features = pass.by_feature(q), grad_features = pass.by_feature(grad);
  const Packed packed_lse = pass.statistics(lse), packed_inner = pass.statistics(inner);
  Sums gradients(pass);
  const std::vector<std::vector<int32_t>> ranks = pass.walk.ranks();
  std::vector<int32_t> turns(shape.batch * shape.heads * pass.walk.num_column_tiles());
  pass.for_each_tile([&](int64_t t, int64_t head, char* scratch) {
    Columns columns = pass.walk.columns_of(t);
    columns.by_token[0] = queries.head(head);
    columns.by_token[1] = grads.head(head);
    columns.by_feature[0] = query_features.head(head);
    columns.by_feature[1] = grad_features.head(head);
    columns.lse = packed_lse.floats(head);
    columns.inner = packed_inner.floats(head);
    columns.gradients = gradients.head(head);
    columns.turns = turns.data() + head * pass.walk.num_column_tiles();
    columns.ranks = ranks[t].data();
    const RowTile tile{{pass.rows(t, k, head), pass.rows(t, v, head)},
                       {pass.rows(t, dk, head), pass.rows(t, dv, head)},
                       {}};
    pass.kernels.backward(tile, columns, shape.head_size, scale, scratch);
  });
  gradients.write(dq, scale);
}

}  // namespace svggt
