//! Products of one packed group of 16 rows with a few tokens, for each type of weights and each processor.

use std::sync::OnceLock;

use super::format::{Blocks, Format, LINE, Q4_0, Q4K, Q5K, Q6K, Q8_0};
use super::input::{Encoded, Encoding, Panel, TILE, encode};
use super::lanes::{LANES, Lanes, Portable};

/// Sums of 16 rows for each token of a tile.
pub(super) type Sums = [[f32; LANES]; TILE];

/// A variant of the kernels that this processor can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Isa(Variant);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Some blocks of a group.
#[derive(Clone, Copy)]
pub(super) struct Group {
    pub format: Format,
    pub data: *const u8,
    pub blocks: usize,
}

impl Isa {
    /// The variants that this processor can run, fastest first.
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni")
            {
                found.push(Self(Variant::Avx512));
            }
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                found.push(Self(Variant::Avx2));
            }
        }
        found.push(Self(Variant::Portable));
        found
    }

    /// The fastest.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }

    /// For benchmarks and logs.
    pub fn name(self) -> &'static str {
        match self.0 {
            Variant::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Variant::Avx512 => "avx512-vnni",
        }
    }

    /// Adds the products of a group with as many tokens as `sums` holds, at most [`TILE`].
    ///
    /// # Safety
    /// `group` and `panel` must hold as many blocks as `group` says, `panel` as many tokens.
    pub unsafe fn multiply(self, group: Group, panel: Panel, sums: &mut [[f32; LANES]]) {
        let (tokens, mut done) = (sums.len(), 0);
        while done < tokens {
            let count = [12, 8, 4, 2, 1].into_iter().find(|&t| t <= tokens - done).unwrap_or(1);
            let panel = Panel {
                words: panel.words.wrapping_add(done),
                scales: panel.scales.wrapping_add(done),
                sums: panel.sums.wrapping_add(done),
                ..panel
            };
            // SAFETY: passed on
            unsafe {
                match count {
                    12 => self.tile::<12>(group, panel, &mut sums[done..]),
                    8 => self.tile::<8>(group, panel, &mut sums[done..]),
                    4 => self.tile::<4>(group, panel, &mut sums[done..]),
                    2 => self.tile::<2>(group, panel, &mut sums[done..]),
                    _ => self.tile::<1>(group, panel, &mut sums[done..]),
                }
            }
            done += count;
        }
    }

    unsafe fn tile<const T: usize>(self, group: Group, panel: Panel, sums: &mut [[f32; LANES]]) {
        let sums = sums.first_chunk_mut::<T>().expect("sums have room for a tile");
        // SAFETY: passed on
        unsafe {
            match group.format {
                Format::F32 => match self.0 {
                    Variant::Portable => floats_portable(group, panel, sums),
                    #[cfg(target_arch = "x86_64")]
                    Variant::Avx2 => super::x86::floats_avx2(group, panel, sums),
                    #[cfg(target_arch = "x86_64")]
                    Variant::Avx512 => super::x86::floats_avx512(group, panel, sums),
                },
                Format::Q4_0 => self.blocks::<Q4_0, T>(group, panel, sums),
                Format::Q8_0 => self.blocks::<Q8_0, T>(group, panel, sums),
                Format::Q4K => self.blocks::<Q4K, T>(group, panel, sums),
                Format::Q5K => self.blocks::<Q5K, T>(group, panel, sums),
                Format::Q6K => self.blocks::<Q6K, T>(group, panel, sums),
            }
        }
    }

    unsafe fn blocks<B: Blocks, const T: usize>(
        self,
        group: Group,
        panel: Panel,
        sums: &mut [[f32; LANES]; T],
    ) {
        // SAFETY: passed on
        unsafe {
            match self.0 {
                Variant::Portable => blocks_portable::<B, T>(group, panel, sums),
                #[cfg(target_arch = "x86_64")]
                Variant::Avx2 => super::x86::blocks_avx2::<B, T>(group, panel, sums),
                #[cfg(target_arch = "x86_64")]
                Variant::Avx512 => super::x86::blocks_avx512::<B, T>(group, panel, sums),
            }
        }
    }

    /// # Safety
    /// See [`encode`].
    pub unsafe fn encode(self, encoding: Encoding, x: &[f32], out: &Encoded) {
        // SAFETY: passed on
        unsafe {
            match self.0 {
                Variant::Portable => encode(encoding, x, out),
                #[cfg(target_arch = "x86_64")]
                Variant::Avx2 => super::x86::encode_avx2(encoding, x, out),
                #[cfg(target_arch = "x86_64")]
                Variant::Avx512 => super::x86::encode_avx512(encoding, x, out),
            }
        }
    }

    /// `Σ a_i · b_i`
    pub fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        match self.0 {
            // SAFETY: arrays need no features
            Variant::Portable => unsafe { dot::<Portable>(a, b) },
            // SAFETY: this variant exists only where the processor has it
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2 => unsafe { super::x86::dot_avx2(a, b) },
            // SAFETY: as above
            #[cfg(target_arch = "x86_64")]
            Variant::Avx512 => unsafe { super::x86::dot_avx512(a, b) },
        }
    }

    /// `silu(gate) ∘ up` into `gate`.
    pub fn swiglu(self, gate: &mut [[f32; LANES]], up: &[[f32; LANES]]) {
        match self.0 {
            Variant::Portable => swiglu(gate, up),
            // SAFETY: this variant exists only where the processor has it
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2 => unsafe { super::x86::swiglu_avx2(gate, up) },
            // SAFETY: as above
            #[cfg(target_arch = "x86_64")]
            Variant::Avx512 => unsafe { super::x86::swiglu_avx512(gate, up) },
        }
    }
}

