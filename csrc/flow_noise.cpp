// flow_noise: x_t = (1 - t) x + t z and the velocity z - x, with z the standard normal of (seed, stream, sample index, element)
// made on the way and never stored (paper section 3).
//
//     x, x_t, velocity (B, ...); t (B,) fp32; index (B,) int64
//
// z is Box-Muller on neighbouring uniforms as in kernels/iomm_kernels/philox.py: the same uniforms bit for bit, the normals to
// a few units in the last place of PyTorch's, whose logarithm, sine and cosine are others.

#include <bit>

#include "philox.h"

namespace iomm {
namespace {

constexpr const char* NAME = "flow_noise";

IOMM_INLINE float uniform(uint32_t word) {
    return (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 0x1p-23f;
}

// ln x for normal x > 0 (Cephes' logf): x = 2^e m with m in [sqrt(1/2), sqrt(2)), then a polynomial in m - 1.
IOMM_INLINE float log_of(float x) {
    const int32_t bits = std::bit_cast<int32_t>(x) - 0x3f3504f3;
    const float e = static_cast<float>(bits >> 23);
    const float m = std::bit_cast<float>((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const float square = m * m;
    return (p * m * square - 2.12194440e-4f * e - 0.5f * square) + m + 0.693359375f * e;
}

// Sine and cosine of an angle in [0, 2 pi] (Cephes' sinf, cosf): quarter turns off in three parts, then polynomials.
IOMM_INLINE void sine_cosine(float angle, float& sine, float& cosine) {
    const int32_t quarter = static_cast<int32_t>(angle * 0.63661977f + 0.5f);
    const float q = static_cast<float>(quarter);
    const float r = ((angle - q * 1.5703125f) - q * 4.837512969970703125e-4f) - q * 7.549789948768648e-8f;
    const float z = r * r;
    const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
    const float c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
    const bool odd = quarter & 1;
    const float a = odd ? c : s, b = odd ? s : c;
    sine = quarter & 2 ? -a : a;
    cosine = (quarter + 1) & 2 ? -b : b;
}

// The next 4 TILE normals of a sample.
IOMM_INLINE void normals(float* z, Words& words, uint64_t seed, uint32_t stream, uint64_t sample, uint32_t first_block) {
    philox_tile(words, seed, stream, sample, first_block);
    for (int pair = 0; pair < 4; pair += 2) {
#pragma omp simd
        for (int64_t i = 0; i < TILE; ++i) {
            const float radius = std::sqrt(-2.0f * log_of(uniform(words.lane[pair][i])));
            float sine, cosine;
            sine_cosine(6.2831853071795864769f * uniform(words.lane[pair + 1][i]), sine, cosine);
            z[4 * i + pair] = radius * cosine;
            z[4 * i + pair + 1] = radius * sine;
        }
    }
}

struct Draw {
    uint64_t seed;
    uint32_t stream;
    uint64_t sample;
};

template <typename T>
IOMM_CLONES void piece(const T* x, T* x_t, T* velocity, int64_t first, int64_t last, float t, Draw draw) {
    Words words;
    alignas(64) float z[4 * TILE];
    for (int64_t element = first; element < last; element += 4 * TILE) {
        normals(z, words, draw.seed, draw.stream, draw.sample, static_cast<uint32_t>(element / 4));
        const int64_t count = std::min(4 * TILE, last - element);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
            const float clean = to_float(x[element + i]), noise = z[i];
            x_t[element + i] = from_float<T>((1 - t) * clean + t * noise);
            velocity[element + i] = from_float<T>(noise - clean);
        }
    }
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& t, const Tensor& index, int64_t seed, int64_t stream) {
    STD_TORCH_CHECK(x.dim() >= 1, NAME, ": x has no sample axis; give (B, ...).");
    const int64_t samples = x.size(0), n = samples == 0 ? 0 : x.numel() / samples;
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == samples, NAME, ": t is ", shape(t), ", but x of shape ", shape(x), " needs (",
                    samples, ").");
    const Tensor clean = torch::stable::contiguous(x), indices = sample_indices(NAME, index, samples);
    const Tensor times = torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
    Tensor x_t = torch::stable::new_empty(clean, clean.sizes()), velocity = torch::stable::new_empty(clean, clean.sizes());
    constexpr int64_t PIECE = 32 * 4 * TILE;
    const int64_t a_sample = (n + PIECE - 1) / PIECE;
    dispatch(NAME, x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T* in = data<T>(clean);
        T *x_t_data = data<T>(x_t), *velocity_data = data<T>(velocity);
        const float* t_data = data<float>(times);
        const int64_t* index_data = data<int64_t>(indices);
        torch::stable::parallel_for(0, samples * a_sample, grain(4 * PIECE), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t b = i / a_sample, first = i % a_sample * PIECE;
                piece<T>(in + b * n, x_t_data + b * n, velocity_data + b * n, first, std::min(first + PIECE, n), t_data[b],
                         {static_cast<uint64_t>(seed), static_cast<uint32_t>(stream), static_cast<uint64_t>(index_data[b])});
            }
        });
    });
    return {x_t, velocity};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iomm_csrc, m) {
    m.def("flow_noise(Tensor x, Tensor t_B, Tensor index_B, int seed, int stream) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(iomm_csrc, CPU, m) { m.impl("flow_noise", TORCH_BOX(&forward)); }

}  // namespace iomm
