/* Causal attention of a packed row and its backward, with the scores of a few queries at a time.
 *
 * Segment n is tokens [bounds[n], bounds[n + 1]) and continues segment before[n], -1 if none: it sees that one whole, and
 * what that one continues, and of itself what comes before a token. Query heads that share a key head are computed
 * together: `repeats` rows per token. The softmax is that of Milakov and Gimelshein (2018) with all keys at once; backward
 * computes it again from the stored logarithm of its sum, as in Dao et al. (2022), algorithm 4.
 */
#include "tiles.h"
#include "wide.h"

#define ROWS 256 /* queries times repeats, at once */

typedef struct {
  const int64_t *bounds, *before;
  int64_t segments, heads, kv_heads, size; /* size: of a head, a multiple of 32 */
  float scale;
  int64_t window; /* tokens that a query sees, its own among them */
} shape;

typedef struct { /* one segment and key head */
  int64_t first, length, keys;         /* its first token, its tokens, all keys that it sees */
  int64_t key_blocks, size_blocks;
  int64_t *tokens;                     /* [keys] where they stand */
  number *key_columns, *value_columns; /* packed [key blocks][size blocks]: for matmuls over a head's numbers */
  number *key_rows, *value_rows;       /* packed [size blocks][key blocks]: for matmuls over keys */
} seen;

/* Numbers are in the workspace of one thread, laid out for the longest chain of segments. */
typedef struct {
  seen seen;
  number *rows, *grad_rows, *p, *grad_scores, *packed, *gathered; /* [ROWS][size] twice, [ROWS][keys] twice */
  float *scores, *grad_p, *grad_keys, *grad_values;                 /* [32][keys] twice, [keys][size] twice */
} workspace;

static int64_t longest_chain(const shape *s) {
  int64_t longest = 0;
  for (int64_t n = 0; n < s->segments; n++) {
    int64_t keys = 0;
    for (int64_t m = n; m >= 0; m = s->before[m]) keys += s->bounds[m + 1] - s->bounds[m];
    if (keys > longest) longest = keys;
  }
  return blocks(longest) * SIDE;
}

static void *part(char **free_, int64_t bytes) {
  void *here = *free_;
  *free_ += (bytes + 63) / 64 * 64;
  return here;
}

/* The workspace's parts within one piece of memory; NULL: only count. */
static int64_t lay_out(workspace *r, char *memory, int64_t keys, int64_t size) {
  char *free_ = memory;
  int64_t matrix = keys * size * sizeof(number);
  r->seen.tokens = part(&free_, keys * sizeof(int64_t));
  r->seen.key_columns = part(&free_, matrix), r->seen.value_columns = part(&free_, matrix);
  r->seen.key_rows = part(&free_, matrix), r->seen.value_rows = part(&free_, matrix);
  r->gathered = part(&free_, matrix);
  r->rows = part(&free_, ROWS * size * sizeof(number)), r->grad_rows = part(&free_, ROWS * size * sizeof(number));
  r->p = part(&free_, ROWS * keys * sizeof(number)), r->grad_scores = part(&free_, ROWS * keys * sizeof(number));
  r->packed = part(&free_, 2 * ROWS * (size > SIDE ? size : SIDE) * sizeof(number));
  r->scores = part(&free_, SIDE * keys * sizeof(float)), r->grad_p = part(&free_, SIDE * keys * sizeof(float));
  r->grad_keys = part(&free_, keys * size * sizeof(float)), r->grad_values = part(&free_, keys * size * sizeof(float));
  return free_ - memory;
}

/* Rows `tokens` of one head, side by side, made up to whole blocks with zeros. */
static void gather(const number *from, int64_t stride, int64_t size, const seen *s, number *to) {
  for (int64_t i = 0; i < s->keys; i++) memcpy(to + i * size, from + s->tokens[i] * stride, size * sizeof(number));
  memset(to + s->keys * size, 0, (s->key_blocks * SIDE - s->keys) * size * sizeof(number));
}

static void pack_keys(const number *from, int64_t size, const seen *s, number *columns, number *rows) {
  for (int64_t k = 0; k < s->key_blocks; k++)
    for (int64_t d = 0; d < s->size_blocks; d++) {
      const number *block = from + k * SIDE * size + d * SIDE;
      if (columns) pack_columns(block, size, SIDE, columns + (k * s->size_blocks + d) * BLOCK);
      if (rows) pack_rows(block, size, SIDE, rows + (d * s->key_blocks + k) * BLOCK);
    }
}

