/* Sixteen numbers at a time: bfloat16 in memory, float in registers. AMX comes with these instructions. */
#pragma once
#include "amx.h"

#define LOG2_E 1.44269504f

static inline __m512 widened(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

static inline __m512 sixteen(const number *from) { return widened(_mm256_loadu_si256((const __m256i *)from)); }

static inline __m512i rounded_two(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

static inline void round_two(__m512 first, __m512 second, number *to) { _mm512_storeu_si512(to, rounded_two(first, second)); }

/* Past the caches, which would fetch first what lies there. `to` at a multiple of 64 bytes. */
static inline void round_two_away(__m512 first, __m512 second, number *to) {
  _mm512_stream_si512((__m512i *)to, rounded_two(first, second));
}

/* 2**t for t <= 126, to 2e-7 of it: by whole powers and a Taylor series around the nearest. A NaN stays. */
static inline __m512 powers_of_two(__m512 t) {
  __m512 rest = _mm512_reduce_ps(t, 0), whole = _mm512_sub_ps(t, rest), e = _mm512_set1_ps(1.33335581e-3f);
  e = _mm512_fmadd_ps(e, rest, _mm512_set1_ps(9.61812911e-3f));
  e = _mm512_fmadd_ps(e, rest, _mm512_set1_ps(5.55041087e-2f));
  e = _mm512_fmadd_ps(e, rest, _mm512_set1_ps(2.40226507e-1f));
  e = _mm512_fmadd_ps(e, rest, _mm512_set1_ps(6.93147181e-1f));
  e = _mm512_fmadd_ps(e, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(e, whole);
}

/* 1 / (1 + e**-x), to 3e-6 of it */
static inline __m512 sigmoids(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
  __m512 t = _mm512_min_ps(_mm512_set1_ps(126.0f), _mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E))); /* a NaN stays */
  __m512 sum = _mm512_add_ps(one, powers_of_two(t)), inverse = _mm512_rcp14_ps(sum);
  return _mm512_mul_ps(inverse, _mm512_fnmadd_ps(sum, inverse, two));
}
