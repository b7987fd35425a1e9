// Prefill with weights in GGUF's blocks: the tiles of prefill.cuh on mma.sync, with weights that are unpacked into shared
// memory as 16-bit floats. Weights of a step are loaded two steps ahead, 16 bytes at a time, and unpacked one step ahead.
// Two threads share a row; each unpacks 32 of a step's 64 columns.
//
// Plan `plan::prefill_quantized`, reference `reference::Ffn` on `reference::dequantize`, test tests/prefill_quantized.rs.
#pragma once

#include "prefill.cuh"
#include "quantized.cuh"

struct PrefillQuantizedShared {
    Operand<TILE> a[STAGES], b[2];
};

// The unsigned byte `at` of a word, as a float: its bits are the last of 2^23's.
__device__ __forceinline__ float byte_to_float(uint32_t word, uint32_t at, float minus) {
    return __uint_as_float(__byte_perm(word, 0x4b000000, 0x7440 | at)) - (8388608.0f + minus);
}

// Eight weights, scale · (byte - bias) - minimum, of two words.
template <class T>
__device__ __forceinline__ uint4 unpack8(uint32_t low, uint32_t high, float bias, float scale, float minimum) {
    T out[8];
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) store(&out[i], scale * byte_to_float(i < 4 ? low : high, i % 4, bias) - minimum);
    uint4 bits;
    memcpy(&bits, out, sizeof(bits));
    return bits;
}

// What a thread loads of a row for a step of 64 columns, its part 0 or 1, and how it unpacks that.
template <class Q>
struct Raw;

template <>
struct Raw<Q4K> {
    uint4 header, nibbles;

    __device__ __forceinline__ void load(const uint8_t* row, uint32_t step, uint32_t part) {
        const uint8_t* block = row + size_t(step / 4) * Q4K::BYTES;
        header = load16(block);
        nibbles = load_weights(block + 16 + step % 4 * 32 + part * 16);
    }

    // The low nibbles are 16 columns of the step's first sub-block, the high ones of its second.
    template <class T>
    __device__ __forceinline__ void unpack(Operand<TILE>& to, uint32_t row, uint32_t step, uint32_t part) const {
        float scale[2], minimum[2];
        Q4K::unpack_scales(header, step % 4, scale, minimum);
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t n[4] = {nibbles.x >> 4 * i & 0x0f0f0f0f, nibbles.y >> 4 * i & 0x0f0f0f0f,
                                   nibbles.z >> 4 * i & 0x0f0f0f0f, nibbles.w >> 4 * i & 0x0f0f0f0f};
#pragma unroll
            for (uint32_t c = 0; c < 2; ++c)
                *to.at(row, i * 4 + part * 2 + c) = unpack8<T>(n[2 * c], n[2 * c + 1], 0.0f, scale[i], minimum[i]);
        }
    }
};

template <>
struct Raw<Q8_0> {
    uint4 chunks[3];  // 34 bytes that start at a multiple of 2

    __device__ __forceinline__ static uint32_t start(uint32_t step, uint32_t part) { return (step * 2 + part) * Q8_0::BYTES; }

    // A row ends at a multiple of 16 bytes. If its last block needs only two chunks, a third would lie beyond the row.
    __device__ __forceinline__ void load(const uint8_t* row, uint32_t step, uint32_t part) {
        const uint32_t first = start(step, part) / 16 * 16;
#pragma unroll
        for (uint32_t c = 0; c < 3; ++c)
            if (first + c * 16 < start(step, part) + Q8_0::BYTES) chunks[c] = load_weights(row + first + c * 16);
    }

    template <class T>
    __device__ __forceinline__ void unpack(Operand<TILE>& to, uint32_t row, uint32_t step, uint32_t part) const {
        const uint32_t offset = start(step, part) % 16;
        uint32_t w[12];
        memcpy(w, chunks, sizeof(w));
        // shift by the offset's words, in two steps, since registers cannot be indexed
#pragma unroll
        for (uint32_t i = 0; i < 10; ++i) w[i] = offset & 8 ? w[i + 2] : w[i];
#pragma unroll
        for (uint32_t i = 0; i < 9; ++i) w[i] = offset & 4 ? w[i + 1] : w[i];
        const bool odd = offset & 2;
        const float d = half_bits(odd ? w[0] >> 16 : w[0]);
        // signed bytes as unsigned ones, 128 more
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) w[i] = (odd ? w[i + 1] : __funnelshift_r(w[i], w[i + 1], 16)) ^ 0x80808080;
#pragma unroll
        for (uint32_t c = 0; c < 4; ++c)
            *to.at(row, part * 4 + c) = unpack8<T>(w[2 * c], w[2 * c + 1], 128.0f, d, 0.0f);
    }
};

