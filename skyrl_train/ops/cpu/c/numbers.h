/* The type that the kernels of engine and learner read and write, and two functions on float.
 *
 * -DBFLOAT16 or nothing for float. Numbers are read as float, computed as float and rounded once, when they are written.
 */
#pragma once
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

static inline float sigmoid(float x) {
  float e = exponential(-fabsf(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}
