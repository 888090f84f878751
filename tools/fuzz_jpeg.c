/* The driver of tools/fuzz_jpeg.py: cuts and files from standard input through the JPEG decoder, one line each to standard output,
 * "decoded" or "refused: REASON". Blocks are as large as what they hold, so that a byte too many is one that the sanitizers see. */
#include "../csrc/jpeg_view.c"

static int take(void *to, size_t size) { return fread(to, 1, size, stdin) == size; }

int main(void) {
    Cut cut;
    uint32_t size;
    while (take(&cut, sizeof cut)) {
        if (!take(&size, sizeof size)) return 2;
        uint8_t *data = malloc(size), *out = malloc((size_t)3 * cut.out_height * cut.out_width);
        if (!take(data, size)) return 2;
        char reason[JMSG_LENGTH_MAX];
        const int failed = iomm_jpeg_view(data, size, &cut, out, reason);
        if (printf("%s%s\n", failed ? "refused: " : "decoded", failed ? reason : "") < 0) return 2;
        free(data);
        free(out);
    }
    return 0;
}
