// pack_index, pack_rows, take_rows: the three launches of pack_tokens and unpack_tokens (kernels/iomm_kernels/pack_index.py and
// pack_tokens.py hold the maths; these give the same numbers). Not yet run on a GPU.
//
//     rows of a sample   [ text slots 0 .. A-1 | patch slots A .. P-1 ],  P = A + N
//     row[b, p]          number of tokens that count before slot (b, p); -1 where it does not count or fit
//     source[t]          b P + p with row[b, p] = t; -1 behind the last row
//
// Bytes: pack_index reads the flags of the samples before its own out of L2, N B^2 / 2; the copies move each row once, 128 bits
// an access where rows and addresses are multiples of 16 bytes. Nothing waits for the device.

#include "cuda_common.h"

namespace iomm {
namespace {

constexpr int THREADS = 256, WARP = 32, WARPS = THREADS / WARP;
constexpr int ROWS_A_BLOCK = 4;  // one warp copies a row
constexpr unsigned ALL = 0xffffffffu;

// Sum over the block, known to all of its threads. `shared` may be used again after the next __syncthreads.
__device__ int block_sum(int value, int* shared) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_down_sync(ALL, value, offset);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = value;
    __syncthreads();
    int sum = 0;
    for (int warp = 0; warp < WARPS; ++warp) sum += shared[warp];
    __syncthreads();
    return sum;
}

// One block places the tokens of one sample; the last one fills what is behind them.
__global__ __launch_bounds__(THREADS) void index_kernel(const int* __restrict__ count, const uint8_t* __restrict__ keep,
                                                        int* __restrict__ cu, int* __restrict__ source, int* __restrict__ row,
                                                        int* __restrict__ dropped, int samples, int A, int N, int capacity) {
    __shared__ int shared[WARPS];
    const int b = blockIdx.x, thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    int before = 0;
    for (int i = thread; i < b; i += THREADS) before += min(max(count[i], 0), A);
    for (int i = thread; i < b * N; i += THREADS) before += keep[i] != 0;
    const int first = block_sum(before, shared), mine = min(max(count[b], 0), A), slot = b * (A + N);
    for (int a = thread; a < A; a += THREADS) {
        const bool fits = a < mine && first + a < capacity;
        if (fits) source[first + a] = slot + a;
        row[slot + a] = fits ? first + a : -1;
    }
    int end = first + mine;
    for (int start = 0; start < N; start += THREADS) {  // every thread goes through every step: the block adds up in it
        const int n = start + thread;
        const bool counts = n < N && keep[b * N + n] != 0;
        const unsigned votes = __ballot_sync(ALL, counts);
        if (lane == 0) shared[warp] = __popc(votes);
        __syncthreads();
        int at = end + __popc(votes & ((1u << lane) - 1)), all = 0;
        for (int other = 0; other < WARPS; ++other) {
            if (other < warp) at += shared[other];
            all += shared[other];
        }
        __syncthreads();
        const bool fits = counts && at < capacity;
        if (fits) source[at] = slot + A + n;
        if (n < N) row[slot + A + n] = fits ? at : -1;
        end += all;
    }
    if (thread == 0) {
        cu[b + 1] = min(end, capacity);
        if (b == 0) cu[0] = 0;
        if (b == samples - 1) *dropped = max(end - capacity, 0);
    }
    if (b == samples - 1) {
        for (int t = end + thread; t < capacity; t += THREADS) source[t] = -1;
    }
}

__global__ void empty_index_kernel(int* cu, int* source, int* dropped, int capacity) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t < capacity) source[t] = -1;
    if (t == 0) *cu = *dropped = 0;
}

template <typename Access>
__device__ Access zero_access() {
    if constexpr (sizeof(Access) == 16) return make_uint4(0, 0, 0, 0);
    else return Access(0);
}

// out[i] = row index[i], zeros where it is -1; `width` accesses a row. TWO: slot b (A + N) + p is row b A + p of `text` or
// b N + p - A of `patch`; else it is a row of `text`.
template <typename Access, bool TWO>
__global__ __launch_bounds__(ROWS_A_BLOCK * WARP) void take_kernel(const Access* __restrict__ text,
                                                                   const Access* __restrict__ patch,
                                                                   const int* __restrict__ index, Access* __restrict__ out,
                                                                   int rows, int A, int N, int width) {
    const int i = blockIdx.x * ROWS_A_BLOCK + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (i >= rows) return;
    const int slot = index[i];
    const Access* from = text + static_cast<int64_t>(slot) * width;
    if (TWO && slot >= 0) {
        const int b = slot / (A + N), p = slot % (A + N);
        from = p < A ? text + (static_cast<int64_t>(b) * A + p) * width : patch + (static_cast<int64_t>(b) * N + p - A) * width;
    }
    Access* to = out + static_cast<int64_t>(i) * width;
    if (slot < 0) {
        for (int w = lane; w < width; w += WARP) to[w] = zero_access<Access>();
        return;
    }
#pragma unroll 4
    for (int w = lane; w < width; w += WARP) to[w] = from[w];
}

