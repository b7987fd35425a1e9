// The state of the simulated machine, for sim.cpp and wgmma.cpp.
#pragma once

#include "sim.h"

#include <csetjmp>
#include <map>
#include <memory>
#include <string>
#include <ucontext.h>
#include <vector>

namespace sim {

constexpr size_t STACK = 128 * 1024;
constexpr unsigned WARP = 32;

struct Copy {
    void* to;
    const void* from;
    unsigned bytes;
    unsigned group;
};

// What a thread has issued to the asynchronous tensor cores.
struct Product {
    float* d;
    unsigned n;
    uint64_t a, b;
    float (*widen)(uint16_t);
    unsigned group;
};
struct Accumulators {
    std::vector<float> values;
    unsigned group;  // of the last product that uses them
};
struct Wgmma {
    bool fenced = false;
    unsigned group = 0;
    std::vector<Product> products;           // issued, not computed
    std::map<float*, Accumulators> running;  // registers that belong to the tensor cores for now
    uint64_t history = 0;
    std::vector<size_t> unfenced;  // 16-byte chunks of shared memory that this thread wrote
};

struct Fibre {
    std::unique_ptr<char[]> stack{new char[STACK]};
    ucontext_t start;
    jmp_buf here;
    bool started = false, done = false;
    Thread thread;
    // asynchronous copies that have not happened yet
    std::vector<Copy> copies;
    unsigned group = 0;
    Wgmma wgmma;
};

struct Warp {
    unsigned waiting = 0;
    const char* site = nullptr;
    // two, as a thread may enter the next exchange while others still read this one
    alignas(16) char slots[2][WARP][64];
    unsigned turn = 0;
    uint64_t haste = 0;
    bool lazy = false;  // wgmma reads its operands as late as it may
};

// SplitMix64: order is drawn three times for each step of a thread.
struct Order {
    using result_type = uint64_t;
    uint64_t state = 0;
    static constexpr uint64_t min() { return 0; }
    static constexpr uint64_t max() { return UINT64_MAX; }
    uint64_t operator()() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    unsigned below(size_t n) { return unsigned(((*this)() >> 32) * n >> 32); }
};

struct Machine {
    std::vector<std::unique_ptr<Fibre>> fibres;
    std::vector<Warp> warps;
    std::vector<unsigned> ready;
    std::vector<char> shared;
    // for each chunk of 16 bytes: 1 + the thread that wrote it and has not fenced that for wgmma, or 0
    std::vector<unsigned> writers;
    std::vector<std::string> sites;
    Order order;
    jmp_buf scheduler;
    Body body = nullptr;
    const void* args = nullptr;
    unsigned current = 0, threads = 0, waiting = 0, finished = 0;
    const char* site = nullptr;
    int skipped = -1;
    size_t shared_bytes = 0;
    char error[256];
    bool failed = false;
};

extern thread_local Machine machine;

inline Fibre& me() { return *machine.fibres[machine.current]; }

// Numbers barriers in the order in which they are met; true for the one to leave out.
bool is_skipped(const char* site);
void meet_warp(const char* site);

// Where shared memory begins on this machine, at a multiple of 1024, and where on the device: its first KiB is the
// system's.
inline char* shared_window() {
    char* data = machine.shared.data();
    return data + (1024 - reinterpret_cast<uintptr_t>(data) % 1024) % 1024;
}
constexpr uint32_t SHARED_WINDOW = 1024;

// Says whether the warpgroups of the block, of 128 threads each, have issued the same products in all warps.
const char* wgmma_block_ends();

}  // namespace sim
