// The scheduler behind sim.h, and the kernels themselves.
#include "machine.h"

#include <algorithm>
#include <cstdio>

namespace sim {

thread_local Machine machine;

namespace {

Kernel* kernels = nullptr;

[[noreturn]] void to_scheduler() { _longjmp(machine.scheduler, 1); }

void wait() {
    if (_setjmp(me().here) == 0) to_scheduler();
}

void fibre_main() {
    for (;;) {
        machine.body(machine.args);
        if (!me().wgmma.running.empty()) fail("a thread leaves with wgmma in flight");
        me().done = true;
        ++machine.finished;
        wait();
    }
}

void resume(unsigned index) {
    machine.current = index;
    Fibre& fibre = me();
    if (_setjmp(machine.scheduler) != 0) return;
    if (fibre.started) _longjmp(fibre.here, 1);
    fibre.started = true;
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get();
    fibre.start.uc_stack.ss_size = STACK;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, fibre_main, 0);
    setcontext(&fibre.start);
}

void make(const Copy& copy) {
    memset(copy.to, 0, 16);
    if (copy.bytes > 0) memcpy(copy.to, copy.from, copy.bytes);
    const size_t chunk = size_t(static_cast<char*>(copy.to) - shared_window()) / 16;
    machine.writers[chunk] = machine.current + 1;
    me().wgmma.unfenced.push_back(chunk);
}

}  // namespace

bool is_skipped(const char* site) {
    auto& sites = machine.sites;
    size_t index = 0;
    while (index < sites.size() && sites[index] != site) ++index;
    if (index == sites.size()) sites.emplace_back(site);
    return int(index) == machine.skipped;
}

void meet_warp(const char* site) {
    unsigned index = machine.current / WARP;
    Warp& warp = machine.warps[index];
    if (warp.waiting > 0 && strcmp(warp.site, site) != 0) fail("threads of a warp wait at different places");
    warp.site = site;
    if (++warp.waiting < WARP) return wait();
    warp.waiting = 0;
    for (unsigned lane = 0; lane < WARP; ++lane) {
        unsigned other = index * WARP + lane;
        if (other != machine.current) machine.ready.push_back(other);
    }
    // the last one to arrive takes its turn like the others
    machine.ready.push_back(machine.current);
    wait();
}

namespace {

void run_block(const Dim3& block, const Dim3& grid) {
    Machine& m = machine;
    m.ready.clear();
    m.waiting = m.finished = 0;
    for (Warp& warp : m.warps) {
        warp.waiting = 0;
        warp.haste = m.order();
        warp.lazy = m.order() % 2 == 0;
    }
    std::fill(m.shared.begin(), m.shared.end(), char(0xff));
    std::fill(m.writers.begin(), m.writers.end(), 0);
    for (unsigned t = 0; t < m.threads; ++t) {
        Fibre& fibre = *m.fibres[t];
        fibre.done = false;
        fibre.copies.clear();
        fibre.wgmma = {};
        fibre.thread = {{t, 0, 0}, block, {m.threads, 1, 1}, grid};
        m.ready.push_back(t);
    }
    while (!m.ready.empty() && !m.failed) {
        // of three at random the one whose warp is in the greatest haste, so that some warps run far ahead
        auto haste = [&](size_t at) { return m.warps[m.ready[at] / WARP].haste; };
        size_t pick = m.order.below(m.ready.size());
        for (int i = 0; i < 2; ++i) {
            size_t other = m.order.below(m.ready.size());
            if (haste(other) > haste(pick)) pick = other;
        }
        std::swap(m.ready[pick], m.ready.back());
        unsigned index = m.ready.back();
        m.ready.pop_back();
        resume(index);
    }
    if (m.failed) return;
    const char* what = wgmma_block_ends();
    if (m.finished != m.threads) {
        m.failed = true;
        snprintf(m.error, sizeof m.error, "%u of %u threads wait for others that have left", m.threads - m.finished,
                 m.threads);
    } else if (what != nullptr) {
        m.failed = true;
        snprintf(m.error, sizeof m.error, "%s, block (%u, %u)", what, block.x, block.y);
    }
}

}  // namespace

Kernel::Kernel(const char* name, Body body, size_t args_bytes)
    : name(name), body(body), args_bytes(args_bytes), next(kernels) {
    kernels = this;
}

const Thread& self() { return me().thread; }

void fail(const char* what) {
    const Thread& t = self();
    snprintf(machine.error, sizeof machine.error, "%s, block (%u, %u), thread %u", what, t.block.x, t.block.y,
             t.thread.x);
    machine.failed = true;
    to_scheduler();
}

void sync_block(const char* site) {
    if (is_skipped(site)) return;
    if (machine.waiting > 0 && strcmp(machine.site, site) != 0) fail("threads of a block wait at different barriers");
    machine.site = site;
    if (++machine.waiting == machine.threads) {
        machine.waiting = 0;
        for (unsigned t = 0; t < machine.threads; ++t) machine.ready.push_back(t);
    }
    wait();
}

void sync_warp(const char* site) {
    if (!is_skipped(site)) meet_warp(site);
}

const void* exchange(const char* site, const void* mine, size_t bytes) {
    Warp& warp = machine.warps[machine.current / WARP];
    if (warp.waiting == 0) ++warp.turn;
    auto& slots = warp.slots[warp.turn % 2];
    memcpy(slots[machine.current % WARP], mine, bytes);
    meet_warp(site);
    return slots;
}

void* shared(size_t bytes, size_t align) {
    if (bytes > machine.shared_bytes) fail("the kernel uses more shared memory than was asked for");
    // no better aligned than was asked for
    return shared_window() + align % 1024;
}

