/* Bicubic resize with antialiasing of RGB rows as they come, as Pillow's: first the columns of a row, rounded to whole levels,
 * then the rows. Only as many rows are held as one output row is made of.
 *
 * Columns are resized for four rows at once: one vector is one pixel of the four rows, [r g b - | r g b - | ...]. What GCC does
 * badly with vectors wider than the processor's (comparing, converting) is left to plain loops over a row.
 *
 * Processors that fuse multiplication and addition round sums another way: one level of one number in ten thousand differs. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "clones.h"

enum { ROWS = 4, CHANNELS = 4, LANES = ROWS * CHANNELS, BLOCK = 4 * LANES };
enum { MANY_TAPS = 8 }; /* reached by a shrinkage by 2, beyond which the JPEG itself is decoded smaller */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float pixel __attribute__((vector_size(4 * CHANNELS)));
typedef int32_t pixel_levels __attribute__((vector_size(4 * CHANNELS)));

/* What each output pixel of an axis is made of: `taps` inputs from `first` on. */
typedef struct {
    int taps, *first;
    float *weight;
} Axis;

typedef struct {
    Axis x, y;
    int columns, out_width, out_height; /* `columns` of an input row */
    int upside_down;
    size_t stride;                      /* of a held row, in floats */
    int held, arrived, made;            /* rows: places for them, come so far, made so far */
    float *four, *ring, *sum; /* four rows as vectors; the rows held; a row being summed */
    uint8_t *packed;
    void *memory;
} Resize;

static int axis_taps(int in, int out) {
    if (in == out) return 1;
    const double scale = (double)in / out, taps = ceil(4 * (scale > 1 ? scale : 1));
    return taps < in ? (int)taps : in;
}

/* Pillow's weights: the cubic with a = -1/2, widened where the image shrinks, normalised. `mirrored`: of outputs in reverse. */
static void fill_axis(Axis axis, int in, int out, int mirrored) {
    const double scale = (double)in / out, wide = scale > 1 ? scale : 1;
    const float narrow = (float)(1 / wide);
    for (int i = 0; i < out; i++) {
        const double center = (i + 0.5) * scale;
        int first = in == out ? i : (int)floor(center - 2 * wide + 0.5);
        if (first < 0) first = 0;
        if (first > in - axis.taps) first = in - axis.taps;
        const int place = mirrored ? out - 1 - i : i;
        axis.first[place] = first;
        const float begin = (float)(first + 0.5 - center);
        float *weight = axis.weight + (size_t)place * axis.taps, sum = 0;
        for (int k = 0; k < axis.taps; k++) {
            const float d = fabsf(begin + k) * narrow;
            const float near = (1.5f * d - 2.5f) * d * d + 1, far = ((-0.5f * d + 2.5f) * d - 4) * d + 2;
            weight[k] = d < 1 ? near : d < 2 ? far : 0;
            sum += weight[k];
        }
        for (int k = 0; k < axis.taps; k++) weight[k] /= sum;
    }
}

static size_t whole_blocks(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* 0 where there is no memory. `resize->memory` is the caller's to free. `mirrored`: left and right exchanged; `upside_down`: top
 * and bottom. */
static int start_resize(Resize *resize, int columns, int rows, int out_width, int out_height, int mirrored, int upside_down) {
    const int x_taps = axis_taps(columns, out_width), y_taps = axis_taps(rows, out_height);
    const int held = (y_taps + ROWS - 1 + ROWS - 1) / ROWS * ROWS;
    const size_t stride = ((size_t)CHANNELS * out_width + BLOCK - 1) / BLOCK * BLOCK + BLOCK;
    const size_t sizes[] = {
        whole_blocks((size_t)columns * LANES * sizeof(float)),
        whole_blocks(held * stride * sizeof(float)),
        whole_blocks((size_t)out_width * x_taps * sizeof(float)),
        whole_blocks((size_t)out_height * y_taps * sizeof(float)),
        whole_blocks(out_width * sizeof(int)),
        whole_blocks(out_height * sizeof(int)),
        whole_blocks(stride),
        whole_blocks(stride * sizeof(float)),
    };
    size_t total = 64;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) total += sizes[i];
    uint8_t *memory = malloc(total);
    if (!memory) return 0;
    void *part[sizeof sizes / sizeof *sizes];
    uint8_t *at = memory + 64 - (uintptr_t)memory % 64;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; at += sizes[i++]) part[i] = at;
    *resize = (Resize){
        .x = {x_taps, part[4], part[2]},
        .y = {y_taps, part[5], part[3]},
        .columns = columns,
        .out_width = out_width,
        .out_height = out_height,
        .upside_down = upside_down,
        .stride = stride,
        .held = held,
        .four = part[0],
        .ring = part[1],
        .packed = part[6],
        .sum = part[7],
        .memory = memory,
    };
    fill_axis(resize->x, columns, out_width, mirrored);
    fill_axis(resize->y, rows, out_height, 0);
    return 1;
}

/* Nearest whole level, 0 ... 255. */
static IOMM_INLINE int level(float value) {
    value = value < 0 ? 0 : value > 255 ? 255 : value;
    return (int)(value + 0.5f);
}

