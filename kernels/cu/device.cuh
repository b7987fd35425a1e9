// What all kernels share: numbers, 16-byte loads, sums over a warp, shared memory, the instructions of tensor cores.
//
// Every kernel's test covers it.
#pragma once

#include "args.h"

#ifdef DYNAMOE_SIM
#include "sim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// At least `blocks` blocks run on a multiprocessor. Without this number, the compiler spills registers to fit more.
#define DYNAMOE_KERNEL_OF(name, Args, threads, blocks, body) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args args) { body(args); }
#endif
// At least 512 threads a multiprocessor.
#define DYNAMOE_KERNEL(name, Args, threads, body) DYNAMOE_KERNEL_OF(name, Args, threads, 512 / threads, body)

constexpr uint32_t WARP = 32;
constexpr uint32_t ALL = 0xffffffff;

// ---- numbers ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

__device__ __forceinline__ uint32_t min_of(uint32_t a, uint32_t b) { return a < b ? a : b; }
__device__ __forceinline__ uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }
__device__ __forceinline__ uint32_t round_up(uint32_t x, uint32_t to) { return (x + to - 1) / to * to; }

// ---- 16 bytes at a time ----

// Weights are read once: past the first-level cache, which holds the activations.
__device__ __forceinline__ uint4 load_weights(const void* p) {
#ifdef DYNAMOE_SIM
    sim::check_aligned(p, 16);
    uint4 v;
    memcpy(&v, p, 16);
    return v;
#else
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
    return v;
#endif
}

__device__ __forceinline__ uint4 load16(const void* p) {
#ifdef DYNAMOE_SIM
    sim::check_aligned(p, 16);
#endif
    return *static_cast<const uint4*>(p);
}

// Elements in 16 bytes.
template <class T>
constexpr uint32_t PACK = 16 / sizeof(T);

__device__ __forceinline__ void unpack(uint4 v, float (&out)[4], float) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(words[i]);
}

__device__ __forceinline__ void unpack(uint4 v, float (&out)[8], __nv_bfloat16) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
    }
}

__device__ __forceinline__ void unpack(uint4 v, float (&out)[8], __half) {
    __half halves[8];
    memcpy(halves, &v, 16);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = __half2float(halves[i]);
}

// ---- threads ----

__device__ __forceinline__ uint32_t lane_id() { return threadIdx.x % WARP; }
__device__ __forceinline__ uint32_t warp_id() { return threadIdx.x / WARP; }

// The sum over the warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

// The block's shared memory as a struct.
template <class S>
__device__ __forceinline__ S& shared_memory() {
#ifdef DYNAMOE_SIM
    return *static_cast<S*>(sim::shared(sizeof(S), alignof(S)));
#else
    // what wgmma's operands need, the most of all
    extern __shared__ __align__(1024) unsigned char dynamoe_shared[];
    return *reinterpret_cast<S*>(dynamoe_shared);
#endif
}

// ---- asynchronous copies to shared memory ----

// Fills 16 bytes of shared memory: the first `bytes`, 0 or 16, are copied, the others become zero.
__device__ __forceinline__ void copy_async(void* to, const void* from, uint32_t bytes = 16) {
#ifdef DYNAMOE_SIM
    sim::copy_async(to, from, bytes);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(bytes)
                 : "memory");
#endif
}

__device__ __forceinline__ void copy_commit() {
#ifdef DYNAMOE_SIM
    sim::copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's copies, except those of the last LEAVE commits.
#ifdef DYNAMOE_SIM
#define copy_wait(LEAVE) sim::copy_wait(SIM_SITE, LEAVE)
#else
#define copy_wait(LEAVE) asm volatile("cp.async.wait_group %0;" ::"n"(LEAVE) : "memory")
#endif

// ---- tensor cores ----

// Four 8×8 matrices of 16-bit elements; lane l holds the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef DYNAMOE_SIM
    sim::ldmatrix_x4(SIM_SITE, r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}

// d (16, 8) += a (16, 16) · b (16, 8), in fragments over the warp.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
#ifdef DYNAMOE_SIM
    sim::mma(SIM_SITE, d, a, b, [](uint16_t bits) { return __bfloat162float({bits}); });
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
#ifdef DYNAMOE_SIM
    sim::mma(SIM_SITE, d, a, b, [](uint16_t bits) { return __half2float({bits}); });
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
