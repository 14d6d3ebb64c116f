/* What a decoding step does between its matrix products: norms, rotary positions, attention over the cache, SwiGLU; and
 * behind the last one: drawing a token.
 *
 * Compiled for one type and one head shape: -DHEAD_DIM, -DHEADS, -DKV_HEADS, and -DBFLOAT16 or nothing for float.
 * Numbers are read as float, computed as float and rounded once, when they are written.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define QUERIES (HEADS / KV_HEADS) /* that share one key head */
#define BLOCK 64                   /* tokens between two rescalings of the running softmax */

#ifdef BFLOAT16
typedef uint16_t number;
static inline float read_(number x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
static inline number rounded(float x) { /* to the nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (number)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#else
typedef float number;
static inline float read_(number x) { return x; }
static inline number rounded(float x) { return x; }
#endif

/* e**x for x <= 0, to 2 units in the last place; 0 below -87. Branch free, so that the compiler makes vectors of it. */
static inline float exponential(float x) {
  float bounded = x < -87.0f ? -87.0f : x;
  float whole = rintf(bounded * 1.44269504f);
  float rest = bounded - whole * 0.693359375f + whole * 2.12194440e-4f; /* ln 2 in two parts */
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  int32_t power = ((int32_t)whole + 127) << 23;
  float scale;
  memcpy(&scale, &power, 4);
  return x < -87.0f ? 0.0f : sum * scale;
}

/* y = x / rms(x) * weight; Zhang and Sennrich (2019), eq. 4 */
static inline void normed(const number *x, const number *weight, float epsilon, int width, number *y) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < width; i++) sum += read_(x[i]) * read_(x[i]);
  float scale = 1.0f / sqrtf(sum / width + epsilon);
#pragma omp simd
  for (int i = 0; i < width; i++) y[i] = rounded(read_(x[i]) * scale * read_(weight[i]));
}

void rms_norm(const number *x, const number *weight, number *y, float epsilon, int rows, int width) {
#pragma omp parallel for if (rows > 1)
  for (int row = 0; row < rows; row++)
    normed(x + (int64_t)row * width, weight, epsilon, width, y + (int64_t)row * width);
}

/* y[row] = silu(gate) * up, where x[row] = gate, up; Shazeer (2020) */
void swiglu(const number *x, number *y, int rows, int width) {
#pragma omp parallel for if (rows > 1)
  for (int row = 0; row < rows; row++) {
    const number *gate = x + (int64_t)row * 2 * width, *up = gate + width;
    number *out = y + (int64_t)row * width;
#pragma omp simd
    for (int i = 0; i < width; i++) {
      float g = read_(gate[i]), e = exponential(-fabsf(g));
      float sigmoid = (g < 0 ? e : 1.0f) / (1.0f + e);
      out[i] = rounded(g * sigmoid * read_(up[i]));
    }
  }
}

/* In place, Su et al. (2021), with the halves of a head as pairs; the head is normed first where the model does that. */
static inline void rotate(number *head, const number *cosine, const number *sine, const number *norm, float epsilon) {
  float x[HEAD_DIM];
  if (norm) normed(head, norm, epsilon, HEAD_DIM, head);
#pragma omp simd
  for (int i = 0; i < HEAD_DIM; i++) x[i] = read_(head[i]);
#pragma omp simd
  for (int i = 0; i < HEAD_DIM / 2; i++) {
    head[i] = rounded(x[i] * read_(cosine[i]) - x[i + HEAD_DIM / 2] * read_(sine[i]));
  }
#pragma omp simd
  for (int i = HEAD_DIM / 2; i < HEAD_DIM; i++) {
    head[i] = rounded(x[i] * read_(cosine[i]) + x[i - HEAD_DIM / 2] * read_(sine[i]));
  }
}

/* heads [rows, HEADS + 2 KV_HEADS, HEAD_DIM]: queries and keys are rotated in place, keys and values go to the cache.
 * cosine, sine [rows, HEAD_DIM]; places [rows]: where a row's token begins in the cache's first head. */
