// velocity_mse: mean squared error of a sample and, for its gradient, v - target, in one pass (paper eq. 2).
//
//     loss_b = mean over (v - target)^2      v, target (B, ...), n numbers a sample
//     gradient = (2 / n) (v - target): the factor is the caller's, as it is too small for fp16
//
// Sums: blocks of BLOCK numbers, in fp64.

#include "common.h"

namespace iomm {
namespace {

constexpr const char* NAME = "velocity_mse";
constexpr int64_t BLOCK = 4096;

template <typename T>
IOMM_CLONES double block(const T* velocity, const T* target, T* differences, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
        const float difference = to_float(velocity[i]) - to_float(target[i]);
        sum += difference * difference;
        differences[i] = from_float<T>(difference);
    }
    return sum;
}

std::tuple<Tensor, Tensor> forward(const Tensor& velocity, const Tensor& target) {
    STD_TORCH_CHECK(velocity.dim() >= 1, NAME, ": the velocity has no sample axis; give (B, ...).");
    check_like(NAME, "the target", target, velocity);
    const Tensor v = torch::stable::contiguous(velocity), t = torch::stable::contiguous(target);
    const int64_t samples = v.size(0), n = samples == 0 ? 0 : v.numel() / samples, blocks = (n + BLOCK - 1) / BLOCK;
    Tensor loss = torch::stable::new_empty(v, {samples}, ScalarType::Float);
    Tensor differences = torch::stable::new_empty(v, v.sizes());
    dispatch(NAME, v, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T *v_data = data<T>(v), *t_data = data<T>(t);
        T* differences_data = data<T>(differences);
        float* loss_data = data<float>(loss);
        std::vector<double> sums(samples * blocks);
        torch::stable::parallel_for(0, samples * blocks, grain(BLOCK), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t inside = i % blocks * BLOCK, at = i / blocks * n + inside;
                sums[i] = block<T>(v_data + at, t_data + at, differences_data + at, std::min(BLOCK, n - inside));
            }
        });
        for (int64_t b = 0; b < samples; ++b) {
            double sum = 0;
            for (int64_t i = 0; i < blocks; ++i) sum += sums[b * blocks + i];
            loss_data[b] = static_cast<float>(sum / n);  // of no numbers: NaN, as PyTorch's mean
        }
    });
    return {loss, differences};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iomm_csrc, m) {
    m.def("velocity_mse(Tensor velocity, Tensor target) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(iomm_csrc, CPU, m) { m.impl("velocity_mse", TORCH_BOX(&forward)); }

}  // namespace iomm
