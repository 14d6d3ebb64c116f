/* AMX: eight tiles of 16 rows of 64 bytes, in which a processor multiplies bfloat16 matrices (Intel, Architecture
 * Instruction Set Extensions, chapter 3). TILES is defined where the compiler knows them; `tiles_allowed` says whether
 * Linux lets this process use them.
 */
#pragma once
#include "numbers.h"

static int tiles_allowed = 0;

#if defined(BFLOAT16) && defined(__AMX_BF16__)
#define TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Ask Linux (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): 1 if this process may use them. */
int prepare_tiles(void) { return tiles_allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

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
#else
int prepare_tiles(void) { return 0; }
#endif
