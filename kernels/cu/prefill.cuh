// Prefill: many tokens. Multiplying takes the time. Rows are sorted by width, widest first, so the part of h that exists is
// a staircase, and blocks whose tile lies outside leave at once. Products run on 16-bit tensor cores (mma.sync), with
// operands in a ring of shared memory that asynchronous copies fill.
//
// A block makes 128 rows × 128 columns. In `gate_up` 64 of them are of gate_proj and 64 of up_proj, so that the thread that
// holds a gate holds its up too. Rows of x are gathered as they are loaded, rows of y scattered as they are stored.
//
// Plan `plan::prefill` with `Tile::Mma`, reference `reference::Ffn`, test tests/prefill.rs.
#pragma once

#include "decode.cuh"

constexpr uint32_t PREFILL_THREADS = 256;
constexpr uint32_t TILE = 128;       // rows of either operand
constexpr uint32_t TILE_K = 64;      // 128 bytes: 8 chunks of 16
constexpr uint32_t CHUNKS = 8;
constexpr uint32_t STAGES = 3;

// A row's chunks are permuted by its number, so that eight rows' same chunk lies in different banks. At a multiple of
// 1024 bytes this is what wgmma calls a swizzle of 128 bytes.
template <uint32_t ROWS>
struct alignas(1024) Operand {
    uint4 chunks[ROWS][CHUNKS];
    __device__ __forceinline__ uint4* at(uint32_t row, uint32_t chunk) { return &chunks[row][chunk ^ row % CHUNKS]; }
};

// Copies that each of a block's threads makes of an operand.
template <uint32_t ROWS, uint32_t THREADS>
constexpr uint32_t COPIES = ROWS * CHUNKS / THREADS;

struct PrefillShared {
    Operand<TILE> a[STAGES], b[STAGES];
};

// The threads' share in filling an operand: each copies one chunk of rows that are 32 apart, or with fewer threads less.
template <uint32_t THREADS>
__device__ __forceinline__ uint32_t copy_row(uint32_t i) { return threadIdx.x / CHUNKS + i * (THREADS / CHUNKS); }
__device__ __forceinline__ uint32_t copy_chunk() { return threadIdx.x % CHUNKS; }

// The warp's accumulators: 64 rows × two groups of 16 columns, as 4 × 2 × 2 tiles of mma.
struct Accumulators {
    float d[4][2][2][4];
};

// Warps stand two high and four wide.
__device__ __forceinline__ uint32_t warp_row() { return warp_id() / 4 * 64; }
__device__ __forceinline__ uint32_t warp_column() { return warp_id() % 4; }

// The first column of the warp's group g: of gates and their ups, or of outputs.
__device__ __forceinline__ uint32_t gate_up_column(uint32_t g) { return g * (TILE / 2) + warp_column() * 16; }
__device__ __forceinline__ uint32_t down_column(uint32_t g) { return warp_column() * 32 + g * 16; }