// `source.next(a, raw)` copies the next step's rows of activations, loads this thread's part of its weights, and returns
// that step's number within the row.
template <class Q, class T, class Source>
__device__ __forceinline__ void multiply_quantized(Source& source, uint32_t steps, const uint32_t (&column)[2],
                                                   Accumulators& acc) {
    PrefillQuantizedShared& shared = shared_memory<PrefillQuantizedShared>();
    const uint32_t row = threadIdx.x / 2, part = threadIdx.x % 2;
    Raw<Q> raw = {};
    uint32_t loaded = 0;
    for (uint32_t s = 0; s + 1 < STAGES; ++s) {
        if (s == 1 && steps > 0) raw.template unpack<T>(shared.b[0], row, loaded, part);
        if (s < steps) loaded = source.next(shared.a[s], raw);
        copy_commit();
    }
    for (uint32_t step = 0; step < steps; ++step) {
        copy_wait(1);  // STAGES - 2
        // this step's operands are there, and all warps have left those that are made next
        __syncthreads();
        if (step + 1 < steps) raw.template unpack<T>(shared.b[(step + 1) % 2], row, loaded, part);
        if (step + 2 < steps) loaded = source.next(shared.a[(step + 2) % STAGES], raw);
        copy_commit();
        multiply<T>(shared.a[step % STAGES], shared.b[step % 2], column, acc);
    }
}

// Rows of x, and a row of gate_proj or up_proj.
template <class Q, class T>
struct QuantizedGateUpSource {
    Rows<T, TILE, PREFILL_THREADS> x;
    const uint8_t* row;
    uint32_t columns, step = 0;

    __device__ __forceinline__ QuantizedGateUpSource(const FfnArgs& args, const NeuronTile& tile, uint32_t first_row)
        : x(rows_of_x<T, TILE, PREFILL_THREADS>(args, first_row)), columns(args.hidden_size) {
        const uint32_t r = threadIdx.x / 2, neuron = tile.first + r % (TILE / 2);
        const bool is_gate = r < TILE / 2;
        const Segment& segment = tile.segment;
        const size_t stride = size_t(is_gate ? segment.gate_stride : segment.up_stride) * Q::BYTES;
        const uint8_t* matrix = static_cast<const uint8_t*>(is_gate ? segment.gate : segment.up);
        row = matrix + (min_of(neuron, segment.end - 1) - segment.start) * stride;
    }

    __device__ __forceinline__ uint32_t next(Operand<TILE>& to, Raw<Q>& raw) {
        x.copy(to, step * TILE_K + copy_chunk() * PACK<T>, columns);
        raw.load(row, step, threadIdx.x % 2);
        return step++;
    }
};

// Rows of h, and a row of down_proj.
template <class Q, class T>
struct QuantizedDownSource {
    Along<T> along;
    uint32_t first_row, column;

    __device__ __forceinline__ QuantizedDownSource(const FfnArgs& args, uint32_t first_row, uint32_t first_column)
        : along(args, reach_of_tile(args, first_row), full_rows<TILE, PREFILL_THREADS>(args, first_row)),
          first_row(first_row),
          column(min_of(first_column + threadIdx.x / 2, args.hidden_size - 1)) {}

    __device__ __forceinline__ uint32_t next(Operand<TILE>& to, Raw<Q>& raw) {
        const Segment& segment = along.args.segments[along.s];
        const uint32_t step = along.k / TILE_K;
        along.template copy_h<TILE, PREFILL_THREADS>(to, first_row);
        raw.load(static_cast<const uint8_t*>(segment.down) + size_t(column) * segment.down_stride * Q::BYTES, step,
                 threadIdx.x % 2);
        along.advance();
        return step;
    }
};

// Grid (ceil(T / 128), tiles of 64 neurons in every segment).
template <class Q, class T>
__device__ __forceinline__ void prefill_quantized_gate_up(const FfnArgs& a) {
    const uint32_t first_row = blockIdx.x * TILE;
    const NeuronTile tile = neuron_tile(a, blockIdx.y, TILE / 2);
    if (tile.first >= reach_of_tile(a, first_row).of(tile.segment.serves)) return;

    QuantizedGateUpSource<Q, T> source(a, tile, first_row);
    const uint32_t column[2] = {gate_up_column(0), gate_up_column(1)};
    Accumulators acc = {};
    multiply_quantized<Q, T>(source, steps_over(a.hidden_size), column, acc);
    store_gate_up<T>(a, tile, first_row, acc);
}

// Grid (ceil(T / 128), ceil(D / 128)).
template <class Q, class T>
__device__ __forceinline__ void prefill_quantized_down(const FfnArgs& a) {
    const uint32_t first_row = blockIdx.x * TILE, first_column = blockIdx.y * TILE;
    QuantizedDownSource<Q, T> source(a, first_row, first_column);
    const uint32_t column[2] = {down_column(0), down_column(1)};
    Accumulators acc = {};
    multiply_quantized<Q, T>(source, source.along.steps(), column, acc);
    store_down<T>(a, first_row, first_column, acc);
}
