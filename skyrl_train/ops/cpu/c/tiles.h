#pragma once
/* Matmuls of bfloat16 in AMX tiles.
 *
 * A tile product adds to C[16][16] (float) the sum over 32 numbers of A[16][32] * B[32][16]. A's rows lie as they are in
 * memory; B's lie in pairs, B[2r][c] beside B[2r + 1][c] in row r of its tile. So one operand of a product is packed first,
 * 32 x 32 numbers = 2 tiles at a time.
 */
#include "amx.h"

#define SIDE 32                  /* of a block: what is packed, and what is computed at once */
#define TILE (16 * SIDE)         /* numbers in a tile */
#define BLOCK (2 * TILE)

static inline void configure_all_tiles(void) {
  tile_shapes shapes = full_tiles();
  configure_tiles(&shapes);
}

/* 16 x 16 words of 32 bits. */
static inline void transpose(__m512i *r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) { /* row i of a lane holds column i + 4 lane */
    __m512i even = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), odd = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    __m512i even_ = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), odd_ = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(even, even_, 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(odd, odd_, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(even, even_, 0xdd);
    t[i + 12] = _mm512_shuffle_i32x4(odd, odd_, 0xdd);
  }
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

/* Row pairs of a 32 x 32 block, of which `rows` exist, number by number beside each other: left and right half. */
static inline void pair_rows(const number *from, int64_t stride, int rows, __m512i *left, __m512i *right) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16)), nothing = _mm512_setzero_si512();
  for (int r = 0; r < 16; r++) {
    __m512i a = 2 * r < rows ? _mm512_loadu_si512(from + 2 * r * stride) : nothing;
    __m512i b = 2 * r + 1 < rows ? _mm512_loadu_si512(from + (2 * r + 1) * stride) : nothing;
    left[r] = _mm512_permutex2var_epi16(a, first, b);
    right[r] = _mm512_permutex2var_epi16(a, second, b);
  }
}

/* Packs B of a matmul, which is from[k][n]. */
static inline void pack_rows(const number *from, int64_t stride, int rows, number *to) {
  __m512i left[16], right[16];
  pair_rows(from, stride, rows, left, right);
  for (int r = 0; r < 16; r++) _mm512_storeu_si512(to + r * SIDE, left[r]), _mm512_storeu_si512(to + TILE + r * SIDE, right[r]);
}

/* Packs B of a matmul, which is transposed: from[n][k]. */
static inline void pack_columns(const number *from, int64_t stride, int rows, number *to) {
  for (int half = 0; half < 2; half++) {
    __m512i r[16];
    for (int i = 0; i < 16; i++)
      r[i] = 16 * half + i < rows ? _mm512_loadu_si512(from + (16 * half + i) * stride) : _mm512_setzero_si512();
    transpose(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + half * TILE + i * SIDE, r[i]);
  }
}

/* Packs A of a matmul, which is transposed: from[k][m]. */
static inline void pack_transposed(const number *from, int64_t stride, int rows, number *to) {
  __m512i half[2][16];
  pair_rows(from, stride, rows, half[0], half[1]);
  for (int h = 0; h < 2; h++) {
    transpose(half[h]);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + h * TILE + i * SIDE, half[h][i]);
  }
}

/* Tiles 0 to 3, a 32 x 32 block of C, += A B over `steps` blocks. A's second tile lies `below` numbers behind its first. */
static inline void multiply(const number *a, int64_t stride, int64_t below, int64_t a_step, const number *b, int steps) {
  for (int s = 0; s < steps; s++, a += a_step, b += BLOCK) {
    _tile_loadd(4, a, 2 * stride);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + below, 2 * stride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

static inline void clear_block(void) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

static inline void load_block(const float *c, int64_t stride) {
  _tile_loadd(0, c, 4 * stride);
  _tile_loadd(1, c + 16, 4 * stride);
  _tile_loadd(2, c + 16 * stride, 4 * stride);
  _tile_loadd(3, c + 16 * stride + 16, 4 * stride);
}

static inline void store_block(float *c, int64_t stride) {
  _tile_stored(0, c, 4 * stride);
  _tile_stored(1, c + 16, 4 * stride);
  _tile_stored(2, c + 16 * stride, 4 * stride);
  _tile_stored(3, c + 16 * stride + 16, 4 * stride);
}

static inline int64_t blocks(int64_t rows) { return (rows + SIDE - 1) / SIDE; }