/* Packs all keys and values of one key head that segment n sees. */
static void look(const shape *s, int64_t n, int64_t head, const number *key, const number *value, int backward, workspace *r) {
  seen *all = &r->seen;
  int64_t stride = s->kv_heads * s->size, end = 0;
  for (int64_t m = n; m >= 0; m = s->before[m]) end += s->bounds[m + 1] - s->bounds[m];
  all->first = s->bounds[n], all->length = s->bounds[n + 1] - s->bounds[n], all->keys = end;
  all->key_blocks = blocks(end), all->size_blocks = s->size / SIDE;
  for (int64_t m = n; m >= 0; m = s->before[m])
    for (int64_t token = s->bounds[m + 1] - 1; token >= s->bounds[m]; token--) all->tokens[--end] = token;
  gather(key + head * s->size, stride, s->size, all, r->gathered);
  pack_keys(r->gathered, s->size, all, all->key_columns, backward ? all->key_rows : NULL);
  gather(value + head * s->size, stride, s->size, all, r->gathered);
  pack_keys(r->gathered, s->size, all, backward ? all->value_columns : NULL, backward ? NULL : all->value_rows);
}

/* Rows [row, row + ROWS) of a segment's queries, token by token and in each its `repeats` heads; zeros behind the last. */
static int64_t take_rows(const shape *s, const seen *all, int64_t head, int64_t row, const number *from, number *to) {
  int64_t repeats = s->heads / s->kv_heads, total = all->length * repeats, count = total - row < ROWS ? total - row : ROWS;
  for (int64_t i = 0; i < count; i++) {
    int64_t token = all->first + (row + i) / repeats, grad_token = head * repeats + (row + i) % repeats;
    memcpy(to + i * s->size, from + (token * s->heads + grad_token) * s->size, s->size * sizeof(number));
  }
  memset(to + count * s->size, 0, (blocks(count) * SIDE - count) * s->size * sizeof(number));
  return count;
}

/* The keys that a row sees: [*start, *stop) */
static inline void bounds_of(const shape *s, const seen *all, int64_t row, int64_t *start, int64_t *stop) {
  int64_t own = all->keys - all->length, token = row / (s->heads / s->kv_heads);
  if (token >= all->length) token = all->length - 1;
  *stop = own + token + 1;
  *start = *stop > s->window ? *stop - s->window : 0;
}

/* A 32-row block of rows [32][size] times all packed columns in key blocks [begin, end) -> to [32][width]. */
static void products_over_size(const number *rows, const number *columns, const seen *all, int64_t size, int64_t begin,
                               int64_t end, float *to, int64_t width) {
  for (int64_t k = begin; k < end; k++) {
    clear_block();
    multiply(rows, size, 16 * size, SIDE, columns + k * all->size_blocks * BLOCK, all->size_blocks);
    store_block(to + k * SIDE, width);
  }
}

/* p [32 rows, width] over key blocks [begin, end) times packed rows -> rows of a head's numbers, each times its factor. */
static void products_over_keys(const shape *s, const seen *all, int64_t head, int64_t row, int64_t count, const number *p,
                               int64_t width, const number *packed, int64_t begin, int64_t end, const float *factors,
                               number *out) {
  int64_t repeats = s->heads / s->kv_heads;
  float c[BLOCK] __attribute__((aligned(64)));
  for (int64_t d = 0; d < all->size_blocks; d++) {
    clear_block();
    multiply(p + begin * SIDE, width, 16 * width, SIDE, packed + (d * all->key_blocks + begin) * BLOCK, (int)(end - begin));
    store_block(c, SIDE);
    for (int64_t i = 0; i < count; i++) {
      int64_t token = all->first + (row + i) / repeats, grad_token = head * repeats + (row + i) % repeats;
      number *to = out + (token * s->heads + grad_token) * s->size + d * SIDE;
      __m512 factor = _mm512_set1_ps(factors[i]), left = _mm512_loadu_ps(c + i * SIDE), right = _mm512_loadu_ps(c + i * SIDE + 16);
      round_two(_mm512_mul_ps(left, factor), _mm512_mul_ps(right, factor), to);
    }
  }
}

