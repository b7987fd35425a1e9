//! The loops of the kernels, generic over the vectors of a processor: products of one packed group of 16 rows with a
//! few tokens, dot products, `act(gate) ∘ up`.
//!
//! [`super::isa`] chooses the variant that runs.

use super::format::{Blocks, Format, LINE};
use super::input::{Panel, TILE};
use super::lanes::{LANES, Lanes};
use crate::activation::Sigmoidal;

/// Sums of 16 rows for each token of a tile.
pub(crate) type Sums = [[f32; LANES]; TILE];

/// Some blocks of a packed group of 16 rows.
#[derive(Clone, Copy)]
pub(super) struct Group {
    pub format: Format,
    /// Its first byte.
    pub data: *const u8,
    /// Blocks of each row.
    pub blocks: usize,
}

/// Quantized weights. The integers of a part are exact; parts are added as floats.
///
/// # Safety
/// The processor must have the features of `L`. `group` and `panel` must hold as many blocks as `group` says, and
/// `panel` `T` tokens.
#[inline(always)]
pub(super) unsafe fn blocks<L: Lanes, B: Blocks, const T: usize>(
    group: Group,
    panel: Panel,
    sums: &mut [[f32; LANES]; T],
) {
    // how many sums of inputs a block has: one for each scale, or a pair of parts in one
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
                // unrolled by hand: a constant part makes constants of the shifts in `codes`
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
    // SAFETY: the caller keeps the same contract
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
    // few tokens take several sums each: the additions to one would wait for each other
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
    // SAFETY: the caller keeps the same contract
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

/// `act(gate) ∘ up` into `gate`.
#[inline(always)]
pub(super) fn glu(act: Sigmoidal, gate: &mut [[f32; LANES]], up: &[[f32; LANES]]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        for (gate, &up) in gate.iter_mut().zip(up) {
            *gate = act.value(*gate) * up;
        }
    }
}

/// The module `$name`: the loops and [`super::encode::encode`], compiled for the vectors `$lanes` under `$attribute`.
macro_rules! compile {
    ($(#[$doc:meta])* $name:ident, $lanes:ty, $attribute:meta) => {
        $(#[$doc])*
        pub(super) mod $name {
            use $crate::activation::Sigmoidal;
            use $crate::cpu::format::{Blocks, Encoding};
            use $crate::cpu::input::{Panel, PanelMut};
            use $crate::cpu::lanes::LANES;
            use $crate::cpu::loops::{self, Group};

            /// # Safety
            /// See [`loops::blocks`].
            #[$attribute]
            pub unsafe fn blocks<B: Blocks, const T: usize>(
                group: Group,
                panel: Panel,
                sums: &mut [[f32; LANES]; T],
            ) {
                // SAFETY: the caller keeps the same contract
                unsafe { loops::blocks::<$lanes, B, T>(group, panel, sums) }
            }

            /// # Safety
            /// See [`loops::floats`].
            #[$attribute]
            pub unsafe fn floats<const T: usize>(group: Group, panel: Panel, sums: &mut [[f32; LANES]; T]) {
                // SAFETY: the caller keeps the same contract
                unsafe { loops::floats::<$lanes, T>(group, panel, sums) }
            }

            /// # Safety
            /// The processor must have the features; see [`super::super::encode::encode`].
            #[$attribute]
            pub unsafe fn encode(encoding: Encoding, x: &[f32], out: &PanelMut) {
                // SAFETY: the caller keeps the same contract
                unsafe { $crate::cpu::encode::encode(encoding, x, out) }
            }

            /// # Safety
            /// See [`loops::dot`].
            #[$attribute]
            pub unsafe fn dot(a: &[f32], b: &[f32]) -> f32 {
                // SAFETY: the caller keeps the same contract
                unsafe { loops::dot::<$lanes>(a, b) }
            }

            /// # Safety
            /// The processor must have the features.
            #[$attribute]
            pub unsafe fn glu(act: Sigmoidal, gate: &mut [[f32; LANES]], up: &[[f32; LANES]]) {
                loops::glu(act, gate, up);
            }
        }
    };
}
pub(super) use compile;
