/* Attention of single tokens over the cache. -DHEAD_DIM, -DHEADS, -DKV_HEADS. */
#pragma once
#include "numbers.h"

#define QUERIES (HEADS / KV_HEADS) /* that share one key head */
#define BLOCK 64                   /* tokens between two rescalings of the running softmax */

/* A head's row is read soon: a hint, harmless wherever it points. Without it half of the time goes in waiting. */
static inline void fetch(const number *row) {
  for (int i = 0; i < HEAD_DIM; i += 64 / (int)sizeof(number)) __builtin_prefetch(row + i);
}

/* One query head group over tokens [first, last] of one key head; the softmax runs along (Milakov and Gimelshein, 2018).
 * own, prefix: where the head begins in the slot, and in the one to read tokens below `shared` from. */
static void attend_one(const number *query, const number *keys, const number *values, int64_t own, int64_t prefix,
                       int64_t head_stride, int shared, int first, int last, float scale, number *out) {
  float q[QUERIES][HEAD_DIM], sums[QUERIES][HEAD_DIM] = {{0}}, top[QUERIES], total[QUERIES];
  for (int r = 0; r < QUERIES; r++) {
    top[r] = -INFINITY, total[r] = 0;
    for (int i = 0; i < HEAD_DIM; i++) q[r][i] = read_(query[r * HEAD_DIM + i]) * scale;
  }
  for (int start = first, count; start <= last; start += count) {
    int end = start < shared && shared <= last ? shared : last + 1;
    count = end - start < BLOCK ? end - start : BLOCK;
    int64_t at = (start < shared ? prefix : own) + (int64_t)start * HEAD_DIM;
    float scores[QUERIES][BLOCK];
    for (int t = 0; t < count; t++) {
      const number *key = keys + at + t * HEAD_DIM;
      fetch(values + at + t * HEAD_DIM);
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
      fetch(keys + at + head_stride + t * HEAD_DIM); /* of the next head, which most often comes next */
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

typedef struct { /* of each row: its token's slot and position; the slot that holds its first `shared` tokens as well */
  const int64_t *slots, *positions, *prefix_slots, *prefix_lengths;
} tokens;

/* A token of a slot over the cached tokens up to its own, row by row, by the team. heads [rows, HEADS + 2 KV_HEADS, D] as
 * rotate_rows left them. A group's prompt comes from memory once, for its rows read it in one slot. window: how many tokens
 * a query sees, its own among them; out [rows, HEADS, HEAD_DIM]. */
static void attend_rows(const number *heads, const number *keys, const number *values, const tokens *at,
                        int64_t slot_stride, int64_t head_stride, float scale, int window, number *out, int rows) {
#pragma omp for schedule(static)
  for (int item = 0; item < rows * KV_HEADS; item++) {
    int row = item / KV_HEADS, head = item % KV_HEADS, last = (int)at->positions[row];
    int64_t own = at->slots[row] * slot_stride + head * head_stride;
    int64_t prefix = at->prefix_slots[row] * slot_stride + head * head_stride;
    const number *query = heads + ((int64_t)row * (HEADS + 2 * KV_HEADS) + head * QUERIES) * HEAD_DIM;
    int first = last + 1 > window ? last + 1 - window : 0;
    attend_one(query, keys, values, own, prefix, head_stride, (int)at->prefix_lengths[row], first, last, scale,
               out + ((int64_t)row * HEADS + head * QUERIES) * HEAD_DIM);
  }
}
