/* The programs (CTAs) of a PTX kernel, one after the other, each thread a fiber, run in random order; what TMA loads
   arrives at random times too.
   What PTX leaves to the machine is as unkind as it may be: shared memory begins as NaNs, and threads that need not
   wait for one another do not. Addresses in shared memory are checked, those in global memory are not but for their
   alignment. Included by kernels translated by ptx_on_cpu.py, after THREADS. */
#define _GNU_SOURCE
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define SHARED_AT 1024u /* address of the first byte: not zero, so that an offset for an address is noticed */
#define STACK (256 << 10)

typedef struct { uint64_t address, sizes[5], strides[5]; uint32_t box[5], rank, element, swizzle; } map_t;
typedef struct { int16_t pending, count; int32_t bytes_and_phase; } barrier_t; /* bytes << 1 | phase */
#define WORDS 6 /* that a thread shows the others at a time, at most: its part of both operands of mma */
typedef struct { uint32_t values[2][WORDS][32], arrived, generation; } warp_t;
typedef struct { uint32_t target, barrier; const map_t *map; int32_t at[5]; uint64_t from; uint32_t bytes; } load_t;

static uint8_t *shared;
static uint32_t shared_size, program, programs, current, alive, progress, pending_loads, error;
static const uint64_t *parameters;
static const map_t *maps;
static ucontext_t scheduler, fibers[THREADS];
static uint8_t finished[THREADS], *stacks;
static warp_t warps[THREADS / 32], blocks[16];
static load_t loads[1024];
static uint64_t random_state;
static char *message;
static uint32_t waiting[THREADS];

static uint32_t draw(uint32_t below) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return (uint32_t)(random_state >> 33) % below;
}
static void yield_(void) { swapcontext(&fibers[current], &scheduler); }
static void fail(const char *format, ...) {
  va_list list;
  va_start(list, format);
  if (!error) vsnprintf(message, 1000, format, list);
  va_end(list);
  error = 1;
  for (;;) yield_();
}
static void *at_shared(uint32_t address, uint32_t size) {
  if (address < SHARED_AT || address % size || address - SHARED_AT + size > shared_size)
    fail("thread %u: %u bytes at shared address %d", current, size, (int)(address - SHARED_AT));
  return shared + (address - SHARED_AT);
}
static void *at_global(uint64_t address, uint32_t size) {
  if (address < 4096 || address % size) fail("thread %u: %u bytes at global address %#lx", current, size, address);
  return (void *)address;
}

/* Threads together. */
typedef const uint32_t (*shown_t)[32];
static shown_t meet(warp_t *group, uint32_t members, const uint32_t *own, uint32_t words) {
  uint32_t generation = group->generation, (*values)[32] = group->values[generation & 1];
  for (uint32_t i = 0; i < words; i++) values[i][current & 31] = own[i];
  if (++group->arrived == members) {
    group->arrived = 0;
    group->generation++;
    progress++;
  } else
    while (group->generation == generation) yield_();
  return (shown_t)values;
}
static shown_t warp_of(const uint32_t *own, uint32_t words) { return meet(&warps[current / 32], 32, own, words); }
static const uint32_t *warp(uint32_t value) { return warp_of(&value, 1)[0]; }
static uint32_t shuffle_up(uint32_t value, uint32_t by) {
  const uint32_t *values = warp(value);
  uint32_t lane = current & 31;
  return lane < by ? value : values[lane - by];
}

/* Barriers in shared memory. */
static void settle(barrier_t *b) {
  progress++;
  if (b->pending < 0) fail("thread %u: more arrivals than a barrier counts", current);
  if (!b->pending && !(b->bytes_and_phase >> 1)) {
    b->bytes_and_phase ^= 1;
    b->pending = b->count;
  }
}
static void barrier_init(uint32_t address, uint32_t count) {
  barrier_t *b = at_shared(address, 8);
  *b = (barrier_t){(int16_t)count, (int16_t)count, 0};
}
static void barrier_arrive(uint32_t address, uint32_t bytes, uint32_t count) {
  barrier_t *b = at_shared(address, 8);
  b->bytes_and_phase += (int32_t)bytes << 1;
  b->pending -= (int16_t)count;
  settle(b);
}
static uint8_t barrier_test(uint32_t address, uint32_t parity) {
  barrier_t *b = at_shared(address, 8);
  if ((b->bytes_and_phase & 1) != (int32_t)parity) {
    progress++;
    return 1;
  }
  waiting[current] = address - SHARED_AT;
  yield_();
  return 0;
}

