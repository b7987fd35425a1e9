// Which neurons of which segments are needed. Segments are runs of neurons. Without separate weights, each serves all tokens.
// With them, the first neurons exist twice: in segments for tokens at full width, and in segments for those below. Blocks
// work on one segment at a time, and skip those that serve none of their tokens.
//
// Every kernel of the FFN uses it. `segments::list` makes the list, `reference::Ffn` has both sets of weights, and the tests are
// called separate_weights_serve_tokens_below_full_width.
#pragma once

#include "device.cuh"

// How far tokens reach: the widest at full width and the widest below, 0 if there are none.
struct Reach {
    uint32_t full_width;
    uint32_t full = 0, below = 0;

    __device__ __forceinline__ explicit Reach(uint32_t full_width) : full_width(full_width) {}

    __device__ __forceinline__ void add(uint32_t width) {
        if (width == full_width) full = width;
        else below = max_of(below, width);
    }

    __device__ __forceinline__ uint32_t of(uint32_t serves) const {
        return serves == FULL_WIDTH ? full : serves == BELOW_FULL_WIDTH ? below : max_of(full, below);
    }

    // The end of the neurons that are needed, in whole steps; not before the segment's start.
    template <uint32_t STEP>
    __device__ __forceinline__ uint32_t end(const Segment& segment) const {
        return max_of(segment.start, min_of(segment.end, round_up(of(segment.serves), STEP)));
    }
};

// Whether a segment serves a token of this width.
__device__ __forceinline__ bool is_served(const FfnArgs& a, const Segment& segment, uint32_t width) {
    return segment.serves == ALL_TOKENS || (width == a.intermediate_size) == (segment.serves == FULL_WIDTH);
}

// Of tokens that are bits, those that a segment serves; `full` are those at full width.
__device__ __forceinline__ uint32_t served(const Segment& segment, uint32_t full) {
    return segment.serves == ALL_TOKENS ? ALL : segment.serves == FULL_WIDTH ? full : ~full;
}

// The tokens that are decoded together, `size` of them or what is left.
struct Group {
    uint32_t first, tokens;
    uint32_t full = 0;  // bit t: token first + t is at full width
    Reach reach;

    __device__ __forceinline__ Group(const FfnArgs& a, uint32_t size)
        : first(blockIdx.y * size), tokens(min_of(size, a.tokens - first)), reach(a.intermediate_size) {
        for (uint32_t t = 0; t < tokens; ++t) {
            const uint32_t width = a.widths[first + t];
            reach.add(width);
            full |= uint32_t(width == a.intermediate_size) << t;
        }
    }

    // Bit t: the segment serves token first + t.
    __device__ __forceinline__ uint32_t served(const Segment& segment) const {
        return ::served(segment, full) & ((1u << tokens) - 1);
    }
};

__device__ __forceinline__ uint32_t width_of_row(const FfnArgs& a, uint32_t row) {
    return a.widths[a.order == nullptr ? row : a.order[row]];
}

// The reach of `count` rows, in every lane.
__device__ __forceinline__ Reach reach_of_rows(const FfnArgs& a, uint32_t first_row, uint32_t count) {
    Reach reach(a.intermediate_size);
    const uint32_t end = min_of(first_row + count, a.tokens);
    for (uint32_t row = first_row + lane_id(); row < end; row += WARP) reach.add(width_of_row(a, row));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        reach.full = max_of(reach.full, __shfl_xor_sync(ALL, reach.full, step));
        reach.below = max_of(reach.below, __shfl_xor_sync(ALL, reach.below, step));
    }
    return reach;
}

// A tile's segment and its first neuron there.
struct NeuronTile {
    const Segment& segment;
    uint32_t first;
};

// Tile number `tile`, of `neurons` neurons each in every segment.
__device__ __forceinline__ NeuronTile neuron_tile(const FfnArgs& a, uint32_t tile, uint32_t neurons) {
    for (uint32_t s = 0;; ++s) {
        const Segment& segment = a.segments[s];
        const uint32_t tiles = (segment.end - segment.start + neurons - 1) / neurons;
        if (tile < tiles) return {segment, segment.start + tile * neurons};
        tile -= tiles;
    }
}
