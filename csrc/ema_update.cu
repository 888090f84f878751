// ema_update: e <- lerp(e, w, 1 - decay) for many tensors in one launch per TENSORS tensors or BLOCKS blocks. Not yet run on a GPU.
//
//     e fp32, w fp32, bf16 or fp16 of the same shape, contiguous; in place
//
// PyTorch's _foreach_lerp_ wants one type; with bf16 weights it needs an fp32 copy of them first. Bytes: e read and written, w read
// once. Tensors of a multiple of 8 numbers at addresses that are multiples of 16 bytes, which PyTorch's are, go 128 bits an access;
// the others number by number. The formula is torch.lerp's.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_common.h"

namespace iomm {
namespace {

constexpr int THREADS = 256, TENSORS = 48, BLOCKS = 320;
constexpr int64_t NUMBERS = 16384;  // of a block

// Travels as the kernel's argument: at most 4 KB.
struct Batch {
    float* average[TENSORS];
    const void* weight[TENSORS];
    int64_t numbers[TENSORS];
    int block_part[BLOCKS];        // which NUMBERS of its tensor
    uint8_t block_tensor[BLOCKS];  // which tensor
};
static_assert(sizeof(Batch) <= 4000);

__device__ float lerp(float e, float w, float step) {
    return step < 0.5f ? e + step * (w - e) : w - (w - e) * (1.0f - step);
}

// Eight weights in fp32.
__device__ void load_eight(const float* w, float (&out)[8]) {
    *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(w);
    *reinterpret_cast<float4*>(out + 4) = *reinterpret_cast<const float4*>(w + 4);
}

template <typename W>
__device__ void load_eight(const W* w, float (&out)[8]) {
    W raw[8];
    *reinterpret_cast<uint4*>(raw) = *reinterpret_cast<const uint4*>(w);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = static_cast<float>(raw[i]);
}

template <typename W, bool WIDE>
__global__ __launch_bounds__(THREADS) void ema_kernel(const __grid_constant__ Batch batch, float step) {
    const int tensor = batch.block_tensor[blockIdx.x];
    const int64_t first = batch.block_part[blockIdx.x] * NUMBERS;
    const int count = static_cast<int>(min(NUMBERS, batch.numbers[tensor] - first));
    float* e = batch.average[tensor] + first;
    const W* w = static_cast<const W*>(batch.weight[tensor]) + first;
    if constexpr (WIDE) {
#pragma unroll 2
        for (int i = 8 * threadIdx.x; i < count; i += 8 * THREADS) {
            float now[8];
            load_eight(w + i, now);
            float4 low = *reinterpret_cast<const float4*>(e + i), high = *reinterpret_cast<const float4*>(e + i + 4);
            low = make_float4(lerp(low.x, now[0], step), lerp(low.y, now[1], step), lerp(low.z, now[2], step),
                              lerp(low.w, now[3], step));
            high = make_float4(lerp(high.x, now[4], step), lerp(high.y, now[5], step), lerp(high.z, now[6], step),
                               lerp(high.w, now[7], step));
            *reinterpret_cast<float4*>(e + i) = low;
            *reinterpret_cast<float4*>(e + i + 4) = high;
        }
    } else {
        for (int i = threadIdx.x; i < count; i += THREADS) e[i] = lerp(e[i], static_cast<float>(w[i]), step);
    }
}

bool is_wide(const Tensor& average, const Tensor& weight) {
    return average.numel() % 8 == 0 && access_bytes(address(average), address(weight)) == 16;
}

// All pairs that are `WIDE`, or all that are not.
template <typename W, bool WIDE>
void update_some(const std::vector<Tensor>& averages, const std::vector<Tensor>& weights, float step, cudaStream_t stream) {
    Batch batch;
    int tensors = 0, blocks = 0;
    const auto launch = [&] {
        if (blocks > 0) {
            ema_kernel<W, WIDE><<<blocks, THREADS, 0, stream>>>(batch, step);
            STD_CUDA_KERNEL_LAUNCH_CHECK();
        }
        tensors = blocks = 0;
    };
    for (size_t i = 0; i < averages.size(); ++i) {
        if (is_wide(averages[i], weights[i]) != WIDE) continue;
        const int64_t numbers = averages[i].numel();
        const auto enter = [&] {
            batch.average[tensors] = static_cast<float*>(averages[i].mutable_data_ptr());
            batch.weight[tensors] = weights[i].const_data_ptr();
            batch.numbers[tensors] = numbers;
        };
        if (tensors == TENSORS) launch();
        enter();
        for (int64_t part = 0; part * NUMBERS < numbers; ++part) {
            if (blocks == BLOCKS) {
                launch();
                enter();  // the rest of this tensor, first of the next batch
            }
            batch.block_tensor[blocks] = static_cast<uint8_t>(tensors);
            batch.block_part[blocks++] = static_cast<int>(part);
        }
        ++tensors;
    }
    launch();
}

template <typename W>
void update(const std::vector<Tensor>& averages, const std::vector<Tensor>& weights, float step, cudaStream_t stream) {
    update_some<W, true>(averages, weights, step, stream);
    update_some<W, false>(averages, weights, step, stream);
}

void ema_update_(std::vector<Tensor> averages, std::vector<Tensor> weights, double decay) {
    STD_TORCH_CHECK(decay >= 0 && decay < 1, "ema_update: the decay ", decay, " is outside [0, 1).");
    STD_TORCH_CHECK(averages.size() == weights.size(), "ema_update: ", averages.size(), " averages and ", weights.size(),
                    " weights; give one of each.");
    if (averages.empty()) return;
    const ScalarType type = weights[0].scalar_type();
    const auto device = averages[0].get_device_index();
    for (size_t i = 0; i < averages.size(); ++i) {
        const Tensor &e = averages[i], &w = weights[i];
        STD_TORCH_CHECK(e.scalar_type() == ScalarType::Float && w.scalar_type() == type && e.numel() == w.numel() &&
                            e.is_contiguous() && w.is_contiguous() && e.is_cuda() && w.is_cuda() &&
                            e.get_device_index() == device && w.get_device_index() == device,
                        "ema_update: average ", i, " is ", shape(e), " and its weight ", shape(w),
                        "; give contiguous fp32 averages and weights of one type and of their sizes, all on one GPU.");
    }
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(averages[0]);
    const float step = static_cast<float>(1.0 - decay);
    switch (type) {
        case ScalarType::Float: return update<float>(averages, weights, step, stream);
        case ScalarType::BFloat16: return update<__nv_bfloat16>(averages, weights, step, stream);
        case ScalarType::Half: return update<__half>(averages, weights, step, stream);
        default:
            STD_TORCH_CHECK(false, "ema_update: weights of type ", torch::headeronly::toString(type),
                            " are not supported; give fp32, bf16 or fp16.");
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iomm_csrc, m) {
    m.def("ema_update_(Tensor(a!)[] averages, Tensor[] weights, float decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(iomm_csrc, CUDA, m) { m.impl("ema_update_", TORCH_BOX(&ema_update_)); }

}  // namespace iomm
