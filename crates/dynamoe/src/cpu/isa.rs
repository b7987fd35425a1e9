//! Which variant of the kernels runs: the fastest that this processor has instructions for.

use std::sync::OnceLock;

use super::format::{Encoding, Format, Q4_0, Q4K, Q5K, Q6K, Q8_0};
use super::input::{Panel, PanelMut};
use super::lanes::{LANES, Portable};
use super::loops::{Group, compile};
#[cfg(target_arch = "x86_64")]
use super::x86;
use crate::activation::HiddenAct;

/// A variant of the kernels that this processor can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Isa(Variant);

/// Private, so that an [`Isa`] exists only where the processor has its instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

compile!(
    /// For any processor. Not inlined: the compiler may otherwise use the processor's own vectors to compute addresses
    /// for this variant before it knows which variant runs.
    portable, super::Portable, inline(never)
);

/// Calls a function of an [`Isa`]'s variant. Its features need no check: a variant exists only where the processor has
/// them.
macro_rules! on_variant {
    ($isa:expr, $function:ident $(::<$($generic:ident),+>)? ($($argument:expr),+)) => {
        match $isa.0 {
            Variant::Portable => portable::$function$(::<$($generic),+>)?($($argument),+),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2 => x86::avx2::$function$(::<$($generic),+>)?($($argument),+),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx512 => x86::avx512::$function$(::<$($generic),+>)?($($argument),+),
        }
    };
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

    /// The fastest of them.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }

    /// The name for benchmarks and logs.
    pub fn name(self) -> &'static str {
        match self.0 {
            Variant::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Variant::Avx512 => "avx512-vnni",
        }
    }

    /// Adds the products of a group with as many tokens as `sums` holds, at most [`super::input::TILE`].
    ///
    /// # Safety
    /// `group` and `panel` must hold as many blocks as `group` says, `panel` as many tokens as `sums`.
    pub(super) unsafe fn multiply(self, group: Group, panel: Panel, sums: &mut [[f32; LANES]]) {
        let mut done = 0;
        while done < sums.len() {
            let (left, sums) = (sums.len() - done, &mut sums[done..]);
            let panel = Panel {
                words: panel.words.wrapping_add(done),
                scales: panel.scales.wrapping_add(done),
                sums: panel.sums.wrapping_add(done),
                ..panel
            };
            // the largest tile that fits
            macro_rules! tile {
                ($($tokens:literal)+) => {
                    match left {
                        $(left if left >= $tokens => {
                            // SAFETY: the caller keeps the same contract, and the tile is within it
                            unsafe { self.tile::<$tokens>(group, panel, sums) };
                            $tokens
                        })+
                        _ => unreachable!("the smallest tile has one token"),
                    }
                };
            }
            done += tile!(12 8 4 2 1);
        }
    }

    /// [`Isa::multiply`] for the first `T` tokens.
    ///
    /// # Safety
    /// As there.
    unsafe fn tile<const T: usize>(self, group: Group, panel: Panel, sums: &mut [[f32; LANES]]) {
        let sums = sums.first_chunk_mut::<T>().expect("sums have room for a tile");
        // SAFETY: the caller keeps the same contract
        unsafe {
            match group.format {
                Format::F32 => on_variant!(self, floats(group, panel, sums)),
                Format::Q4_0 => on_variant!(self, blocks::<Q4_0, T>(group, panel, sums)),
                Format::Q8_0 => on_variant!(self, blocks::<Q8_0, T>(group, panel, sums)),
                Format::Q4K => on_variant!(self, blocks::<Q4K, T>(group, panel, sums)),
                Format::Q5K => on_variant!(self, blocks::<Q5K, T>(group, panel, sums)),
                Format::Q6K => on_variant!(self, blocks::<Q6K, T>(group, panel, sums)),
            }
        }
    }

    /// Encodes `x`, whole blocks of one token, into `out`.
    ///
    /// # Safety
    /// `out` must have room for these blocks.
    pub(super) unsafe fn encode(self, encoding: Encoding, x: &[f32], out: &PanelMut) {
        // SAFETY: the caller keeps the same contract
        unsafe { on_variant!(self, encode(encoding, x, out)) }
    }

    /// `Σ a_i · b_i`, as long as the shorter one.
    pub fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        // SAFETY: `dot` asks for nothing but the processor's features
        unsafe { on_variant!(self, dot(a, b)) }
    }

    /// `act(gate) ∘ up` into `gate`.
    pub fn glu(self, act: HiddenAct, gate: &mut [[f32; LANES]], up: &[[f32; LANES]]) {
        // SAFETY: `glu` asks for nothing but the processor's features
        unsafe { on_variant!(self, glu(act.function(), gate, up)) }
    }
}
