/* The floor that `iomm bench data` holds loaders against: what libjpeg-turbo needs to decode each JPEG in full, handing out only
 * the columns of the centre square, and to shrink that to SIDE x SIDE by averaging areas. No metadata, no batch, one thread.
 *
 *   jpeg_floor FILE SIDE OFFSET:SIZE...      prints "images, CPU seconds, checksum of the pixels"
 *
 * Any error of the file or of libjpeg ends the program with status 1. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <jpeglib.h>

typedef float pixel __attribute__((vector_size(16), aligned(4))); /* red, green, blue, and the next pixel's red */

/* The input columns of each output column, `taps` of them from `first`, and how much of each lies in it. */
typedef struct {
    int taps, *first;
    float *weight;
} Columns;

static Columns share_columns(int square, int side) {
    const float scale = (float)square / side;
    Columns columns = {(int)scale + 2, malloc(side * sizeof(int)), NULL};
    if (columns.taps > square) columns.taps = square;
    columns.weight = malloc((size_t)side * columns.taps * sizeof(float));
    for (int x = 0; x < side; x++) {
        const float begin = x * scale, end = begin + scale;
        const int first = (int)begin < square - columns.taps ? (int)begin : square - columns.taps;
        columns.first[x] = first;
        for (int tap = 0; tap < columns.taps; tap++) {
            const float low = first + tap < begin ? begin : first + tap;
            const float high = first + tap + 1 > end ? end : first + tap + 1;
            columns.weight[x * columns.taps + tap] = high > low ? (high - low) / (scale * scale) : 0;
        }
    }
    return columns;
}

/* One output row from `sum_row`, the area-weighted sum of its input rows. */
static void average_columns(const float *sum_row, Columns columns, int side, uint8_t *out) {
    for (int x = 0; x < side; x++) {
        const float *from = sum_row + 3 * columns.first[x], *weight = columns.weight + x * columns.taps;
        pixel value = {0.5f, 0.5f, 0.5f, 0.5f};
        for (int tap = 0; tap < columns.taps; tap++) value += *(const pixel *)(from + 3 * tap) * weight[tap];
        for (int c = 0; c < 3; c++) out[3 * x + c] = (uint8_t)(int)value[c];
    }
}

static uint64_t shrink(const uint8_t *data, size_t size, int side, uint8_t *out) {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    jpeg.err = jpeg_std_error(&errors);
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, data, size);
    jpeg_read_header(&jpeg, TRUE);
    jpeg.out_color_space = JCS_RGB;
    jpeg_start_decompress(&jpeg);
    const int square = jpeg.output_width < jpeg.output_height ? jpeg.output_width : jpeg.output_height;
    const JDIMENSION left = (jpeg.output_width - square) / 2, top = (jpeg.output_height - square) / 2;
    JDIMENSION from = left, width = square;
    jpeg_crop_scanline(&jpeg, &from, &width);
    if (top) jpeg_skip_scanlines(&jpeg, top);

    const float scale = (float)square / side;
    Columns columns = share_columns(square, side);
    uint8_t *row = malloc(3 * (size_t)width);
    float *sum_row = calloc(3 * (size_t)square + 4, sizeof *sum_row);
    int y_out = 0;
    for (int y = 0; y < square; y++) {
        jpeg_read_scanlines(&jpeg, &row, 1);
        const uint8_t *inside = row + 3 * (left - from);
        for (float begin = y; begin < y + 1 && y_out < side;) {
            const float end = (y_out + 1) * scale, stop = end < y + 1 ? end : y + 1;
            const float share = stop - begin;
            for (int i = 0; i < 3 * square; i++) sum_row[i] += inside[i] * share;
            if (stop == end || (y == square - 1 && y_out == side - 1)) {
                average_columns(sum_row, columns, side, out + 3 * (size_t)side * y_out++);
                memset(sum_row, 0, 3 * (size_t)square * sizeof *sum_row);
            }
            begin = stop;
        }
    }
    uint64_t check = 0;
    for (int i = 0; i < 3 * side * side; i += 97) check += out[i];
    free(sum_row);
    free(columns.first);
    free(columns.weight);
    free(row);
    jpeg_abort_decompress(&jpeg);
    jpeg_destroy_decompress(&jpeg);
    return check;
}

int main(int count, char **argument) {
    FILE *file = count > 3 ? fopen(argument[1], "rb") : NULL;
    if (!file) return 1;
    const int side = atoi(argument[2]);
    uint8_t *out = malloc(3 * (size_t)side * side);
    uint64_t check = 0;
    clock_t ticks = 0;
    for (int i = 3; i < count; i++) {
        unsigned long long offset, size;
        if (sscanf(argument[i], "%llu:%llu", &offset, &size) != 2) return 1;
        uint8_t *data = malloc(size);
        if (fseeko(file, (off_t)offset, SEEK_SET) || fread(data, 1, size, file) != size) return 1;
        const clock_t start = clock();
        check += shrink(data, size, side, out);
        ticks += clock() - start;
        free(data);
    }
    printf("%d %.6f %llu\n", count - 3, (double)ticks / CLOCKS_PER_SEC, (unsigned long long)check);
    fclose(file);
    free(out);
    return 0;
}
