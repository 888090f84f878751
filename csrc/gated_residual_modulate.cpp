// gated_residual_modulate: gated_residual and the modulate that follows it, the residual's row still in L1 for the second.
//
//     out = x + gate * y;  h = n(out) (1 + scale) + shift      x, y (L, B, D); gate, shift, scale (B, D)
//
// out is rounded before it is normalised, as if the two operators ran in turn.

#include "norm_rows.h"

namespace iomm {
namespace {

constexpr const char* NAME = "gated_residual_modulate";

struct Vectors {  // (B, D)
    const float *gate, *factor, *shift;
};

struct Sums {  // planes (B, D) of a piece
    float *gate, *shift, *scale;
};

struct Size {
    int64_t samples, n;
    bool rms;
    float eps;
};

template <typename T>
IOMM_CLONES void forward_rows(const Rows<T>& x, const Rows<T>& y, T* out, T* h, Vectors v, Size size, int64_t first,
                              int64_t last) {
    const int64_t n = size.n;
    std::vector<float> wide(n), wide_h(n);
    for (int64_t l = first; l < last; ++l) {
        for (int64_t b = 0; b < size.samples; ++b) {
            const int64_t row = l * size.samples + b;
            const T *x_row = x.at(l, b), *y_row = y.at(l, b);
            const float* gate = v.gate + b * n;
            T *out_row = out + row * n, *h_row = h + row * n;
            float* sum = staged(out_row, wide.data());
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) sum[i] = to_float(x_row[i]) + gate[i] * to_float(y_row[i]);
            narrow(out_row, sum, n);
            const float* stored = widen(out_row, wide.data(), n);
            row_forward(staged(h_row, wide_h.data()), stored, v.factor + b * n, v.shift + b * n, n,
                        row_statistics(stored, n, size.rms, size.eps), false);
            narrow(h_row, wide_h.data(), n);
        }
    }
}

template <typename T>
struct Gradients {  // what comes in, and what was kept
    Rows<T> dout, dh, out, y;
};

template <typename T>
IOMM_CLONES void backward_rows(const Gradients<T>& in, T* dx, T* dy, Sums sums, Vectors v, Size size, int64_t first,
                               int64_t last) {
    const int64_t n = size.n;
    std::vector<float> wide_dout(n), wide_dh(n), wide_out(n), wide_dx(n);
    for (int64_t l = first; l < last; ++l) {
        for (int64_t b = 0; b < size.samples; ++b) {
            const int64_t row = (l * size.samples + b) * n, at = b * n;
            const float* out = widen(in.out.at(l, b), wide_out.data(), n);
            float* dx_row = staged(dx + row, wide_dx.data());
            row_backward(dx_row, sums.shift + at, sums.scale + at, widen(in.dh.at(l, b), wide_dh.data(), n), out,
                         v.factor + at, widen(in.dout.at(l, b), wide_dout.data(), n), n, size.rms,
                         row_statistics(out, n, size.rms, size.eps), false);
            narrow(dx + row, dx_row, n);
            const T* y_row = in.y.at(l, b);
            const float* gate = v.gate + at;
            float* dgate = sums.gate + at;
            T* dy_row = dy + row;
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) {
                dgate[i] += dx_row[i] * to_float(y_row[i]);
                dy_row[i] = from_float<T>(dx_row[i] * gate[i]);
            }
        }
    }
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& gate, const Tensor& y, const std::optional<Tensor>& shift,
                                   const Tensor& scale, bool rms, double eps) {
    check_tokens(NAME, x);
    check_like(NAME, "y", y, x);
    const Size size{x.size(1), x.size(2), rms, static_cast<float>(eps)};
    const Tensor gates = vectors(NAME, "gate", gate, x), factors = plus_one(vectors(NAME, "scale", scale, x));
    const Tensor shifts = shift ? vectors(NAME, "shift", *shift, x) : torch::stable::new_zeros(factors, factors.sizes());
    Tensor out = torch::stable::new_empty(x, x.sizes()), h = torch::stable::new_empty(x, x.sizes());
    const Vectors v{data<float>(gates), data<float>(factors), data<float>(shifts)};
    dispatch(NAME, x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Rows<T> x_rows(x), y_rows(y);
        T *out_data = data<T>(out), *h_data = data<T>(h);
        for_tokens(x.size(0), size.samples * size.n, [&](int64_t first, int64_t last) {
            forward_rows<T>(x_rows, y_rows, out_data, h_data, v, size, first, last);
        });
    });
    return {out, h};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dout, const Tensor& dh, const Tensor& out, const Tensor& gate,
                                    const Tensor& y, const Tensor& scale, bool rms, double eps) {
    check_tokens(NAME, y);
    check_like(NAME, "out's gradient", dout, y);
    check_like(NAME, "h's gradient", dh, y);
    check_like(NAME, "out", out, y);
    const int64_t tokens = y.size(0);
    const Size size{y.size(1), y.size(2), rms, static_cast<float>(eps)};
    const int64_t plane = size.samples * size.n;
    const Tensor gates = vectors(NAME, "gate", gate, y), factors = plus_one(vectors(NAME, "scale", scale, y));
    Tensor both = torch::stable::new_empty(y, {2, tokens, size.samples, size.n});
    Tensor sums = planes_for(gates, tokens, 3);
    const Vectors v{data<float>(gates), data<float>(factors), nullptr};
    float* sum_data = data<float>(sums);
    dispatch(NAME, y, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Gradients<T> in{Rows<T>(dout), Rows<T>(dh), Rows<T>(out), Rows<T>(y)};
        T* dx = data<T>(both);
        for_pieces(tokens, plane, [&](int64_t piece, int64_t first, int64_t last) {
            float* at = sum_data + 3 * piece * plane;
            backward_rows<T>(in, dx, dx + tokens * plane, {at, at + plane, at + 2 * plane}, v, size, first, last);
        });
    });
    return {both, total(sums, scale)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iomm_csrc, m) {
    m.def("gated_residual_modulate(Tensor x_LBD, Tensor gate_BD, Tensor y_LBD, Tensor? shift_BD, Tensor scale_BD, bool rms,"
          " float eps) -> (Tensor, Tensor)");
    m.def("gated_residual_modulate_backward(Tensor dout_LBD, Tensor dh_LBD, Tensor out_LBD, Tensor gate_BD, Tensor y_LBD,"
          " Tensor scale_BD, bool rms, float eps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(iomm_csrc, CPU, m) {
    m.impl("gated_residual_modulate", TORCH_BOX(&forward));
    m.impl("gated_residual_modulate_backward", TORCH_BOX(&backward));
}

}  // namespace iomm