// At once or when it is waited for: a kernel has to be right in both cases.
void copy_async(void* to, const void* from, unsigned bytes) {
    check_aligned(to, 16);
    if (bytes > 0) check_aligned(from, 16);
    const Copy copy = {to, from, bytes, me().group};
    if (machine.order() % 2 == 0) return make(copy);
    me().copies.push_back(copy);
}

void copy_commit() { ++me().group; }

void copy_wait(const char* site, unsigned leave) {
    if (is_skipped(site)) return;
    Fibre& fibre = me();
    size_t done = 0;
    for (; done < fibre.copies.size() && fibre.copies[done].group + leave < fibre.group; ++done)
        make(fibre.copies[done]);
    fibre.copies.erase(fibre.copies.begin(), fibre.copies.begin() + long(done));
}

unsigned ballot(const char* site, bool predicate) {
    const char* all = static_cast<const char*>(exchange(site, &predicate, sizeof predicate));
    unsigned bits = 0;
    for (unsigned lane = 0; lane < WARP; ++lane) bits |= unsigned(all[64 * lane] != 0) << lane;
    return bits;
}

void mma(const char* site, float d[4], const uint32_t a[4], const uint32_t b[2], float (*widen)(uint16_t)) {
    struct Fragment {
        float a[4][2], b[2][2];
    } mine;
    for (unsigned i = 0; i < 2; ++i) {
        for (unsigned r = 0; r < 4; ++r) mine.a[r][i] = widen(uint16_t(a[r] >> 16 * i));
        for (unsigned r = 0; r < 2; ++r) mine.b[r][i] = widen(uint16_t(b[r] >> 16 * i));
    }
    const char* all = static_cast<const char*>(exchange(site, &mine, sizeof mine));
    auto fragment = [&](unsigned lane) { return reinterpret_cast<const Fragment*>(all + 64 * lane); };
    unsigned lane = machine.current % WARP;
    for (unsigned i = 0; i < 4; ++i) {
        // row of A and column of B of this element of D
        unsigned row = lane / 4, high = i / 2, column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; k += 2) {
            const float* left = fragment(row * 4 + k % 8 / 2)->a[high + k / 8 * 2];
            const float* right = fragment(column * 4 + k % 8 / 2)->b[k / 8];
            d[i] += left[0] * right[0];
            d[i] += left[1] * right[1];
        }
    }
}

void ldmatrix_x4(const char* site, uint32_t r[4], const void* row) {
    check_aligned(row, 16);
    const char* all = static_cast<const char*>(exchange(site, &row, sizeof row));
    unsigned lane = machine.current % WARP;
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        const char* from;
        memcpy(&from, all + 64 * (matrix * 8 + lane / 4), sizeof from);
        memcpy(&r[matrix], from + lane % 4 * 4, 4);
    }
}

}  // namespace sim

float __half2float(__half h) {
    int exponent = h.bits >> 10 & 31;
    float mantissa = float(h.bits & 1023), sign = h.bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * mantissa * 0x1p-24f;
    return __uint_as_float(unsigned(h.bits & 0x8000) << 16 | unsigned(h.bits & 0x7fff) << 13) * 0x1p112f;
}

__half __float2half_rn(float x) {
    uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    float y = fabsf(x);
    if (x != x) return {0x7fff};
    if (y >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    if (y < ldexpf(1, -14)) return {uint16_t(sign | uint16_t(nearbyintf(ldexpf(y, 24))))};
    int exponent;
    float mantissa = nearbyintf(ldexpf(frexpf(y, &exponent), 11));  // 1024 to 2048
    return {uint16_t(sign | (((exponent + 14) << 10) + int(mantissa) - 1024))};
}

extern "C" size_t sim_args_bytes(const char* name) {
    for (sim::Kernel* k = sim::kernels; k != nullptr; k = k->next)
        if (strcmp(k->name, name) == 0) return k->args_bytes;
    return 0;
}

// Runs a kernel; returns null or an error. `skipped` is the number of a barrier to leave out, or -1; *sites
// becomes the number of barriers that were met.
extern "C" const char* sim_launch(const char* name, const unsigned grid[2], unsigned threads, size_t shared_bytes,
                                  const void* args, uint64_t seed, int skipped, unsigned* sites) {
    using namespace sim;
    Machine& m = machine;
    Kernel* kernel = kernels;
    while (kernel != nullptr && strcmp(kernel->name, name) != 0) kernel = kernel->next;
    if (kernel == nullptr) return "no kernel of this name";
    if (threads == 0 || threads % WARP != 0 || threads > 1024) return "a block must be of 32 to 1024 threads, in warps";
    if (m.failed) m.fibres.clear();  // their stacks were left in the middle
    while (m.fibres.size() < threads) m.fibres.emplace_back(new Fibre);
    m.warps.resize(threads / WARP);
    m.shared.resize(shared_bytes + 2 * 1024);
    m.writers.resize(m.shared.size() / 16);
    m.shared_bytes = shared_bytes;
    m.body = kernel->body;
    m.args = args;
    m.threads = threads;
    m.skipped = skipped;
    m.sites.clear();
    m.failed = false;
    m.order.state = seed;
    std::vector<Dim3> blocks;
    for (unsigned y = 0; y < grid[1]; ++y)
        for (unsigned x = 0; x < grid[0]; ++x) blocks.push_back({x, y, 0});
    std::shuffle(blocks.begin(), blocks.end(), m.order);
    for (const Dim3& block : blocks)
        if (!m.failed) run_block(block, {grid[0], grid[1], 1});
    *sites = unsigned(m.sites.size());
    return m.failed ? m.error : nullptr;
}

#include "dynamoe.cu"