/* Returns which of the keys [at, at + 16) lie in [start, stop), as a bit mask. */
static inline __mmask16 visible(int at, int start, int stop) {
  const __m512i first = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i keys = _mm512_add_epi32(_mm512_set1_epi32(at), first);
  return _mm512_mask_cmplt_epi32_mask(_mm512_cmpge_epi32_mask(keys, _mm512_set1_epi32(start)), keys, _mm512_set1_epi32(stop));
}

/* Sixteen weights exp(scale * score - normalizer), 0 of keys that are not visible; both factors times log2(e). */
static inline __m512 weights_of(const float *scores, __mmask16 seen, __m512 scale, __m512 normalizer) {
  return _mm512_maskz_mov_ps(seen, powers_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores), scale, normalizer)));
}

/* scores -> weights over the largest in [start, stop), and zeros in the rest of the whole blocks [from, to).
 * Returns the logarithm of the sum of exponentials. */
static float softmax_row(const float *scores, float scale, int start, int stop, int from, int to, number *p, float *sum) {
  __m512 tops = _mm512_set1_ps(-INFINITY), totals = _mm512_setzero_ps();
  for (int j = from; j < to; j += 16)
    tops = _mm512_mask_max_ps(tops, visible(j, start, stop), tops, _mm512_loadu_ps(scores + j));
  float top = _mm512_reduce_max_ps(tops);
  __m512 slope = _mm512_set1_ps(scale * LOG2_E), over = _mm512_set1_ps(top * scale * LOG2_E);
  for (int j = from; j < to; j += SIDE) {
    __m512 left = weights_of(scores + j, visible(j, start, stop), slope, over);
    __m512 right = weights_of(scores + j + 16, visible(j + 16, start, stop), slope, over);
    round_two(left, right, p + j);
    totals = _mm512_add_ps(totals, _mm512_add_ps(left, right));
  }
  *sum = _mm512_reduce_add_ps(totals);
  return top * scale + logf(*sum);
}

static void forward_rows(const shape *s, workspace *r, int64_t head, int64_t row, const number *query, number *out,
                         float *normalizers) {
  const seen *all = &r->seen;
  int64_t repeats = s->heads / s->kv_heads, width = all->key_blocks * SIDE, count = take_rows(s, all, head, row, query, r->rows);
  for (int64_t b = 0; b < count; b += SIDE) {
    int64_t here = count - b < SIDE ? count - b : SIDE, start, stop, last;
    bounds_of(s, all, row + b, &start, &stop);
    int64_t begin = start / SIDE;
    bounds_of(s, all, row + b + here - 1, &start, &last);
    int64_t end = blocks(last);
    products_over_size(r->rows + b * s->size, all->key_columns, all, s->size, begin, end, r->scores, width);
    float factors[SIDE];
    for (int64_t i = 0; i < here; i++) {
      int64_t token = all->first + (row + b + i) / repeats, grad_token = head * repeats + (row + b + i) % repeats;
      float sum;
      bounds_of(s, all, row + b + i, &start, &stop);
      normalizers[token * s->heads + grad_token] = softmax_row(r->scores + i * width, s->scale, (int)start, (int)stop,
                                                             (int)begin * SIDE, (int)end * SIDE, r->p + i * width, &sum);
      factors[i] = 1.0f / sum;
    }
    products_over_keys(s, all, head, row + b, here, r->p, width, all->value_rows, begin, end, factors, out);
  }
}

/* query, out [T, heads, size]; key, value [T, kv_heads, size]; normalizers [T, heads]. Returns 0, or -1 without memory. */
int attend(const shape *s, const number *query, const number *key, const number *value, number *out, float *normalizers) {
  int64_t keys = longest_chain(s), repeats = s->heads / s->kv_heads;
  int failed = 0;
#pragma omp parallel
  {
    workspace r;
    char *memory = aligned_alloc(64, lay_out(&r, NULL, keys, s->size));
    if (memory) lay_out(&r, memory, keys, s->size), configure_all_tiles();
    else {
#pragma omp atomic write
      failed = -1;
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s->segments * s->kv_heads; task++) {
      int64_t head = task % s->kv_heads;
      if (!memory) continue;
      look(s, task / s->kv_heads, head, key, value, 0, &r);
      for (int64_t row = 0; row < r.seen.length * repeats; row += ROWS) forward_rows(s, &r, head, row, query, out, normalizers);
    }
    if (memory) _tile_release();
    free(memory);
  }
  return failed;
}