void rotate_and_store(number *heads, const number *cosine, const number *sine, const number *query_norm,
                      const number *key_norm, float epsilon, number *keys, number *values, const int64_t *places,
                      int64_t head_stride, int rows) {
#pragma omp parallel for if (rows > 1)
  for (int row = 0; row < rows; row++) {
    number *head = heads + (int64_t)row * (HEADS + 2 * KV_HEADS) * HEAD_DIM;
    const number *c = cosine + row * HEAD_DIM, *s = sine + row * HEAD_DIM;
    for (int h = 0; h < HEADS; h++, head += HEAD_DIM) rotate(head, c, s, query_norm, epsilon);
    for (int h = 0; h < KV_HEADS; h++, head += HEAD_DIM) {
      rotate(head, c, s, key_norm, epsilon);
      memcpy(keys + places[row] + h * head_stride, head, sizeof(number) * HEAD_DIM);
    }
    for (int h = 0; h < KV_HEADS; h++, head += HEAD_DIM)
      memcpy(values + places[row] + h * head_stride, head, sizeof(number) * HEAD_DIM);
  }
}

/* One query head group over tokens [first, last] of one key head; the softmax runs along (Milakov and Gimelshein, 2018).
 * own, twin: where the head begins in the slot, and in the one to read tokens below `shared` from. */
static void attend_one(const number *query, const number *keys, const number *values, int64_t own, int64_t twin,
                       int shared, int first, int last, float scale, number *out) {
  float q[QUERIES][HEAD_DIM], sums[QUERIES][HEAD_DIM] = {{0}}, top[QUERIES], total[QUERIES];
  for (int r = 0; r < QUERIES; r++) {
    top[r] = -INFINITY, total[r] = 0;
    for (int i = 0; i < HEAD_DIM; i++) q[r][i] = read_(query[r * HEAD_DIM + i]) * scale;
  }
  for (int start = first, count; start <= last; start += count) {
    int end = start < shared && shared <= last ? shared : last + 1;
    count = end - start < BLOCK ? end - start : BLOCK;
    int64_t at = (start < shared ? twin : own) + (int64_t)start * HEAD_DIM;
    float scores[QUERIES][BLOCK];
    for (int t = 0; t < count; t++) {
      const number *key = keys + at + t * HEAD_DIM;
      float k[HEAD_DIM];
#pragma omp simd
      for (int i = 0; i < HEAD_DIM; i++) k[i] = read_(key[i]);
      for (int r = 0; r < QUERIES; r++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < HEAD_DIM; i++) sum += q[r][i] * k[i];
        scores[r][t] = sum;
      }
    }
    for (int r = 0; r < QUERIES; r++) {
      float best = top[r], sum = 0;
#pragma omp simd reduction(max : best)
      for (int t = 0; t < count; t++) best = scores[r][t] > best ? scores[r][t] : best;
#pragma omp simd reduction(+ : sum)
      for (int t = 0; t < count; t++) {
        scores[r][t] = exponential(scores[r][t] - best);
        sum += scores[r][t];
      }
      float shrink = top[r] == -INFINITY ? 0.0f : exponential(top[r] - best);
      total[r] = total[r] * shrink + sum, top[r] = best;
      for (int i = 0; i < HEAD_DIM; i++) sums[r][i] *= shrink;
    }
    for (int t = 0; t < count; t++) {
      const number *value = values + at + t * HEAD_DIM;
      float v[HEAD_DIM];
#pragma omp simd
      for (int i = 0; i < HEAD_DIM; i++) v[i] = read_(value[i]);
      for (int r = 0; r < QUERIES; r++)
#pragma omp simd
        for (int i = 0; i < HEAD_DIM; i++) sums[r][i] += scores[r][t] * v[i];
    }
  }
  for (int r = 0; r < QUERIES; r++)
    for (int i = 0; i < HEAD_DIM; i++) out[r * HEAD_DIM + i] = rounded(sums[r][i] / total[r]);
}

/* The newest token of `rows` sequences over their cached tokens. heads as rotate_and_store left them; slots, positions,
 * twins, shared [rows]: the first `shared` tokens are read from slot `twin`, which holds the same: so a group's prompt
 * comes from memory once. window: how many tokens a query sees, its own among them; out [rows, HEADS, HEAD_DIM]. */
