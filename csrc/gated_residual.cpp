// gated_residual: out = x + gate * y, and its backward dy = dout * gate, dgate = sum over tokens of dout * y (dx is dout).
//
//     x, y, out (L, B, D); gate (B, D)
//
// One pass each way; eager PyTorch writes gate * y and dout * y to memory in between.

#include "stream_rows.h"

namespace iomm {
namespace {

constexpr const char* NAME = "gated_residual";

template <typename T>
IOMM_CLONES void forward_rows(const Rows<T>& x, const Rows<T>& y, T* out, const float* gate, int64_t samples, int64_t n,
                              int64_t first, int64_t last, bool stream) {
    for (int64_t l = first; l < last; ++l) {
        for (int64_t b = 0; b < samples; ++b) {
            const T *x_row = x.at(l, b), *y_row = y.at(l, b);
            const float* gate_row = gate + b * n;
            T* out_row = out + (l * samples + b) * n;
            if constexpr (std::is_same_v<T, float>) {
                if (stream) {
                    stream_gated(out_row, x_row, gate_row, y_row, n);
                    continue;
                }
            }
#pragma omp simd
            for (int64_t i = 0; i < n; ++i)
                out_row[i] = from_float<T>(to_float(x_row[i]) + gate_row[i] * to_float(y_row[i]));
        }
    }
}

// dgate: this piece's plane.
template <typename T>
IOMM_CLONES void backward_rows(const Rows<T>& dout, const Rows<T>& y, T* dy, float* dgate, const float* gate,
                               int64_t samples, int64_t n, int64_t first, int64_t last, bool stream) {
    for (int64_t l = first; l < last; ++l) {
        for (int64_t b = 0; b < samples; ++b) {
            const T *dout_row = dout.at(l, b), *y_row = y.at(l, b);
            const float* gate_row = gate + b * n;
            float* sum = dgate + b * n;
            T* dy_row = dy + (l * samples + b) * n;
            if constexpr (std::is_same_v<T, float>) {
                if (stream) {
                    stream_gated_backward(dy_row, sum, dout_row, gate_row, y_row, n);
                    continue;
                }
            }
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) {
                const float d = to_float(dout_row[i]);
                sum[i] += d * to_float(y_row[i]);
                dy_row[i] = from_float<T>(d * gate_row[i]);
            }
        }
    }
}

Tensor forward(const Tensor& x, const Tensor& gate, const Tensor& y) {
    check_tokens(NAME, x);
    check_like(NAME, "y", y, x);
    const int64_t samples = x.size(1), n = x.size(2);
    const Tensor gates = vectors(NAME, "gate", gate, x);
    Tensor out = torch::stable::new_empty(x, x.sizes());
    dispatch(NAME, x, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Rows<T> x_rows(x), y_rows(y);
        T* out_data = data<T>(out);
        const auto* gate_data = data<float>(gates);
        const bool stream = streams(out_data, x.size(0) * samples, n);
        for_tokens(x.size(0), samples * n, [&](int64_t first, int64_t last) {
            forward_rows<T>(x_rows, y_rows, out_data, gate_data, samples, n, first, last, stream);
            if (stream) stream_end();
        });
    });
    return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dout, const Tensor& gate, const Tensor& y) {
    check_tokens(NAME, y);
    check_like(NAME, "the gradient", dout, y);
    const int64_t samples = y.size(1), n = y.size(2);
    const Tensor gates = vectors(NAME, "gate", gate, y);
    Tensor dy = torch::stable::new_empty(y, y.sizes());
    Tensor dgate = planes_for(gates, y.size(0), 1);
    dispatch(NAME, y, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Rows<T> dout_rows(dout), y_rows(y);
        T* dy_data = data<T>(dy);
        float* dgate_data = data<float>(dgate);
        const float* gate_data = data<float>(gates);
        const bool stream = streams(dy_data, y.size(0) * samples, n);
        for_pieces(y.size(0), samples * n, [&](int64_t piece, int64_t first, int64_t last) {
            backward_rows<T>(dout_rows, y_rows, dy_data, dgate_data + piece * samples * n, gate_data, samples, n, first, last,
                             stream);
            if (stream) stream_end();
        });
    });
    return {dy, torch::stable::squeeze(total(dgate, gate), 0)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iomm_csrc, m) {
    m.def("gated_residual(Tensor x_LBD, Tensor gate_BD, Tensor y_LBD) -> Tensor");
    m.def("gated_residual_backward(Tensor dout_LBD, Tensor gate_BD, Tensor y_LBD) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(iomm_csrc, CPU, m) {
    m.impl("gated_residual", TORCH_BOX(&forward));
    m.impl("gated_residual_backward", TORCH_BOX(&backward));
}

}  // namespace iomm
