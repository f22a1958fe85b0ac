// Threads of a threadgroup as fibers on one CPU thread.
//
// A fiber runs until it comes to a barrier or to an operation of its simdgroup. 32 lanes that wait at the same line go
// on together; a threadgroup barrier lets nobody on before all threads of the group stand at it. Anything else is an
// error that names the lines. Four schedules decide which simdgroup runs next; a correct kernel gives the same bits
// under each.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#endif

namespace emulator {

constexpr unsigned LANES = 32;
constexpr std::size_t STACK_BYTES = 256 << 10;

// A fiber that does not run, and how to let another run instead.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void emulator_switch(Context* from, Context* to);
asm(R"(
.text
.weak emulator_switch
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
inline void prepare(Context& context, char* stack, void (*start)()) {
  void** top = reinterpret_cast<void**>(stack + STACK_BYTES);
  *--top = nullptr;  // what `start` would return to, if it did
  *--top = reinterpret_cast<void*>(start);
  for (int saved_register = 0; saved_register < 6; saved_register++) *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t state;
};
inline void emulator_switch(Context* from, Context* to) { swapcontext(&from->state, &to->state); }
inline void prepare(Context& context, char* stack, void (*start)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = STACK_BYTES;
  makecontext(&context.state, start, 0);
}
#endif

enum class Waiting { no, for_simdgroup, for_threadgroup, for_ever };
enum class Schedule { in_turn, first_runs_on, last_runs_on, random };
constexpr Schedule SCHEDULES[] = {
    Schedule::in_turn, Schedule::first_runs_on, Schedule::last_runs_on, Schedule::random};

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* sanitizer_state = nullptr;
  Waiting waiting = Waiting::no;
  int line = 0;
};

struct Threadgroup {
  // What the 32 lanes of a simdgroup give one another. Two places in turn: a lane may be one operation ahead.
  struct Exchange {
    alignas(16) char given[2][LANES][16];
    unsigned operations[LANES];
  };

  std::vector<Fiber> fibers;
  std::vector<Exchange> exchanges;
  unsigned running = 0;
  unsigned position[3] = {}, positions[3] = {};
  std::function<void()> body;
  std::map<int, std::vector<char>> memory;
  std::size_t memory_bytes = 0, most_memory_bytes = 0;
  std::uint64_t random_state = 1;
  std::string error;
  Context scheduler;
  void* scheduler_sanitizer_state = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;

  static Threadgroup& current() {
    static Threadgroup group;
    return group;
  }

  // Lets the scheduler run until it takes up the running fiber again.
  void wait(Waiting what, int line) {
    Fiber& fiber = fibers[running];
    fiber.waiting = what;
    fiber.line = line;
    __sanitizer_start_switch_fiber(
        what == Waiting::for_ever ? nullptr : &fiber.sanitizer_state, scheduler_stack, scheduler_stack_bytes);
    emulator_switch(&fiber.context, &scheduler);
    __sanitizer_finish_switch_fiber(fibers[running].sanitizer_state, &scheduler_stack, &scheduler_stack_bytes);
  }

  // Runs one threadgroup to its end, or until `error` says why there is none.
  void run(Schedule schedule) {
    for (Fiber& fiber : fibers) {
      if (!fiber.stack) {
        fiber.stack = static_cast<char*>(
            mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      }
      fiber.waiting = Waiting::no;
      fiber.sanitizer_state = nullptr;
      prepare(fiber.context, fiber.stack, start);
    }
    for (Exchange& exchange : exchanges) std::memset(exchange.operations, 0, sizeof exchange.operations);
    memory.clear();
    memory_bytes = 0;

    std::vector<bool> can_run(exchanges.size(), true);
    unsigned last = 0;
    for (;;) {
      const unsigned next = choose(schedule, can_run, last);
      if (next < can_run.size()) {
        last = next;
        can_run[next] = run_simdgroup(next, schedule);
      } else if (!pass_barrier()) {
        return;
      } else {
        can_run.assign(can_run.size(), true);
      }
      if (!error.empty()) return;
    }
  }

 private:
  static void start() {
    Threadgroup& group = current();
    __sanitizer_finish_switch_fiber(nullptr, &group.scheduler_stack, &group.scheduler_stack_bytes);
    group.body();
    group.wait(Waiting::for_ever, 0);
    std::abort();
  }

  unsigned random_below(unsigned bound) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return unsigned(random_state >> 33) % bound;
  }

