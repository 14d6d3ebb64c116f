/* The gradient of a linear layer's weight, summed in float where it is kept. */
#include "tiles.h"

#define ROWS_AT_ONCE 2048    /* so often the sums are read and written */
#define LEFT_AT_ONCE 8192    /* packed blocks of of_y */
#define RIGHT_AT_ONCE 512    /* packed blocks of x: 1 MiB, which a core keeps close */

/* Numbers of `room` that weight_gradient wants. */
int64_t room_for(int64_t rows, int64_t width, int64_t depth) {
  int64_t steps = blocks(rows < ROWS_AT_ONCE ? rows : ROWS_AT_ONCE), panels = width / SIDE;
  int64_t at_once = LEFT_AT_ONCE / steps < panels ? LEFT_AT_ONCE / steps : panels;
  return (at_once + depth / SIDE) * steps * BLOCK;
}

/* gradient [width, depth] (+)= of_y [rows, width]^T x [rows, depth]; width and depth are multiples of 32.
 * is_new: the gradient's numbers mean nothing yet. */
void weight_gradient(const number *of_y, const number *x, float *gradient, int is_new, int64_t rows, int64_t width,
                     int64_t depth, number *room) {
  int64_t panels = width / SIDE, columns = depth / SIDE;
  for (int64_t first = 0; first < rows; first += ROWS_AT_ONCE) {
    int64_t here = rows - first < ROWS_AT_ONCE ? rows - first : ROWS_AT_ONCE, steps = blocks(here);
    int64_t at_once = LEFT_AT_ONCE / steps, span = RIGHT_AT_ONCE / steps;
    number *right = room, *left = room + columns * steps * BLOCK;
    for (int64_t group = 0; group < panels; group += at_once) {
      int64_t count = panels - group < at_once ? panels - group : at_once, spans = (columns + span - 1) / span;
#pragma omp parallel
      {
        take_all_tiles();
#pragma omp for
        for (int64_t s = 0; s < steps; s++) {
          int64_t row = first + s * SIDE, exist = here - s * SIDE;
          for (int64_t i = 0; i < count; i++)
            pack_transposed(of_y + row * width + (group + i) * SIDE, width, exist, left + (i * steps + s) * BLOCK);
          for (int64_t column = 0; !group && column < columns; column++)
            pack_rows(x + row * depth + column * SIDE, depth, exist, right + (column * steps + s) * BLOCK);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < spans * count; task++) {
          int64_t i = task % count, begin = task / count * span, end = begin + span < columns ? begin + span : columns;
          for (int64_t column = begin; column < end; column++) {
            float *c = gradient + (group + i) * SIDE * depth + column * SIDE;
            if (is_new && !first) clear_block();
            else load_block(c, depth);
            multiply(left + i * steps * BLOCK, SIDE, TILE, BLOCK, right + column * steps * BLOCK, steps);
            store_block(c, depth);
          }
        }
        _tile_release();
      }
    }
  }
}
