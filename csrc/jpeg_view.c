/* jpeg_view: a part of a JPEG, resized, from the file's bytes to planes, on the system's libjpeg-turbo.
 *
 *     rows of the part, decoded at 1/1, 1/2, 1/4 or 1/8 -> resize_rows.h -> uint8 (3, H, W)
 *
 * No more of the image is held than the rows that one output row is made of. Columns outside the part are entropy-decoded
 * only, and so are rows. All of the file is read: whatever libjpeg-turbo warns about (bytes missing, bytes too many, a broken
 * code) makes the file unusable, as it then fills in pixels of its own. Thread-safe; no state is kept between calls. */
#include <setjmp.h>
#include <stdio.h>

#include <jpeglib.h>

#include "resize_rows.h"

#define EXPORT __attribute__((visibility("default")))

enum { MAX_SCANS = 100 }; /* of a progressive file: each costs a pass over the image, whatever it holds */
enum { MARGIN = 2 };      /* columns decoded beside the part, which smooth upsampling of chroma looks at */

/* What is cut out: of the image decoded at 1/reduce, in pixels of that. Kept in step with iomm_kernels/jpeg.py. */
typedef struct {
    int32_t width, height, reduce; /* as the header says, before the reduction */
    int32_t left, top, columns, rows;
    int32_t out_width, out_height;
    int32_t mirrored, upside_down; /* 0 or 1: left and right, top and bottom exchanged */
} Cut;

typedef struct {
    struct jpeg_error_mgr base; /* libjpeg's pointer to its error manager is one to this */
    jmp_buf back;
    char *reason;
} Errors;

static void fail(j_common_ptr jpeg) {
    Errors *errors = (Errors *)jpeg->err;
    jpeg->err->format_message(jpeg, errors->reason);
    longjmp(errors->back, 1);
}

static void refuse(j_decompress_ptr jpeg, const char *reason) {
    Errors *errors = (Errors *)jpeg->err;
    snprintf(errors->reason, JMSG_LENGTH_MAX, "%s", reason);
    longjmp(errors->back, 1);
}

static void warn(j_common_ptr jpeg, int level) {
    if (level < 0) fail(jpeg);
}

static void count_scans(j_common_ptr jpeg) {
    if (((j_decompress_ptr)jpeg)->input_scan_number > MAX_SCANS) refuse((j_decompress_ptr)jpeg, "more than 100 scans");
}

static void begin(j_decompress_ptr jpeg, const uint8_t *data, size_t size, const Cut *cut) {
    jpeg_mem_src(jpeg, data, size);
    jpeg_read_header(jpeg, TRUE);
    if ((int64_t)jpeg->image_width != cut->width || (int64_t)jpeg->image_height != cut->height)
        refuse(jpeg, "its size is not the one that its header was read to say");
    if (jpeg->num_components != 1 && jpeg->num_components != 3) refuse(jpeg, "neither gray nor of three components");
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg->scale_num = 1;
    jpeg->scale_denom = (unsigned)cut->reduce;
    jpeg_start_decompress(jpeg);
    if (cut->left + cut->columns > (int64_t)jpeg->output_width || cut->top + cut->rows > (int64_t)jpeg->output_height)
        refuse(jpeg, "the part lies outside the image");
}

/* Columns from `*left` on for the part's own, and those before and behind it that libjpeg decodes with them. */
static JDIMENSION crop(j_decompress_ptr jpeg, const Cut *cut) {
    const JDIMENSION end = (JDIMENSION)(cut->left + cut->columns) + MARGIN;
    JDIMENSION from = cut->left > MARGIN ? (JDIMENSION)cut->left - MARGIN : 0;
    JDIMENSION width = (end < jpeg->output_width ? end : jpeg->output_width) - from;
    jpeg_crop_scanline(jpeg, &from, &width);
    return (JDIMENSION)cut->left - from;
}

static void decode(j_decompress_ptr jpeg, const Cut *cut, Resize *resize, uint8_t *rows_memory, uint8_t *out) {
    const size_t before = CHANNELS * (size_t)crop(jpeg, cut), stride = CHANNELS * (size_t)jpeg->output_width;
    if (cut->top) jpeg_skip_scanlines(jpeg, (JDIMENSION)cut->top);
    uint8_t *rows[ROWS], *parts[ROWS];
    for (int left = cut->rows; left;) {
        const int count = left < ROWS ? left : ROWS;
        for (int r = 0; r < ROWS; r++) {
            rows[r] = rows_memory + (size_t)(r < count ? r : count - 1) * stride;
            parts[r] = rows[r] + before;
        }
        for (int r = 0; r < count;) r += (int)jpeg_read_scanlines(jpeg, rows + r, (JDIMENSION)(count - r));
        take_rows(resize, parts, count, out);
        left -= count;
    }
    /* Below the part: skipping up to the very end would leave it unread. */
    const JDIMENSION left = jpeg->output_height - jpeg->output_scanline;
    if (left > 1) jpeg_skip_scanlines(jpeg, left - 1);
    if (left) jpeg_read_scanlines(jpeg, rows, 1);
    jpeg_finish_decompress(jpeg);
}

/* Returns 0, or 1 with a text of at most JMSG_LENGTH_MAX (200) bytes in `reason`.
 *
 * `out` is (3, cut->out_height, cut->out_width); what it holds after a failure is undefined. All numbers of `cut` are positive,
 * but left, top and the flags, which may be 0. */
EXPORT int iomm_jpeg_view(const uint8_t *data, size_t size, const Cut *cut, uint8_t *out, char *reason) {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_progress_mgr progress = {.progress_monitor = count_scans};
    Errors errors = {.reason = reason};
    Resize resize;
    const size_t width = ((size_t)cut->width + (size_t)cut->reduce - 1) / (size_t)cut->reduce;
    uint8_t *const rows = malloc(CHANNELS * width * ROWS);
    if (!rows || !start_resize(&resize, cut->columns, cut->rows, cut->out_width, cut->out_height, cut->mirrored,
                               cut->upside_down)) {
        free(rows);
        snprintf(reason, JMSG_LENGTH_MAX, "no memory to decode it in");
        return 1;
    }
    void *const memory = resize.memory; /* setjmp: what is read after a jump back is not changed before it */
    jpeg.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = fail;
    errors.base.emit_message = warn;
    const int failed = setjmp(errors.back);
    if (!failed) {
        jpeg_create_decompress(&jpeg);
        jpeg.progress = &progress;
        begin(&jpeg, data, size, cut);
        decode(&jpeg, cut, &resize, rows, out);
    }
    jpeg_destroy_decompress(&jpeg);
    free(memory);
    free(rows);
    return failed;
}
