/* RMSNorm of a row and SwiGLU of a number, as engine and learner compute them. */
#pragma once
#include "numbers.h"

/* 1 / rms(x) */
static inline float scale_of(const number *x, float epsilon, int width) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < width; i++) sum += read_(x[i]) * read_(x[i]);
  return 1.0f / sqrtf(sum / width + epsilon);
}

/* y = x / rms(x) * weight, perhaps in place; Zhang and Sennrich (2019), eq. 4 */
static inline void normed(const number *x, const number *weight, float epsilon, int width, number *y) {
  float scale = scale_of(x, epsilon, width);
#pragma omp simd
  for (int i = 0; i < width; i++) y[i] = rounded(read_(x[i]) * scale * read_(weight[i]));
}

/* silu(gate) * up; Shazeer (2020), eq. 5 */
static inline number gated(number gate, number up) { return rounded(read_(gate) * sigmoid(read_(gate)) * read_(up)); }
