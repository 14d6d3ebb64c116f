/* The matrix products of linear layers y = x W^T + b: their outputs, and the gradients of their inputs and weights.
 *
 * A thread has a rectangle of the result. It packs as much of one operand as its second cache holds, the near one, and
 * lets the other, the far one, pass by in panels of 32 rows or columns. What follows a product is done with its sums
 * while they are in the first cache.
 */
#include "norm_and_gate.h"
#include "tiles.h"

#define NEAR 512          /* blocks of the near operand that are packed at once: 1 MiB */
#define CLOSE 18          /* blocks of the far operand that are multiplied at once: 36 KiB, the first cache holds them */
#define STEPS 128         /* longer sums are taken in parts */
#define STEPS_OF_WEIGHTS 64 /* blocks of tokens in the sums of weights' gradients, which are added in memory */

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

typedef struct { /* 32 rows of an operand as tiles take them: 16 and 16 `below`, the next 32 numbers of all a `step` on */
  const number *at;
  int64_t stride, below, step;
} panel;

typedef struct { /* where a block lies, and which of its rows exist */
  const number *at;
  int64_t stride;
  int rows;
} place;

typedef struct product {
  const layer *layers;
  int64_t count, tokens, inputs, first_panel; /* of tokens */
  matrix x, residual;         /* [tokens, inputs], or its gradient; [tokens, outputs] or nothing */
  gate gate;
  int64_t far, near, steps;   /* panels of 32 rows of either operand; blocks of 32 numbers in a sum */
  int64_t together;           /* near panels whose sums `put` wants at once; `near` counts so many as one */
  int near_is_left;
  int steps_lie_close;        /* in the near operand's memory, rather than panels */
  const number *packed_far;   /* all of it, or NULL */
  panel (*far_rows)(const struct product *, int64_t panel, int64_t step); /* where they lie, if they can be taken there */
  void (*pack_far)(const struct product *, int64_t panel, int64_t step, number *to);
  place (*near_at)(const struct product *, int64_t panel, int64_t step);
  void (*pack_near)(const number *from, int64_t stride, int rows, number *to);
  void (*put)(const struct product *, int64_t far, int64_t near, float *sums); /* [together][32][32] */
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

/* Tiles 0 to 3, a 32 x 32 block of C, += A B over `steps` blocks, while rows [row, stop) of a next panel are asked for.
 * One operand passes the first cache by and leaves the other there. */
static inline void multiply_passing(panel a, panel b, int64_t steps, int left_passes, panel next, int64_t row, int64_t stop) {
  for (int64_t s = 0; s < steps; s++, a.at += a.step, b.at += b.step, next.at += next.step) {
    for (int64_t i = row; i < stop; i++) _mm_prefetch((const char *)(next.at + i * next.stride), _MM_HINT_T1);
    if (left_passes) {
      _tile_stream_loadd(4, a.at, 2 * a.stride);
      _tile_loadd(6, b.at, 2 * b.stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b.at + b.below, 2 * b.stride);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stream_loadd(5, a.at + a.below, 2 * a.stride);
    } else {
      _tile_stream_loadd(6, b.at, 2 * b.stride);
      _tile_loadd(4, a.at, 2 * a.stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_stream_loadd(7, b.at + b.below, 2 * b.stride);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a.at + a.below, 2 * a.stride);
    }
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

/* Numbers of a workspace in which the sums of so many far panels wait for the rest of their steps. */
static int64_t numbers_of_workspace(int64_t waiting) {
  return (NEAR + CLOSE + 2 * (waiting + 1) * (NEAR / CLOSE + 1)) * BLOCK;
}

/* Numbers of `room` that the products of so many tokens want, of layers with so many inputs. */
int64_t room_for(int64_t tokens, int64_t inputs) {
  int64_t packed = least(blocks(tokens), STEPS_OF_WEIGHTS) * (inputs / SIDE) * BLOCK;
  return packed + omp_get_max_threads() * numbers_of_workspace(blocks(tokens));
}

/* Near panels [first, first + count), blocks [step, step + steps) of each, in the order in which they lie in memory. */
static void pack_group(const product *p, int64_t first, int64_t count, int64_t step, int64_t steps, number *to) {
  int64_t outer = p->steps_lie_close ? count : steps, inner = p->steps_lie_close ? steps : count;
  for (int64_t i = 0; i < outer; i++)
    for (int64_t j = 0; j < inner; j++) {
      int64_t n = p->steps_lie_close ? i : j, s = p->steps_lie_close ? j : i;
      place from = p->near_at(p, first + n, step + s);
      if (i + 1 < outer) {
        place next = p->steps_lie_close ? p->near_at(p, first + n + 1, step + s) : p->near_at(p, first + n, step + s + 1);
        ask_for_block(next.at, next.stride);
      }
      p->pack_near(from.at, from.stride, from.rows, to + (n * steps + s) * BLOCK);
    }
}

/* Steps [from, stop) of a far panel, packed if they must be. */
static panel far_panel(const product *p, int64_t far, int64_t from, int64_t stop, number *room) {
  if (p->packed_far) return packed_panel(p->packed_far + (far * p->steps + from) * BLOCK);
  panel rows = p->far_rows(p, far, from);
  if (rows.at && p->far_rows(p, far, stop - 1).at == rows.at + (stop - 1 - from) * rows.step) return rows;
  for (int64_t s = from; s < stop; s++) p->pack_far(p, far, s, room + (s - from) * BLOCK);
  return packed_panel(room);
}

/* The products of one far panel and `count` near ones over steps [step, step + steps), for which `packed` is packed. */
static void multiply_panel(const product *p, const workspace *w, int64_t far, int64_t first, int64_t count, int64_t step,
                           int64_t steps, int is_last, float *sums) {
  int64_t parts = (steps + CLOSE - 1) / CLOSE, is_whole = steps == p->steps && parts == 1;
  for (int64_t part = 0; part < parts; part++) {
    int64_t from = steps * part / parts, stop = steps * (part + 1) / parts;
    panel passing, held = far_panel(p, far, step + from, step + stop, w->far), next = {0};
    if (!is_last) next = p->packed_far ? packed_panel(held.at + p->steps * BLOCK) : p->far_rows(p, far + 1, step + from);
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
      if (ends) p->put(p, far, first + n / p->together, block - (p->together - 1) * BLOCK);
    }
  }
}

/* Far panels [far, far_end) and near ones [near, near_end). */
static void multiply_range(const product *p, const workspace *w, int64_t far, int64_t far_end, int64_t near, int64_t near_end) {
  int64_t width = (near_end - near) * p->together, depth = p->steps;
  if (depth > STEPS) depth = NEAR / width > CLOSE ? NEAR / width : CLOSE;
  int64_t group = NEAR / depth / p->together, groups = (near_end - near + group - 1) / group;
  for (int64_t g = 0; g < groups; g++) {
    int64_t first = near + (near_end - near) * g / groups, count = near + (near_end - near) * (g + 1) / groups - first;
    for (int64_t step = 0; step < p->steps; step += depth) {
      int64_t steps = least(depth, p->steps - step), kept = depth < p->steps ? count * p->together * BLOCK : 0;
      pack_group(p, first * p->together, count * p->together, step, steps, w->near);
      for (int64_t f = far; f < far_end; f++) multiply_panel(p, w, f, first, count, step, steps, f + 1 == far_end, w->sums + (f - far) * kept);
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

static void multiply_all(const product *p, number *room) {
#pragma omp parallel
  {
    int threads = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t columns = parts_of_near(p, threads), rows = threads / columns, row = me / columns, column = me % columns;
    number *own = room + me * numbers_of_workspace(p->steps > STEPS ? p->far : 0);
    workspace w = {own, own + NEAR * BLOCK, (float *)(own + (NEAR + CLOSE) * BLOCK)};
    take_all_tiles();
    multiply_range(p, &w, p->far * row / rows, p->far * (row + 1) / rows, p->near * column / columns,
                   p->near * (column + 1) / columns);
    _tile_release();
  }
}

/* The layer that a panel of all outputs belongs to; *panel becomes that of the layer. */
static inline const layer *layer_of(const product *p, int64_t *panel) {
  const layer *of = p->layers;
  while (*panel >= of->y.width / SIDE) *panel -= of++->y.width / SIDE;
  return of;
}

static inline int rows_of(const product *p, int64_t panel) { return (int)least(SIDE, p->tokens - panel * SIDE); }

/* Numbers between the rows of a block. */
static inline int64_t stride_of(const matrix *m) { return m->in_blocks ? SIDE : m->width; }

static inline number *block_at(const matrix *m, int64_t panel, int64_t step) {
  return m->at + (m->in_blocks ? (panel * (m->width / SIDE) + step) * BLOCK : panel * SIDE * m->width + step * SIDE);
}

/* Where tiles can take a panel; rows at multiples of a page would all want the same places of the first cache. */
static panel panel_at(const product *p, const matrix *m, int64_t panel_of_tokens, int64_t step) {
  const number *at = block_at(m, panel_of_tokens, step);
  if (m->in_blocks) return packed_panel(at);
  int can = rows_of(p, panel_of_tokens) == SIDE && m->width % 2048;
  return (panel){can ? at : NULL, m->width, 16 * m->width, SIDE};
}

static void copy_block(const product *p, const matrix *m, int64_t panel, int64_t step, number *to) {
  const number *from = block_at(m, panel, step);
  int rows = m->in_blocks ? SIDE : rows_of(p, panel);
  for (int i = 0; i < SIDE; i++)
    _mm512_storeu_si512(to + i * SIDE, i < rows ? _mm512_loadu_si512(from + i * stride_of(m)) : _mm512_setzero_si512());
}

static panel rows_of_x(const product *p, int64_t panel, int64_t step) { return panel_at(p, &p->x, panel, step); }

static void copy_x(const product *p, int64_t panel, int64_t step, number *to) { copy_block(p, &p->x, panel, step, to); }

static panel rows_of_y(const product *p, int64_t panel, int64_t step) {
  const layer *l = layer_of(p, &step);
  return panel_at(p, &l->y, panel, step);
}

static void copy_y(const product *p, int64_t panel, int64_t step, number *to) {
  const layer *l = layer_of(p, &step);
  copy_block(p, &l->y, panel, step, to);
}

static place near_y(const product *p, int64_t panel, int64_t step) {
  const layer *l = layer_of(p, &panel);
  return (place){block_at(&l->y, p->first_panel + step, panel), stride_of(&l->y), l->y.in_blocks ? SIDE : rows_of(p, step)};
}

static place near_weight(const product *p, int64_t panel, int64_t step) {
  const layer *l = layer_of(p, &panel);
  return (place){l->weight + panel * SIDE * p->inputs + step * SIDE, p->inputs, SIDE};
}

static place near_weights_by_turns(const product *p, int64_t panel, int64_t step) {
  return (place){p->layers[panel % 2].weight + panel / 2 * SIDE * p->inputs + step * SIDE, p->inputs, SIDE};
}

static place near_weight_rows(const product *p, int64_t panel, int64_t step) {
  const layer *l = layer_of(p, &step);
  return (place){l->weight + step * SIDE * p->inputs + panel * SIDE, p->inputs, SIDE};
}

static inline void round_row(const float *from, number *to) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from)));
}

/* A block of sums, plus the bias and the residual's rows unless they are NULL, into its place. */
static inline void put_block(const product *p, int64_t far, float *sums, const number *bias, const number *residual,
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

static void put_outputs(const product *p, int64_t far, int64_t near, float *sums) {
  const layer *l = layer_of(p, &near);
  put_block(p, far, sums, bias_at(l, near), p->residual.at ? block_at(&p->residual, far, near) : NULL, &l->y, near);
}

static inline __m512 widened(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

static inline __m512 sixteen(const number *from) { return widened(_mm256_loadu_si256((const __m256i *)from)); }

static inline __m512i rounded_two(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

static inline void round_two(__m512 first, __m512 second, number *to) { _mm512_storeu_si512(to, rounded_two(first, second)); }

/* 1 / (1 + 2**t), t = -x log2 e, to 3e-6 of it: 2**t by whole powers and a Taylor series around the nearest. */
static inline __m512 sigmoids(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
  __m512 t = _mm512_min_ps(_mm512_set1_ps(126.0f), _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f))); /* a NaN stays */
  __m512 rest = _mm512_reduce_ps(t, 0), whole = _mm512_sub_ps(t, rest), e = _mm512_set1_ps(1.33335581e-3f);
  e = _mm512_fmadd_ps(e, rest, _mm512_set1_ps(9.61812911e-3f));
  e = _mm512_fmadd_ps(e, rest, _mm512_set1_ps(5.55041087e-2f));
  e = _mm512_fmadd_ps(e, rest, _mm512_set1_ps(2.40226507e-1f));
  e = _mm512_fmadd_ps(e, rest, _mm512_set1_ps(6.93147181e-1f));
  e = _mm512_fmadd_ps(e, rest, one);
  __m512 sum = _mm512_add_ps(one, _mm512_scalef_ps(e, whole)), inverse = _mm512_rcp14_ps(sum);
  return _mm512_mul_ps(inverse, _mm512_fnmadd_ps(sum, inverse, two));
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

static void put_gated(const product *p, int64_t far, int64_t near, float *sums) {
  const layer *l = p->layers;
  number *to = block_at(&p->gate.gated, far, near), *of_gate = block_at(&l[0].y, far, near), *of_up = block_at(&l[1].y, far, near);
  for (int i = 0; i < BLOCK; i += SIDE) {
    __m512i gate = put_away(sums + i, bias_at(l, near), of_gate + i);
    __m512i up = put_away(sums + BLOCK + i, bias_at(l + 1, near), of_up + i);
    __m512 y[2]; /* of the rounded numbers, so that backward finds the same */
    for (int half = 0; half < 2; half++) {
      __m512 g = widened(half ? _mm512_extracti64x4_epi64(gate, 1) : _mm512_castsi512_si256(gate));
      __m512 u = widened(half ? _mm512_extracti64x4_epi64(up, 1) : _mm512_castsi512_si256(up));
      y[half] = _mm512_mul_ps(_mm512_mul_ps(g, sigmoids(g)), u);
    }
    round_two(y[0], y[1], to + i);
  }
}

static void put_inputs(const product *p, int64_t far, int64_t near, float *sums) {
  put_block(p, far, sums, NULL, NULL, &p->x, near);
}

static void put_through_gate(const product *p, int64_t far, int64_t near, float *sums) {
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
    round_two(to_gate[0], to_gate[1], of_gate + i);
    round_two(to_up[0], to_up[1], of_up + i);
    round_two(y[0], y[1], gated + i);
  }
}

static void put_gradient(const product *p, int64_t far, int64_t near, float *sums) {
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
  product p = {.layers = layers, .count = count, .tokens = tokens, .inputs = x->width, .x = *x, .far = blocks(tokens),
               .near = panels_of_outputs(layers, count), .steps = x->width / SIDE, .together = 1, .steps_lie_close = 1,
               .far_rows = rows_of_x, .pack_far = copy_x, .near_at = near_weight, .pack_near = pack_columns, .put = put_outputs};
  if (residual) p.residual = *residual;
  if (gated) {
    p.gate.gated = *gated, p.near /= 2, p.together = 2;
    p.near_at = near_weights_by_turns, p.put = put_gated;
  }
  multiply_all(&p, room);
}

/* The gradient of the shared input. With a gate, whose output it was: the gradients of what went in, and that once more;
 * then only the width of of_x is read. */
void gradient_of_input(const layer *layers, int64_t count, const matrix *of_x, const gate *through, int64_t tokens,
                       number *room) {
  product p = {.layers = layers, .count = count, .tokens = tokens, .inputs = of_x->width, .x = *of_x,
               .far = blocks(tokens), .near = of_x->width / SIDE, .steps = panels_of_outputs(layers, count),
               .together = 1, .far_rows = rows_of_y, .pack_far = copy_y, .near_at = near_weight_rows, .pack_near = pack_rows, .put = put_inputs};
  if (through) p.gate = *through, p.put = put_through_gate;
  multiply_all(&p, room);
}

/* Each layer's gradient (+)= of_y^T x */
void gradients_of_weights(const layer *layers, int64_t count, const matrix *x, int64_t tokens, number *room) {
  int64_t panels = x->width / SIDE, all = blocks(tokens);
  for (int64_t first = 0; first < all; first += STEPS_OF_WEIGHTS) {
    int64_t steps = least(STEPS_OF_WEIGHTS, all - first);
    product p = {.layers = layers, .count = count, .tokens = tokens - first * SIDE, .inputs = x->width,
                 .first_panel = first, .far = panels, .near = panels_of_outputs(layers, count), .steps = steps,
                 .together = 1, .near_is_left = 1, .packed_far = room, .near_at = near_y, .pack_near = pack_transposed, .put = put_gradient};
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < steps; s++)
      for (int64_t panel = 0; panel < panels; panel++)
        pack_rows(block_at(x, first + s, panel), stride_of(x), x->in_blocks ? SIDE : rows_of(&p, s),
                  room + (panel * steps + s) * BLOCK);
    multiply_all(&p, room + panels * steps * BLOCK);
  }
}

/* RMSNorm of rows x, into blocks y. */
void norm_into_blocks(const number *x, const number *weight, float epsilon, const matrix *y, int64_t rows) {
  int64_t width = y->width;
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < blocks(rows); panel++)
    for (int64_t i = 0; i < SIDE; i++) {
      int64_t row = panel * SIDE + i;
      const number *from = x + row * width;
      float scale = row < rows ? scale_of(from, epsilon, (int)width) : 0.0f;
      for (int64_t step = 0; step < width / SIDE; step++) {
        float to[SIDE] = {0};
#pragma omp simd
        for (int64_t j = 0; j < SIDE; j++)
          if (row < rows) to[j] = read_(from[step * SIDE + j]) * scale * read_(weight[step * SIDE + j]);
        round_row(to, block_at(y, panel, step) + i * SIDE);
      }
    }
}
