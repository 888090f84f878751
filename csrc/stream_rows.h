// Rows of fp32 written past the caches, for outputs too large to be found there again: a store that goes to memory directly does
// not read the line first, which is a quarter of what these operators move. AVX-512 only; elsewhere rows are written as usual.
#pragma once

#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define IOMM_STREAM __attribute__((target("avx512f")))
#endif

namespace iomm {

constexpr int64_t STREAM_BYTES = 8 << 20;  // outputs from this size on

#ifdef IOMM_STREAM

// Whether rows of n numbers of this output are written past the caches.
template <typename T>
bool streams(const T* out, int64_t rows, int64_t n) {
    return std::is_same_v<T, float> && n % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0 &&
           rows * n * static_cast<int64_t>(sizeof(T)) >= STREAM_BYTES && __builtin_cpu_supports("avx512f");
}

// Makes the rows of this thread visible to the others; to be called once behind them.
inline void stream_end() { _mm_sfence(); }

// out = x + gate y
IOMM_STREAM inline void stream_gated(float* out, const float* x, const float* gate, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += 16)
        _mm512_stream_ps(out + i, _mm512_fmadd_ps(_mm512_loadu_ps(gate + i), _mm512_loadu_ps(y + i), _mm512_loadu_ps(x + i)));
}

// dy = dout gate, dgate += dout y
IOMM_STREAM inline void stream_gated_backward(float* dy, float* dgate, const float* dout, const float* gate, const float* y,
                                              int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 d = _mm512_loadu_ps(dout + i);
        _mm512_storeu_ps(dgate + i, _mm512_fmadd_ps(d, _mm512_loadu_ps(y + i), _mm512_loadu_ps(dgate + i)));
        _mm512_stream_ps(dy + i, _mm512_mul_ps(d, _mm512_loadu_ps(gate + i)));
    }
}

// y = (x - mean) rstd factor + shift
IOMM_STREAM inline void stream_modulated(float* y, const float* x, const float* factor, const float* shift, int64_t n,
                                         float mean, float rstd) {
    const __m512 centre = _mm512_set1_ps(mean), scale = _mm512_set1_ps(rstd);
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 normal = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), centre), scale);
        _mm512_stream_ps(y + i, _mm512_fmadd_ps(normal, _mm512_loadu_ps(factor + i), _mm512_loadu_ps(shift + i)));
    }
}

// dx = rstd (dy factor - first - n(x) second)
IOMM_STREAM inline void stream_input_gradient(float* dx, const float* dy, const float* x, const float* factor, int64_t n,
                                              float mean, float rstd, float first, float second) {
    const __m512 centre = _mm512_set1_ps(mean), scale = _mm512_set1_ps(rstd);
    const __m512 one = _mm512_set1_ps(first), two = _mm512_set1_ps(second);
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 normal = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), centre), scale);
        const __m512 g = _mm512_fmsub_ps(_mm512_loadu_ps(dy + i), _mm512_loadu_ps(factor + i), one);
        _mm512_stream_ps(dx + i, _mm512_mul_ps(scale, _mm512_fnmadd_ps(normal, two, g)));
    }
}

#else

template <typename T>
bool streams(const T*, int64_t, int64_t) {
    return false;
}
inline void stream_end() {}
inline void stream_gated(float*, const float*, const float*, const float*, int64_t) {}
inline void stream_gated_backward(float*, float*, const float*, const float*, const float*, int64_t) {}
inline void stream_modulated(float*, const float*, const float*, const float*, int64_t, float, float) {}
inline void stream_input_gradient(float*, const float*, const float*, const float*, int64_t, float, float, float, float) {}

#endif

}  // namespace iomm
