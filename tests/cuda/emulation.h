// CUDA as far as the kernels use it, for a C++ compiler: grid, block and threads, shared memory, barriers, warp shuffles, half types.
//
// Blocks run one after the other, the threads of a block as fibers in one thread of the system, switched at barriers and shuffles and
// nowhere else, so that a run is deterministic. `emulation_backwards` runs blocks, warps and lanes in the opposite order: results that
// differ show a missing barrier. Threads that wait at different barriers, or that leave while others wait, are an error.

#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 { unsigned int x, y, z; };

namespace emulation {

enum State { READY, AT_WARP, AT_BLOCK, DONE };
const int MOST_THREADS = 1024, WARP = 32, STACK = 64 * 1024;

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started;
  State state;
  dim3 thread;
  int number;
  unsigned int shuffles;
};

struct Machine {
  Fiber fibers[MOST_THREADS];
  char slots[MOST_THREADS / WARP][2][WARP][16];
  Fiber* current;
  jmp_buf scheduler;
  void (*body)(void*);
  void* arguments;
  dim3 grid, block, block_index;
  int threads;
  bool backwards;
};

inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulation of CUDA: %s\n", what);
  abort();
}

inline void __attribute__((noinline)) wait(State state) {
  Fiber* self = machine.current;
  self->state = state;
  if (_setjmp(self->at) == 0) _longjmp(machine.scheduler, 1);
}

inline void live() {
  for (;;) {
    machine.body(machine.arguments);
    wait(DONE);
  }
}

inline void __attribute__((noinline)) resume(Fiber* fiber) {
  machine.current = fiber;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->at, 1);
  fiber->started = true;
  setcontext(&fiber->start);
}

inline int ordered(int k, int count) { return machine.backwards ? count - 1 - k : k; }

// A warp until all of its threads wait at the barrier of the block, or all are done.
inline State run_warp(int first, int count) {
  for (;;) {
    int found[4] = {0, 0, 0, 0};
    for (int k = 0; k < count; k++) resume(&machine.fibers[first + ordered(k, count)]);
    for (int k = 0; k < count; k++) found[machine.fibers[first + k].state]++;
    if (found[AT_BLOCK] == count) return AT_BLOCK;
    if (found[DONE] == count) return DONE;
    if (found[AT_WARP] != count) fail("threads of a warp wait at different places, or not all of them take part in a shuffle");
    for (int k = 0; k < count; k++) machine.fibers[first + k].state = READY;
  }
}

inline void run_block() {
  for (int k = 0; k < machine.threads; k++) {
    Fiber& f = machine.fibers[k];
    f.state = READY;
    f.shuffles = 0;
    f.number = k;
    f.thread = {k % machine.block.x, k / machine.block.x % machine.block.y, k / machine.block.x / machine.block.y};
    if (!f.started) {
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = malloc(STACK);
      f.start.uc_stack.ss_size = STACK;
      f.start.uc_link = nullptr;
      makecontext(&f.start, live, 0);
    }
  }
  const int warps = (machine.threads + WARP - 1) / WARP;
  for (;;) {
    int done = 0;
    for (int k = 0; k < warps; k++) {
      const int first = ordered(k, warps) * WARP;
      const int count = machine.threads - first < WARP ? machine.threads - first : WARP;
      done += run_warp(first, count) == DONE;
    }
    if (done == warps) return;
    if (done != 0) fail("some threads left a block while others wait at its barrier");
    for (int k = 0; k < machine.threads; k++) machine.fibers[k].state = READY;
  }
}

