// ema_update: e <- lerp(e, w, 1 - decay) for many tensors in one launch per TENSORS tensors or BLOCKS blocks. Not yet run on a GPU.
//
//     e fp32, w fp32, bf16 or fp16 of the same shape, contiguous; in place
//
// PyTorch's _foreach_lerp_ wants one type; with bf16 weights it needs an fp32 copy of them first. Bytes: e read and written, w read
// once. Four numbers an access where the addresses allow, which PyTorch's allocations do. The formula is torch.lerp's.

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

__device__ float4 load_four(const float* w) { return *reinterpret_cast<const float4*>(w); }

__device__ float4 load_four(const __nv_bfloat16* w) {
    const uint2 raw = *reinterpret_cast<const uint2*>(w);
    const float2 low = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&raw.x));
    const float2 high = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&raw.y));
    return make_float4(low.x, low.y, high.x, high.y);
}

__device__ float4 load_four(const __half* w) {
    const uint2 raw = *reinterpret_cast<const uint2*>(w);
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
    return make_float4(low.x, low.y, high.x, high.y);
}

template <typename W>
__global__ __launch_bounds__(THREADS) void ema_kernel(const __grid_constant__ Batch batch, float step) {
    const int tensor = batch.block_tensor[blockIdx.x];
    const int64_t first = batch.block_part[blockIdx.x] * NUMBERS;
    const int count = static_cast<int>(min(NUMBERS, batch.numbers[tensor] - first));
    float* e = batch.average[tensor] + first;
    const W* w = static_cast<const W*>(batch.weight[tensor]) + first;
    const bool aligned = reinterpret_cast<uint64_t>(e) % 16 == 0 && reinterpret_cast<uint64_t>(w) % (4 * sizeof(W)) == 0;
    const int fours = aligned ? count / 4 : 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < fours; i += THREADS) {
        float4 mean = reinterpret_cast<const float4*>(e)[i];
        const float4 now = load_four(w + 4 * i);
        mean.x = lerp(mean.x, now.x, step);
        mean.y = lerp(mean.y, now.y, step);
        mean.z = lerp(mean.z, now.z, step);
        mean.w = lerp(mean.w, now.w, step);
        reinterpret_cast<float4*>(e)[i] = mean;
    }
    for (int i = 4 * fours + threadIdx.x; i < count; i += THREADS) e[i] = lerp(e[i], static_cast<float>(w[i]), step);
}

template <typename W>
void update(const std::vector<Tensor>& averages, const std::vector<Tensor>& weights, float step, cudaStream_t stream) {
    Batch batch;
    int tensors = 0, blocks = 0;
    const auto launch = [&] {
        if (blocks > 0) {
            ema_kernel<W><<<blocks, THREADS, 0, stream>>>(batch, step);
            STD_CUDA_KERNEL_LAUNCH_CHECK();
        }
        tensors = blocks = 0;
    };
    for (size_t i = 0; i < averages.size(); ++i) {
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
