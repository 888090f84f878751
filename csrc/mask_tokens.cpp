// keep_tokens: which patch tokens a step keeps, a function of (seed, stream, sample index, token): word >> 9 >= threshold,
// which is iomm_kernels.philox's `uniform >= mask ratio` in integers. mask_tokens: drawing and zeroing in one pass; its own
// backward on the gradient.
//
//     index (B,) int64; hidden (B,) bool or none, True: all of the sample's tokens are masked; keep (B, N) bool; x, y (B, N, F)

#include <cstring>

#include "philox.h"

namespace iomm {
namespace {

constexpr int64_t DRAWN = 4 * TILE;  // tokens drawn at a time

struct Draw {
    uint64_t seed;
    uint32_t stream, threshold;
};

// keep of the tokens [first, first + count), first a multiple of DRAWN and count at most DRAWN.
IOMM_CLONES void draw(bool* keep, int64_t first, int64_t count, uint64_t sample, Draw of) {
    Words words;
    philox_tile(words, of.seed, of.stream, sample, static_cast<uint32_t>(first / 4));
    for (int64_t i = 0; i < count; ++i) keep[i] = words.lane[i % 4][i / 4] >> 9 >= of.threshold;
}

// Runs body(sample, first token, count, keep) for all tokens of all samples, at most DRAWN at a time.
template <typename Body>
void for_drawn(const char* name, const Tensor& index, const std::optional<Tensor>& hidden, int64_t samples, int64_t tokens,
               int64_t bytes_a_token, Draw of, const Body& body) {
    const Tensor indices = sample_indices(name, index, samples);
    STD_TORCH_CHECK(!hidden || (same_shape(*hidden, indices) && hidden->scalar_type() == ScalarType::Bool), name,
                    ": hidden has to be bool of shape (", samples, ").");
    const Tensor hides = hidden ? torch::stable::contiguous(*hidden) : indices;
    const int64_t* index_data = data<int64_t>(indices);
    const bool* hide_data = hidden ? data<bool>(hides) : nullptr;
    const int64_t parts = (tokens + DRAWN - 1) / DRAWN;
    torch::stable::parallel_for(0, samples * parts, grain(DRAWN * (8 + bytes_a_token / 4)), [&](int64_t begin, int64_t end) {
        bool keep[DRAWN];
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / parts, first = i % parts * DRAWN, count = std::min(DRAWN, tokens - first);
            if (hide_data != nullptr && hide_data[b]) std::fill(keep, keep + count, false);
            else draw(keep, first, count, static_cast<uint64_t>(index_data[b]), of);
            body(b, first, count, keep);
        }
    });
}

Draw checked(const char* name, int64_t seed, int64_t stream, int64_t threshold) {
    STD_TORCH_CHECK(threshold >= 0 && threshold <= UINT32_MAX, name, ": threshold ", threshold, " is outside [0, 2^32).");
    return {static_cast<uint64_t>(seed), static_cast<uint32_t>(stream), static_cast<uint32_t>(threshold)};
}

Tensor keep_tokens(const Tensor& index, const std::optional<Tensor>& hidden, int64_t tokens, int64_t seed, int64_t stream,
                   int64_t threshold) {
    STD_TORCH_CHECK(index.dim() == 1 && tokens >= 0, "keep_tokens: needs (B,) sample indices and a number of tokens, got ",
                    shape(index), " and ", tokens, ".");
    Tensor keep = torch::stable::new_empty(index, {index.size(0), tokens}, ScalarType::Bool);
    bool* out = data<bool>(keep);
    for_drawn("keep_tokens", index, hidden, index.size(0), tokens, 1, checked("keep_tokens", seed, stream, threshold),
              [&](int64_t b, int64_t first, int64_t count, const bool* drawn) {
                  std::copy(drawn, drawn + count, out + b * tokens + first);
              });
    return keep;
}

Tensor mask_tokens(const Tensor& x, const Tensor& index, const std::optional<Tensor>& hidden, int64_t seed, int64_t stream,
                   int64_t threshold) {
    STD_TORCH_CHECK(x.dim() == 3, "mask_tokens: patch tokens have to be (B, N, F), got ", shape(x), ".");
    const Tensor rows = torch::stable::contiguous(x);
    Tensor y = torch::stable::new_empty(rows, rows.sizes());
    const int64_t tokens = x.size(1), width = x.size(2) * static_cast<int64_t>(x.element_size());
    const char* in = data<char>(rows);
    char* out = data<char>(y);
    for_drawn("mask_tokens", index, hidden, x.size(0), tokens, width, checked("mask_tokens", seed, stream, threshold),
              [&](int64_t b, int64_t first, int64_t count, const bool* drawn) {
                  for (int64_t i = 0; i < count; ++i) {
                      const int64_t at = (b * tokens + first + i) * width;
                      if (drawn[i]) std::memcpy(out + at, in + at, width);
                      else std::memset(out + at, 0, width);
                  }
              });
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iomm_csrc, m) {
    m.def("keep_tokens(Tensor index_B, Tensor? hidden_B, int tokens, int seed, int stream, int threshold) -> Tensor");
    m.def("mask_tokens(Tensor x_BNF, Tensor index_B, Tensor? hidden_B, int seed, int stream, int threshold) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(iomm_csrc, CPU, m) {
    m.impl("keep_tokens", TORCH_BOX(&keep_tokens));
    m.impl("mask_tokens", TORCH_BOX(&mask_tokens));
}

}  // namespace iomm