#[inline(always)]
pub(super) fn swiglu(gate: &mut [[f32; LANES]], up: &[[f32; LANES]]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        for (gate, &up) in gate.iter_mut().zip(up) {
            *gate *= crate::math::sigmoid(*gate) * up;
        }
    }
}

/// Not inlined: where the compiler may use the processor's own vectors, it computes the addresses of this variant
/// before it knows which variant runs.
#[inline(never)]
unsafe fn blocks_portable<B: Blocks, const T: usize>(
    group: Group,
    panel: Panel,
    sums: &mut [[f32; LANES]; T],
) {
    // SAFETY: passed on
    unsafe { blocks::<Portable, B, T>(group, panel, sums) }
}

/// As [`blocks_portable`].
#[inline(never)]
unsafe fn floats_portable<const T: usize>(group: Group, panel: Panel, sums: &mut [[f32; LANES]; T]) {
    // SAFETY: passed on
    unsafe { floats::<Portable, T>(group, panel, sums) }
}

/// Quantized weights. The integers of a part are exact; parts are added as floats.
///
/// # Safety
/// See [`Isa::multiply`]; the processor must have the features of `L`.
#[inline(always)]
pub(super) unsafe fn blocks<L: Lanes, B: Blocks, const T: usize>(
    group: Group,
    panel: Panel,
    sums: &mut [[f32; LANES]; T],
) {
    // sums for each part, or pairs of parts
    let sums_each = if B::MINIMA { B::PARTS / 2 } else { B::PARTS * B::SCALES };
    let stride = panel.stride;
    // SAFETY: the indices are below what the caller promises
    unsafe {
        let mut results = [L::splat_f32(0.0); T];
        for (result, sum) in results.iter_mut().zip(&*sums) {
            *result = L::load_f32(sum.as_ptr());
        }
        for block in 0..group.blocks {
            let p = group.data.add(block * B::BYTES);
            let x = Panel {
                words: panel.words.add(block * B::PARTS * 8 * stride),
                scales: panel.scales.add(block * stride),
                sums: panel.sums.add(block * sums_each * stride),
                stride,
            };
            let mut scales = [L::splat_f32(0.0); 16];
            B::scales::<L>(p, &mut scales);
            let mut total = [L::splat_f32(0.0); T];
            if B::PARTS == 1 {
                part::<L, B, T>(p, 0, x, &scales, &mut total);
            } else {
                // written out, since codes are shifted by constants then
                for four in (0..B::PARTS).step_by(4) {
                    part::<L, B, T>(p, four, x, &scales, &mut total);
                    part::<L, B, T>(p, four + 1, x, &scales, &mut total);
                    part::<L, B, T>(p, four + 2, x, &scales, &mut total);
                    part::<L, B, T>(p, four + 3, x, &scales, &mut total);
                }
            }
            if B::MINIMA {
                let (minima, scale) = B::minima::<L>(p);
                for (t, total) in total.iter_mut().enumerate() {
                    let mut dot = L::splat(0);
                    for (pair, &minima) in minima.iter().enumerate() {
                        dot = L::dot16(dot, minima, *x.sums.add(pair * stride + t));
                    }
                    *total = L::fma(L::to_f32(dot), scale, *total);
                }
            }
            for (t, (result, total)) in results.iter_mut().zip(total).enumerate() {
                *result = L::fma(total, L::splat_f32(*x.scales.add(t)), *result);
            }
        }
        for (result, sum) in results.into_iter().zip(sums) {
            L::store_f32(sum.as_mut_ptr(), result);
        }
    }
}

