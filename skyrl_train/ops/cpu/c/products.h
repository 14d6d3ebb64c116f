/* The product of two operands in AMX tiles.
 *
 * A thread has a rectangle of the result. It packs as much of one operand as its second cache holds, the near one, and
 * lets the other, the far one, pass by in panels of 32 rows or columns. What follows a product is done with its sums
 * while they are in the first cache.
 */
#pragma once
#include "tiles.h"

#define NEAR 512    /* blocks of the near operand that are packed at once: 1 MiB */
#define CLOSE 18    /* blocks of the far operand that are multiplied at once: 36 KiB, the first cache holds them */
#define STEPS 128   /* longer sums are taken in parts */
#define WAITING 64  /* far panels whose sums wait for the other parts */

typedef struct { /* 32 rows of an operand as tiles take them: 16 and 16 `below`, the next 32 numbers of all a `step` on */
  const number *at;
  int64_t stride, below, step;
} panel;

typedef struct { /* where a block lies, and which of its rows exist */
  const number *at;
  int64_t stride;
  int rows;
} place;

typedef struct {
  int64_t far, near, steps; /* panels of 32 rows of either operand; blocks of 32 numbers in a sum */
  int64_t together;         /* near panels whose sums `put` wants at once; `near` counts so many as one */
  int near_is_left;
  int steps_lie_close;      /* in the near operand's memory, rather than panels */
  const number *packed_far; /* all of it; or NULL, and the next two */
  panel (*far_rows)(const void *of, int64_t panel, int64_t step); /* where they lie, if tiles can take them there */
  void (*pack_far)(const void *of, int64_t panel, int64_t step, number *to);
  place (*near_at)(const void *of, int64_t panel, int64_t step);
  void (*pack_near)(const number *from, int64_t stride, int rows, number *to);
  void (*put)(const void *of, int64_t far, int64_t near, float *sums); /* [together][32][32] */
  const void *of; /* for these functions */
} product;

typedef struct { /* of one thread */
  number *near, *far;
  float *sums;
} workspace;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline panel packed_panel(const number *at) { return (panel){at, SIDE, TILE, BLOCK}; }

/* For the second cache: 32 rows of 64 bytes. */
static inline void ask_for_block(const number *at, int64_t stride) {
  for (int row = 0; row < SIDE; row++) _mm_prefetch((const char *)(at + row * stride), _MM_HINT_T1);
}

#define LOAD(tile, at, stride, passes) \
  do { \
    if (passes) _tile_stream_loadd(tile, at, 2 * (stride)); \
    else _tile_loadd(tile, at, 2 * (stride)); \
  } while (0)

/* Tiles 0 to 3, a 32 x 32 block of C, += A B over `steps` blocks, while rows [row, stop) of a next panel are asked for.
 * One operand passes the first cache by and leaves the other there. */