// acc += a · bᵀ over one stage. `column[g]` is the first row of b in the warp's group g.
template <class T>
__device__ __forceinline__ void multiply(Operand<TILE>& a, Operand<TILE>& b, const uint32_t (&column)[2], Accumulators& acc) {
    const uint32_t lane = lane_id();
#pragma unroll
    for (uint32_t k = 0; k < CHUNKS; k += 2) {
        uint32_t left[4][4], right[2][4];
#pragma unroll
        for (uint32_t m = 0; m < 4; ++m) ldmatrix_x4(left[m], a.at(warp_row() + m * 16 + lane % 16, k + lane / 16));
#pragma unroll
        for (uint32_t g = 0; g < 2; ++g)
            ldmatrix_x4(right[g], b.at(column[g] + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
#pragma unroll
        for (uint32_t m = 0; m < 4; ++m)
#pragma unroll
            for (uint32_t g = 0; g < 2; ++g)
#pragma unroll
                for (uint32_t n = 0; n < 2; ++n) {
                    const uint32_t pair[2] = {right[g][2 * n], right[g][2 * n + 1]};
                    mma(acc.d[m][g][n], left[m], pair, T{});
                }
    }
}

// `source.fill(a, b)` copies the next stage's operands; there are `steps` of them.
template <class T, class Source>
__device__ __forceinline__ void multiply_all(Source& source, uint32_t steps, const uint32_t (&column)[2],
                                             Accumulators& acc) {
    PrefillShared& shared = shared_memory<PrefillShared>();
    for (uint32_t s = 0; s + 1 < STAGES; ++s) {
        if (s < steps) source.fill(shared.a[s], shared.b[s]);
        copy_commit();
    }
    uint32_t stage = 0, filled = STAGES - 1;
    for (uint32_t step = 0; step < steps; ++step) {
        copy_wait(1);  // STAGES - 2
        // all copies of this stage have arrived, and all warps have left the one that is filled next
        __syncthreads();
        if (step + STAGES - 1 < steps) source.fill(shared.a[filled], shared.b[filled]);
        copy_commit();
        multiply<T>(shared.a[stage], shared.b[stage], column, acc);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        filled = filled + 1 == STAGES ? 0 : filled + 1;
    }
}

// Rows of an operand, as this thread copies them. Rows beyond the matrix may be any: their products are not stored.
template <class T, uint32_t ROWS, uint32_t THREADS>
struct Rows {
    const T* at[COPIES<ROWS, THREADS>];

    // columns from k on, of `columns`
    __device__ __forceinline__ void copy(Operand<ROWS>& to, uint32_t k, uint32_t columns) const {
#pragma unroll
        for (uint32_t i = 0; i < COPIES<ROWS, THREADS>; ++i)
            copy_async(to.at(copy_row<THREADS>(i), copy_chunk()), k < columns ? at[i] + k : at[i], k < columns ? 16 : 0);
    }
};

// Rows of x, in `order` if there is one.
template <class T, uint32_t ROWS, uint32_t THREADS>
__device__ __forceinline__ Rows<T, ROWS, THREADS> rows_of_x(const FfnArgs& a, uint32_t first_row) {
    Rows<T, ROWS, THREADS> rows;
#pragma unroll
    for (uint32_t i = 0; i < COPIES<ROWS, THREADS>; ++i) {
        const uint32_t row = min_of(first_row + copy_row<THREADS>(i), a.tokens - 1);
        const uint32_t token = a.order == nullptr ? row : a.order[row];
        rows.at[i] = static_cast<const T*>(a.x) + size_t(token) * a.x_stride;
    }
    return rows;
}

__device__ __forceinline__ uint32_t steps_over(uint32_t columns) { return (columns + TILE_K - 1) / TILE_K; }

// ROWS rows of x against COLUMNS rows of which the first half are of gate_proj, the second of up_proj.
template <class T, uint32_t ROWS, uint32_t COLUMNS, uint32_t THREADS = PREFILL_THREADS>
struct GateUpSource {
    Rows<T, ROWS, THREADS> a;
    Rows<T, COLUMNS, THREADS> b;
    uint32_t k, columns;

    __device__ __forceinline__ GateUpSource(const FfnArgs& args, const Segment& segment, uint32_t first_row,
                                            uint32_t first_neuron)
        : a(rows_of_x<T, ROWS, THREADS>(args, first_row)), k(copy_chunk() * PACK<T>), columns(args.hidden_size) {
#pragma unroll
        for (uint32_t i = 0; i < COPIES<COLUMNS, THREADS>; ++i) {
            const uint32_t column = copy_row<THREADS>(i), neuron = first_neuron + column % (COLUMNS / 2);
            const bool is_gate = column < COLUMNS / 2;
            const T* matrix = static_cast<const T*>(is_gate ? segment.gate : segment.up);
            const uint32_t stride = is_gate ? segment.gate_stride : segment.up_stride;
            b.at[i] = matrix + size_t(min_of(neuron, segment.end - 1) - segment.start) * stride;
        }
    }

    __device__ __forceinline__ void fill(Operand<ROWS>& to_a, Operand<COLUMNS>& to_b) {
        a.copy(to_a, k, columns);
        b.copy(to_b, k, columns);
        k += TILE_K;
    }

    __device__ __forceinline__ uint32_t steps() const { return steps_over(columns); }
};

// Of the rows of h that this thread copies, those at full width, as bits.
template <uint32_t ROWS, uint32_t THREADS>
__device__ __forceinline__ uint32_t full_rows(const FfnArgs& a, uint32_t first_row) {
    uint32_t full = 0;
    if (a.separate_size == 0) return full;
#pragma unroll
    for (uint32_t i = 0; i < COPIES<ROWS, THREADS>; ++i) {
        const uint32_t row = first_row + copy_row<THREADS>(i);
        full |= uint32_t(row < a.tokens && width_of_row(a, row) == a.intermediate_size) << i;
    }
    return full;
}

// Steps along h, segment by segment, up to the rows' reach in whole vectors.
template <class T>
struct Along {
    const FfnArgs& args;
    Reach reach;
    uint32_t full;          // `full_rows`
    uint32_t s = 0, k = 0;  // the next step: its segment, and its first neuron there

    __device__ __forceinline__ Along(const FfnArgs& args, const Reach& reach, uint32_t full)
        : args(args), reach(reach), full(full) {
        skip(0);
    }

    __device__ __forceinline__ uint32_t length(uint32_t s) const {
        return reach.template end<PACK<T>>(args.segments[s]) - args.segments[s].start;
    }

    __device__ __forceinline__ uint32_t steps() const {
        uint32_t steps = 0;
        for (uint32_t s = 0; s < args.segment_count; ++s) steps += steps_over(length(s));
        return steps;
    }

    __device__ __forceinline__ void advance() {
        k += TILE_K;
        if (k < length(s)) return;
        ++s;
        skip(0);
    }

    // Skips the first `steps` steps from where a segment begins, and segments that are not needed.
    __device__ __forceinline__ void skip(uint32_t steps) {
        for (; s < args.segment_count && steps >= steps_over(length(s)); ++s) steps -= steps_over(length(s));
        k = steps * TILE_K;
    }

    // this step's columns of rows from `first` on, of a matrix of `count` rows that are `stride` apart; of a thread's
    // rows, those that are bits of `wanted`
    template <uint32_t ROWS, uint32_t THREADS>
    __device__ __forceinline__ void copy(Operand<ROWS>& to, const T* matrix, size_t stride, uint32_t first,
                                         uint32_t count, uint32_t wanted = ALL) const {
        const uint32_t column = k + copy_chunk() * PACK<T>;
        const bool inside = column < length(s);
#pragma unroll
        for (uint32_t i = 0; i < COPIES<ROWS, THREADS>; ++i) {
            const uint32_t row = first + copy_row<THREADS>(i);
            const bool exists = inside && row < count && (wanted >> i & 1) != 0;
            copy_async(to.at(copy_row<THREADS>(i), copy_chunk()), exists ? matrix + row * stride + column : matrix,
                       exists ? 16 : 0);
        }
    }

    template <uint32_t ROWS, uint32_t THREADS>
    __device__ __forceinline__ void copy_h(Operand<ROWS>& to, uint32_t first_row) const {
        const Segment& segment = args.segments[s];
        const T* h = static_cast<const T*>(args.h) + segment.start;
        copy<ROWS, THREADS>(to, h, args.intermediate_size, first_row, args.tokens, served(segment, full));
    }
};

// ROWS rows of h against COLUMNS rows of down_proj.
template <class T, uint32_t ROWS, uint32_t COLUMNS, uint32_t THREADS = PREFILL_THREADS>
struct DownSource {
    Along<T> along;
    uint32_t first_row, first_column;

    __device__ __forceinline__ DownSource(const FfnArgs& args, const Reach& reach, uint32_t first_row,
                                          uint32_t first_column)
        : along(args, reach, full_rows<ROWS, THREADS>(args, first_row)),
          first_row(first_row),
          first_column(first_column) {}

    __device__ __forceinline__ void fill(Operand<ROWS>& to_a, Operand<COLUMNS>& to_b) {
        const FfnArgs& args = along.args;
        const Segment& segment = args.segments[along.s];
        along.template copy_h<ROWS, THREADS>(to_a, first_row);
        along.template copy<COLUMNS, THREADS>(to_b, static_cast<const T*>(segment.down), segment.down_stride,
                                              first_column, args.hidden_size);
        along.advance();
    }
};

// Stores two neighbours at once; p is aligned to both.
template <class T>
__device__ __forceinline__ void store2(T* p, float x, float y) {
    T pair[2];
    store(&pair[0], x);
    store(&pair[1], y);
    uint32_t bits;
    memcpy(&bits, pair, sizeof(bits));
    *reinterpret_cast<uint32_t*>(p) = bits;
}

// The reach of the 128 sorted rows from `first_row` on, of which the first is the widest.
__device__ __forceinline__ Reach reach_of_tile(const FfnArgs& a, uint32_t first_row) {
    if (a.separate_size > 0) return reach_of_rows(a, first_row, TILE);
    Reach reach(a.intermediate_size);
    reach.add(width_of_row(a, first_row));
    return reach;
}

// Two neighbouring neurons of a row of h; `gate` and `up` are pairs.
template <class T>
__device__ __forceinline__ void store_hidden(const FfnArgs& a, uint32_t row, uint32_t width, uint32_t neuron,
                                             const float* gate, const float* up) {
    float out[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) out[i] = neuron + i < width ? silu(gate[i]) * up[i] : 0.0f;
    store2(static_cast<T*>(a.h) + size_t(row) * a.intermediate_size + neuron, out[0], out[1]);
}

template <class T>
__device__ __forceinline__ void store_gate_up(const FfnArgs& a, const NeuronTile& tile, uint32_t first_row,
                                              const Accumulators& acc) {
#pragma unroll
    for (uint32_t m = 0; m < 4; ++m)
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            const uint32_t row = first_row + warp_row() + m * 16 + half * 8 + lane_id() / 4;
            if (row >= a.tokens) continue;
            const uint32_t width = a.widths[a.order[row]];
            if (!is_served(a, tile.segment, width)) continue;
#pragma unroll
            for (uint32_t n = 0; n < 2; ++n) {
                const uint32_t neuron = tile.first + warp_column() * 16 + n * 8 + lane_id() % 4 * 2;
                if (neuron >= tile.segment.end) continue;
                store_hidden<T>(a, row, width, neuron, &acc.d[m][0][n][half * 2], &acc.d[m][1][n][half * 2]);
            }
        }
}

template <class T>
__device__ __forceinline__ void store_down(const FfnArgs& a, uint32_t first_row, uint32_t first_column,
                                           const Accumulators& acc) {
#pragma unroll
    for (uint32_t m = 0; m < 4; ++m)
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            const uint32_t row = first_row + warp_row() + m * 16 + half * 8 + lane_id() / 4;
            if (row >= a.tokens) continue;
            const uint32_t token = a.order[row];
            T* y = static_cast<T*>(a.y) + size_t(token) * a.hidden_size;
#pragma unroll
            for (uint32_t g = 0; g < 2; ++g)
#pragma unroll
                for (uint32_t n = 0; n < 2; ++n) {
                    const uint32_t d = first_column + down_column(g) + n * 8 + lane_id() % 4 * 2;
                    if (d >= a.hidden_size) continue;
                    const float* pair = &acc.d[m][g][n][half * 2];
                    store2(y + d, compensated(a, pair[0], token, d), compensated(a, pair[1], token, d + 1));
                }
        }
}