/* TMA: a box into lines of shared memory, zeros outside of the tensor, 16-byte chunks swizzled by their address. */
static void carry_out(load_t *load) {
  const map_t *m = load->map;
  uint32_t total = m->element, bits = m->swizzle == 128 ? 7 : m->swizzle == 64 ? 3 : m->swizzle == 32 ? 1 : 0;
  for (uint32_t i = 0; i < m->rank; i++) total *= m->box[i];
  if (load->target % 128) fail("a box at shared address %d", (int)(load->target - SHARED_AT));
  for (uint32_t byte = 0; byte < total; byte += m->element) {
    uint32_t rest = byte / m->element, inside = 1, to = load->target + byte;
    uint64_t from = m->address;
    for (uint32_t i = 0; i < m->rank; i++) {
      int64_t place = (int64_t)load->at[i] + rest % m->box[i];
      rest /= m->box[i];
      if (place < 0 || place >= (int64_t)m->sizes[i]) inside = 0;
      from += place * (i ? m->strides[i - 1] : m->element);
    }
    to ^= (to >> 7 & bits) << 4;
    if (inside)
      memcpy(at_shared(to, m->element), (void *)from, m->element);
    else
      memset(at_shared(to, m->element), 0, m->element);
  }
  barrier_t *b = at_shared(load->barrier, 8);
  b->bytes_and_phase -= (int32_t)total << 1;
  settle(b);
}
static void carry_out_bulk(load_t *load) {
  if (load->target % 16 || load->from % 16 || load->bytes % 16)
    fail("%u bytes from %#lx to shared address %d", load->bytes, load->from, (int)(load->target - SHARED_AT));
  for (uint32_t i = 0; i < load->bytes; i += 16)
    memcpy(at_shared(load->target + i, 16), at_global(load->from + i, 16), 16);
  barrier_t *b = at_shared(load->barrier, 8);
  b->bytes_and_phase -= (int32_t)load->bytes << 1;
  settle(b);
}
static void bulk(uint32_t target, uint64_t from, uint32_t bytes, uint32_t barrier) {
  if (pending_loads == 1024) fail("too many loads");
  loads[pending_loads++] = (load_t){.target = target, .barrier = barrier, .from = from, .bytes = bytes};
}
static void tma(uint32_t target, uint64_t map, uint32_t barrier, int count, ...) {
  if (pending_loads == 1024) fail("too many loads");
  load_t *load = &loads[pending_loads++];
  va_list list;
  *load = (load_t){target, barrier, (const map_t *)map};
  va_start(list, count);
  for (int i = 0; i < count; i++) load->at[i] = va_arg(list, int32_t);
  va_end(list);
  if (load->map->rank != (uint32_t)count) fail("%d coordinates in %u dimensions", count, load->map->rank);
}

/* Numbers. */
static float f(uint32_t bits) { float v; memcpy(&v, &bits, 4); return v; }
static uint32_t u(float v) { uint32_t bits; memcpy(&bits, &v, 4); return bits == 0xFFC00000 ? 0x7FFFFFFF : bits; }
static uint32_t shl(uint32_t v, uint32_t by) { return by > 31 ? 0 : v << by; }
static uint32_t shr(uint32_t v, uint32_t by) { return by > 31 ? 0 : v >> by; }
static uint32_t sar(uint32_t v, uint32_t by) { return (uint32_t)((int32_t)v >> (by > 31 ? 31 : by)); }
static float flush(float v) { return fabsf(v) < 0x1p-126f ? copysignf(0, v) : v; }
static float min_nan(float a, float b) { return isnan(a) || isnan(b) ? NAN : fminf(a, b); }
static float max_nan(float a, float b) { return isnan(a) || isnan(b) ? NAN : fmaxf(a, b); }
static uint32_t bf16(float v) {
  uint32_t bits = u(v);
  return isnan(v) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
static float e4m3_value(uint32_t byte) {
  int exponent = byte >> 3 & 15, fraction = byte & 7;
  float magnitude = exponent ? ldexpf(8 + fraction, exponent - 10) : ldexpf(fraction, -9);
  if ((byte & 127) == 127) magnitude = NAN;
  return byte & 128 ? -magnitude : magnitude;
}
static uint32_t e4m3(float v) {
  if (isnan(v)) return 0x7F;
  float magnitude = fminf(fabsf(v), 448);
  int exponent;
  frexpf(magnitude, &exponent);
  float step = ldexpf(1, (exponent < -5 ? -5 : exponent) - 4);
  float rounded = rintf(magnitude / step) * step;
  uint32_t byte = 0;
  while (e4m3_value(byte) < rounded) byte++;
  return byte | (signbit(v) ? 128 : 0);
}

static uint32_t bf16x2(uint32_t a, uint32_t b, float (*of)(float, float)) {
  return bf16(of(f(a << 16), f(b << 16))) | bf16(of(f(a & 0xFFFF0000), f(b & 0xFFFF0000))) << 16;
}
static float times(float a, float b) { return a * b; }
static uint32_t max_u16x2(uint32_t a, uint32_t b) {
  uint32_t low = (a & 0xFFFF) > (b & 0xFFFF) ? a & 0xFFFF : b & 0xFFFF;
  return low | ((a >> 16) > (b >> 16) ? a >> 16 : b >> 16) << 16;
}
static uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors) {
  uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t result = 0;
  for (uint32_t i = 0; i < 4; i++) {
    uint32_t selector = selectors >> 4 * i & 15, byte = bytes >> 8 * (selector & 7) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

/* Matrices of a warp. Of 8x8 16-bit values lane l has row l / 4, columns 2 (l % 4) and the next. */
static void load_matrices(uint32_t address, uint32_t *result) {
  uint32_t lane = current & 31;
  const uint32_t *lines = warp(address);
  for (uint32_t i = 0; i < 4; i++) {
    uint32_t line = lines[8 * i + lane / 4];
    at_shared(line, 16);
    result[i] = *(uint32_t *)at_shared(line + lane % 4 * 4, 4);
  }
}
static uint32_t transpose(uint32_t value) {
  const uint32_t *rows = warp(value);
  uint32_t lane = current & 31, row = lane / 4, column = lane % 4 * 2, result = 0;
  for (uint32_t i = 0; i < 2; i++) result |= (rows[(column + i) * 4 + row / 2] >> 16 * (row % 2) & 0xFFFF) << 16 * i;
  return result;
}
/* 16x16 by 16x8, bf16 into fp32: sums in double, rounded once. */
static void mma(const uint32_t *a, const uint32_t *b, const uint32_t *c, uint32_t *d) {
  uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]}, lane = current & 31;
  shown_t all = warp_of(own, 6);
  for (uint32_t i = 0; i < 4; i++) {
    uint32_t row = lane / 4 * 4, column = (lane % 4 * 2 + i % 2) * 4;
    double sum = f(c[i]);
    for (uint32_t k = 0; k < 16; k++) {
      uint32_t from = k % 8 / 2, shift = k % 2 ? 0 : 16;
      uint32_t left = all[i / 2 + k / 8 * 2][row + from] << shift & 0xFFFF0000;
      sum += (double)f(left) * f(all[4 + k / 8][column + from] << shift & 0xFFFF0000);
    }
    d[i] = u((float)sum);
  }
}