/* p and dS of 32 rows, from scores and dP: dS = p (dP - sum(dO O)) scale. Zeros outside of key blocks [begin, end). */
static void gradient_of_scores(const shape *s, workspace *r, int64_t row, int64_t b, int64_t here, int64_t begin, int64_t end,
                               const float *normalizers, const float *deltas) {
  int64_t width = r->seen.key_blocks * SIDE, from = begin * SIDE, to = end * SIDE;
  __m512 scale = _mm512_set1_ps(s->scale), slope = _mm512_set1_ps(s->scale * LOG2_E);
  for (int64_t i = 0; i < SIDE; i++) {
    number *out[2] = {r->p + (b + i) * width, r->grad_scores + (b + i) * width};
    const float *scores = r->scores + i * width, *grad_p = r->grad_p + i * width;
    int64_t start = 0, stop = 0, real = i < here ? i : 0;
    if (i < here) bounds_of(s, &r->seen, row + b + i, &start, &stop);
    __m512 normalizer = _mm512_set1_ps(normalizers[real] * LOG2_E), delta = _mm512_set1_ps(deltas[real]);
    for (int which = 0; which < 2; which++) {
      memset(out[which], 0, from * sizeof(number));
      memset(out[which] + to, 0, (width - to) * sizeof(number));
    }
    for (int64_t j = from; j < to; j += SIDE) {
      __m512 p[2], grad_scores[2];
      for (int half = 0; half < 2; half++) {
        int64_t at = j + 16 * half;
        p[half] = weights_of(scores + at, visible((int)at, (int)start, (int)stop), slope, normalizer);
        grad_scores[half] = _mm512_mul_ps(_mm512_mul_ps(p[half], _mm512_sub_ps(_mm512_loadu_ps(grad_p + at), delta)), scale);
      }
      round_two(p[0], p[1], out[0] + j);
      round_two(grad_scores[0], grad_scores[1], out[1] + j);
    }
  }
}

/* to [keys, size] += left [rows, width]^T right [rows, size], for the key blocks [begin, end). */
static void add_over_rows(workspace *r, const number *left, const number *right, int64_t rows, int64_t size, int64_t begin,
                          int64_t end, float *to) {
  int64_t steps = blocks(rows), width = r->seen.key_blocks * SIDE, size_blocks = size / SIDE;
  number *packed_right = r->packed, *packed_left = r->packed + ROWS * size;
  for (int64_t d = 0; d < size_blocks; d++)
    for (int64_t i = 0; i < steps; i++)
      pack_rows(right + i * SIDE * size + d * SIDE, size, SIDE, packed_right + (d * steps + i) * BLOCK);
  for (int64_t k = begin; k < end; k++) {
    for (int64_t i = 0; i < steps; i++) pack_transposed(left + i * SIDE * width + k * SIDE, width, SIDE, packed_left + i * BLOCK);
    for (int64_t d = 0; d < size_blocks; d++) {
      float *c = to + k * SIDE * size + d * SIDE;
      load_block(c, size);
      multiply(packed_left, SIDE, TILE, BLOCK, packed_right + d * steps * BLOCK, steps);
      store_block(c, size);
    }
  }
}

