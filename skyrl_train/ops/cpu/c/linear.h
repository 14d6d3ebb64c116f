/* The products of linear layers y = x W^T + b in AMX tiles: their outputs, and the gradients of inputs and of weights. */
#pragma once
#include "norm_and_gate.h"
#include "products.h"
#include "wide.h"

#define STEPS_OF_WEIGHTS 64 /* blocks of tokens at most in a sum of a weight's gradient; these are added up in memory */

typedef struct { /* [rows, width], width a multiple of 32: row by row, or in blocks of 32 x 32, the last rows filled up */
  number *at;
  int64_t width, in_blocks;
} matrix;

typedef struct { /* one of the layers that share an input, or the gradient of one */
  const number *weight, *bias; /* [outputs, inputs], [outputs] or NULL */
  matrix y;                    /* [tokens, outputs], or its gradient */
  float *gradient;             /* of the weight */
  int64_t is_new;              /* its numbers mean nothing yet */
} layer;

typedef struct { /* gated = silu(gate) * up, and gradients, [tokens, width] each and in blocks */
  matrix gate, up, of_gate, of_up, gated;
} gate;

typedef struct {
  const layer *layers;
  int64_t tokens, inputs, first_panel; /* of tokens */
  matrix x, residual; /* [tokens, inputs], or its gradient; [tokens, outputs] or nothing */
  gate gate;
} operands;

/* The layer that a panel of all outputs belongs to; *panel becomes that of the layer. */
static inline const layer *layer_of(const operands *p, int64_t *panel) {
  const layer *of = p->layers;
  while (*panel >= of->y.width / SIDE) *panel -= of++->y.width / SIDE;
  return of;
}

static inline int rows_of(const operands *p, int64_t panel) { return (int)least(SIDE, p->tokens - panel * SIDE); }

/* Numbers between the rows of a block. */
static inline int64_t stride_of(const matrix *m) { return m->in_blocks ? SIDE : m->width; }

static inline number *block_at(const matrix *m, int64_t panel, int64_t step) {
  return m->at + (m->in_blocks ? (panel * (m->width / SIDE) + step) * BLOCK : panel * SIDE * m->width + step * SIDE);
}

/* Where tiles can take a panel; rows at multiples of a page would all want the same places of the first cache. */
static panel panel_at(const operands *p, const matrix *m, int64_t panel_of_tokens, int64_t step) {
  const number *at = block_at(m, panel_of_tokens, step);
  if (m->in_blocks) return packed_panel(at);
  int can = rows_of(p, panel_of_tokens) == SIDE && m->width % 2048;
  return (panel){can ? at : NULL, m->width, 16 * m->width, SIDE};
}

static void copy_block(const operands *p, const matrix *m, int64_t panel, int64_t step, number *to) {
  const number *from = block_at(m, panel, step);
  int rows = m->in_blocks ? SIDE : rows_of(p, panel);
  for (int i = 0; i < SIDE; i++)
    _mm512_storeu_si512(to + i * SIDE, i < rows ? _mm512_loadu_si512(from + i * stride_of(m)) : _mm512_setzero_si512());
}

static panel rows_of_x(const void *of, int64_t panel, int64_t step) {
  const operands *p = of;
  return panel_at(p, &p->x, panel, step);
}

static void copy_x(const void *of, int64_t panel, int64_t step, number *to) {
  const operands *p = of;
  copy_block(p, &p->x, panel, step, to);
}

static panel rows_of_y(const void *of, int64_t panel, int64_t step) {
  const operands *p = of;
  const layer *l = layer_of(p, &step);
  return panel_at(p, &l->y, panel, step);
}

static void copy_y(const void *of, int64_t panel, int64_t step, number *to) {
  const operands *p = of;
  const layer *l = layer_of(p, &step);
  copy_block(p, &l->y, panel, step, to);
}

static place near_y(const void *of, int64_t panel, int64_t step) {
  const operands *p = of;
  const layer *l = layer_of(p, &panel);
  return (place){block_at(&l->y, p->first_panel + step, panel), stride_of(&l->y), l->y.in_blocks ? SIDE : rows_of(p, step)};
}

static place near_weight(const void *of, int64_t panel, int64_t step) {
  const operands *p = of;
  const layer *l = layer_of(p, &panel);
  return (place){l->weight + panel * SIDE * p->inputs + step * SIDE, p->inputs, SIDE};
}

static place near_weights_by_turns(const void *of, int64_t panel, int64_t step) {
  const operands *p = of;
  return (place){p->layers[panel % 2].weight + panel / 2 * SIDE * p->inputs + step * SIDE, p->inputs, SIDE};
}

static place near_weight_rows(const void *of, int64_t panel, int64_t step) {
  const operands *p = of;
  const layer *l = layer_of(p, &step);
  return (place){l->weight + step * SIDE * p->inputs + panel * SIDE, p->inputs, SIDE};
}

