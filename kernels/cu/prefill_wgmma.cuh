// Prefill on sm_90a: the tiles of prefill.cuh on wgmma. A block of two warpgroups makes 128 rows × N columns, each warpgroup
// 64 of the rows. Operands arrive by asynchronous copies in a ring of four stages: the products of one stage run, those of
// the next are issued, the third arrives, and copies of the fourth are issued.
//
// Plan `plan::prefill` with `Tile::Wgmma128` and `Tile::Wgmma256`, reference `reference::Ffn`, test tests/prefill.rs.
#pragma once

#include "prefill.cuh"
#include "wgmma.cuh"

constexpr uint32_t WGMMA_STAGES = 4;

template <uint32_t N>
struct WgmmaShared {
    Operand<TILE> a[WGMMA_STAGES];
    Operand<N> b[WGMMA_STAGES];
};

template <class T, uint32_t N, class Source>
__device__ __forceinline__ void wgmma_all(Source& source, uint32_t steps, float (&acc)[N / 2]) {
    WgmmaShared<N>& shared = shared_memory<WgmmaShared<N>>();
    for (uint32_t s = 0; s < 2; ++s) {
        if (s < steps) source.fill(shared.a[s], shared.b[s]);
        copy_commit();
    }
    wgmma_registers(acc);
    for (uint32_t step = 0; step < steps; ++step) {
        const uint32_t stage = step % WGMMA_STAGES, filled = (step + 2) % WGMMA_STAGES;
        copy_wait(1);
        proxy_fence();
        // this stage has arrived, and all products of the one that is filled below are over
        __syncthreads();
        wgmma_fence();
        const uint64_t a = wgmma_descriptor(shared.a[stage].chunks[threadIdx.x / WARPGROUP * 64]);
        const uint64_t b = wgmma_descriptor(shared.b[stage].chunks[0]);
#pragma unroll
        for (uint32_t k = 0; k < 128; k += 32) wgmma<N>(acc, wgmma_advance(a, k), wgmma_advance(b, k), T{});
        wgmma_commit();
        if (step + 2 < steps) source.fill(shared.a[filled], shared.b[filled]);
        copy_commit();
        wgmma_wait(1);
    }
    wgmma_wait(0);
    wgmma_registers(acc);
}

// The row of d[… + 2 half + i] in the tile, and the column of d[4 j + …].
__device__ __forceinline__ uint32_t wgmma_row(uint32_t half) { return warp_id() * 16 + half * 8 + lane_id() / 4; }
__device__ __forceinline__ uint32_t wgmma_column(uint32_t j) { return j * 8 + lane_id() % 4 * 2; }

// Grid (ceil(T / 128), tiles of N / 2 neurons in every segment).
template <class T, uint32_t N>
__device__ __forceinline__ void wgmma_gate_up(const FfnArgs& a) {
    const uint32_t first_row = blockIdx.x * TILE;
    const NeuronTile tile = neuron_tile(a, blockIdx.y, N / 2);
    if (tile.first >= reach_of_tile(a, first_row).of(tile.segment.serves)) return;

    GateUpSource<T, TILE, N> source(a, tile.segment, first_row, tile.first);
    float acc[N / 2] = {};
    wgmma_all<T, N>(source, source.steps(), acc);

#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t row = first_row + wgmma_row(half);
        if (row >= a.tokens) continue;
        const uint32_t width = a.widths[a.order[row]];
        if (!is_served(a, tile.segment, width)) continue;
#pragma unroll
        for (uint32_t j = 0; j < N / 16; ++j) {
            const uint32_t neuron = tile.first + wgmma_column(j);
            if (neuron >= tile.segment.end) continue;
            store_hidden<T>(a, row, width, neuron, &acc[j * 4 + half * 2], &acc[N / 4 + j * 4 + half * 2]);
        }
    }
}

// Grid (ceil(T / 128), ceil(D / N)).
template <class T, uint32_t N>
__device__ __forceinline__ void wgmma_down(const FfnArgs& a) {
    const uint32_t first_row = blockIdx.x * TILE, first_column = blockIdx.y * N;
    DownSource<T, TILE, N> source(a, reach_of_tile(a, first_row), first_row, first_column);
    float acc[N / 2] = {};
    wgmma_all<T, N>(source, source.along.steps(), acc);

#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t row = first_row + wgmma_row(half);
        if (row >= a.tokens) continue;
        const uint32_t token = a.order[row];
        T* y = static_cast<T*>(a.y) + size_t(token) * a.hidden_size;
#pragma unroll
        for (uint32_t j = 0; j < N / 8; ++j) {
            const uint32_t d = first_column + wgmma_column(j);
            if (d >= a.hidden_size) continue;
            const float* pair = &acc[j * 4 + half * 2];
            store2(y + d, compensated(a, pair[0], token, d), compensated(a, pair[1], token, d + 1));
        }
    }
}