static inline void multiply_passing(panel a, panel b, int64_t steps, int left_passes, panel next, int64_t row, int64_t stop) {
  for (int64_t s = 0; s < steps; s++, a.at += a.step, b.at += b.step, next.at += next.step) {
    for (int64_t i = row; i < stop; i++) _mm_prefetch((const char *)(next.at + i * next.stride), _MM_HINT_T1);
    LOAD(4, a.at, a.stride, left_passes);
    LOAD(6, b.at, b.stride, !left_passes);
    _tile_dpbf16ps(0, 4, 6);
    LOAD(7, b.at + b.below, b.stride, !left_passes);
    _tile_dpbf16ps(1, 4, 7);
    LOAD(5, a.at + a.below, a.stride, left_passes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

#define WORKSPACE ((NEAR + CLOSE + 2 * (WAITING + 1) * (NEAR / CLOSE)) * BLOCK) /* numbers of one thread */

/* Near panels [first, first + count), blocks [step, step + steps) of each, in the order in which they lie in memory. */
static void pack_group(const product *p, int64_t first, int64_t count, int64_t step, int64_t steps, number *to) {
  int64_t outer = p->steps_lie_close ? count : steps, inner = p->steps_lie_close ? steps : count;
  for (int64_t i = 0; i < outer; i++)
    for (int64_t j = 0; j < inner; j++) {
      int64_t n = p->steps_lie_close ? i : j, s = p->steps_lie_close ? j : i;
      place from = p->near_at(p->of, first + n, step + s);
      if (i + 1 < outer) {
        place next = p->steps_lie_close ? p->near_at(p->of, first + n + 1, step + s) : p->near_at(p->of, first + n, step + s + 1);
        ask_for_block(next.at, next.stride);
      }
      p->pack_near(from.at, from.stride, from.rows, to + (n * steps + s) * BLOCK);
    }
}

/* Steps [from, stop) of a far panel, packed if they must be. */
static panel far_panel(const product *p, int64_t far, int64_t from, int64_t stop, number *room) {
  if (p->packed_far) return packed_panel(p->packed_far + (far * p->steps + from) * BLOCK);
  panel rows = p->far_rows(p->of, far, from);
  if (rows.at && p->far_rows(p->of, far, stop - 1).at == rows.at + (stop - 1 - from) * rows.step) return rows;
  for (int64_t s = from; s < stop; s++) p->pack_far(p->of, far, s, room + (s - from) * BLOCK);
  return packed_panel(room);
}

/* The products of one far panel and `count` near ones over steps [step, step + steps), which are packed. */
static void multiply_panel(const product *p, const workspace *w, int64_t far, int64_t first, int64_t count, int64_t step,
                           int64_t steps, int is_last, float *sums) {
  int64_t parts = (steps + CLOSE - 1) / CLOSE, is_whole = steps == p->steps && parts == 1;
  for (int64_t part = 0; part < parts; part++) {
    int64_t from = steps * part / parts, stop = steps * (part + 1) / parts;
    panel passing, held = far_panel(p, far, step + from, step + stop, w->far), next = {0};
    if (!is_last) next = p->packed_far ? packed_panel(held.at + p->steps * BLOCK) : p->far_rows(p->of, far + 1, step + from);
    int64_t panels = count * p->together, length = stop - from;
    for (int64_t n = 0; n < panels; n++) {
      float *block = sums + (is_whole ? n % p->together : n) * BLOCK;
      int ends = step + stop == p->steps && n % p->together == p->together - 1;
      passing = packed_panel(w->near + (n * steps + from) * BLOCK);
      int64_t row = next.at ? SIDE * n / panels : 0, end = next.at ? SIDE * (n + 1) / panels : 0;
      if (step + from) load_block(block, SIDE);
      else clear_block();
      if (p->near_is_left) multiply_passing(passing, held, length, 1, next, row, end);
      else multiply_passing(held, passing, length, 0, next, row, end);
      store_block(block, SIDE);
      if (ends) p->put(p->of, far, first + n / p->together, block - (p->together - 1) * BLOCK);
    }
  }
}

/* Far panels [far, far_end) and near ones [near, near_end). */
static void multiply_range(const product *p, const workspace *w, int64_t far, int64_t far_end, int64_t near, int64_t near_end) {
  int64_t width = (near_end - near) * p->together, depth = p->steps, at_once = far_end - far;
  if (!width) return;
  if (depth > STEPS) depth = NEAR / width > CLOSE ? NEAR / width : CLOSE, at_once = WAITING;
  int64_t group = NEAR / depth / p->together, groups = (near_end - near + group - 1) / group;
  for (int64_t g = 0; g < groups; g++) {
    int64_t first = near + (near_end - near) * g / groups, count = near + (near_end - near) * (g + 1) / groups - first;
    int64_t waiting = depth < p->steps ? count * p->together * BLOCK : 0; /* sums of a far panel */
    for (int64_t begin = far; begin < far_end; begin += at_once) {
      int64_t stop = least(begin + at_once, far_end);
      for (int64_t step = 0; step < p->steps; step += depth) {
        int64_t steps = least(depth, p->steps - step);
        pack_group(p, first * p->together, count * p->together, step, steps, w->near);
        for (int64_t f = begin; f < stop; f++)
          multiply_panel(p, w, f, first, count, step, steps, f + 1 == stop, w->sums + (f - begin) * waiting);
      }
    }
  }
}

/* Into how many parts so many threads divide the near panels; the far ones into threads / parts. What a block's product,
 * and its way to the first cache, cost in cycles decides. */
static int64_t parts_of_near(const product *p, int threads) {
  int64_t best = 0, least_cycles = INT64_MAX;
  for (int64_t parts = 1; parts <= threads; parts++) {
    if (threads % parts) continue;
    int64_t near = (p->near + parts - 1) / parts * p->together, far = (p->far * parts + threads - 1) / threads;
    int64_t cycles = 64 * near * far + 200 * near + 100 * far;
    if (cycles < least_cycles) best = parts, least_cycles = cycles;
  }
  return best;
}

/* room: WORKSPACE numbers per thread. */
static void multiply_all(const product *p, number *room) {
#pragma omp parallel
  {
    int threads = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t columns = parts_of_near(p, threads), rows = threads / columns, row = me / columns, column = me % columns;
    number *own = room + me * WORKSPACE;
    workspace w = {own, own + NEAR * BLOCK, (float *)(own + (NEAR + CLOSE) * BLOCK)};
    take_all_tiles();
    multiply_range(p, &w, p->far * row / rows, p->far * (row + 1) / rows, p->near * column / columns,
                   p->near * (column + 1) / columns);
    _mm_sfence(); /* what was stored past the caches */
    _tile_release();
  }
}