static inline void round_row(const float *from, number *to) {
  round_two(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), to);
}

/* A block of sums, plus the bias and the residual's rows unless they are NULL, into its place. */
static inline void put_block(const operands *p, int64_t far, float *sums, const number *bias, const number *residual,
                             const matrix *to, int64_t column) {
  number *at = block_at(to, far, column);
  int rows = to->in_blocks ? SIDE : rows_of(p, far);
  for (int i = 0; i < rows; i++, sums += SIDE) {
    for (int j = 0; bias && j < SIDE; j++) sums[j] += read_(bias[j]);
    for (int j = 0; residual && j < SIDE; j++) sums[j] += read_(residual[i * p->residual.width + j]);
    round_row(sums, at + i * stride_of(to));
  }
}

static inline const number *bias_at(const layer *l, int64_t column) { return l->bias ? l->bias + column * SIDE : NULL; }

static void put_outputs(const void *of, int64_t far, int64_t near, float *sums) {
  const operands *p = of;
  const layer *l = layer_of(p, &near);
  put_block(p, far, sums, bias_at(l, near), p->residual.at ? block_at(&p->residual, far, near) : NULL, &l->y, near);
}

/* 32 sums plus the bias, rounded; past the caches to where backward will read them. */
static inline __m512i put_away(const float *sums, const number *bias, number *to) {
  __m512 y[2];
  for (int half = 0; half < 2; half++) {
    y[half] = _mm512_loadu_ps(sums + 16 * half);
    if (bias) y[half] = _mm512_add_ps(y[half], sixteen(bias + 16 * half));
  }
  __m512i numbers = rounded_two(y[0], y[1]);
  _mm512_stream_si512((__m512i *)to, numbers);
  return numbers;
}

static void put_gated(const void *of, int64_t far, int64_t near, float *sums) {
  const operands *p = of;
  const layer *l = p->layers;
  number *to_gate = block_at(&l[0].y, far, near), *to_up = block_at(&l[1].y, far, near);
  number *to = block_at(&p->gate.gated, far, near);
  for (int i = 0; i < BLOCK; i += SIDE) {
    __m512i gate = put_away(sums + i, bias_at(l, near), to_gate + i);
    __m512i up = put_away(sums + BLOCK + i, bias_at(l + 1, near), to_up + i);
    __m512 y[2]; /* of the rounded numbers, so that backward finds the same */
    for (int half = 0; half < 2; half++) {
      __m512 g = widened(half ? _mm512_extracti64x4_epi64(gate, 1) : _mm512_castsi512_si256(gate));
      __m512 u = widened(half ? _mm512_extracti64x4_epi64(up, 1) : _mm512_castsi512_si256(up));
      y[half] = _mm512_mul_ps(_mm512_mul_ps(g, sigmoids(g)), u);
    }
    round_two(y[0], y[1], to + i);
  }
}

static void put_inputs(const void *of, int64_t far, int64_t near, float *sums) {
  const operands *p = of;
  put_block(p, far, sums, NULL, NULL, &p->x, near);
}

static void put_through_gate(const void *of, int64_t far, int64_t near, float *sums) {
  const operands *p = of;
  const gate *m = &p->gate;
  const number *gate = block_at(&m->gate, far, near), *up = block_at(&m->up, far, near);
  number *of_gate = block_at(&m->of_gate, far, near), *of_up = block_at(&m->of_up, far, near);
  number *gated = block_at(&m->gated, far, near);
  for (int i = 0; i < BLOCK; i += SIDE) {
    __m512 to_gate[2], to_up[2], y[2];
    for (int half = 0; half < 2; half++) {
      __m512 g = sixteen(gate + i + 16 * half), u = sixteen(up + i + 16 * half), s = sigmoids(g);
      __m512 of = _mm512_loadu_ps(sums + i + 16 * half), opened = _mm512_mul_ps(g, s);
      __m512 slope = _mm512_fmadd_ps(g, _mm512_fnmadd_ps(s, s, s), s); /* s (1 + g (1 - s)) */
      to_gate[half] = _mm512_mul_ps(_mm512_mul_ps(of, u), slope);
      to_up[half] = _mm512_mul_ps(of, opened);
      y[half] = _mm512_mul_ps(opened, u);
    }
    round_two_away(to_gate[0], to_gate[1], of_gate + i);
    round_two_away(to_up[0], to_up[1], of_up + i);
    round_two_away(y[0], y[1], gated + i);
  }
}

