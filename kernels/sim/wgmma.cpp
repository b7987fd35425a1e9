// wgmma.mma_async as the PTX manual defines it: D (64, N) += A (64, 16) · B (N, 16)ᵀ by a warpgroup of four warps, with
// operands in shared memory. A product may read its operands at any time between its issue and the wait for its
// group; here it does so at once or, in a lazy warp, when it is waited for. Until then its accumulators are NaN.
//
// A descriptor, by bits: 0-13 start address, 16-29 leading and 32-45 stride byte offset, each over 16; 49-51 base offset;
// 62-63 swizzle, of which 1, 128 bytes, is modelled. Rows of 128 bytes then lie in groups of eight, which are the stride
// offset apart (the leading one is not used), and bits 4-6 of an address are xored with bits 7-9, counted from a start
// at a multiple of 1024 bytes.
#include "machine.h"

namespace sim {
namespace {

constexpr unsigned WARPGROUP = 128, K = 16;

// The 16 numbers of one row of an operand.
void read_row(uint64_t descriptor, unsigned row, float (*widen)(uint16_t), float (&out)[K]) {
    auto field = [&](unsigned bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
    const uint32_t base_offset = descriptor >> 49 & 7;
    const uint32_t linear = field(0) + row / 8 * field(32) + row % 8 * 128;
    for (unsigned half = 0; half < 2; ++half) {
        const uint32_t at = linear + half * 16;
        const uint32_t address = at ^ (((at >> 7) - base_offset) & 7) << 4;
        const size_t chunk = (address - SHARED_WINDOW) / 16;
        if (address < SHARED_WINDOW || (chunk + 1) * 16 > machine.shared.size() - 1024)
            fail("wgmma: an operand lies outside shared memory");
        if (machine.writers[chunk] != 0)
            fail("wgmma: an operand was written without fence.proxy.async by its writer");
        uint16_t bits[8];
        memcpy(bits, shared_window() + chunk * 16, 16);
        for (unsigned i = 0; i < 8; ++i) out[half * 8 + i] = widen(bits[i]);
    }
}

float dot(const float (&a)[K], const float (&b)[K]) {
    float sum = 0;
    for (unsigned k = 0; k < K; ++k) sum += a[k] * b[k];
    return sum;
}

// This thread's part: of rows l / 4 and 8 below in the 16 rows of its warp, columns 2 (l % 4) and the next of each eight.
void compute(const Product& p, std::vector<float>& d) {
    const unsigned lane = machine.current % 32, warp = machine.current % WARPGROUP / 32;
    float a[2][K], b[K];
    for (unsigned half = 0; half < 2; ++half) read_row(p.a, warp * 16 + half * 8 + lane / 4, p.widen, a[half]);
    for (unsigned eight = 0; eight < p.n / 8; ++eight)
        for (unsigned i = 0; i < 2; ++i) {
            read_row(p.b, eight * 8 + lane % 4 * 2 + i, p.widen, b);
            for (unsigned half = 0; half < 2; ++half) d[eight * 4 + half * 2 + i] += dot(a[half], b);
        }
}

}  // namespace

void wgmma(const char* site, float* d, unsigned n, uint64_t a, uint64_t b, float (*widen)(uint16_t)) {
    Wgmma& state = me().wgmma;
    const uint64_t mine[2] = {a, b};
    const char* all = static_cast<const char*>(exchange(site, mine, sizeof mine));
    if (memcmp(all, mine, sizeof mine) != 0) fail("wgmma: a warp's threads have different descriptors");
    if (machine.threads % WARPGROUP != 0) fail("wgmma: the block is not in groups of 128 threads");
    if (a >> 62 != 1 || b >> 62 != 1) fail("wgmma: this swizzle is not modelled");
    if (!state.fenced) fail("wgmma: no wgmma.fence since its registers were last free");
    for (uint64_t part : {a, b, uint64_t(n)}) state.history = state.history * 0x9e3779b97f4a7c15 + part;

    auto [found, is_new] = state.running.try_emplace(d);
    if (is_new) found->second.values.assign(d, d + n / 2);
    found->second.group = state.group;
    std::fill(d, d + n / 2, NAN);
    const Product product = {d, n, a, b, widen, state.group};
    if (machine.warps[machine.current / 32].lazy)
        state.products.push_back(product);
    else
        compute(product, found->second.values);
}

void wgmma_fence(const char* site) {
    if (is_skipped(site)) return;
    meet_warp(site);
    me().wgmma.fenced = true;
}

void wgmma_commit(const char* site) {
    if (is_skipped(site)) return;
    meet_warp(site);
    ++me().wgmma.group;
}

void wgmma_wait(const char* site, unsigned leave) {
    if (is_skipped(site)) return;
    meet_warp(site);
    Wgmma& state = me().wgmma;
    auto is_over = [&](unsigned group) { return group + leave < state.group; };
    size_t done = 0;
    for (; done < state.products.size() && is_over(state.products[done].group); ++done)
        compute(state.products[done], state.running.at(state.products[done].d).values);
    state.products.erase(state.products.begin(), state.products.begin() + long(done));
    for (auto it = state.running.begin(); it != state.running.end();) {
        if (!is_over(it->second.group)) {
            ++it;
            continue;
        }
        std::copy(it->second.values.begin(), it->second.values.end(), it->first);
        it = state.running.erase(it);
        state.fenced = false;
    }
}

void proxy_fence(const char* site) {
    if (is_skipped(site)) return;
    for (size_t chunk : me().wgmma.unfenced)
        if (machine.writers[chunk] == machine.current + 1) machine.writers[chunk] = 0;
    me().wgmma.unfenced.clear();
}

uint32_t shared_address(const void* p) {
    return uint32_t(static_cast<const char*>(p) - shared_window()) + SHARED_WINDOW;
}

const char* wgmma_block_ends() {
    for (unsigned t = 0; t < machine.threads; ++t)
        if (machine.fibres[t]->wgmma.history != machine.fibres[t / WARPGROUP * WARPGROUP]->wgmma.history)
            return "the warps of a warpgroup have issued different products";
    return nullptr;
}

}  // namespace sim