static void backward_rows(const shape *s, workspace *r, int64_t head, int64_t row, const number *query, const number *out,
                          const number *grad_out, const float *normalizers, number *grad_query) {
  const seen *all = &r->seen;
  int64_t repeats = s->heads / s->kv_heads, width = all->key_blocks * SIDE, lowest = all->key_blocks, highest = 0;
  int64_t count = take_rows(s, all, head, row, query, r->rows);
  take_rows(s, all, head, row, grad_out, r->grad_rows);
  const float ones[SIDE] = {[0 ... SIDE - 1] = 1.0f};
  for (int64_t b = 0; b < count; b += SIDE) {
    int64_t here = count - b < SIDE ? count - b : SIDE, start, stop, last;
    float deltas[SIDE], grad_row[SIDE];
    for (int64_t i = 0; i < here; i++) {
      int64_t token = all->first + (row + b + i) / repeats, at = token * s->heads + head * repeats + (row + b + i) % repeats;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < s->size; j++) sum += read_(grad_out[at * s->size + j]) * read_(out[at * s->size + j]);
      deltas[i] = sum, grad_row[i] = normalizers[at];
    }
    bounds_of(s, all, row + b, &start, &stop);
    int64_t begin = start / SIDE;
    bounds_of(s, all, row + b + here - 1, &start, &last);
    int64_t end = blocks(last);
    products_over_size(r->rows + b * s->size, all->key_columns, all, s->size, begin, end, r->scores, width);
    products_over_size(r->grad_rows + b * s->size, all->value_columns, all, s->size, begin, end, r->grad_p, width);
    gradient_of_scores(s, r, row, b, here, begin, end, grad_row, deltas);
    products_over_keys(s, all, head, row + b, here, r->grad_scores + b * width, width, all->key_rows, begin, end, ones, grad_query);
    if (begin < lowest) lowest = begin;
    if (end > highest) highest = end;
  }
  add_over_rows(r, r->grad_scores, r->rows, count, s->size, lowest, highest, r->grad_keys);
  add_over_rows(r, r->p, r->grad_rows, count, s->size, lowest, highest, r->grad_values);
}

/* Computes the gradients of one key head from a whole tree of segments, [first, stop): [tokens of the tree][size]. */
static void backward_tree(const shape *s, workspace *r, int64_t first, int64_t stop, int64_t head, const number *query,
                          const number *key, const number *value, const number *out, const number *grad_out,
                          const float *normalizers, number *grad_query, float *key_sums, float *value_sums) {
  int64_t begin = s->bounds[first], repeats = s->heads / s->kv_heads;
  for (int64_t n = first; n < stop; n++) {
    look(s, n, head, key, value, 1, r);
    int64_t numbers = r->seen.key_blocks * SIDE * s->size;
    memset(r->grad_keys, 0, numbers * sizeof(float)), memset(r->grad_values, 0, numbers * sizeof(float));
    for (int64_t row = 0; row < r->seen.length * repeats; row += ROWS)
      backward_rows(s, r, head, row, query, out, grad_out, normalizers, grad_query);
    for (int64_t i = 0; i < r->seen.keys; i++) {
      int64_t at = (r->seen.tokens[i] - begin) * s->size;
#pragma omp simd
      for (int64_t j = 0; j < s->size; j++) {
        key_sums[at + j] += r->grad_keys[i * s->size + j];
        value_sums[at + j] += r->grad_values[i * s->size + j];
      }
    }
  }
}

/* roots [trees + 1]: the first segment of each tree of segments. Gradients are laid out as what they are of. */
int attend_backward(const shape *s, const int64_t *roots, int64_t trees, const number *query, const number *key,
                    const number *value, const number *out, const number *grad_out, const float *normalizers,
                    number *grad_query, number *grad_key, number *grad_value) {
  int64_t keys = longest_chain(s);
  int failed = 0;
#pragma omp parallel
  {
    workspace r;
    char *memory = aligned_alloc(64, lay_out(&r, NULL, keys, s->size));
    if (memory) lay_out(&r, memory, keys, s->size), configure_all_tiles();
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < trees * s->kv_heads; task++) {
      int64_t first = roots[task / s->kv_heads], stop = roots[task / s->kv_heads + 1], head = task % s->kv_heads;
      int64_t begin = s->bounds[first], tokens = s->bounds[stop] - begin;
      float *sums = memory ? calloc(2 * tokens * s->size, sizeof(float)) : NULL;
      if (!sums) {
#pragma omp atomic write
        failed = -1;
        continue;
      }
      backward_tree(s, &r, first, stop, head, query, key, value, out, grad_out, normalizers, grad_query, sums,
                    sums + tokens * s->size);
      for (int64_t i = 0; i < tokens; i++) {
        int64_t at = ((begin + i) * s->kv_heads + head) * s->size;
#pragma omp simd
        for (int64_t j = 0; j < s->size; j++) {
          grad_key[at + j] = rounded(sums[i * s->size + j]);
          grad_value[at + j] = rounded(sums[(tokens + i) * s->size + j]);
        }
      }
      free(sums);
    }
    if (memory) _tile_release();
    free(memory);
  }
  return failed;
}
