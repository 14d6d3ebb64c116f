/* Sixteen numbers at a time: bfloat16 in memory, float in registers. AMX comes with these instructions. */
#pragma once
#include "amx.h"

#define LOG2_E 1.44269504f

static inline __m512i rounded_two(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

static inline void round_two(__m512 first, __m512 second, number *to) { _mm512_storeu_si512(to, rounded_two(first, second)); }

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