void attend(const number *heads, const number *keys, const number *values, const int64_t *slots,
            const int64_t *positions, const int64_t *twins, const int64_t *shared, int64_t slot_stride,
            int64_t head_stride, float scale, int window, number *out, int rows) {
#pragma omp parallel for schedule(static)
  for (int item = 0; item < rows * KV_HEADS; item++) {
    int row = item / KV_HEADS, head = item % KV_HEADS, last = (int)positions[row];
    int64_t own = slots[row] * slot_stride + head * head_stride, twin = twins[row] * slot_stride + head * head_stride;
    const number *query = heads + ((int64_t)row * (HEADS + 2 * KV_HEADS) + head * QUERIES) * HEAD_DIM;
    int first = last + 1 > window ? last + 1 - window : 0;
    attend_one(query, keys, values, own, twin, (int)shared[row], first, last, scale,
               out + ((int64_t)row * HEADS + head * QUERIES) * HEAD_DIM);
  }
}

#define PART 256 /* tokens whose weights are summed before the search, which then looks at vocab / PART + PART numbers */

/* The first token whose cumulative weight exceeds uniform * the sum of all; -1 if next to nothing is left to draw from. */
static int64_t drawn(const float *weights, const double *sums, int vocab, double uniform) {
  int num_parts = (vocab + PART - 1) / PART, part = 0;
  double left = 0, before = 0;
  for (int i = 0; i < num_parts; i++) left += sums[i];
  if (!(left > 1e-20)) return -1;
  double target = uniform * left;
  while (part < num_parts - 1 && before + sums[part] <= target) before += sums[part++];
  while (sums[part] == 0) part--; /* rounding carried the search behind the last weight */
  int64_t last = -1;
  for (int i = part * PART; i < vocab && i < (part + 1) * PART; i++) {
    if (weights[i] == 0) continue;
    last = i;
    if ((before += weights[i]) > target) break;
  }
  return last;
}

static int64_t likeliest(const float *weights, int vocab) {
  float best = 0;
#pragma omp simd reduction(max : best)
  for (int i = 0; i < vocab; i++) best = weights[i] > best ? weights[i] : best;
  if (!(best > 1e-20f)) return -1;
  int64_t token = 0;
  while (weights[token] != best) token++;
  return token;
}

static double part_sum(const float *weights, int part, int vocab) {
  int end = (part + 1) * PART < vocab ? (part + 1) * PART : vocab;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = part * PART; i < end; i++) sum += weights[i];
  return sum;
}

/* logits [rows, vocab] -> tokens [rows] in proportion to softmax(logits / temperature) without the banned ones, and
 * their logprobs [rows] with them. Temperature 0: the likeliest, its logprob at temperature 1. Token -1: see `drawn`.
 * A logprob that is not finite: the logits were not. banned [num_banned, 2]: row and token, by ascending row.
 * Returns 0, or -1 without memory. */
int draw(const number *logits, const float *temperatures, const double *uniforms, const int64_t *banned, int num_banned,
         int64_t *tokens, double *logprobs, int rows, int vocab) {
  int num_parts = (vocab + PART - 1) / PART, failed = 0;
#pragma omp parallel
  {
    float *weights = malloc(sizeof(float) * vocab);
    double *sums = malloc(sizeof(double) * num_parts);
    if (!weights || !sums) {
#pragma omp atomic write
      failed = -1;
    }
#pragma omp for
    for (int row = 0; row < rows; row++) {
      if (!weights || !sums) continue;
      const number *x = logits + (int64_t)row * vocab;
      float top = -INFINITY, inverse = temperatures[row] > 0 ? 1.0f / temperatures[row] : 1.0f;
#pragma omp simd reduction(max : top)
      for (int i = 0; i < vocab; i++) top = read_(x[i]) > top ? read_(x[i]) : top;
#pragma omp simd
      for (int i = 0; i < vocab; i++) weights[i] = exponential((read_(x[i]) - top) * inverse);
      double total = 0;
      for (int part = 0; part < num_parts; part++) total += sums[part] = part_sum(weights, part, vocab);
      for (int i = 0; i < num_banned; i++)
        if (banned[2 * i] == row) {
          weights[banned[2 * i + 1]] = 0;
          sums[banned[2 * i + 1] / PART] = part_sum(weights, (int)(banned[2 * i + 1] / PART), vocab);
        }
      int64_t token = temperatures[row] > 0 ? drawn(weights, sums, vocab, uniforms[row]) : likeliest(weights, vocab);
      tokens[row] = token;
      logprobs[row] = (token < 0 ? 0.0 : ((double)read_(x[token]) - top) * inverse) - log(total);
    }
    free(weights);
    free(sums);
  }
  return failed;
}
