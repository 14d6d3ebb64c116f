/* Intel's AMX: eight tiles of 16 rows of 64 bytes, whose product adds to 16 x 16 floats the sum over 32 bfloat16 numbers
 * (Architecture Instruction Set Extensions, chapter 3). AMX is defined where the compiler may use them.
 */
#pragma once
#include "numbers.h"

#if defined(BFLOAT16) && defined(__AMX_BF16__)
#define AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Linux keeps the tiles' registers for a process that has asked once (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
 * Returns 0 if it does. */
int request_tiles(void) { return (int)syscall(SYS_arch_prctl, 0x1023, 18); }

typedef struct { /* what _tile_loadconfig reads */
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} tile_shapes;

static inline tile_shapes full_tiles(void) {
  tile_shapes shapes = {.palette = 1};
  for (int tile = 0; tile < 8; tile++) shapes.bytes[tile] = 64, shapes.rows[tile] = 16;
  return shapes;
}

/* In this thread, until _tile_release. */
static inline void configure_tiles(const tile_shapes *shapes) {
  __asm__ volatile("" : : "r"(shapes) : "memory"); /* gcc 12 does not see that all of it is read */
  _tile_loadconfig(shapes);
}
#else
int request_tiles(void) { return -1; }
#endif
