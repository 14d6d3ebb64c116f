/* The operations of a decoding step between its matmuls: norms, rotary positions, attention over the cache, SwiGLU, and
 * drawing a token. Where there are AMX tiles: the matmuls and the whole step as well.
 *
 * Compiled for one type and one head shape: -DHEAD_DIM, -DHEADS, -DKV_HEADS, and -DBFLOAT16 or nothing for float.
 * A function that says "by the team" shares its work among the threads of the region that it is called in.
 */
#include "decode_attention.h"
#include "draw.h"
#include "elementwise.h"
#include "decode_linear.h"

#define GROUP (HEADS + 2 * KV_HEADS) /* heads of a row: queries, keys, values */

void rms_norm(const number *x, const number *weight, number *y, float epsilon, int rows, int width) {
#pragma omp parallel if (rows > 1)
  norm_rows(x, weight, y, epsilon, rows, width);
}

void swiglu(const number *x, number *y, int rows, int width) {
#pragma omp parallel if (rows > 1)
  gate_rows(x, y, rows, width);
}

void rotate_and_store(number *heads, const number *cosine, const number *sine, const number *query_norm,
                      const number *key_norm, float epsilon, number *keys, number *values, const int64_t *places,
                      int64_t head_stride, int rows) {
#pragma omp parallel if (rows > 1)
  rotate_rows(heads, cosine, sine, query_norm, key_norm, epsilon, keys, values, places, head_stride, rows);
}

void attend(const number *heads, const number *keys, const number *values, const tokens *at, int64_t slot_stride,
            int64_t head_stride, float scale, int window, number *out, int rows) {
#pragma omp parallel
  attend_rows(heads, keys, values, at, slot_stride, head_stride, scale, window, out, rows);
}

void linear(const linear_layer *p, const number *x, const number *residual, number *out, int rows) {
#pragma omp parallel
  multiply_all(p, x, residual, out, rows);
}

typedef struct {
  const number *attention_norm, *query_norm, *key_norm, *mlp_norm;
  linear_layer query_key_value, output, gate_up, down;
  float attention_epsilon, head_epsilon, mlp_epsilon, scale;
  int window;
} layer;

typedef struct { /* of a KVCache: keys of the first layer; where its values, the next layer, slot and head lie from there */
  number *keys;
  int64_t values, layer, slot, head;
} cache;

/* All layers for rows that are one token each: row [rows, hidden] in place. cosine, sine [rows, HEAD_DIM];
 * places [rows]: where a row's token begins in the cache's first head; normed [rows, hidden], heads [rows, GROUP, D],
 * attended [rows, HEADS, D], gated [rows, intermediate]: buffers. */
void decode(const layer *layers, int num_layers, const cache *kv, const tokens *at, const int64_t *places,
            const number *cosine, const number *sine, number *row, number *normed, number *heads, number *attended,
            number *gated, int rows) {
#pragma omp parallel
  for (const layer *l = layers; l < layers + num_layers; l++) {
    int hidden = l->output.outputs;
    number *keys = kv->keys + (l - layers) * kv->layer, *values = keys + kv->values;
    norm_rows(row, l->attention_norm, normed, l->attention_epsilon, rows, hidden);
    multiply_all(&l->query_key_value, normed, NULL, heads, rows);
    rotate_rows(heads, cosine, sine, l->query_norm, l->key_norm, l->head_epsilon, keys, values, places, kv->head, rows);
    attend_rows(heads, keys, values, at, kv->slot, kv->head, l->scale, l->window, attended, rows);
    multiply_all(&l->output, attended, row, row, rows);
    norm_rows(row, l->mlp_norm, normed, l->mlp_epsilon, rows, hidden);
    multiply_all(&l->gate_up, normed, NULL, gated, rows);
    multiply_all(&l->down, gated, row, row, rows);
  }
}
