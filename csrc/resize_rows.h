/* Bicubic resize with antialiasing of RGB rows as they come, as Pillow's: first the columns of a row, rounded to whole levels,
 * then the rows. Only as many rows are held as one output row is made of.
 *
 * Columns are resized for four rows at once: one vector is one pixel of the four rows, [r g b - | r g b - | ...]. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "clones.h"

enum { ROWS = 4, CHANNELS = 4, LANES = ROWS * CHANNELS, BLOCK = 4 * LANES };

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

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
    float *four, *ring;
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
        .memory = memory,
    };
    memset(resize->ring, 0, sizes[1]); /* what pads a row is computed with and never shown */
    fill_axis(resize->x, columns, out_width, mirrored);
    fill_axis(resize->y, rows, out_height, 0);
    return 1;
}

/* Nearest whole levels, 0 ... 255. */
static IOMM_INLINE whole levels(lanes value) {
    whole level = __builtin_convertvector(value + 0.5f, whole);
    level &= ~(level >> 31);
    const whole over = level > 255;
    return (level & ~over) | (over & 255);
}

/* The columns of four rows, [x][row][channel], into rows of the ring. */
static IOMM_INLINE void sum_columns(const Resize *resize, float *to, int taps) {
    const Axis axis = resize->x;
    const size_t stride = resize->stride;
    for (int x = 0; x < resize->out_width; x++) {
        const float *from = resize->four + (size_t)LANES * axis.first[x], *weight = axis.weight + (size_t)x * taps;
        lanes sum = {0};
        for (int k = 0; k < taps; k++) sum += *(const lanes *)(from + LANES * k) * weight[k];
        sum = __builtin_convertvector(levels(sum), lanes);
        for (int r = 0; r < ROWS; r++) memcpy(to + r * stride + CHANNELS * x, (float *)&sum + CHANNELS * r, 16);
    }
}

/* Four rows of `resize->columns` pixels of four bytes, the last of no meaning, into the ring from row `place` on. */
static IOMM_CLONES void resize_columns(const Resize *resize, uint8_t *const *rows, int place) {
    const whole shift = {0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24};
    const uint8_t *const row[ROWS] = {rows[0], rows[1], rows[2], rows[3]};
    float *restrict four = resize->four;
    for (int x = 0, columns = resize->columns; x < columns; x++) {
        int32_t p[ROWS];
        for (int r = 0; r < ROWS; r++) memcpy(p + r, row[r] + CHANNELS * x, sizeof *p);
        const whole stored = {p[0], p[0], p[0], p[0], p[1], p[1], p[1], p[1], p[2], p[2], p[2], p[2], p[3], p[3], p[3], p[3]};
        *(lanes *)(four + LANES * x) = __builtin_convertvector(stored >> shift & 255, lanes);
    }
    float *to = resize->ring + place * resize->stride;
    switch (resize->x.taps) { /* up to a shrinkage by 2, beyond which the JPEG itself is decoded smaller */
        case 1: return sum_columns(resize, to, 1);
        case 4: return sum_columns(resize, to, 4);
        case 5: return sum_columns(resize, to, 5);
        case 6: return sum_columns(resize, to, 6);
        case 7: return sum_columns(resize, to, 7);
        case 8: return sum_columns(resize, to, 8);
        default: return sum_columns(resize, to, resize->x.taps);
    }
}

/* Output row `y` into three planes. */
static IOMM_CLONES void resize_rows(const Resize *resize, int y, uint8_t *restrict red, uint8_t *restrict green,
                                    uint8_t *restrict blue) {
    const Axis axis = resize->y;
    const float *weight = axis.weight + (size_t)y * axis.taps;
    const int begin = axis.first[y] % resize->held, width = resize->out_width;
    uint8_t *restrict packed = resize->packed;
    for (int x = 0; x < CHANNELS * width; x += BLOCK) {
        lanes sum[BLOCK / LANES] = {{0}};
        for (int k = 0, place = begin; k < axis.taps; k++) {
            const lanes *row = (const lanes *)(resize->ring + place * resize->stride + x);
            for (int i = 0; i < BLOCK / LANES; i++) sum[i] += row[i] * weight[k];
            if (++place == resize->held) place = 0;
        }
        for (int i = 0; i < BLOCK / LANES; i++) {
            const bytes level = __builtin_convertvector(levels(sum[i]), bytes);
            memcpy(packed + x + LANES * i, &level, sizeof level);
        }
    }
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