static uint32_t common(uint32_t a, uint32_t b) { return b ? common(b, a % b) : a; }
static void thread(void);
static void enter(void) {
  thread();
  finished[current] = 1;
  alive--;
  progress++;
  for (;;) yield_();
}

int run(uint32_t grid, uint32_t dynamic, const uint64_t *arguments, const map_t *tensor_maps, uint64_t seed, char *text) {
  stacks = malloc((size_t)THREADS * STACK);
  shared = aligned_alloc(1024, (dynamic + 1023) / 1024 * 1024);
  shared_size = dynamic, programs = grid, parameters = arguments, maps = tensor_maps, message = text, error = 0;
  random_state = seed * 2 + 1;
  uint32_t idle = 0;
  for (program = 0; program < programs && !error; program++) {
    memset(shared, 0xFF, dynamic);
    memset(warps, 0, sizeof warps);
    memset(blocks, 0, sizeof blocks);
    memset(finished, 0, sizeof finished);
    memset(waiting, 0, sizeof waiting);
    alive = THREADS, pending_loads = 0;
    for (uint32_t i = 0; i < THREADS; i++) {
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = stacks + (size_t)i * STACK;
      fibers[i].uc_stack.ss_size = STACK;
      fibers[i].uc_link = 0;
      makecontext(&fibers[i], enter, 0);
    }
    while (alive && !error) {
      uint32_t before = progress, start = draw(THREADS), step = draw(THREADS);
      while (common(step, THREADS) != 1) step = draw(THREADS);
      for (uint32_t i = 0; i < THREADS && !error; i++) {
        current = (start + i * step) % THREADS;
        if (!finished[current] && draw(8)) swapcontext(&scheduler, &fibers[current]);
        if (pending_loads && !draw(64)) {
          uint32_t which = draw(pending_loads);
          load_t load = loads[which];
          loads[which] = loads[--pending_loads];
          (load.map ? carry_out : carry_out_bulk)(&load);
        }
      }
      if (progress != before || pending_loads) idle = 0;
      else if (++idle > 100) { /* in so many rounds everybody was asked */
        uint32_t counts[THREADS / 32] = {0}, n = 0;
        for (uint32_t i = 0; i < THREADS; i++) counts[i / 32] += finished[i];
        n = snprintf(text, 1000, "nobody goes on; threads that ended, and what the first of each warp waited for last:");
        for (uint32_t i = 0; i < THREADS / 32; i++)
          n += snprintf(text + n, 1000 - n, " %u/%u", counts[i], waiting[32 * i]);
        error = 1;
      }
    }
    if (!error && pending_loads) snprintf(text, 1000, "a program ended before %u of its loads", pending_loads), error = 1;
  }
  free(stacks);
  free(shared);
  return (int)error;
}
