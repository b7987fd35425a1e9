// Decoding with weights in GGUF's blocks, as an engine holds them. Activations are quantized too, to 8 bits in blocks of
// 32, as in llama.cpp's and candle's kernels for the GPU. Four products are then one instruction (dp4a). In f32, unpacking
// 4-bit weights would take longer than reading them.
//
//     Q8_0: 32 weights in 34 bytes, d (f16), q[32]:           w = d · q
//     Q4K:  256 weights in 144 bytes, d, dmin (f16), twelve bytes with 8 scales and 8 minima of 6 bits, 4-bit q:
//           w = d · scale · q - dmin · minimum
//
// Columns are multiples of 256, so rows are whole 16 bytes.
//
// Plans `plan::quantize` and `plan::decode_quantized`, references `reference::quantize`, `reference::dequantize` and
// `reference::Ffn`, test tests/quantized.rs.
#pragma once

#include "decode.cuh"

constexpr uint32_t SUPER_BLOCK = 256;
constexpr uint32_t QUANTIZE_THREADS = 256;

// Grid (ceil(K / 256), T): a warp for each block of 32.
template <class T>
__device__ __forceinline__ void quantize(const QuantizeArgs& a) {
    const uint32_t token = blockIdx.y, k = blockIdx.x * QUANTIZE_THREADS + threadIdx.x;
    if (k - lane_id() >= a.columns) return;
    if (a.widths != nullptr) {
        const uint32_t first = token / 8 * 8, end = min_of(first + 8, a.tokens);
        Reach reach(a.columns);
        for (uint32_t t = first; t < end; ++t) reach.add(a.widths[t]);
        const uint32_t list = a.widths[token] == a.columns ? FULL_WIDTH : BELOW_FULL_WIDTH;
        // the same for the whole warp, as separate weights are in whole blocks
        const uint32_t width = reach.of(k < a.separate_size ? list : ALL_TOKENS);
        if (k - lane_id() >= round_up(width, SUPER_BLOCK)) return;
    }
    const float x = to_float(static_cast<const T*>(a.x)[size_t(token) * a.x_stride + k]);
    float largest = fabsf(x);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, step));
    const float scale = largest / 127.0f;
    const int q = scale > 0.0f ? __float2int_rn(x / scale) : 0;
    int sum = q;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    a.out.q[size_t(token) * a.columns + k] = static_cast<int8_t>(q);
    if (lane_id() == 0) a.out.scales[size_t(token) * (a.columns / 32) + k / 32] = scale;
    if (lane_id() % 16 == 0) a.out.sums[size_t(token) * (a.columns / 16) + k / 16] = scale * float(sum);
}

// Quantized rows from a column on; `columns` is their stride.
struct Activations {
    const int8_t* q;
    const float* scales;
    const float* sums;
    uint32_t columns;

    __device__ __forceinline__ Activations(const Quantized& x, uint32_t token, uint32_t column, uint32_t columns)
        : q(x.q + size_t(token) * columns + column),
          scales(x.scales + size_t(token) * (columns / 32) + column / 32),
          sums(x.sums + size_t(token) * (columns / 16) + column / 16),
          columns(columns) {}
};

// Four chunks of four products.
__device__ __forceinline__ int dot16(uint4 a, uint4 b) {
    int sum = __dp4a(int(a.x), int(b.x), 0);
    sum = __dp4a(int(a.y), int(b.y), sum);
    sum = __dp4a(int(a.z), int(b.z), sum);
    return __dp4a(int(a.w), int(b.w), sum);
}

__device__ __forceinline__ float half_bits(uint32_t bits) {
    const uint16_t low = static_cast<uint16_t>(bits);
    __half h;
    memcpy(&h, &low, 2);
    return __half2float(h);
}

struct Q4K {
    static constexpr uint32_t WEIGHTS = 256, BYTES = 144;
    template <uint32_t ROWS>
    struct Shared {};

