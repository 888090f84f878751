// What the CUDA operators share. Not yet run on a GPU.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA  // opens the stable ABI's CUDA functions
#endif

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace iomm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape(const Tensor& tensor) {
    std::string text = "(";
    for (int64_t size : tensor.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + ")";
}

// PyTorch's current stream of the tensor's device, which has to be the current device (`DeviceGuard`).
inline cudaStream_t current_stream(const Tensor& tensor) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

// The widest access, up to 16 bytes, that divides all these addresses and lengths in bytes.
template <typename... Values>
int64_t access_bytes(Values... values) {
    const uint64_t all = (uint64_t{16} | ... | static_cast<uint64_t>(values));
    return static_cast<int64_t>(all & (~all + 1));
}

inline uint64_t address(const Tensor& tensor) { return reinterpret_cast<uint64_t>(tensor.data_ptr()); }

}  // namespace iomm
