/* The operations of an update between its matmuls, each in one pass over memory: norms, rotary positions, SwiGLU,
 * logprobs, AdamW; forward and backward. Compiled for one type of numbers, see numbers.h.
 */
#include "amx.h"
#include "norm_and_gate.h"

/* y = x / rms(x) * weight */
void norm(const number *x, const number *weight, float epsilon, number *y, int64_t rows, int width) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) normed(x + row * width, weight, epsilon, width, y + row * width);
}

/* grad_x = (weight grad_y - x mean(weight grad_y x) / rms^2) / rms, plus `more` if given; grad_weight [width] += grad_y x / rms.
 * Returns 0, or -1 without memory. */
int norm_backward(const number *grad_y, const number *x, const number *weight, float epsilon, const number *more,
                  number *grad_x, float *grad_weight, int64_t rows, int width) {
  int failed = 0;
#pragma omp parallel
  {
    float *total = calloc(width, sizeof(float)); /* of this thread's rows */
    if (!total) {
#pragma omp atomic write
      failed = -1;
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      if (!total) continue;
      const number *g = grad_y + row * width, *from = x + row * width;
      float scale = scale_of(from, epsilon, width), sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < width; i++) sum += read_(g[i]) * read_(weight[i]) * read_(from[i]);
      float along = sum / width * scale * scale * scale;
#pragma omp simd
      for (int i = 0; i < width; i++) {
        total[i] += read_(g[i]) * read_(from[i]) * scale;
        float out = read_(g[i]) * read_(weight[i]) * scale - read_(from[i]) * along;
        grad_x[row * width + i] = rounded(more ? out + read_(more[row * width + i]) : out);
      }
    }
#pragma omp for schedule(static, 1) ordered
    for (int thread = 0; thread < omp_get_num_threads(); thread++) { /* in the order of threads: always the same sum */
#pragma omp ordered
      for (int i = 0; total && i < width; i++) grad_weight[i] += total[i];
    }
    free(total);
  }
  return failed;
}

/* Su et al. (2021), eq. 34, with the halves of a head as pairs; sign -1 turns back: the gradient's way.
 * x, y [tokens, heads, size], perhaps the same; cosine, sine [tokens, size]. */
void rotate(const number *x, number *y, const number *cosine, const number *sine, float sign, int64_t tokens, int heads, int size) {
  int half = size / 2;
#pragma omp parallel for schedule(static)
  for (int64_t token = 0; token < tokens; token++) {
    const number *c = cosine + token * size, *s = sine + token * size;
    for (int head = 0; head < heads; head++) {
      int64_t at = (token * heads + head) * size;
#pragma omp simd
      for (int i = 0; i < half; i++) {
        float a = read_(x[at + i]), b = read_(x[at + half + i]);
        y[at + i] = rounded(a * read_(c[i]) - sign * b * read_(s[i]));
        y[at + half + i] = rounded(b * read_(c[i + half]) + sign * a * read_(s[i + half]));
      }
    }
  }
}

/* y = silu(gate) * up */
void swiglu(const number *gate, const number *up, number *y, int64_t count) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; i++) y[i] = gated(gate[i], up[i]);
}

/* The gradients of gate and up; y is computed again and overwrites its gradient. */
void swiglu_backward(const number *gate, const number *up, number *grad_y_then_y, number *grad_gate, number *grad_up,
                     int64_t count) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; i++) {
    float g = read_(gate[i]), u = read_(up[i]), grad_y = read_(grad_y_then_y[i]), s = sigmoid(g);
    grad_gate[i] = rounded(grad_y * u * s * (1.0f + g * (1.0f - s)));
    grad_up[i] = rounded(grad_y * g * s);
    grad_y_then_y[i] = rounded(g * s * u);
  }
}

/* For each row of logits [rows, vocab] / temperature: log of the sum of exponentials, log p(target), entropy. */
void logprobs(const number *logits, const int64_t *targets, float temperature, float *normalizers, float *logprobs,
              float *entropies, int64_t rows, int vocab) {
  float inverse = 1.0f / temperature;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const number *x = logits + row * vocab;
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int i = 0; i < vocab; i++) top = read_(x[i]) > top ? read_(x[i]) : top;
    double total = 0, weighed = 0;
    for (int start = 0; start < vocab; start += 1024) { /* short sums in float, then long ones in double */
      int stop = start + 1024 < vocab ? start + 1024 : vocab;
      float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
      for (int i = start; i < stop; i++) {
        float z = (read_(x[i]) - top) * inverse, e = exponential(z);
        sum += e, product += e * z;
      }
      total += sum, weighed += product;
    }
    float above = (float)log(total); /* of the normalizer, over the largest logit */
    normalizers[row] = top * inverse + above;
    logprobs[row] = (read_(x[targets[row]]) - top) * inverse - above;
    entropies[row] = above - (float)(weighed / total);
  }
}