    // Eight lanes share a block: each takes 16 bytes, whose low nibbles are 16 weights of sub-block 2g and whose
    // high nibbles are 16 of sub-block 2g + 1.
    template <uint32_t ROWS, uint32_t TOKENS>
    static __device__ __forceinline__ void dot_rows(const uint8_t* const (&rows)[ROWS], const Activations& x,
                                                    uint32_t length, uint32_t served, float (&sums)[ROWS][TOKENS],
                                                    Shared<ROWS>*) {
        constexpr uint32_t UNROLL = 2;
        const uint32_t part = lane_id() % 8, g = part / 2, half = part % 2;
        for (uint32_t start = lane_id() / 8; start * WEIGHTS < length; start += 4 * UNROLL) {
            uint4 header[UNROLL][ROWS], nibbles[UNROLL][ROWS];
#pragma unroll
            for (uint32_t u = 0; u < UNROLL; ++u)
#pragma unroll
                for (uint32_t r = 0; r < ROWS; ++r) {
                    const uint32_t block = start + 4 * u;
                    if (block * WEIGHTS >= length) continue;
                    const uint8_t* from = rows[r] + size_t(block) * BYTES;
                    header[u][r] = load16(from);
                    nibbles[u][r] = load_weights(from + 16 + part * 16);
                }
#pragma unroll
            for (uint32_t u = 0; u < UNROLL; ++u) {
                const uint32_t block = start + 4 * u;
                if (block * WEIGHTS >= length) break;
                const uint32_t k = block * WEIGHTS + g * 64 + half * 16;
#pragma unroll
                for (uint32_t r = 0; r < ROWS; ++r) {
                    float scale[2], minimum[2];
                    unpack_scales(header[u][r], g, scale, minimum);
                    const uint4 n = nibbles[u][r];
                    constexpr uint32_t LOW = 0x0f0f0f0f;
                    const uint4 low = {n.x & LOW, n.y & LOW, n.z & LOW, n.w & LOW};
                    const uint4 high = {n.x >> 4 & LOW, n.y >> 4 & LOW, n.z >> 4 & LOW, n.w >> 4 & LOW};
#pragma unroll
                    for (uint32_t t = 0; t < TOKENS; ++t) {
                        if (served >> t == 0) break;
                        if ((served >> t & 1) == 0) continue;
                        const int8_t* q = x.q + size_t(t) * x.columns + k;
                        const float* scales = x.scales + size_t(t) * (x.columns / 32) + k / 32;
                        const float* halves = x.sums + size_t(t) * (x.columns / 16) + k / 16;
                        sums[r][t] += scale[0] * scales[0] * float(dot16(low, load16(q))) +
                                      scale[1] * scales[1] * float(dot16(high, load16(q + 32))) -
                                      minimum[0] * halves[0] - minimum[1] * halves[2];
                    }
                }
            }
        }
    }

    // Scales and minima of sub-blocks 2g and 2g + 1. Those of the first four lie in the low six bits of bytes 0 to 3
    // and 4 to 7; the last four have their low nibbles in bytes 8 to 11 and their high bits on top of the first.
    static __device__ __forceinline__ void unpack_scales(uint4 header, uint32_t g, float (&scale)[2],
                                                         float (&minimum)[2]) {
        const float d = half_bits(header.x), dmin = half_bits(header.x >> 16);
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t shift = 8 * ((2 * g + i) % 4);
            const uint32_t a = header.y >> shift, b = header.z >> shift, c = header.w >> shift;
            scale[i] = d * float(g < 2 ? a & 63 : (c & 15) | (a >> 6 & 3) << 4);
            minimum[i] = dmin * float(g < 2 ? b & 63 : (c >> 4 & 15) | (b >> 6 & 3) << 4);
        }
    }
};

struct Q8_0 {
    static constexpr uint32_t WEIGHTS = 32, BYTES = 34;
    // a warp takes 32 blocks at a time, which are not aligned: they pass through shared memory
    static constexpr uint32_t STEP = WARP * WEIGHTS, STEP_BYTES = WARP * BYTES;
    template <uint32_t ROWS>
    struct Shared {
        uint4 chunks[2][ROWS][STEP_BYTES / 16 + 1];  // and one word to read past the last block
    };

    template <uint32_t ROWS>
    static __device__ __forceinline__ void fetch(const uint8_t* const (&rows)[ROWS], uint32_t length, uint32_t step,
                                                 Shared<ROWS>* shared) {
        if (step * STEP < length) {
            const uint32_t bytes = min_of(STEP, length - step * STEP) / WEIGHTS * BYTES;
#pragma unroll
            for (uint32_t r = 0; r < ROWS; ++r)
                for (uint32_t c = lane_id(); c < bytes / 16; c += WARP)
                    copy_async(&shared->chunks[step % 2][r][c], rows[r] + size_t(step) * STEP_BYTES + c * 16);
        }
        copy_commit();
    }

    template <uint32_t ROWS, uint32_t TOKENS>
    static __device__ __forceinline__ void dot_rows(const uint8_t* const (&rows)[ROWS], const Activations& x,
                                                    uint32_t length, uint32_t served, float (&sums)[ROWS][TOKENS],
                                                    Shared<ROWS>* shared) {
        fetch(rows, length, 0, shared);
        for (uint32_t step = 0; step * STEP < length; ++step) {
            fetch(rows, length, step + 1, shared);
            copy_wait(1);
            __syncwarp();
            const uint32_t k = step * STEP + lane_id() * WEIGHTS;
            if (k < length) {
#pragma unroll
                for (uint32_t r = 0; r < ROWS; ++r) {
                    const uint32_t* words = reinterpret_cast<const uint32_t*>(shared->chunks[step % 2][r]);
                    block_dot(words + lane_id() * BYTES / 4, lane_id() % 2 == 1, x, k, served, sums[r]);
                }
            }
            __syncwarp();  // before the next copies come here
        }
    }