inline void run(const unsigned int* grid, const unsigned int* block, void (*body)(void*), void* arguments) {
  machine.grid = {grid[0], grid[1], grid[2]};
  machine.block = {block[0], block[1], block[2]};
  const unsigned long threads = (unsigned long)block[0] * block[1] * block[2];
  if (threads == 0 || threads > MOST_THREADS) fail("a block has no threads, or more than 1024");
  if (grid[0] == 0 || grid[1] == 0 || grid[1] > 65535 || grid[2] != 1) fail("a grid that CUDA does not take");
  machine.threads = (int)threads;
  machine.body = body;
  machine.arguments = arguments;
  const unsigned long blocks = (unsigned long)grid[0] * grid[1];
  for (unsigned long k = 0; k < blocks; k++) {
    const unsigned long b = machine.backwards ? blocks - 1 - k : k;
    machine.block_index = {(unsigned int)(b % grid[0]), (unsigned int)(b / grid[0]), 0};
    run_block();
  }
}

// A kernel with its arguments, each read from where `arguments` points: what cuLaunchKernel does.
template <class... A> struct Launch {
  void (*kernel)(A...);
  void** arguments;
  template <size_t... I> void call(std::index_sequence<I...>) { kernel(*static_cast<A*>(arguments[I])...); }
  static void body(void* self) { static_cast<Launch*>(self)->call(std::index_sequence_for<A...>()); }
};

template <class... A> void launch(void (*kernel)(A...), const unsigned int* grid, const unsigned int* block, void** arguments, int given) {
  if (given != (int)sizeof...(A)) fail("a kernel is given more or fewer arguments than it has");
  Launch<A...> launch = {kernel, arguments};
  run(grid, block, Launch<A...>::body, &launch);
}

}  // namespace emulation

extern "C" void emulation_backwards(int backwards) { emulation::machine.backwards = backwards != 0; }

#define threadIdx (emulation::machine.current->thread)
#define blockIdx (emulation::machine.block_index)
#define blockDim (emulation::machine.block)
#define gridDim (emulation::machine.grid)

inline void __syncthreads() { emulation::wait(emulation::AT_BLOCK); }

// Every lane writes its value, waits for its warp, and reads another's. Two slots in turns: no lane is more than one shuffle ahead.
template <class T> T emulated_exchange(unsigned int mask, T value, int offset, bool exclusive) {
  static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes here");
  emulation::Fiber* self = emulation::machine.current;
  if (mask != 0xffffffffu) emulation::fail("a shuffle of a part of a warp");
  const int warp = self->number / emulation::WARP, lane = self->number % emulation::WARP;
  auto& slots = emulation::machine.slots[warp][self->shuffles++ % 2];
  memcpy(slots[lane], &value, sizeof(T));
  emulation::wait(emulation::AT_WARP);
  const int source = exclusive ? lane ^ offset : lane + offset;
  if (source < emulation::WARP && self->number - lane + source < emulation::machine.threads) memcpy(&value, slots[source], sizeof(T));
  return value;
}
template <class T> T __shfl_xor_sync(unsigned int mask, T value, int offset) { return emulated_exchange(mask, value, offset, true); }
template <class T> T __shfl_down_sync(unsigned int mask, T value, int offset) { return emulated_exchange(mask, value, offset, false); }

inline int __any_sync(unsigned int mask, int condition) {
  for (int offset = 16; offset > 0; offset /= 2) condition |= __shfl_xor_sync(mask, condition, offset);
  return condition;
}

using std::fabs;
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

struct __nv_bfloat16 { uint16_t bits; };

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

struct __half { uint16_t bits; };

inline float __half2float(__half x) {
  const int exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  float value = exponent == 31 ? (fraction ? NAN : INFINITY)
              : exponent == 0 ? std::ldexp((float)fraction, -24)
                              : std::ldexp((float)(fraction + 1024), exponent - 25);
  return x.bits & 0x8000 ? -value : value;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return {0x7fff};
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {(uint16_t)(sign | 0x7c00)};
  if (size < 0x1p-14f) return {(uint16_t)(sign | (uint16_t)std::nearbyint(std::ldexp(size, 24)))};
  int exponent;
  std::frexp(size, &exponent);
  const int fraction = (int)std::nearbyint(std::ldexp(size, 11 - exponent));  // 1024 … 2048
  return {(uint16_t)(sign | (((exponent + 14) << 10) + (fraction - 1024)))};
}
