// Philox4x32-10 as in kernels/iomm_kernels/philox.py, bit for bit:
//
//     key = (seed low, seed high), counter = (element / 4, sample low, sample high, stream)
//
// (Salmon et al., SC 2011.) Words of TILE neighbouring blocks are made together, so that the compiler vectorises over them.
#pragma once

#include "common.h"

namespace iomm {

constexpr int64_t TILE = 64;  // blocks of four words

struct Words {
    alignas(64) uint32_t lane[4][TILE];
};

IOMM_INLINE void philox_tile(Words& words, uint64_t seed, uint32_t stream, uint64_t sample, uint32_t first_block) {
#pragma omp simd
    for (int64_t i = 0; i < TILE; ++i) {
        uint32_t c0 = first_block + static_cast<uint32_t>(i), c1 = static_cast<uint32_t>(sample);
        uint32_t c2 = static_cast<uint32_t>(sample >> 32), c3 = stream;
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
            c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
            c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
            c1 = static_cast<uint32_t>(p1);
            c3 = static_cast<uint32_t>(p0);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        words.lane[0][i] = c0;
        words.lane[1][i] = c1;
        words.lane[2][i] = c2;
        words.lane[3][i] = c3;
    }
}

// Contiguous int64 sample indices.
inline Tensor sample_indices(const char* name, const Tensor& index, int64_t samples) {
    STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == samples && index.scalar_type() == ScalarType::Long, name,
                    ": sample indices have to be int64 of shape (", samples, "), got ", shape(index), " ",
                    torch::headeronly::toString(index.scalar_type()), ".");
    return torch::stable::contiguous(index);
}

}  // namespace iomm
