// Stable counting sort of the tokens by expert, widest first, in one block. The rows of a tile then have about the same
// width, and the tiles that exist form a staircase.
//
// Plan `plan::sort`, reference `reference::sort`, test tests/prefill.rs.
#pragma once

#include "device.cuh"

constexpr uint32_t SORT_THREADS = 512;

struct SortShared {
    uint32_t next[MAX_EXPERTS];  // the place of each expert's next token
    uint32_t found[SORT_THREADS / WARP][MAX_EXPERTS];
};

// Grid (1).
__device__ __forceinline__ void sort_tokens(const SortArgs& a) {
    SortShared& shared = shared_memory<SortShared>();
    if (threadIdx.x < MAX_EXPERTS) shared.next[threadIdx.x] = 0;
    __syncthreads();
    for (uint32_t t = threadIdx.x; t < a.tokens; t += SORT_THREADS) atomicAdd(&shared.next[a.experts[t]], 1u);
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t place = 0;
        for (uint32_t e = a.expert_count; e-- > 0;) {
            const uint32_t count = shared.next[e];
            shared.next[e] = place;
            place += count;
        }
    }
    for (uint32_t base = 0; base < a.tokens; base += SORT_THREADS) {
        const uint32_t token = base + threadIdx.x;
        const uint32_t expert = token < a.tokens ? a.experts[token] : MAX_EXPERTS;
        uint32_t earlier = 0;  // tokens of this expert before this one in the warp
        for (uint32_t e = 0; e < a.expert_count; ++e) {
            const uint32_t same = __ballot_sync(ALL, expert == e);
            if (expert == e) earlier = __popc(same & ((1u << lane_id()) - 1));
            if (lane_id() == 0) shared.found[warp_id()][e] = __popc(same);
        }
        __syncthreads();
        if (expert < a.expert_count) {
            uint32_t place = shared.next[expert] + earlier;
            for (uint32_t w = 0; w < warp_id(); ++w) place += shared.found[w][expert];
            // always so, unless experts change while they are sorted
            if (place < a.tokens) a.order[place] = token;
        }
        __syncthreads();
        if (threadIdx.x < a.expert_count)
            for (uint32_t w = 0; w < SORT_THREADS / WARP; ++w) shared.next[threadIdx.x] += shared.found[w][threadIdx.x];
        __syncthreads();
    }
}