/* The columns of four rows, [x][row][channel], into rows of the ring. */
static IOMM_INLINE void sum_columns(const Resize *resize, float *to, const int taps) {
    const Axis axis = resize->x;
    const size_t stride = resize->stride;
    const float *four = resize->four;
    for (int x = 0; x < resize->out_width; x++) {
        const float *from = four + (size_t)LANES * axis.first[x], *weight = axis.weight + (size_t)x * taps;
        lanes sum = {0};
        for (int k = 0; k < taps; k++) sum += *(const lanes *)(from + LANES * k) * weight[k];
        for (int r = 0; r < ROWS; r++) memcpy(to + r * stride + CHANNELS * x, (float *)&sum + CHANNELS * r, sizeof(pixel));
    }
}

/* Four rows of `resize->columns` pixels of four bytes, the last of no meaning, into the ring from row `place` on. */
static IOMM_CLONES void resize_columns(const Resize *resize, uint8_t *const *rows, int place) {
    const pixel_levels shift = {0, 8, 16, 24};
    const uint8_t *const row[ROWS] = {rows[0], rows[1], rows[2], rows[3]};
    float *restrict four = resize->four;
    for (int x = 0, columns = resize->columns; x < columns; x++)
        for (int r = 0; r < ROWS; r++) {
            int32_t stored;
            memcpy(&stored, row[r] + CHANNELS * x, sizeof stored);
            const pixel value = __builtin_convertvector((pixel_levels){stored, stored, stored, stored} >> shift & 255, pixel);
            memcpy(four + LANES * x + CHANNELS * r, &value, sizeof value);
        }
    float *to = resize->ring + place * resize->stride;
    switch (resize->x.taps) { /* with a constant number of taps the loops are unrolled */
        case 1: sum_columns(resize, to, 1); break;
        case 4: sum_columns(resize, to, 4); break;
        case 5: sum_columns(resize, to, 5); break;
        case 6: sum_columns(resize, to, 6); break;
        case 7: sum_columns(resize, to, 7); break;
        case MANY_TAPS: sum_columns(resize, to, MANY_TAPS); break;
        default: sum_columns(resize, to, resize->x.taps);
    }
    for (int r = 0; r < ROWS; r++, to += resize->stride)
        for (int i = 0, n = CHANNELS * resize->out_width; i < n; i++) to[i] = (float)level(to[i]);
}

/* `n` numbers of an output row out of rows of the ring from row `place` on. */
static IOMM_INLINE void sum_rows(const Resize *resize, const float *weight, int place, const int taps, int n) {
    uint8_t *restrict packed = resize->packed;
    const float *row[MANY_TAPS];
    for (int k = 0; k < taps; k++) {
        row[k] = resize->ring + place * resize->stride;
        if (++place == resize->held) place = 0;
    }
    for (int x = 0; x < n; x++) {
        float sum = 0;
        for (int k = 0; k < taps; k++) sum += row[k][x] * weight[k];
        packed[x] = (uint8_t)level(sum);
    }
}

/* The same for any number of taps. */
static IOMM_INLINE void sum_many_rows(const Resize *resize, const float *weight, int place, int n) {
    float *restrict sum = resize->sum;
    for (int x = 0; x < n; x++) sum[x] = 0;
    for (int k = 0; k < resize->y.taps; k++) {
        const float *row = resize->ring + place * resize->stride;
        for (int x = 0; x < n; x++) sum[x] += row[x] * weight[k];
        if (++place == resize->held) place = 0;
    }
    for (int x = 0; x < n; x++) resize->packed[x] = (uint8_t)level(sum[x]);
}

/* Output row `y` into three planes. */
static IOMM_CLONES void resize_rows(const Resize *resize, int y, uint8_t *restrict red, uint8_t *restrict green,
                                    uint8_t *restrict blue) {
    const Axis axis = resize->y;
    const float *weight = axis.weight + (size_t)y * axis.taps;
    const int place = axis.first[y] % resize->held, width = resize->out_width, n = CHANNELS * width;
    switch (axis.taps) {
        case 1: sum_rows(resize, weight, place, 1, n); break;
        case 4: sum_rows(resize, weight, place, 4, n); break;
        case 5: sum_rows(resize, weight, place, 5, n); break;
        case 6: sum_rows(resize, weight, place, 6, n); break;
        case 7: sum_rows(resize, weight, place, 7, n); break;
        case MANY_TAPS: sum_rows(resize, weight, place, MANY_TAPS, n); break;
        default: sum_many_rows(resize, weight, place, n);
    }
    const uint8_t *packed = resize->packed;
    for (int x = 0; x < width; x++) {
        red[x] = packed[CHANNELS * x];
        green[x] = packed[CHANNELS * x + 1];
        blue[x] = packed[CHANNELS * x + 2];
    }
}

/* Up to four further input rows; makes the output rows that are now complete. `rows` names four, the last ones repeated where
 * fewer are left. `out` is (3, H, W). */
static void take_rows(Resize *resize, uint8_t *const *rows, int count, uint8_t *out) {
    resize_columns(resize, rows, resize->arrived % resize->held);
    resize->arrived += count;
    const size_t plane = (size_t)resize->out_width * resize->out_height;
    while (resize->made < resize->out_height &&
           resize->y.first[resize->made] + resize->y.taps <= resize->arrived) {
        const int y = resize->made++;
        uint8_t *row = out + (size_t)(resize->upside_down ? resize->out_height - 1 - y : y) * resize->out_width;
        resize_rows(resize, y, row, row + plane, row + 2 * plane);
    }
}