/// The products with 32 weights of a block at `p`.
///
/// # Safety
/// As for [`blocks`].
#[inline(always)]
unsafe fn part<L: Lanes, B: Blocks, const T: usize>(
    p: *const u8,
    part: usize,
    x: Panel,
    scales: &[L::F; 16],
    total: &mut [L::F; T],
) {
    let quads = 8 / B::SCALES;
    // SAFETY: passed on
    unsafe {
        for scale in 0..B::SCALES {
            let at = part * B::SCALES + scale;
            let mut dots = [L::splat(0); T];
            if !B::MINIMA {
                for (t, dot) in dots.iter_mut().enumerate() {
                    *dot = L::splat(*x.sums.add(at * x.stride + t));
                }
            }
            for quad in scale * quads..(scale + 1) * quads {
                let codes = B::codes::<L>(p, part, quad);
                let words = x.words.add((part * 8 + quad) * x.stride);
                for (t, dot) in dots.iter_mut().enumerate() {
                    *dot = L::dot8(*dot, codes, *words.add(t), B::WIDE);
                }
            }
            for (total, dot) in total.iter_mut().zip(dots) {
                *total = L::fma(L::to_f32(dot), scales[at], *total);
            }
        }
    }
}

/// Weights of 32 bits.
///
/// # Safety
/// As for [`blocks`].
#[inline(always)]
pub(super) unsafe fn floats<L: Lanes, const T: usize>(
    group: Group,
    panel: Panel,
    sums: &mut [[f32; LANES]; T],
) {
    // several sums for few tokens, whose additions would wait for each other
    let ways = if T < 4 { 4 } else { 1 };
    // SAFETY: the indices are below what the caller promises
    unsafe {
        let mut totals = [[L::splat_f32(0.0); T]; 4];
        for (total, sum) in totals[0].iter_mut().zip(&*sums) {
            *total = L::load_f32(sum.as_ptr());
        }
        let whole = group.blocks / ways * ways;
        for k in (0..whole).step_by(ways) {
            for (way, totals) in totals[..ways].iter_mut().enumerate() {
                floats_step::<L, T>(group, panel, k + way, totals);
            }
        }
        for k in whole..group.blocks {
            floats_step::<L, T>(group, panel, k, &mut totals[0]);
        }
        for (t, sum) in sums.iter_mut().enumerate() {
            let mut total = totals[0][t];
            for more in &totals[1..ways] {
                total = L::add(total, more[t]);
            }
            L::store_f32(sum.as_mut_ptr(), total);
        }
    }
}

/// The products with input `k`.
///
/// # Safety
/// As for [`blocks`].
#[inline(always)]
unsafe fn floats_step<L: Lanes, const T: usize>(
    group: Group,
    panel: Panel,
    k: usize,
    totals: &mut [L::F; T],
) {
    // SAFETY: passed on
    unsafe {
        let weights = L::load_f32(group.data.add(k * LINE).cast());
        let x = panel.words.add(k * panel.stride).cast::<f32>();
        for (t, total) in totals.iter_mut().enumerate() {
            *total = L::fma(weights, L::splat_f32(*x.add(t)), *total);
        }
    }
}

/// `Σ a_i · b_i`, as long as the shorter one.
///
/// # Safety
/// The processor must have the features of `L`.
#[inline(always)]
pub(super) unsafe fn dot<L: Lanes>(a: &[f32], b: &[f32]) -> f32 {
    let len = a.len().min(b.len());
    let whole = len / (4 * LANES) * (4 * LANES);
    // SAFETY: `whole` elements are there
    let lanes = unsafe {
        let mut sums = [L::splat_f32(0.0); 4];
        for at in (0..whole).step_by(4 * LANES) {
            for (part, sum) in sums.iter_mut().enumerate() {
                let at = at + part * LANES;
                *sum = L::fma(L::load_f32(a.as_ptr().add(at)), L::load_f32(b.as_ptr().add(at)), *sum);
            }
        }
        let sum = L::add(L::add(sums[0], sums[1]), L::add(sums[2], sums[3]));
        let mut lanes = [0f32; LANES];
        L::store_f32(lanes.as_mut_ptr(), sum);
        lanes
    };
    let rest: f32 = a[whole..len].iter().zip(&b[whole..len]).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}