#define AT_ONCE 256 /* numbers between two prefetches: the CPU's own prefetcher falls behind, so much is computed per number */
#define AHEAD 4096  /* numbers from the computation to its prefetch */

static inline void prefetch_for_writing(const number *x) {
  for (int i = 0; i < AT_ONCE; i += 64 / (int)sizeof(number)) __builtin_prefetch(x + i, 1);
}

/* Overwrites the logits with their gradient, from those of log p(target) and of the entropy H:
 * d log p(target) / dz = [target] - p,  dH / dz = -p (log p + H). */
void logprobs_backward(number *logits, const int64_t *targets, float temperature, const float *normalizers,
                       const float *entropies, const float *grad_logprobs, const float *grad_entropies, int64_t rows,
                       int vocab) {
  float inverse = 1.0f / temperature;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    number *x = logits + row * vocab;
    float normalizer = normalizers[row], entropy = entropies[row];
    float pull = grad_logprobs[row] * inverse, grad_entropy = grad_entropies ? grad_entropies[row] * inverse : 0.0f;
    int64_t target = targets[row];
    float z = read_(x[target]) * inverse - normalizer, p = exponential(z < 0 ? z : 0);
    for (int start = 0; start < vocab; start += AT_ONCE) {
      int stop = start + AT_ONCE < vocab ? start + AT_ONCE : vocab;
      prefetch_for_writing(x + start + AHEAD);
#pragma omp simd
      for (int i = start; i < stop; i++) {
        float log_p = read_(x[i]) * inverse - normalizer;
        x[i] = rounded(-exponential(log_p < 0 ? log_p : 0) * (pull + grad_entropy * (log_p + entropy)));
      }
    }
    x[target] = rounded(pull - p * (pull + grad_entropy * (z + entropy)));
  }
}

#define PARTS 64 /* whose sums are added in order: always the same number, however many threads there are */

double square_sum(const float *x, int64_t count) {
  double sums[PARTS], total = 0;
  int64_t size = (count + PARTS - 1) / PARTS;
#pragma omp parallel for schedule(static)
  for (int part = 0; part < PARTS; part++) {
    int64_t stop = (part + 1) * size < count ? (part + 1) * size : count;
    sums[part] = 0;
    for (int64_t start = part * size; start < stop; start += 4096) {
      int64_t end = start + 4096 < stop ? start + 4096 : stop;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = start; i < end; i++) sum += x[i] * x[i];
      sums[part] += sum;
    }
  }
  for (int part = 0; part < PARTS; part++) total += sums[part];
  return total;
}

/* Number i of a tensor, rounded up or down as Reference.round_masters in reference.py says. */
static inline number dithered(float x, uint32_t i) {
#ifdef BFLOAT16
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (number)((bits + ((i * 2654435761u + 0x80000000u) >> 16)) >> 16);
#else
  (void)i;
  return x;
#endif
}

/* x are numbers `before` and following of a tensor. */
void dither(const float *x, number *y, int64_t count, int64_t before) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; i++) y[i] = dithered(x[i], (uint32_t)(before + i));
}

/* AdamW, Loshchilov and Hutter (2019), algorithm 2, on clip * gradient; first and second are 1 / (1 - beta^step).
 * The new weights also go to `weight_rounded`, dithered, if given. */
void adamw(float *weight, float *mean, float *square, const float *gradient, number *weight_rounded, float clip,
           float rate, float beta1, float beta2, float epsilon, float decay, float first, float second, int64_t count) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < count; i++) {
    float g = gradient[i] * clip, m = beta1 * mean[i] + (1.0f - beta1) * g, v = beta2 * square[i] + (1.0f - beta2) * g * g;
    float w = weight[i] * (1.0f - rate * decay) - rate * first * m / (sqrtf(v * second) + epsilon);
    mean[i] = m, square[i] = v, weight[i] = w;
    if (weight_rounded) weight_rounded[i] = dithered(w, (uint32_t)i);
  }
}

#ifdef AMX
#include "attention.h"
#endif
