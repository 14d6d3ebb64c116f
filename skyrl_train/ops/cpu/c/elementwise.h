/* Norms, gates and rotary positions, row by row. */
#pragma once
#include "norm_and_gate.h"

/* y [rows, width], by the team */
static void norm_rows(const number *x, const number *weight, number *y, float epsilon, int rows, int width) {
#pragma omp for
  for (int row = 0; row < rows; row++)
    normed(x + (int64_t)row * width, weight, epsilon, width, y + (int64_t)row * width);
}

/* x [rows, 2 width]: gate, up -> y [rows, width], by the team */
static void gate_rows(const number *x, number *y, int rows, int width) {
#pragma omp for
  for (int row = 0; row < rows; row++) {
    const number *gate = x + (int64_t)row * 2 * width, *up = gate + width;
    number *out = y + (int64_t)row * width;
#pragma omp simd
    for (int i = 0; i < width; i++) out[i] = gated(gate[i], up[i]);
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
 * cosine, sine [rows, HEAD_DIM]; places [rows]: where a row's token begins in the cache's first head. By the team. */
static void rotate_rows(number *heads, const number *cosine, const number *sine, const number *query_norm,
                        const number *key_norm, float epsilon, number *keys, number *values, const int64_t *places,
                      int64_t head_stride, int rows) {
#pragma omp for
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
