// Decoding 5 to 8 tokens in 16 bits. From 5 tokens on, multiplying on ordinary cores takes about as long as loading the
// weights. Tensor cores multiply faster. Weights go from memory straight into fragments of mma, 16 bytes a lane. So a lane
// holds eight neighbouring columns where mma has columns 2q, 2q+1, 2q+8 and 2q+9. Activations are permuted in the same way,
// and the order of a sum's terms may be any.
//
// A block takes 16 rows of each matrix. Its warps share the columns and add up their sums at the end.
//
// Plan `plan::decode`, reference `reference::Ffn`, test tests/decode.rs.
#pragma once

#include "decode.cuh"

constexpr uint32_t MMA_THREADS = 256;
constexpr uint32_t MMA_WARPS = MMA_THREADS / WARP;
constexpr uint32_t MMA_ROWS = 16;
constexpr uint32_t MMA_TOKENS = 8;

template <uint32_t MATRICES>
struct MmaShared {
    float sums[MMA_WARPS][MATRICES][MMA_TOKENS][MMA_ROWS];
};

// acc[m] += this warp's part of rows[m] · x: of each matrix, rows lane / 4 and lane / 4 + 8, against token lane / 4.
// A null pointer counts as a row of zeros.
template <class T, uint32_t MATRICES>
__device__ __forceinline__ void mma_rows(const T* const (&rows)[MATRICES][2], const T* x, uint32_t length,
                                         float (&acc)[MATRICES][4]) {
    constexpr uint32_t UNITS = 4 / MATRICES;  // 8 loads of weights in flight
    constexpr uint32_t COLUMNS = 32;          // of a unit: four lanes' 16 bytes
    for (uint32_t start = warp_id() * UNITS * COLUMNS; start < length; start += MMA_WARPS * UNITS * COLUMNS) {
        uint4 w[UNITS][MATRICES][2], v[UNITS];
#pragma unroll
        for (uint32_t u = 0; u < UNITS; ++u) {
            const uint32_t k = start + u * COLUMNS + lane_id() % 4 * PACK<T>;
            const uint4 zero = {0, 0, 0, 0};
#pragma unroll
            for (uint32_t m = 0; m < MATRICES; ++m)
#pragma unroll
                for (uint32_t half = 0; half < 2; ++half)
                    w[u][m][half] =
                        k < length && rows[m][half] != nullptr ? load_weights(rows[m][half] + k) : zero;
            v[u] = k < length && x != nullptr ? load16(x + k) : zero;
        }
#pragma unroll
        for (uint32_t u = 0; u < UNITS; ++u)
#pragma unroll
            for (uint32_t m = 0; m < MATRICES; ++m) {
                const uint4 low = w[u][m][0], high = w[u][m][1];
                const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
                const uint32_t x_first[2] = {v[u].x, v[u].y}, x_second[2] = {v[u].z, v[u].w};
                mma(acc[m], first, x_first, T{});
                mma(acc[m], second, x_second, T{});
            }
    }
}

// Adds up the warps; thread t < 128 then has the sums of row t % 16 and token t / 16.
template <uint32_t MATRICES>
__device__ __forceinline__ void mma_sums(const float (&acc)[MATRICES][4], float (&sums)[MATRICES]) {
    MmaShared<MATRICES>& shared = shared_memory<MmaShared<MATRICES>>();
#pragma unroll
    for (uint32_t m = 0; m < MATRICES; ++m)
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i)
            shared.sums[warp_id()][m][lane_id() % 4 * 2 + i % 2][lane_id() / 4 + i / 2 * 8] = acc[m][i];
    __syncthreads();
    if (threadIdx.x >= MMA_ROWS * MMA_TOKENS) return;
#pragma unroll
    for (uint32_t m = 0; m < MATRICES; ++m)
        for (uint32_t w = 0; w < MMA_WARPS; ++w)
            sums[m] += shared.sums[w][m][threadIdx.x / MMA_ROWS][threadIdx.x % MMA_ROWS];
}

// Grid (tiles of 16 neurons in every segment, ceil(T / 8)).
template <class T>
__device__ __forceinline__ void decode_mma_gate_up(const FfnArgs& a) {
    const Group group(a, MMA_TOKENS);
    const NeuronTile tile = neuron_tile(a, blockIdx.x, MMA_ROWS);
    const Segment& segment = tile.segment;
    const uint32_t end = group.reach.end<PACK<T>>(segment);
    if (tile.first >= end) return;

    const T* rows[2][2];
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t neuron = tile.first + half * 8 + lane_id() / 4;
        rows[0][half] = rows[1][half] = nullptr;
        if (neuron >= end) continue;
        const size_t row = neuron - segment.start;
        rows[0][half] = static_cast<const T*>(segment.gate) + row * segment.gate_stride;
        rows[1][half] = static_cast<const T*>(segment.up) + row * segment.up_stride;
    }
    const uint32_t token = lane_id() / 4;
    const T* x =
        token < group.tokens ? static_cast<const T*>(a.x) + size_t(group.first + token) * a.x_stride : nullptr;
    float acc[2][4] = {}, sums[2] = {};
    mma_rows<T>(rows, x, a.hidden_size, acc);
    mma_sums(acc, sums);

    const uint32_t t = threadIdx.x / MMA_ROWS, neuron = tile.first + threadIdx.x % MMA_ROWS;
    if ((group.served(segment) >> t & 1) == 0 || neuron >= end) return;
    T* h = static_cast<T*>(a.h) + size_t(group.first + t) * a.intermediate_size + neuron;
    store(h, neuron < a.widths[group.first + t] ? silu(sums[0]) * sums[1] : 0.0f);
}

// Grid (ceil(D / 16), ceil(T / 8)).
template <class T>
__device__ __forceinline__ void decode_mma_down(const FfnArgs& a) {
    const Group group(a, MMA_TOKENS);
    const uint32_t first_column = blockIdx.x * MMA_ROWS, token = lane_id() / 4;
    float acc[1][4] = {}, sums[1] = {};
    for (uint32_t s = 0; s < a.segment_count; ++s) {
        const Segment& segment = a.segments[s];
        const bool is_served = group.served(segment) >> token & 1;
        const T* rows[1][2];
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            const uint32_t column = first_column + half * 8 + lane_id() / 4;
            const T* down = static_cast<const T*>(segment.down);
            rows[0][half] = column < a.hidden_size ? down + size_t(column) * segment.down_stride : nullptr;
        }
        const T* h = static_cast<const T*>(a.h) + size_t(group.first + token) * a.intermediate_size + segment.start;
        mma_rows<T>(rows, is_served ? h : nullptr, group.reach.end<PACK<T>>(segment) - segment.start, acc);
    }
    mma_sums(acc, sums);

    const uint32_t t = threadIdx.x / MMA_ROWS, column = first_column + threadIdx.x % MMA_ROWS;
    if (t >= group.tokens || column >= a.hidden_size) return;
    T* y = static_cast<T*>(a.y) + size_t(group.first + t) * a.hidden_size + column;
    store(y, compensated(a, sums[0], group.first + t, column));
}
