// The asynchronous tensor cores of Hopper (sm_90a). A warpgroup, four warps, multiplies operands in shared memory while its
// threads go on. Fences and waits tell when the threads may touch operands and accumulators.
//
// Used by prefill_wgmma.cuh; sim/wgmma.cpp does the same on a CPU. Test tests/prefill.rs.
#pragma once

#include "device.cuh"

constexpr uint32_t WARPGROUP = 128;

// Makes this thread's writes to shared memory visible to wgmma, of all threads that pass the next barrier with it. That
// includes asynchronous copies that it has waited for.
#ifdef DYNAMOE_SIM
#define proxy_fence() sim::proxy_fence(SIM_SITE)
#else
#define proxy_fence() asm volatile("fence.proxy.async.shared::cta;" ::: "memory")
#endif

// Hands the accumulators' registers to wgmma: before the first product, and after a thread has touched them.
#ifdef DYNAMOE_SIM
#define wgmma_fence() sim::wgmma_fence(SIM_SITE)
#else
#define wgmma_fence() asm volatile("wgmma.fence.sync.aligned;" ::: "memory")
#endif

// Ends a group of products.
#ifdef DYNAMOE_SIM
#define wgmma_commit() sim::wgmma_commit(SIM_SITE)
#else
#define wgmma_commit() asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")
#endif

// Waits for the products of all groups except the last LEAVE. Their operands may then be overwritten, and registers that
// later groups do not use are free.
#ifdef DYNAMOE_SIM
#define wgmma_wait(LEAVE) sim::wgmma_wait(SIM_SITE, LEAVE)
#else
#define wgmma_wait(LEAVE) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEAVE) : "memory")
#endif

// Rows of 128 bytes of an operand that lies at a multiple of 1024 bytes, swizzled; `row` of 16 bytes is where a multiple
// of 8 rows begins, or a column of 16 bytes in it. Eight rows follow the eight before them.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* row) {
#ifdef DYNAMOE_SIM
    const uint32_t address = sim::shared_address(row);
#else
    const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
#endif
    constexpr uint64_t SWIZZLE_128 = 1, STRIDE = 1024, UNUSED = 1;
    return SWIZZLE_128 << 62 | STRIDE / 16 << 32 | UNUSED << 16 | (address & 0x3ffff) / 16;
}

// The descriptor of the columns that are `bytes` further.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, uint32_t bytes) { return descriptor + bytes / 16; }

// d (64, N) += a (64, 16) · b (N, 16)ᵀ. Of 64 rows a warp has 16; a thread has d[4 j + 2 half + i] at row lane / 4 + 8 half
// and column 8 j + 2 (lane % 4) + i.
#ifdef DYNAMOE_SIM
template <uint32_t N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, __nv_bfloat16) {
    sim::wgmma(SIM_SITE, d, N, a, b, [](uint16_t bits) { return __bfloat162float({bits}); });
}
template <uint32_t N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, __half) {
    sim::wgmma(SIM_SITE, d, N, a, b, [](uint16_t bits) { return __half2float({bits}); });
}
template <uint32_t N>
__device__ __forceinline__ void wgmma_registers(float (&)[N]) {}
#else
// ten operands, from ten times T on, in the instruction's text and in the list of registers
#define TEXT10(T) "%" #T "0,%" #T "1,%" #T "2,%" #T "3,%" #T "4,%" #T "5,%" #T "6,%" #T "7,%" #T "8,%" #T "9,"
#define TEXT60 TEXT10() TEXT10(1) TEXT10(2) TEXT10(3) TEXT10(4) TEXT10(5)
#define TEXT120 TEXT60 TEXT10(6) TEXT10(7) TEXT10(8) TEXT10(9) TEXT10(10) TEXT10(11)
#define OUT4(d, at) "+f"(d[at]), "+f"(d[at + 1]), "+f"(d[at + 2]), "+f"(d[at + 3])
#define OUT16(d, at) OUT4(d, at), OUT4(d, at + 4), OUT4(d, at + 8), OUT4(d, at + 12)
#define OUT64(d, at) OUT16(d, at), OUT16(d, at + 16), OUT16(d, at + 32), OUT16(d, at + 48)
#define WGMMA_128(d, a, b, type)                                                                          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" TEXT60                 \
                 "%60,%61,%62,%63}, %64, %65, 1, 1, 1, 0, 0;"                                             \
                 : OUT64(d, 0)                                                                            \
                 : "l"(a), "l"(b))
#define WGMMA_256(d, a, b, type)                                                                          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" TEXT120                \
                 "%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, 1, 1, 1, 0, 0;"                   \
                 : OUT64(d, 0), OUT64(d, 64)                                                              \
                 : "l"(a), "l"(b))
template <uint32_t N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, __nv_bfloat16) {
    if constexpr (N == 256) WGMMA_256(d, a, b, "bf16");
    else WGMMA_128(d, a, b, "bf16");
}
template <uint32_t N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, __half) {
    if constexpr (N == 256) WGMMA_256(d, a, b, "f16");
    else WGMMA_128(d, a, b, "f16");
}

// Keeps the compiler from moving uses of accumulators across this point, as it does not know what wgmma_wait waits for.
template <uint32_t N>
__device__ __forceinline__ void wgmma_registers(float (&d)[N]) {
#pragma unroll
    for (uint32_t i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
#endif
