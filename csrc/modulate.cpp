// modulate: affine-free LayerNorm or RMSNorm, then scale and shift by the sample's vectors (adaLN), and its backward.
//
//     y = n(x) (1 + scale) + shift      x, y (L, B, D); shift, scale (B, D)
//
// A row is read from memory once and stays in L1 for its statistics, which the backward makes again from it; eager PyTorch makes
// three passes forward.

#include "norm_rows.h"

namespace iomm {
namespace {

constexpr const char* NAME = "modulate";

template <typename T>
IOMM_CLONES void forward_rows(const Rows<T>& x, T* y, const float* factor, const float* shift, int64_t samples, int64_t n,
                              int64_t first, int64_t last, bool rms, float eps, bool stream) {
    std::vector<float> wide(n), out(n);
    for (int64_t l = first; l < last; ++l) {
        for (int64_t b = 0; b < samples; ++b) {
            T* y_row = y + (l * samples + b) * n;
            const float* x_row = widen(x.at(l, b), wide.data(), n);
            row_forward(staged(y_row, out.data()), x_row, factor + b * n, shift + b * n, n,
                        row_statistics(x_row, n, rms, eps), stream);
            narrow(y_row, out.data(), n);
        }
    }
}

// dshift, dscale: this piece's planes.
template <typename T>
IOMM_CLONES void backward_rows(const Rows<T>& dy, const Rows<T>& x, T* dx, float* dshift, float* dscale, const float* factor,
                               int64_t samples, int64_t n, int64_t first, int64_t last, bool rms, float eps,
                               bool stream) {
    std::vector<float> wide_dy(n), wide_x(n), out(n);
    for (int64_t l = first; l < last; ++l) {
        for (int64_t b = 0; b < samples; ++b) {
            T* dx_row = dx + (l * samples + b) * n;
            const float* dy_row = widen(dy.at(l, b), wide_dy.data(), n);
            const float* x_row = widen(x.at(l, b), wide_x.data(), n);
            row_backward(staged(dx_row, out.data()), dshift + b * n, dscale + b * n, dy_row, x_row, factor + b * n, nullptr,
                            n, rms, row_statistics(x_row, n, rms, eps), stream);
            narrow(dx_row, out.data(), n);
        }
    }
}

Tensor forward(const Tensor& x, const std::optional<Tensor>& shift, const Tensor& scale, bool rms, double eps) {
    check_tokens(NAME, x);
    const int64_t samples = x.size(1), n = x.size(2);
    const Tensor factor = plus_one(vectors(NAME, "scale", scale, x));
    const Tensor offset = shift ? vectors(NAME, "shift", *shift, x) : torch::stable::new_zeros(factor, factor.sizes());
    Tensor y = torch::stable::new_empty(x, x.sizes());
    dispatch(NAME, x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Rows<T> rows(x);
        T* out = data<T>(y);
        const float *factors = data<float>(factor), *offsets = data<float>(offset);
        const bool stream = streams(out, x.size(0) * samples, n);
        for_tokens(x.size(0), samples * n, [&](int64_t first, int64_t last) {
            forward_rows<T>(rows, out, factors, offsets, samples, n, first, last, rms, static_cast<float>(eps),
                            stream);
            if (stream) stream_end();
        });
    });
    return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& scale, bool rms, double eps) {
    check_tokens(NAME, x);
    check_like(NAME, "the gradient", dy, x);
    const int64_t samples = x.size(1), n = x.size(2), plane = samples * n;
    const Tensor factor = plus_one(vectors(NAME, "scale", scale, x));
    Tensor dx = torch::stable::new_empty(x, x.sizes());
    Tensor sums = planes_for(factor, x.size(0), 2);
    dispatch(NAME, x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Rows<T> dy_rows(dy), x_rows(x);
        T* out = data<T>(dx);
        float* sum_data = data<float>(sums);
        const float* factors = data<float>(factor);
        const bool stream = streams(out, x.size(0) * samples, n);
        for_pieces(x.size(0), plane, [&](int64_t piece, int64_t first, int64_t last) {
            float* dshift = sum_data + 2 * piece * plane;
            backward_rows<T>(dy_rows, x_rows, out, dshift, dshift + plane, factors, samples, n, first, last, rms,
                             static_cast<float>(eps), stream);
            if (stream) stream_end();
        });
    });
    return {dx, total(sums, scale)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iomm_csrc, m) {
    m.def("modulate(Tensor x_LBD, Tensor? shift_BD, Tensor scale_BD, bool rms, float eps) -> Tensor");
    m.def("modulate_backward(Tensor dy_LBD, Tensor x_LBD, Tensor scale_BD, bool rms, float eps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(iomm_csrc, CPU, m) {
    m.impl("modulate", TORCH_BOX(&forward));
    m.impl("modulate_backward", TORCH_BOX(&backward));
}

}  // namespace iomm