// Grid (ceil(T / 128), tiles of 64 neurons in every segment).
template <class T>
__device__ __forceinline__ void prefill_gate_up(const FfnArgs& a) {
    const uint32_t first_row = blockIdx.x * TILE;
    const NeuronTile tile = neuron_tile(a, blockIdx.y, TILE / 2);
    if (tile.first >= reach_of_tile(a, first_row).of(tile.segment.serves)) return;

    GateUpSource<T, TILE, TILE> source(a, tile.segment, first_row, tile.first);
    const uint32_t column[2] = {gate_up_column(0), gate_up_column(1)};
    Accumulators acc = {};
    multiply_all<T>(source, source.steps(), column, acc);
    store_gate_up<T>(a, tile, first_row, acc);
}

// Grid (ceil(T / 128), ceil(D / 128)).
template <class T>
__device__ __forceinline__ void prefill_down(const FfnArgs& a) {
    const uint32_t first_row = blockIdx.x * TILE, first_column = blockIdx.y * TILE;
    DownSource<T, TILE, TILE> source(a, reach_of_tile(a, first_row), first_row, first_column);
    const uint32_t column[2] = {down_column(0), down_column(1)};
    Accumulators acc = {};
    multiply_all<T>(source, source.along.steps(), column, acc);
    store_down<T>(a, first_row, first_column, acc);
}
