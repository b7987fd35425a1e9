// Decoding: 1, 2, 4 or 8 tokens at a time. Reading the weights takes the time. A warp takes whole rows of a matrix, 16
// bytes a lane, with several loads in flight. The grid depends on shapes only; the router's decisions are on the device,
// so warps beyond the widest token leave at once.
//
// h is 0 between a token's own width and that of the widest token that its segment serves, so `down` need not look at widths.
//
// Plan `plan::decode`, reference `reference::Ffn`, test tests/decode.rs.
#pragma once

#include "segments.cuh"

constexpr uint32_t DECODE_THREADS = 128;
constexpr uint32_t DECODE_ROWS = DECODE_THREADS / WARP;

// sums[r][t] += rows[r] · x[t] over `length` columns, for the tokens that are bits of `served`: this lane's share.
template <class T, uint32_t ROWS, uint32_t TOKENS>
__device__ __forceinline__ void dot_rows(const T* const (&rows)[ROWS], const T* x, size_t x_stride, uint32_t length,
                                         uint32_t served, float (&sums)[ROWS][TOKENS]) {
    constexpr uint32_t STEP = PACK<T>;
    constexpr uint32_t UNROLL = 8 / ROWS;  // 8 loads of weights in flight
    for (uint32_t start = lane_id() * STEP; start < length; start += UNROLL * WARP * STEP) {
        uint4 w[UNROLL][ROWS];
#pragma unroll
        for (uint32_t u = 0; u < UNROLL; ++u) {
            const uint32_t k = start + u * WARP * STEP;
#pragma unroll
            for (uint32_t r = 0; r < ROWS; ++r)
                if (k < length) w[u][r] = load_weights(rows[r] + k);
        }
#pragma unroll
        for (uint32_t u = 0; u < UNROLL; ++u) {
            const uint32_t k = start + u * WARP * STEP;
            if (k >= length) break;
            float weights[ROWS][STEP];
#pragma unroll
            for (uint32_t r = 0; r < ROWS; ++r) unpack(w[u][r], weights[r], T{});
#pragma unroll
            for (uint32_t t = 0; t < TOKENS; ++t) {
                if (served >> t == 0) break;
                if ((served >> t & 1) == 0) continue;
                float v[STEP];
                unpack(load16(x + t * x_stride + k), v, T{});
#pragma unroll
                for (uint32_t r = 0; r < ROWS; ++r)
#pragma unroll
                    for (uint32_t i = 0; i < STEP; ++i) sums[r][t] += weights[r][i] * v[i];
            }
        }
    }
}

template <uint32_t ROWS, uint32_t TOKENS>
__device__ __forceinline__ void sum_all(float (&sums)[ROWS][TOKENS]) {
#pragma unroll
    for (uint32_t r = 0; r < ROWS; ++r)
#pragma unroll
        for (uint32_t t = 0; t < TOKENS; ++t) sums[r][t] = warp_sum(sums[r][t]);
}

// Grid (tiles of 4 neurons in every segment, ceil(T / TOKENS)): a warp for each neuron.
template <class T, uint32_t TOKENS>
__device__ __forceinline__ void decode_gate_up(const FfnArgs& a) {
    const Group group(a, TOKENS);
    const NeuronTile tile = neuron_tile(a, blockIdx.x, DECODE_ROWS);
    const Segment& segment = tile.segment;
    const uint32_t neuron = tile.first + warp_id(), served = group.served(segment);
    if (neuron >= group.reach.end<PACK<T>>(segment)) return;

    const size_t row = neuron - segment.start;
    const T* const rows[2] = {static_cast<const T*>(segment.gate) + row * segment.gate_stride,
                              static_cast<const T*>(segment.up) + row * segment.up_stride};
    float sums[2][TOKENS] = {};
    const T* x = static_cast<const T*>(a.x) + size_t(group.first) * a.x_stride;
    dot_rows<T>(rows, x, a.x_stride, a.hidden_size, served, sums);
    sum_all(sums);
#pragma unroll
    for (uint32_t t = 0; t < TOKENS; ++t) {
        if (lane_id() != t || (served >> t & 1) == 0) continue;
        T* h = static_cast<T*>(a.h) + size_t(group.first + t) * a.intermediate_size + neuron;
        store(h, neuron < a.widths[group.first + t] ? silu(sums[0][t]) * sums[1][t] : 0.0f);
    }
}

// Adds the compensation of the token's expert; the largest expert has none.
__device__ __forceinline__ float compensated(const FfnArgs& a, float y, uint32_t token, uint32_t column) {
    const uint32_t expert = a.experts[token];
    const bool narrow = a.compensation != nullptr && expert + 1 < a.expert_count;
    return narrow ? y + a.compensation[size_t(expert) * a.hidden_size + column] : y;
}

// Grid (ceil(D / 4), ceil(T / TOKENS)): a warp for each output.
template <class T, uint32_t TOKENS>
__device__ __forceinline__ void decode_down(const FfnArgs& a) {
    const Group group(a, TOKENS);
    const uint32_t column = blockIdx.x * DECODE_ROWS + warp_id();
    if (column >= a.hidden_size) return;

    const T* h = static_cast<const T*>(a.h) + size_t(group.first) * a.intermediate_size;
    float sums[1][TOKENS] = {};
    for (uint32_t s = 0; s < a.segment_count; ++s) {
        const Segment& segment = a.segments[s];
        const uint32_t length = group.reach.end<PACK<T>>(segment) - segment.start;
        const T* const rows[1] = {static_cast<const T*>(segment.down) + size_t(column) * segment.down_stride};
        dot_rows<T>(rows, h + segment.start, a.intermediate_size, length, group.served(segment), sums);
    }
    sum_all(sums);
#pragma unroll
    for (uint32_t t = 0; t < TOKENS; ++t) {
        if (lane_id() != t || t >= group.tokens) continue;
        T* y = static_cast<T*>(a.y) + size_t(group.first + t) * a.hidden_size + column;
        store(y, compensated(a, sums[0][t], group.first + t, column));
    }
}
