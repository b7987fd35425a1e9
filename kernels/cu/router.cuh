// The router, decided on the device.
//
//     hidden = x · fc1ᵀ        logits = fc2 · silu(hidden + b1) + b2        expert = first e with logit_e ≥ threshold
//
// `route`, for few tokens: one block for each neuron of the router, so that the whole device reads its weights. The last
// block to finish decides for all tokens, which saves a launch. `decide`, for many tokens: hidden comes from a library GEMM.
//
// Plans `plan::route` and `plan::decide`, reference `reference::Route`, test tests/router.rs.
#pragma once

#include "device.cuh"

constexpr uint32_t ROUTE_THREADS = 256;
constexpr uint32_t ROUTE_TOKENS = 8;

// One warp, one token. hidden is read past the first-level cache: other blocks wrote it.
__device__ void decide_token(const RouteArgs& a, uint32_t token) {
    const volatile float* hidden = a.hidden + size_t(token) * a.router_size;
    const float threshold = a.thresholds != nullptr ? a.thresholds[token] : a.threshold;
    uint32_t expert = 0;
    for (; expert + 1 < a.expert_count; ++expert) {
        const float* weights = a.fc2 + size_t(expert) * a.router_size;
        float sum = 0;
        for (uint32_t r = lane_id(); r < a.router_size; r += WARP) sum += weights[r] * silu(hidden[r] + a.fc1_bias[r]);
        // NaN reaches no threshold
        if (warp_sum(sum) + a.fc2_bias[expert] >= threshold) break;
    }
    if (lane_id() == 0) {
        a.experts[token] = expert;
        a.widths[token] = a.expert_widths[expert];
    }
}

// Grid (ceil(T / 8)), a warp for each token.
__device__ __forceinline__ void decide_tokens(const RouteArgs& a) {
    const uint32_t token = blockIdx.x * (ROUTE_THREADS / WARP) + warp_id();
    if (token < a.tokens) decide_token(a, token);
}

struct RouteShared {
    float sums[ROUTE_THREADS / WARP][ROUTE_TOKENS];
    uint32_t is_last;
};

// Grid (R, ceil(T / 8)).
template <class T>
__device__ __forceinline__ void route(const RouteArgs& a) {
    RouteShared& shared = shared_memory<RouteShared>();
    const uint32_t neuron = blockIdx.x, first = blockIdx.y * ROUTE_TOKENS;
    const uint32_t tokens = min_of(ROUTE_TOKENS, a.tokens - first);
    const T* x = static_cast<const T*>(a.x) + size_t(first) * a.x_stride;
    const float* row = a.fc1 + size_t(neuron) * a.hidden_size;

    float sums[ROUTE_TOKENS] = {};
    constexpr uint32_t STEP = PACK<T>;
    for (uint32_t k = threadIdx.x * STEP; k < a.hidden_size; k += ROUTE_THREADS * STEP) {
        float w[STEP];
#pragma unroll
        for (uint32_t i = 0; i < STEP; i += 4) {
            float part[4];
            unpack(load_weights(row + k + i), part, 0.0f);
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) w[i + j] = part[j];
        }
#pragma unroll
        for (uint32_t t = 0; t < ROUTE_TOKENS; ++t) {
            if (t >= tokens) break;
            float v[STEP];
            unpack(load16(x + size_t(t) * a.x_stride + k), v, T{});
#pragma unroll
            for (uint32_t i = 0; i < STEP; ++i) sums[t] += w[i] * v[i];
        }
    }
#pragma unroll
    for (uint32_t t = 0; t < ROUTE_TOKENS; ++t) {
        const float sum = warp_sum(sums[t]);
        if (lane_id() == 0) shared.sums[warp_id()][t] = sum;
    }
    __syncthreads();
    if (threadIdx.x < tokens) {
        float sum = 0;
        for (uint32_t w = 0; w < ROUTE_THREADS / WARP; ++w) sum += shared.sums[w][threadIdx.x];
        a.hidden[size_t(first + threadIdx.x) * a.router_size + neuron] = sum;
        __threadfence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.is_last = atomicAdd(a.blocks_done + blockIdx.y, 1u) + 1 == a.router_size;
        __threadfence();
    }
    __syncthreads();
    if (shared.is_last == 0) return;
    if (threadIdx.x == 0) a.blocks_done[blockIdx.y] = 0;  // for the next launch
    if (warp_id() < tokens) decide_token(a, first + warp_id());
}