template <typename Access>
void launch_take(const Tensor& text, const Tensor* patch, const Tensor& index, Tensor& out, int A, int N, int64_t row_bytes) {
    const int rows = static_cast<int>(index.numel()), width = static_cast<int>(row_bytes / sizeof(Access));
    const dim3 grid((rows + ROWS_A_BLOCK - 1) / ROWS_A_BLOCK), block(ROWS_A_BLOCK * WARP);
    const Access* first = static_cast<const Access*>(text.const_data_ptr());
    const int* from = static_cast<const int*>(index.const_data_ptr());
    Access* to = static_cast<Access*>(out.mutable_data_ptr());
    if (patch == nullptr) {
        take_kernel<Access, false><<<grid, block, 0, current_stream(text)>>>(first, first, from, to, rows, A, N, width);
    } else {
        const Access* second = static_cast<const Access*>(patch->const_data_ptr());
        take_kernel<Access, true><<<grid, block, 0, current_stream(text)>>>(first, second, from, to, rows, A, N, width);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor take(const char* name, const Tensor& text, const Tensor* patch, const Tensor& index, int64_t A, int64_t N) {
    STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Int, name, ": the index has to be int32 (I,), got ",
                    torch::headeronly::toString(index.scalar_type()), " ", shape(index), ".");
    const Tensor from = torch::stable::contiguous(text), rows = torch::stable::contiguous(index);
    const int64_t channels = text.size(text.dim() - 1);
    const int64_t row_bytes = channels * static_cast<int64_t>(text.element_size());
    Tensor out = torch::stable::new_empty(from, {index.size(0), channels});
    if (out.numel() == 0) return out;
    const torch::stable::accelerator::DeviceGuard guard(text.get_device_index());
    const uint64_t second = patch == nullptr ? 0 : address(*patch);
    switch (access_bytes(row_bytes, address(from), second, address(out))) {
        case 16: launch_take<uint4>(from, patch, rows, out, A, N, row_bytes); break;
        case 8: launch_take<uint64_t>(from, patch, rows, out, A, N, row_bytes); break;
        case 4: launch_take<uint32_t>(from, patch, rows, out, A, N, row_bytes); break;
        case 2: launch_take<uint16_t>(from, patch, rows, out, A, N, row_bytes); break;
        default: launch_take<uint8_t>(from, patch, rows, out, A, N, row_bytes);
    }
    return out;
}

Tensor take_rows(const Tensor& x, const Tensor& index) {
    STD_TORCH_CHECK(x.dim() == 2, "take_rows: x has to be (R, D), got ", shape(x), ".");
    return take("take_rows", x, nullptr, index, 0, 0);
}

Tensor pack_rows(const Tensor& text, const Tensor& patch, const Tensor& source) {
    STD_TORCH_CHECK(text.dim() == 3 && patch.dim() == 3 && text.size(0) == patch.size(0) && text.size(2) == patch.size(2) &&
                        text.scalar_type() == patch.scalar_type(),
                    "pack_rows: text has to be (B, A, D) and patches (B, N, D) of its type, got ", shape(text), " and ",
                    shape(patch), ".");
    const Tensor second = torch::stable::contiguous(patch);
    return take("pack_rows", text, &second, source, text.size(1), patch.size(1));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pack_index(const Tensor& count, const Tensor& keep, int64_t text_slots,
                                                      int64_t capacity) {
    STD_TORCH_CHECK(keep.dim() == 2 && keep.scalar_type() == ScalarType::Bool && count.dim() == 1 &&
                        count.size(0) == keep.size(0),
                    "pack_index: keep has to be bool (B, N) and count (B,), got ",
                    torch::headeronly::toString(keep.scalar_type()), " ", shape(keep), " and ", shape(count), ".");
    const int64_t samples = keep.size(0), N = keep.size(1), slots = text_slots + N;
    STD_TORCH_CHECK(text_slots >= 0 && capacity >= 1 && samples * slots < INT32_MAX && capacity < INT32_MAX, "pack_index: ",
                    samples, " samples of ", slots, " slots and a capacity of ", capacity, " do not fit 32 bits.");
    const Tensor flags = torch::stable::contiguous(keep);
    const Tensor counts = torch::stable::contiguous(torch::stable::to(count, ScalarType::Int));
    Tensor cu = torch::stable::new_empty(flags, {samples + 1}, ScalarType::Int);
    Tensor source = torch::stable::new_empty(flags, {capacity}, ScalarType::Int);
    Tensor row = torch::stable::new_empty(flags, {samples, slots}, ScalarType::Int);
    Tensor dropped = torch::stable::new_empty(flags, {}, ScalarType::Int);
    const torch::stable::accelerator::DeviceGuard guard(keep.get_device_index());
    int *cu_data = static_cast<int*>(cu.mutable_data_ptr()), *source_data = static_cast<int*>(source.mutable_data_ptr());
    int* dropped_data = static_cast<int*>(dropped.mutable_data_ptr());
    if (samples == 0) {
        empty_index_kernel<<<(capacity + THREADS - 1) / THREADS, THREADS, 0, current_stream(keep)>>>(
            cu_data, source_data, dropped_data, static_cast<int>(capacity));
    } else {
        index_kernel<<<samples, THREADS, 0, current_stream(keep)>>>(
            static_cast<const int*>(counts.const_data_ptr()), static_cast<const uint8_t*>(flags.const_data_ptr()), cu_data,
            source_data, static_cast<int*>(row.mutable_data_ptr()), dropped_data, static_cast<int>(samples),
            static_cast<int>(text_slots), static_cast<int>(N), static_cast<int>(capacity));
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return {cu, source, row, dropped};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iomm_csrc, m) {
    m.def("pack_index(Tensor count_B, Tensor keep_BN, int text_slots, int capacity) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("pack_rows(Tensor text_BAD, Tensor patch_BND, Tensor source_T) -> Tensor");
    m.def("take_rows(Tensor x_RD, Tensor index_I) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(iomm_csrc, CUDA, m) {
    m.impl("pack_index", TORCH_BOX(&pack_index));
    m.impl("pack_rows", TORCH_BOX(&pack_rows));
    m.impl("take_rows", TORCH_BOX(&take_rows));
}

}  // namespace iomm
