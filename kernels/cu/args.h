// The kernels' arguments: one struct each, passed by value. kernels/src/args.rs mirrors them.
//
// T tokens, D hidden_size, I intermediate_size, E experts, R the router's hidden size. Strides are those of rows, in
// elements (of quantized matrices: in blocks); columns are contiguous and rows start at multiples of 16 bytes.
#pragma once

#include <stdint.h>

constexpr uint32_t MAX_EXPERTS = 16;
constexpr uint32_t MAX_SEGMENTS = 32;

// Router, fused: fc1 over many blocks, then decided by the last one. Also the decision alone.
struct RouteArgs {
    const void* x;             // (T, D)
    const float* fc1;          // (R, D)
    const float* fc1_bias;     // (R)
    const float* fc2;          // (E-1, R)
    const float* fc2_bias;     // (E-1)
    const float* thresholds;   // (T), or null: `threshold` for all
    float* hidden;             // (T, R), x · fc1ᵀ: scratch of `route`, input of `decide`
    uint32_t* blocks_done;     // one for each group of 8 tokens; 0 before and after
    uint32_t* experts;         // (T)
    uint32_t* widths;          // (T): H_e of each token
    float threshold;
    uint32_t tokens, hidden_size, router_size, expert_count;
    uint32_t x_stride;
    uint32_t expert_widths[MAX_EXPERTS];
};

// Tokens by expert, widest first, in their own order where equal.
struct SortArgs {
    const uint32_t* experts;   // (T)
    uint32_t* order;           // (T): the token at each place
    uint32_t tokens, expert_count;
};

// Rows in blocks of 32, each with one scale: x ≈ scale · q.
struct Quantized {
    int8_t* q;                 // (T, K)
    float* scales;             // (T, K / 32)
    float* sums;               // (T, K / 16): scale · Σ q over each half of a block
};

struct QuantizeArgs {
    const void* x;             // (T, K)
    Quantized out;
    const uint32_t* widths;    // (T), or null: columns that the kernels leave alone in the group of 8 are left alone
    uint32_t tokens, columns;
    uint32_t x_stride, separate_size;  // as in FfnArgs; columns is then I
};

// The tokens that a segment serves.
constexpr uint32_t ALL_TOKENS = 0, FULL_WIDTH = 1, BELOW_FULL_WIDTH = 2;

// A run of neurons, start..end, in matrices of its own: the whole FFN, or one shell.
struct Segment {
    const void* gate;          // (end - start, D)
    const void* up;            // (end - start, D)
    const void* down;          // (D, end - start)
    uint32_t start, end;
    uint32_t gate_stride, up_stride, down_stride;
    uint32_t serves;
};

// The FFN, in two launches: h = silu(gate x) ∘ up x, then y = down h + compensation.
struct FfnArgs {
    const void* x;             // (T, D)
    void* h;                   // (T, I), rows contiguous; in prefill in the order of `order`. A column is a neuron's, of
                               // whichever segment serves the token
    void* y;                   // (T, D), contiguous
    const float* compensation; // (E-1, D), or null
    const uint32_t* experts;   // (T)
    const uint32_t* widths;    // (T)
    const uint32_t* order;     // (T): prefill only
    Quantized xq, hq;          // quantized decoding only: x and h as the weights meet them
    float* partial;            // (splits, T, D): 9 to 64 tokens only
    uint32_t splits;
    uint32_t separate_size;    // neurons, from 0 on, that BELOW_FULL_WIDTH has segments for, beside FULL_WIDTH; or 0
    uint32_t tokens, hidden_size, intermediate_size, expert_count;
    uint32_t x_stride, segment_count;
    Segment segments[MAX_SEGMENTS];
};
