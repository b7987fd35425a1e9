// 9 to 64 tokens in 16 bits. As in decoding, reading the weights takes the time, but each weight is multiplied with many
// tokens. Weights are the rows of mma. Tokens are its columns, 16, 32 or 64 at a time, so that tiles are well filled. Both
// pass through a ring of shared memory. A block's four warps share the columns of a stage and add up their sums at the end.
//
// A block takes 64 rows of weights. Each block reads the tokens again, from the second-level cache, which is little faster
// than memory: hence many rows. down_proj has too few rows for that, so blocks also share its columns, and another launch
// adds up. Nothing beyond the widest token is read.
//
// Plan `plan::few`, reference `reference::Ffn`, test tests/few.rs.
#pragma once

#include "prefill.cuh"

constexpr uint32_t FEW_THREADS = 128;
constexpr uint32_t FEW_WARPS = FEW_THREADS / WARP;
constexpr uint32_t FEW_ROWS = 64;
constexpr uint32_t FEW_STAGES = 6;
constexpr uint32_t FEW_SUM_THREADS = 256;

template <uint32_t TOKENS>
struct FewShared {
    Operand<TOKENS> x[FEW_STAGES];
    Operand<FEW_ROWS> weights[FEW_STAGES];
};

// It takes the ring's place. Four floats more in each row put what a warp stores at once into different banks.
template <uint32_t TOKENS>
struct FewSums {
    float sums[FEW_WARPS][TOKENS][FEW_ROWS + 4];

    __device__ __forceinline__ float of(uint32_t token, uint32_t row) const {
        float sum = 0;
#pragma unroll
        for (uint32_t w = 0; w < FEW_WARPS; ++w) sum += sums[w][token][row];
        return sum;
    }
};

// Weights · xᵀ of `steps` stages, as sums of each warp.
template <class T, uint32_t TOKENS, class Source>
__device__ __forceinline__ const FewSums<TOKENS>& few_sums(Source& source, uint32_t steps) {
    FewShared<TOKENS>& shared = shared_memory<FewShared<TOKENS>>();
    const uint32_t lane = lane_id(), k = warp_id() * 2;
    float acc[FEW_ROWS / 16][TOKENS / 8][4] = {};
    for (uint32_t s = 0; s + 1 < FEW_STAGES; ++s) {
        if (s < steps) source.fill(shared.x[s], shared.weights[s]);
        copy_commit();
    }
    for (uint32_t step = 0; step < steps; ++step) {
        const uint32_t stage = step % FEW_STAGES, filled = (step + FEW_STAGES - 1) % FEW_STAGES;
        copy_wait(4);  // FEW_STAGES - 2
        // all copies of this stage have arrived, and all warps have left the one that is filled next
        __syncthreads();
        if (step + FEW_STAGES - 1 < steps) source.fill(shared.x[filled], shared.weights[filled]);
        copy_commit();
        uint32_t left[FEW_ROWS / 16][4];
#pragma unroll
        for (uint32_t m = 0; m < FEW_ROWS / 16; ++m)
            ldmatrix_x4(left[m], shared.weights[stage].at(m * 16 + lane % 16, k + lane / 16));
#pragma unroll
        for (uint32_t n = 0; n < TOKENS / 16; ++n) {
            uint32_t right[4];
            ldmatrix_x4(right, shared.x[stage].at(n * 16 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
#pragma unroll
            for (uint32_t m = 0; m < FEW_ROWS / 16; ++m)
#pragma unroll
                for (uint32_t half = 0; half < 2; ++half) {
                    const uint32_t pair[2] = {right[2 * half], right[2 * half + 1]};
                    mma(acc[m][2 * n + half], left[m], pair, T{});
                }
        }
    }
    FewSums<TOKENS>& all = shared_memory<FewSums<TOKENS>>();
    __syncthreads();  // the ring is no longer read
#pragma unroll
    for (uint32_t m = 0; m < FEW_ROWS / 16; ++m)
#pragma unroll
        for (uint32_t n = 0; n < TOKENS / 8; ++n)
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i)
                all.sums[warp_id()][n * 8 + lane % 4 * 2 + i % 2][m * 16 + i / 2 * 8 + lane / 4] = acc[m][n][i];
    __syncthreads();
    return all;
}

// Grid (1, tiles of 32 neurons in every segment).
template <class T, uint32_t TOKENS>
__device__ __forceinline__ void few_gate_up(const FfnArgs& a) {
    constexpr uint32_t NEURONS = FEW_ROWS / 2;
    const NeuronTile tile = neuron_tile(a, blockIdx.y, NEURONS);
    if (tile.first >= reach_of_rows(a, 0, TOKENS).of(tile.segment.serves)) return;
    GateUpSource<T, TOKENS, FEW_ROWS, FEW_THREADS> source(a, tile.segment, 0, tile.first);
    const FewSums<TOKENS>& sums = few_sums<T, TOKENS>(source, source.steps());
    for (uint32_t i = threadIdx.x; i < TOKENS * NEURONS / 2; i += FEW_THREADS) {
        const uint32_t token = i / (NEURONS / 2), n = i % (NEURONS / 2) * 2;
        if (token >= a.tokens || tile.first + n >= tile.segment.end) continue;
        const uint32_t width = a.widths[token];
        if (!is_served(a, tile.segment, width)) continue;
        const float gate[2] = {sums.of(token, n), sums.of(token, n + 1)};
        const float up[2] = {sums.of(token, NEURONS + n), sums.of(token, NEURONS + n + 1)};
        store_hidden<T>(a, token, width, tile.first + n, gate, up);
    }
}

// Grid (ceil(D / 64), splits): partial sums.
template <class T, uint32_t TOKENS>
__device__ __forceinline__ void few_down(const FfnArgs& a) {
    const uint32_t first_column = blockIdx.x * FEW_ROWS;
    DownSource<T, TOKENS, FEW_ROWS, FEW_THREADS> source(a, reach_of_rows(a, 0, TOKENS), 0, first_column);
    const uint32_t steps = source.along.steps();
    const uint32_t begin = steps * blockIdx.y / a.splits, end = steps * (blockIdx.y + 1) / a.splits;
    source.along.skip(begin);
    const FewSums<TOKENS>& sums = few_sums<T, TOKENS>(source, end - begin);
    for (uint32_t i = threadIdx.x; i < TOKENS * FEW_ROWS; i += FEW_THREADS) {
        const uint32_t token = i / FEW_ROWS, column = first_column + i % FEW_ROWS;
        if (token >= a.tokens || column >= a.hidden_size) continue;
        a.partial[(size_t(blockIdx.y) * a.tokens + token) * a.hidden_size + column] = sums.of(token, i % FEW_ROWS);
    }
}

// Grid (ceil(D / 256), T).
template <class T>
__device__ __forceinline__ void few_sum(const FfnArgs& a) {
    const uint32_t column = blockIdx.x * FEW_SUM_THREADS + threadIdx.x, token = blockIdx.y;
    if (column >= a.hidden_size) return;
    float y = 0;
    for (uint32_t s = 0; s < a.splits; ++s) y += a.partial[(size_t(s) * a.tokens + token) * a.hidden_size + column];
    store(static_cast<T*>(a.y) + size_t(token) * a.hidden_size + column, compensated(a, y, token, column));
}
