// Rows of modulate, which gated_modulate shares: y = n(x) (1 + scale) + shift, n a LayerNorm or RMSNorm without weights.
// D channels; everything in fp32.
#pragma once

#include "stream_rows.h"

namespace iomm {

struct Statistics {
    float mean, rstd;  // mean is 0 for RMSNorm
};

// Two passes over a row, which lies in L1 for the second.
IOMM_INLINE Statistics row_statistics(const float* x, int64_t n, bool rms, float eps) {
    float sum = 0, squares = 0;
    if (!rms) {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) sum += x[i];
    }
    const float centre = sum / n;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; ++i) squares += (x[i] - centre) * (x[i] - centre);
    return {centre, 1 / std::sqrt(squares / n + eps)};
}

IOMM_INLINE void row_forward(float* y, const float* x, const float* factor, const float* shift, int64_t n, Statistics of,
                             bool stream) {
    if (stream) return stream_modulated(y, x, factor, shift, n, of.mean, of.rstd);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - of.mean) * of.rstd * factor[i] + shift[i];
}

// Adds the row's part to dshift and dscale, then dx = rstd (g - [mean(g)] - n(x) mean(g n(x))) with g = dy factor, plus
// `plus` where it is given; then it is not streamed.
IOMM_INLINE void row_backward(float* dx, float* dshift, float* dscale, const float* dy, const float* x, const float* factor,
                              const float* plus, int64_t n, bool rms, Statistics of, bool stream) {
    float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t i = 0; i < n; ++i) {
        const float normal = (x[i] - of.mean) * of.rstd, g = dy[i] * factor[i];
        sum += g;
        product += g * normal;
        dshift[i] += dy[i];
        dscale[i] += dy[i] * normal;
    }
    const float first = rms ? 0 : sum / n, second = product / n;
    if (stream) return stream_input_gradient(dx, dy, x, factor, n, of.mean, of.rstd, first, second);
    if (plus == nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) dx[i] = of.rstd * (dy[i] * factor[i] - first - (x[i] - of.mean) * of.rstd * second);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
            dx[i] = plus[i] + of.rstd * (dy[i] * factor[i] - first - (x[i] - of.mean) * of.rstd * second);
    }
}

}  // namespace iomm