    // One block, which starts in the middle of the first word if `odd`.
    template <uint32_t TOKENS>
    static __device__ __forceinline__ void block_dot(const uint32_t* words, bool odd, const Activations& x, uint32_t k,
                                                     uint32_t served, float (&sums)[TOKENS]) {
        const float d = half_bits(odd ? words[0] >> 16 : words[0]);
        const uint32_t shift = odd ? 0 : 16;
        words += odd;
        uint32_t q[8];
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) q[i] = __funnelshift_r(words[i], words[i + 1], shift);
#pragma unroll
        for (uint32_t t = 0; t < TOKENS; ++t) {
            if (served >> t == 0) break;
            if ((served >> t & 1) == 0) continue;
            const int8_t* xq = x.q + size_t(t) * x.columns + k;
            const int dot = dot16({q[0], q[1], q[2], q[3]}, load16(xq)) + dot16({q[4], q[5], q[6], q[7]}, load16(xq + 16));
            sums[t] += d * x.scales[size_t(t) * (x.columns / 32) + k / 32] * float(dot);
        }
    }
};

// The warp's part of the block's shared memory.
template <class Q, uint32_t ROWS>
__device__ __forceinline__ typename Q::template Shared<ROWS>* warp_shared() {
    struct All {
        typename Q::template Shared<ROWS> warps[DECODE_THREADS / WARP];
    };
    return &shared_memory<All>().warps[warp_id()];
}

// h in f32. Grid (tiles of 4 neurons in every segment, ceil(T / TOKENS)): a warp for each neuron.
template <class Q, uint32_t TOKENS>
__device__ __forceinline__ void quantized_gate_up(const FfnArgs& a) {
    const Group group(a, TOKENS);
    const NeuronTile tile = neuron_tile(a, blockIdx.x, DECODE_ROWS);
    const Segment& segment = tile.segment;
    const uint32_t neuron = tile.first + warp_id(), served = group.served(segment);
    if (neuron >= group.reach.end<SUPER_BLOCK>(segment)) return;

    const size_t row = neuron - segment.start;
    const uint8_t* const rows[2] = {static_cast<const uint8_t*>(segment.gate) + row * segment.gate_stride * Q::BYTES,
                                    static_cast<const uint8_t*>(segment.up) + row * segment.up_stride * Q::BYTES};
    float sums[2][TOKENS] = {};
    const Activations x(a.xq, group.first, 0, a.hidden_size);
    Q::dot_rows(rows, x, a.hidden_size, served, sums, warp_shared<Q, 2>());
    sum_all(sums);
#pragma unroll
    for (uint32_t t = 0; t < TOKENS; ++t) {
        if (lane_id() != t || (served >> t & 1) == 0) continue;
        float* h = static_cast<float*>(a.h) + size_t(group.first + t) * a.intermediate_size + neuron;
        *h = neuron < a.widths[group.first + t] ? silu(sums[0][t]) * sums[1][t] : 0.0f;
    }
}

// Grid (ceil(D / 4), ceil(T / TOKENS)): a warp for each output.
template <class Q, class T, uint32_t TOKENS>
__device__ __forceinline__ void quantized_down(const FfnArgs& a) {
    const Group group(a, TOKENS);
    const uint32_t column = blockIdx.x * DECODE_ROWS + warp_id();
    if (column >= a.hidden_size) return;

    float sums[1][TOKENS] = {};
    for (uint32_t s = 0; s < a.segment_count; ++s) {
        const Segment& segment = a.segments[s];
        const uint32_t length = group.reach.end<SUPER_BLOCK>(segment) - segment.start;
        const uint8_t* const rows[1] = {static_cast<const uint8_t*>(segment.down) +
                                        size_t(column) * segment.down_stride * Q::BYTES};
        const Activations h(a.hq, group.first, segment.start, a.intermediate_size);
        Q::dot_rows(rows, h, length, group.served(segment), sums, warp_shared<Q, 1>());
    }
    sum_all(sums);
#pragma unroll
    for (uint32_t t = 0; t < TOKENS; ++t) {
        if (lane_id() != t || t >= group.tokens) continue;
        T* y = static_cast<T*>(a.y) + size_t(group.first + t) * a.hidden_size + column;
        store(y, compensated(a, sums[0][t], group.first + t, column));
    }
}
