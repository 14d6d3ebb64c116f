/* The matmul of a few rows, in AMX tiles. It is bound by reading the weights, so they are packed in the order in which they
 * are read, and prefetched.
 *
 * Weights: panels of 32 columns (outputs), each a series of steps of 32 inputs; a step is two tiles of 16 columns; a
 * tile has 16 rows of 16 pairs: row r, pair j holds inputs 2r and 2r + 1 of column j.
 */
#pragma once
#include "amx.h"
#include "elementwise.h"

#define COLUMNS 32     /* of a panel */
#define STEP 32        /* inputs */
#define ROWS_AT_ONCE 256 /* that stay in the second cache while the weights pass by */

typedef struct {
  const number *weights, *bias; /* bias [outputs] or NULL */
  int inputs, outputs;          /* multiples of 32 */
  int gated; /* a panel is 16 columns of a gate and 16 of what it lets pass; half as many come out */
} linear_layer;

#ifdef AMX

#define AHEAD 2048 /* bytes of weights from the prefetch to the read */

/* Tiles 0 to 3 are sums, 4 and 5 rows (of the first 16, of the others), 6 and 7 weights. */
static void configure_tiles_for(int rows) {
  tile_shapes shapes = full_tiles();
  int first = rows < 16 ? rows : 16, others = rows > 16 ? rows - 16 : 1;
  shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = (uint8_t)first;
  shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = (uint8_t)others;
  configure_tiles(&shapes);
}

/* sums [32, 32] = rows (at most 32) of x times a panel, which is in memory still or in a cache already. It passes the
 * first cache by and leaves x there. */
static inline void multiply(const number *x, int rows, int inputs, const number *panel, int in_memory, float *sums) {
  const number *others = x + 16 * inputs;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < inputs; step += STEP, panel += STEP * COLUMNS) {
    for (int line = 0; in_memory && line < STEP * COLUMNS * 2; line += 64)
      _mm_prefetch((const char *)panel + AHEAD + line, _MM_HINT_T1);
    _tile_stream_loadd(6, panel, 64);
    _tile_stream_loadd(7, panel + STEP * COLUMNS / 2, 64);
    _tile_loadd(4, x + step, inputs * sizeof(number));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (rows > 16) {
      _tile_loadd(5, others + step, inputs * sizeof(number));
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, COLUMNS * sizeof(float));
  _tile_stored(1, sums + 16, COLUMNS * sizeof(float));
  if (rows > 16) {
    _tile_stored(2, sums + 16 * COLUMNS, COLUMNS * sizeof(float));
    _tile_stored(3, sums + 16 * COLUMNS + 16, COLUMNS * sizeof(float));
  }
}

static inline void finish_row(const linear_layer *p, const float *sums, const number *residual, int column, int64_t row,
                              number *out) {
  float y[COLUMNS];
#pragma omp simd
  for (int i = 0; i < COLUMNS; i++) y[i] = p->bias ? sums[i] + read_(p->bias[column + i]) : sums[i];
  if (p->gated) {
    out += row * (p->outputs / 2) + column / 2;
#pragma omp simd
    for (int i = 0; i < 16; i++) out[i] = gated(rounded(y[i]), rounded(y[i + 16]));
    return;
  }
  out += row * p->outputs + column;
  if (residual) {
    residual += row * p->outputs + column;
#pragma omp simd
    for (int i = 0; i < COLUMNS; i++) out[i] = rounded(y[i] + read_(residual[i]));
  } else {
#pragma omp simd
    for (int i = 0; i < COLUMNS; i++) out[i] = rounded(y[i]);
  }
}

/* out [rows, outputs] = x [rows, inputs] times the weights, plus the residual [rows, outputs] unless it is NULL, by all
 * threads of the team. The residual may be `out`. */
static void multiply_all(const linear_layer *p, const number *x, const number *residual, number *out, int rows) {
  int panels = p->outputs / COLUMNS, blocks = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, shaped = 0;
  float sums[32 * COLUMNS] __attribute__((aligned(64)));
#pragma omp for schedule(static)
  for (int item = 0; item < panels * blocks; item++) {
    int panel = item % panels, end = (item / panels + 1) * ROWS_AT_ONCE;
    const number *weights = p->weights + (int64_t)panel * COLUMNS * p->inputs;
    for (int row = end - ROWS_AT_ONCE; row < end && row < rows; row += 32) {
      int count = rows - row < 32 ? rows - row : 32;
      if (count != shaped) configure_tiles_for(shaped = count);
      multiply(x + (int64_t)row * p->inputs, count, p->inputs, weights, row == end - ROWS_AT_ONCE, sums);
      for (int i = 0; i < count; i++) finish_row(p, sums + i * COLUMNS, residual, panel * COLUMNS, row + i, out);
    }
  }
  _tile_release();
}
#else
static void multiply_all(const linear_layer *p, const number *x, const number *residual, number *out, int rows) {
  (void)p, (void)x, (void)residual, (void)out, (void)rows;
}
#endif