  unsigned choose(Schedule schedule, const std::vector<bool>& can_run, unsigned last) {
    const unsigned count = unsigned(can_run.size());
    const unsigned shift = schedule == Schedule::random ? random_below(count) : 0;
    for (unsigned i = 0; i < count; i++) {
      unsigned candidate = i;
      if (schedule == Schedule::in_turn) candidate = (last + 1 + i) % count;
      if (schedule == Schedule::last_runs_on) candidate = count - 1 - i;
      if (schedule == Schedule::random) candidate = (i + shift) % count;
      if (can_run[candidate]) return candidate;
    }
    return count;
  }

  void resume(unsigned thread_index) {
    running = thread_index;
    Fiber& fiber = fibers[thread_index];
    __sanitizer_start_switch_fiber(&scheduler_sanitizer_state, fiber.stack, STACK_BYTES);
    emulator_switch(&scheduler, &fiber.context);
    __sanitizer_finish_switch_fiber(scheduler_sanitizer_state, nullptr, nullptr);
  }

  // Runs the lanes up to where they wait next; returns whether they all stand at one operation of their simdgroup.
  bool run_simdgroup(unsigned simdgroup, Schedule schedule) {
    Fiber* lanes = &fibers[simdgroup * LANES];
    const unsigned flip = schedule == Schedule::last_runs_on ? LANES - 1
                          : schedule == Schedule::random     ? random_below(LANES)
                                                             : 0;
    for (unsigned i = 0; i < LANES; i++) {
      if (lanes[i ^ flip].waiting == Waiting::no) resume(simdgroup * LANES + (i ^ flip));
    }
    unsigned waiting = 0;
    bool same_line = true;
    for (unsigned i = 0; i < LANES; i++) {
      waiting += lanes[i].waiting == Waiting::for_simdgroup;
      same_line &= lanes[i].line == lanes[0].line;
    }
    if (waiting < LANES) return false;
    if (!same_line) {
      error = "lanes of one simdgroup wait in different operations, one of them on line " +
              std::to_string(lanes[0].line);
      return false;
    }
    for (unsigned i = 0; i < LANES; i++) lanes[i].waiting = Waiting::no;
    return true;
  }

  // Called when nobody can run: returns whether there was a barrier that everybody had reached.
  bool pass_barrier() {
    unsigned ended = 0, at_barrier = 0;
    int line = 0, other_line = 0;
    bool same_line = true;
    for (const Fiber& fiber : fibers) {
      ended += fiber.waiting == Waiting::for_ever;
      if (fiber.waiting == Waiting::for_threadgroup) {
        same_line &= at_barrier++ == 0 || line == fiber.line;
        line = fiber.line;
      } else if (fiber.waiting == Waiting::for_simdgroup) {
        other_line = fiber.line;
      }
    }
    if (ended == fibers.size()) return false;
    if (at_barrier < fibers.size() || !same_line) {
      error = "a barrier was not reached by every thread: " + std::to_string(ended) + " returned, " +
              std::to_string(at_barrier) + " wait at line " + std::to_string(line) +
              (same_line ? "" : " and others") + ", " + std::to_string(fibers.size() - ended - at_barrier) +
              " in an operation of their simdgroup on line " + std::to_string(other_line);
      return false;
    }
    for (Fiber& fiber : fibers) fiber.waiting = Waiting::no;
    return true;
  }
};

inline unsigned lane() { return Threadgroup::current().running % LANES; }

// What every lane of a simdgroup gave; to be read before the next exchange.
template <class T>
struct Given {
  const char (*bytes)[16];
  T operator[](unsigned lane) const {
    T value;
    std::memcpy(&value, bytes[lane], sizeof(T));
    return value;
  }
};

// Gives `value` to the other lanes of the simdgroup and takes theirs.
template <class T>
__attribute__((noinline)) Given<T> exchange(const T& value, int line) {
  static_assert(sizeof(T) <= 16, "a simdgroup operation takes at most 16 bytes of a lane");
  Threadgroup& group = Threadgroup::current();
  Threadgroup::Exchange& place = group.exchanges[group.running / LANES];
  const unsigned turn = place.operations[lane()]++ % 2;
  std::memcpy(place.given[turn][lane()], &value, sizeof(T));
  group.wait(Waiting::for_simdgroup, line);
  return {place.given[turn]};
}

// A threadgroup array: a block of its exact size, full of NaN, the same for every thread that comes to the line.
inline void* threadgroup_memory(int line, std::size_t bytes) {
  Threadgroup& group = Threadgroup::current();
  std::vector<char>& block = group.memory[line];
  if (block.empty()) {
    block.assign(bytes, char(0xFF));
    group.memory_bytes += bytes;
    if (group.memory_bytes > group.most_memory_bytes) group.most_memory_bytes = group.memory_bytes;
  }
  return block.data();
}

}  // namespace emulator
