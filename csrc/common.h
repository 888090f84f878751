// What the CPU operators share: checks, types, rows, and code for three generations of processors.
//
// Storage types T are fp32, bf16 and fp16; arithmetic, statistics and sums are fp32. Results do not depend on the number of
// threads: work is cut into pieces of a fixed size, and what is summed over pieces is summed in their order.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "clones.h"

namespace iomm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows a thread takes at least, so that small tensors stay on one.
inline int64_t grain(int64_t numbers_per_piece) {
    return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, numbers_per_piece));
}

inline std::string shape(const Tensor& tensor) {
    std::string text = "(";
    for (int64_t size : tensor.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + ")";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
    return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

// Runs `body` with a null pointer of the tensor's storage type.
template <typename Body>
void dispatch(const char* name, const Tensor& tensor, const Body& body) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return body(static_cast<float*>(nullptr));
        case ScalarType::BFloat16: return body(static_cast<torch::headeronly::BFloat16*>(nullptr));
        case ScalarType::Half: return body(static_cast<torch::headeronly::Half*>(nullptr));
        default:
            STD_TORCH_CHECK(false, name, ": ", torch::headeronly::toString(tensor.scalar_type()),
                            " is not supported; give fp32, bf16 or fp16 tensors.");
    }
}

// A (L, B, D) tensor read row by row; copied if its channels are not next to each other.
template <typename T>
struct Rows {
    Tensor tensor;
    const T* data;
    int64_t stride_l, stride_b;

    explicit Rows(const Tensor& given)
        : tensor(given.size(2) <= 1 || given.stride(2) == 1 ? given : torch::stable::contiguous(given)),
          data(static_cast<const T*>(tensor.const_data_ptr())),
          stride_l(tensor.stride(0)),
          stride_b(tensor.stride(1)) {}

    const T* at(int64_t l, int64_t b) const { return data + l * stride_l + b * stride_b; }
};

template <typename T>
T* data(Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

inline void check_like(const char* name, const char* what, const Tensor& given, const Tensor& like) {
    STD_TORCH_CHECK(given.scalar_type() == like.scalar_type() && same_shape(given, like), name, ": ", what, " is ",
                    shape(given), " ", torch::headeronly::toString(given.scalar_type()), ", but the tokens are ",
                    shape(like), " ", torch::headeronly::toString(like.scalar_type()), "; give both in one shape and type.");
}

inline void check_tokens(const char* name, const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0, name, ": tokens have to be (L, B, D) with D > 0, got ", shape(x), ".");
}

// A sample's vectors (B, D) in fp32, contiguous: they are small, so they are converted once.
inline Tensor vectors(const char* name, const char* what, const Tensor& given, const Tensor& x) {
    STD_TORCH_CHECK(given.dim() == 2 && given.size(0) == x.size(1) && given.size(1) == x.size(2), name, ": ", what, " is ",
                    shape(given), ", but tokens of shape ", shape(x), " need (", x.size(1), ", ", x.size(2), ").");
    return torch::stable::contiguous(torch::stable::to(given, ScalarType::Float));
}

// 1 + vectors, new memory.
inline Tensor plus_one(const Tensor& vectors) {
    return torch::stable::subtract(vectors, torch::stable::full({}, -1.0, ScalarType::Float));
}

// Conversions that the compiler vectorises for bf16, rounding to nearest even as PyTorch does; fp16 takes torch's, one by one.
template <typename T>
IOMM_INLINE float to_float(T value) {
    if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) return std::bit_cast<float>(uint32_t{value.x} << 16);
    else return static_cast<float>(value);
}

template <typename T>
IOMM_INLINE T from_float(float value) {
    if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
        const uint32_t bits = std::bit_cast<uint32_t>(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        return T(static_cast<uint16_t>(nan ? 0x7fc0u : rounded), T::from_bits());
    } else {
        return static_cast<T>(value);
    }
}

// The row in fp32: itself, or converted into `scratch`.
template <typename T>
IOMM_INLINE const float* widen(const T* row, float* scratch, int64_t n) {
    if constexpr (std::is_same_v<T, float>) {
        return row;
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) scratch[i] = to_float(row[i]);
        return scratch;
    }
}

// Where a row is computed: the output itself, or `scratch`, which `narrow` then rounds into the output.
template <typename T>
IOMM_INLINE float* staged(T* row, float* scratch) {
    if constexpr (std::is_same_v<T, float>) return row;
    else return scratch;
}

template <typename T>
IOMM_INLINE void narrow(T* row, const float* scratch, int64_t n) {
    if constexpr (!std::is_same_v<T, float>) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) row[i] = from_float<T>(scratch[i]);
    }
}

// Sums over tokens: piece p adds up its tokens into (B, D) planes of its own; `total` adds the planes in order. Inside a piece
// rows are taken in the order of memory, which is worth more than keeping one sample's sums in L1.
inline int64_t tokens_a_piece(int64_t tokens) { return std::clamp<int64_t>(tokens / 8, 4, 32); }

inline int64_t pieces(int64_t tokens) { return (tokens + tokens_a_piece(tokens) - 1) / tokens_a_piece(tokens); }

static IOMM_CLONES void add_planes(float* total, const float* planes, int64_t count, int64_t plane, int64_t begin,
                                   int64_t end) {
    for (int64_t p = 0; p < count; ++p) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) total[i] += planes[p * plane + i];
    }
}

// Zeroed planes (pieces, count, B, D) for sums over `tokens` into `count` vectors like `like`.
inline Tensor planes_for(const Tensor& like, int64_t tokens, int64_t count) {
    return torch::stable::new_zeros(like, {pieces(tokens), count, like.size(0), like.size(1)});
}

// Sum of `planes` (pieces, count, B, D) over its pieces, (count, B, D) in the type of `like`.
inline Tensor total(const Tensor& planes, const Tensor& like) {
    Tensor sum = torch::stable::new_zeros(planes, {planes.size(1), planes.size(2), planes.size(3)});
    const int64_t plane = sum.numel(), count = planes.size(0);
    float* out = data<float>(sum);
    const float* in = data<float>(planes);
    torch::stable::parallel_for(0, plane, grain(count), [&](int64_t begin, int64_t end) {
        add_planes(out, in, count, plane, begin, end);
    });
    return torch::stable::to(sum, like.scalar_type());
}

// Runs body(piece, first token, last token + 1) for all pieces of tokens of `numbers` each.
template <typename Body>
void for_pieces(int64_t tokens, int64_t numbers, const Body& body) {
    const int64_t step = tokens_a_piece(tokens);
    torch::stable::parallel_for(0, pieces(tokens), grain(step * numbers), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i, i * step, std::min((i + 1) * step, tokens));
    });
}

// Runs body(first token, last token + 1) over all tokens of `numbers` each.
template <typename Body>
void for_tokens(int64_t tokens, int64_t numbers, const Body& body) {
    torch::stable::parallel_for(0, tokens, grain(numbers), body);
}

}  // namespace iomm
