// Decoding: 1, 2, 4 or 8 tokens at a time. Reading the weights takes the time. A warp takes whole rows of a matrix, 16
// bytes a lane, with several loads in flight. The grid depends on shapes only; the router's decisions are on the device,
// so warps beyond the widest token leave at once.
//
// h is 0 between a token's own width and that of the widest token, so `down` need not look at widths.
//
// Plan `plan::decode`, reference `reference::Ffn`, test tests/decode.rs.
#pragma once

#include "device.cuh"

constexpr uint32_t DECODE_THREADS = 128;

// The segment of a neuron.
__device__ __forceinline__ const Segment& segment_of(const FfnArgs& a, uint32_t neuron) {
    uint32_t s = 0;
    while (neuron >= a.segments[s].end) ++s;
    return a.segments[s];
}

// The columns of h that exist: the widest token's, in whole vectors.
template <class T>
__device__ __forceinline__ uint32_t decode_limit(const FfnArgs& a, uint32_t first, uint32_t tokens) {
    return min_of(round_up(widest(a.widths + first, tokens), PACK<T>), a.intermediate_size);
}

// sums[r][t] += rows[r] · x[t] over `length` columns: this lane's share.
template <class T, uint32_t ROWS, uint32_t TOKENS>
__device__ __forceinline__ void dot_rows(const T* const (&rows)[ROWS], const T* x, size_t x_stride, uint32_t length,
                                         uint32_t tokens, float (&sums)[ROWS][TOKENS]) {
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
                if (t >= tokens) break;
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

// Grid (ceil(I / 4), ceil(T / TOKENS)): a warp for each neuron.
template <class T, uint32_t TOKENS>
__device__ __forceinline__ void decode_gate_up(const FfnArgs& a) {
    const uint32_t first = blockIdx.y * TOKENS, tokens = min_of(TOKENS, a.tokens - first);
    const uint32_t neuron = blockIdx.x * (DECODE_THREADS / WARP) + warp_id();
    if (neuron >= decode_limit<T>(a, first, tokens)) return;

    const Segment& segment = segment_of(a, neuron);
    const size_t row = neuron - segment.start;
    const T* const rows[2] = {static_cast<const T*>(segment.gate) + row * segment.gate_stride,
                              static_cast<const T*>(segment.up) + row * segment.up_stride};
    float sums[2][TOKENS] = {};
    const T* x = static_cast<const T*>(a.x) + size_t(first) * a.x_stride;
    dot_rows<T>(rows, x, a.x_stride, a.hidden_size, tokens, sums);
    sum_all(sums);
#pragma unroll
    for (uint32_t t = 0; t < TOKENS; ++t) {
        if (lane_id() != t || t >= tokens) continue;
        T* h = static_cast<T*>(a.h) + size_t(first + t) * a.intermediate_size + neuron;
        store(h, neuron < a.widths[first + t] ? silu(sums[0][t]) * sums[1][t] : 0.0f);
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
    const uint32_t first = blockIdx.y * TOKENS, tokens = min_of(TOKENS, a.tokens - first);
    const uint32_t column = blockIdx.x * (DECODE_THREADS / WARP) + warp_id();
    if (column >= a.hidden_size) return;

    const uint32_t limit = decode_limit<T>(a, first, tokens);
    const T* h = static_cast<const T*>(a.h) + size_t(first) * a.intermediate_size;
    float sums[1][TOKENS] = {};
    for (uint32_t s = 0; s < a.segment_count && a.segments[s].start < limit; ++s) {
        const Segment& segment = a.segments[s];
        const T* const rows[1] = {static_cast<const T*>(segment.down) + size_t(column) * segment.down_stride};
        const uint32_t length = min_of(segment.end, limit) - segment.start;
        dot_rows<T>(rows, h + segment.start, a.intermediate_size, length, tokens, sums);
    }
    sum_all(sums);
#pragma unroll
    for (uint32_t t = 0; t < TOKENS; ++t) {
        if (lane_id() != t || t >= tokens) continue;
        T* y = static_cast<T*>(a.y) + size_t(first + t) * a.hidden_size + column;
        store(y, compensated(a, sums[0][t], first + t, column));
    }
}
