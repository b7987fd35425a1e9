// Stands in for CUDA: kernels/cu compiles against it with any C++17 compiler. sim.cpp runs each CUDA thread of a
// block as a fibre, in a seeded order, and reports what a GPU would answer with a hang or with garbage: divergent
// barriers, misaligned vectors, more shared memory than was asked for.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct Dim3 {
    unsigned x, y, z;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};

namespace sim {

struct Thread {
    Dim3 thread, block, block_dim, grid_dim;
};

const Thread& self();

// Waits for every thread of the block, or of the warp; `site` tells barriers apart.
void sync_block(const char* site);
void sync_warp(const char* site);

// Hands the warp's 32 threads each other's `bytes` (at most 64) of `mine`; valid until the next call.
const void* exchange(const char* site, const void* mine, size_t bytes);

// The block's shared memory, filled with NaN before the block starts, at a multiple of `align`.
void* shared(size_t bytes, size_t align);
// An address in shared memory as the device numbers it.
uint32_t shared_address(const void* p);

void copy_async(void* to, const void* from, unsigned bytes);
void copy_commit();
void copy_wait(const char* site, unsigned leave);

[[noreturn]] void fail(const char* what);

inline void check_aligned(const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("misaligned vector access");
}

template <class T>
T shuffle(const char* site, T value, int lane) {
    static_assert(sizeof(T) <= 64, "");
    const char* all = static_cast<const char*>(exchange(site, &value, sizeof(T)));
    T out;
    memcpy(&out, all + 64 * (lane & 31), sizeof(T));
    return out;
}

unsigned ballot(const char* site, bool predicate);

// The fragments of mma.m16n8k16 and ldmatrix.x4, as the PTX manual lays them out over a warp.
void mma(const char* site, float d[4], const uint32_t a[4], const uint32_t b[2], float (*widen)(uint16_t));
void ldmatrix_x4(const char* site, uint32_t r[4], const void* row);

// wgmma.mma_async m64nNk16 and what orders it, as the PTX manual defines them for a warp of a warpgroup; see wgmma.cpp.
// Operands lie in shared memory, with K along their rows, where the descriptors say.
void wgmma(const char* site, float* d, unsigned n, uint64_t a, uint64_t b, float (*widen)(uint16_t));
void wgmma_fence(const char* site);
void wgmma_commit(const char* site);
void wgmma_wait(const char* site, unsigned leave);
// fence.proxy.async: what this thread has written becomes visible to wgmma.
void proxy_fence(const char* site);

// Kernels by name.
using Body = void (*)(const void* args);
struct Kernel {
    Kernel(const char* name, Body body, size_t args_bytes);
    const char* name;
    Body body;
    size_t args_bytes;
    Kernel* next;
};

}  // namespace sim

#define SIM_TEXT2(x) #x
#define SIM_TEXT(x) SIM_TEXT2(x)
#define SIM_SITE __FILE__ ":" SIM_TEXT(__LINE__)

#define threadIdx (sim::self().thread)
#define blockIdx (sim::self().block)
#define blockDim (sim::self().block_dim)
#define gridDim (sim::self().grid_dim)
#define __syncthreads() sim::sync_block(SIM_SITE)
#define __syncwarp() sim::sync_warp(SIM_SITE)
#define __shfl_xor_sync(mask, v, m) sim::shuffle(SIM_SITE, v, int(threadIdx.x % 32) ^ (m))
#define __shfl_sync(mask, v, lane) sim::shuffle(SIM_SITE, v, lane)
#define __ballot_sync(mask, p) sim::ballot(SIM_SITE, p)
// one operating system thread runs all fibres, and blocks one after the other
#define __threadfence()

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += int8_t(a >> 8 * i) * int8_t(b >> 8 * i);
    return c;
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
    return unsigned((uint64_t(hi) << 32 | lo) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = uint64_t(y) << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) out |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline float __expf(float x) { return expf(x); }
inline float __uint_as_float(unsigned x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
template <class T>
T atomicAdd(T* p, T v) {
    return std::exchange(*p, T(*p + v));
}

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
float __half2float(__half h);
__half __float2half_rn(float x);
inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float(unsigned(b.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    unsigned u;
    memcpy(&u, &x, 4);
    if (x != x) return {0x7fff};
    return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

// A kernel with one argument, a struct, by value.
#define DYNAMOE_KERNEL_OF(name, Args, threads, blocks, body)                       \
    static void name(const void* args) { body(*static_cast<const Args*>(args)); } \
    static sim::Kernel kernel_##name(#name, name, sizeof(Args));
