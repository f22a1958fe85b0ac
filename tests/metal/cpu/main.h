// A kernel as a program: `kernel gridx gridy gridz threads schedules seed < buffers > buffers`.
//
// Every buffer is its size in 8 bytes and its content. The program runs the kernel from the same buffers under the first
// `schedules` schedules, which must agree bit by bit, and writes the buffers that the kernel may write.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "fibers.h"

namespace emulator {

// A block of its exact size, so that the address sanitizer sees every byte beyond it.
struct Buffer {
  char* data;
  std::size_t bytes;
};

struct Kernel {
  const char* name;
  void (*call)(char* const* buffers);
  std::vector<bool> writes;
};

[[noreturn]] inline void fail(const std::string& reason) {
  std::fprintf(stderr, "%s\n", reason.c_str());
  std::exit(3);
}

inline std::vector<Buffer> read_buffers(std::size_t count) {
  std::vector<Buffer> buffers(count);
  for (Buffer& buffer : buffers) {
    std::uint64_t bytes;
    if (std::fread(&bytes, 8, 1, stdin) != 1) fail("a buffer is missing");
    buffer = {static_cast<char*>(std::malloc(bytes)), bytes};
    if (std::fread(buffer.data, 1, bytes, stdin) != bytes) fail("a buffer is cut off");
  }
  return buffers;
}

inline void run_grid(
    const Kernel& kernel, const std::vector<Buffer>& buffers, const unsigned* grid, Schedule schedule) {
  std::vector<char*> pointers;
  for (const Buffer& buffer : buffers) pointers.push_back(buffer.data);
  Threadgroup& group = Threadgroup::current();
  group.body = [&] { kernel.call(pointers.data()); };
  std::memcpy(group.positions, grid, sizeof group.positions);
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x++) {
        group.position[0] = x, group.position[1] = y, group.position[2] = z;
        group.run(schedule);
        if (!group.error.empty()) fail(group.error);
      }
}

inline int run_program(const std::vector<Kernel>& kernels, int count, char** words) {
  if (count != 8) fail("usage: kernel gridx gridy gridz threads schedules seed");
  const Kernel* kernel = nullptr;
  for (const Kernel& known : kernels)
    if (known.name == std::string(words[1])) kernel = &known;
  if (!kernel) fail(std::string("there is no kernel ") + words[1]);
  unsigned grid[3];
  for (int i = 0; i < 3; i++) grid[i] = unsigned(std::atoi(words[2 + i]));
  const unsigned threads = unsigned(std::atoi(words[5]));
  const int schedules = std::atoi(words[6]);
  Threadgroup& group = Threadgroup::current();
  group.fibers.resize(threads);
  group.exchanges.resize(threads / LANES);
  group.random_state = 2 * std::strtoull(words[7], nullptr, 10) + 1;

  const std::vector<Buffer> buffers = read_buffers(kernel->writes.size());
  std::vector<std::vector<char>> before, first;
  for (const Buffer& buffer : buffers) before.emplace_back(buffer.data, buffer.data + buffer.bytes);
  for (int i = 0; i < schedules; i++) {
    for (std::size_t b = 0; b < buffers.size(); b++) std::memcpy(buffers[b].data, before[b].data(), buffers[b].bytes);
    run_grid(*kernel, buffers, grid, SCHEDULES[i]);
    for (std::size_t b = 0; b < buffers.size(); b++) {
      if (i == 0) first.emplace_back(buffers[b].data, buffers[b].data + buffers[b].bytes);
      if (std::memcmp(first[b].data(), buffers[b].data, buffers[b].bytes) != 0)
        fail("buffer " + std::to_string(b) + " depends on the schedule: two threads race");
    }
  }
  if (group.most_memory_bytes > 32768)
    fail("a threadgroup may have 32768 bytes of memory, this one has " + std::to_string(group.most_memory_bytes));

  for (std::size_t b = 0; b < buffers.size(); b++) {
    if (kernel->writes[b]) std::fwrite(buffers[b].data, 1, buffers[b].bytes, stdout);
    std::free(buffers[b].data);
  }
  return 0;
}

}  // namespace emulator
