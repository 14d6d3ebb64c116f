/* Drawing a token from a row of logits. */
#pragma once
#include "numbers.h"

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