static void put_gradient(const void *of, int64_t far, int64_t near, float *sums) {
  const operands *p = of;
  const layer *l = layer_of(p, &near);
  int is_new = l->is_new && !p->first_panel;
  for (int i = 0; i < SIDE; i++) {
    float *to = l->gradient + (near * SIDE + i) * p->inputs + far * SIDE;
    for (int half = 0; half < SIDE; half += 16) {
      __m512 sum = _mm512_loadu_ps(sums + i * SIDE + half);
      if (is_new) _mm512_stream_ps(to + half, sum);
      else _mm512_storeu_ps(to + half, _mm512_add_ps(_mm512_loadu_ps(to + half), sum));
    }
  }
}

static int64_t panels_of_outputs(const layer *layers, int64_t count) {
  int64_t panels = 0;
  for (int64_t i = 0; i < count; i++) panels += layers[i].y.width / SIDE;
  return panels;
}

/* Each layer's y, plus the residual if there is one, row by row. With `gated`, of two layers also silu(the first's y) *
 * the other's, all in blocks. */
void outputs(const layer *layers, int64_t count, const matrix *x, const matrix *residual, const matrix *gated,
             int64_t tokens, number *room) {
  operands of = {.layers = layers, .tokens = tokens, .inputs = x->width, .x = *x};
  product p = {.far = blocks(tokens), .near = panels_of_outputs(layers, count), .steps = x->width / SIDE, .together = 1,
               .steps_lie_close = 1, .far_rows = rows_of_x, .pack_far = copy_x, .near_at = near_weight,
               .pack_near = pack_columns, .put = put_outputs, .of = &of};
  if (residual) of.residual = *residual;
  if (gated) of.gate.gated = *gated, p.near /= 2, p.together = 2, p.near_at = near_weights_by_turns, p.put = put_gated;
  multiply_all(&p, room);
}

/* The gradient of the shared input. With a gate, whose output it was: the gradients of what went in, and that once more;
 * then only the width of of_x is read. */
void gradient_of_input(const layer *layers, int64_t count, const matrix *of_x, const gate *through, int64_t tokens,
                       number *room) {
  operands of = {.layers = layers, .tokens = tokens, .inputs = of_x->width, .x = *of_x};
  product p = {.far = blocks(tokens), .near = of_x->width / SIDE, .steps = panels_of_outputs(layers, count),
               .together = 1, .far_rows = rows_of_y, .pack_far = copy_y, .near_at = near_weight_rows,
               .pack_near = pack_rows, .put = put_inputs, .of = &of};
  if (through) of.gate = *through, p.put = put_through_gate;
  multiply_all(&p, room);
}

/* Each layer's gradient (+)= of_y^T x */
void gradients_of_weights(const layer *layers, int64_t count, const matrix *x, int64_t tokens, number *room) {
  int64_t panels = x->width / SIDE, all = blocks(tokens);
  int64_t passes = (all + STEPS_OF_WEIGHTS - 1) / STEPS_OF_WEIGHTS;
  for (int64_t pass = 0; pass < passes; pass++) {
    int64_t first = all * pass / passes, steps = all * (pass + 1) / passes - first;
    operands of = {.layers = layers, .tokens = tokens - first * SIDE, .inputs = x->width, .first_panel = first};
    product p = {.far = panels, .near = panels_of_outputs(layers, count), .steps = steps, .together = 1,
                 .near_is_left = 1, .packed_far = room, .near_at = near_y, .pack_near = pack_transposed,
                 .put = put_gradient, .of = &of};
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < steps; s++)
      for (int64_t panel = 0; panel < panels; panel++)
        pack_rows(block_at(x, first + s, panel), stride_of(x), x->in_blocks ? SIDE : rows_of(&of, s),
                  room + (panel * steps + s) * BLOCK);
    multiply_all(&p, room + panels * steps * BLOCK);
  }
}

/* Numbers of `room` that the products of so many tokens want, of layers with so many inputs. */
int64_t room_for(int64_t tokens, int64_t inputs) {
  int64_t packed = least(blocks(tokens), STEPS_OF_WEIGHTS) * (inputs / SIDE) * BLOCK;
  return packed + omp_get_max_threads() * WORKSPACE;
}

/* RMSNorm of rows x, into blocks y; zeros behind the last row. */
void norm_into_blocks(const number *x, const number *weight, float epsilon, const matrix *y, int64_t rows) {
  int64_t width = y->width;
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < blocks(rows); panel++)
    for (int64_t i = 0; i < SIDE; i++) {
      int64_t row = panel * SIDE + i;
      const number *from = x + (row < rows ? row : 0) * width;
      float scale = row < rows ? scale_of(from, epsilon, (int)width) : 0.0f;
      for (int64_t step = 0; step < width / SIDE; step++) {
        float to[SIDE];
#pragma omp simd
        for (int64_t j = 0; j < SIDE; j++) to[j] = read_(from[step * SIDE + j]) * scale * read_(weight[step * SIDE + j]);
        round_row(to, block_at(y, panel, step) + i * SIDE);
      }
    }
}
