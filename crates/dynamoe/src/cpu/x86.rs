//! AVX2 and AVX-512 with VNNI.

use std::arch::x86_64::*;

use super::format::Blocks;
use super::input;
use super::input::{Encoded, Encoding, Panel};
use super::kernel::{Group, blocks, dot, floats, swiglu};
use super::lanes::{LANES, Lanes};

/// One register of 512 bits.
pub(super) struct Avx512;

impl Lanes for Avx512 {
    type I = __m512i;
    type F = __m512;

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self::I {
        // SAFETY: the caller has 64 bytes there
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_f32(p: *const f32) -> Self::F {
        // SAFETY: the caller has 16 floats there
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::F {
        // SAFETY: the caller has 32 bytes there
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn store_f32(p: *mut f32, v: Self::F) {
        // SAFETY: the caller has room for 16 floats there
        unsafe { _mm512_storeu_ps(p, v) }
    }

    #[inline(always)]
    unsafe fn splat(v: i32) -> Self::I {
        // SAFETY: the processor has AVX-512
        unsafe { _mm512_set1_epi32(v) }
    }

    #[inline(always)]
    unsafe fn splat_f32(v: f32) -> Self::F {
        // SAFETY: the processor has AVX-512
        unsafe { _mm512_set1_ps(v) }
    }

    #[inline(always)]
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the processor has AVX-512
        unsafe { _mm512_and_si512(a, b) }
    }

    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the processor has AVX-512
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    unsafe fn shl(v: Self::I, bits: u32) -> Self::I {
        // SAFETY: the processor has AVX-512
        unsafe { _mm512_sll_epi32(v, _mm_cvtsi32_si128(bits as i32)) }
    }

    #[inline(always)]
    unsafe fn shr(v: Self::I, bits: u32) -> Self::I {
        // SAFETY: the processor has AVX-512
        unsafe { _mm512_srl_epi32(v, _mm_cvtsi32_si128(bits as i32)) }
    }

    #[inline(always)]
    unsafe fn upper_i8(v: Self::I) -> Self::I {
        // SAFETY: the processor has AVX-512
        unsafe { _mm512_srai_epi32::<24>(v) }
    }

    #[inline(always)]
    unsafe fn lower_f16(v: Self::I) -> Self::F {
        // SAFETY: the processor has AVX-512
        unsafe { _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)) }
    }

    #[inline(always)]
    unsafe fn to_f32(v: Self::I) -> Self::F {
        // SAFETY: the processor has AVX-512
        unsafe { _mm512_cvtepi32_ps(v) }
    }

    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the processor has AVX-512
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the processor has AVX-512
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the processor has AVX-512
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn dot8(acc: Self::I, w: Self::I, x: i32, _wide: bool) -> Self::I {
        // SAFETY: the processor has AVX-512 and VNNI
        unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x)) }
    }

    #[inline(always)]
    unsafe fn dot16(acc: Self::I, w: Self::I, x: i32) -> Self::I {
        // SAFETY: the processor has AVX-512 and VNNI
        unsafe { _mm512_dpwssd_epi32(acc, w, _mm512_set1_epi32(x)) }
    }
}

/// Two registers of 256 bits.
pub(super) struct Avx2;

/// Applies an expression to both registers.
macro_rules! both {
    (|$($name:ident),+| $body:expr) => {{
        let first = { $(let $name = $name[0];)+ $body };
        let second = { $(let $name = $name[1];)+ $body };
        [first, second]
    }};
}

impl Lanes for Avx2 {
    type I = [__m256i; 2];
    type F = [__m256; 2];

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self::I {
        // SAFETY: the caller has 64 bytes there
        unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())] }
    }

    #[inline(always)]
    unsafe fn load_f32(p: *const f32) -> Self::F {
        // SAFETY: the caller has 16 floats there
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::F {
        // SAFETY: the caller has 32 bytes there
        unsafe {
            let [a, b] = [_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(16).cast())];
            [_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)]
        }
    }

    #[inline(always)]
    unsafe fn store_f32(p: *mut f32, v: Self::F) {
        // SAFETY: the caller has room for 16 floats there
        unsafe {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        }
    }

    #[inline(always)]
    unsafe fn splat(v: i32) -> Self::I {
        // SAFETY: the processor has AVX2
        [unsafe { _mm256_set1_epi32(v) }; 2]
    }

    #[inline(always)]
    unsafe fn splat_f32(v: f32) -> Self::F {
        // SAFETY: the processor has AVX2
        [unsafe { _mm256_set1_ps(v) }; 2]
    }

    #[inline(always)]
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the processor has AVX2
        unsafe { both!(|a, b| _mm256_and_si256(a, b)) }
    }

    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the processor has AVX2
        unsafe { both!(|a, b| _mm256_or_si256(a, b)) }
    }

    #[inline(always)]
    unsafe fn shl(v: Self::I, bits: u32) -> Self::I {
        // SAFETY: the processor has AVX2
        unsafe { both!(|v| _mm256_sll_epi32(v, _mm_cvtsi32_si128(bits as i32))) }
    }

    #[inline(always)]
    unsafe fn shr(v: Self::I, bits: u32) -> Self::I {
        // SAFETY: the processor has AVX2
        unsafe { both!(|v| _mm256_srl_epi32(v, _mm_cvtsi32_si128(bits as i32))) }
    }

    #[inline(always)]
    unsafe fn upper_i8(v: Self::I) -> Self::I {
        // SAFETY: the processor has AVX2
        unsafe { both!(|v| _mm256_srai_epi32::<24>(v)) }
    }

    #[inline(always)]
    unsafe fn lower_f16(v: Self::I) -> Self::F {
        // SAFETY: the processor has AVX2 and F16C
        unsafe {
            both!(|v| {
                let halves = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
                let (a, b) = (_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
                _mm256_cvtph_ps(_mm_packus_epi32(a, b))
            })
        }
    }

    #[inline(always)]
    unsafe fn to_f32(v: Self::I) -> Self::F {
        // SAFETY: the processor has AVX2
        unsafe { both!(|v| _mm256_cvtepi32_ps(v)) }
    }

    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the processor has AVX2
        unsafe { both!(|a, b| _mm256_add_ps(a, b)) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the processor has AVX2
        unsafe { both!(|a, b| _mm256_mul_ps(a, b)) }
    }

    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the processor has FMA
        unsafe { both!(|a, b, c| _mm256_fmadd_ps(a, b, c)) }
    }

    #[inline(always)]
    unsafe fn dot8(acc: Self::I, w: Self::I, x: i32, wide: bool) -> Self::I {
        // SAFETY: the processor has AVX2
        unsafe {
            let (x, ones) = (_mm256_set1_epi32(x), _mm256_set1_epi16(1));
            if !wide {
                return both!(|acc, w| {
                    let pairs = _mm256_maddubs_epi16(w, x); // at most 2 · 127 · 128 < 2^15
                    _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, ones))
                });
            }
            // pairs of products with codes above 127 exceed 16 bits: the upper bit goes separately
            let upper = _mm256_set1_epi8(-128);
            both!(|acc, w| {
                let low = _mm256_maddubs_epi16(_mm256_andnot_si256(upper, w), x);
                let high = _mm256_maddubs_epi16(_mm256_and_si256(upper, w), x);
                let pairs = _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones));
                _mm256_add_epi32(acc, pairs)
            })
        }
    }

    #[inline(always)]
    unsafe fn dot16(acc: Self::I, w: Self::I, x: i32) -> Self::I {
        // SAFETY: the processor has AVX2
        unsafe {
            let x = _mm256_set1_epi32(x);
            both!(|acc, w| _mm256_add_epi32(acc, _mm256_madd_epi16(w, x)))
        }
    }
}

/// The generic functions, compiled for one variant.
macro_rules! compile {
    ($lanes:ty, $features:literal, $blocks:ident, $floats:ident, $encode:ident, $swiglu:ident, $dot:ident) => {
        /// # Safety
        /// The processor must have the features; see [`blocks`].
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $blocks<B: Blocks, const T: usize>(
            group: Group,
            panel: Panel,
            sums: &mut [[f32; LANES]; T],
        ) {
            // SAFETY: passed on
            unsafe { blocks::<$lanes, B, T>(group, panel, sums) }
        }

        /// # Safety
        /// The processor must have the features; see [`floats`].
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $floats<const T: usize>(
            group: Group,
            panel: Panel,
            sums: &mut [[f32; LANES]; T],
        ) {
            // SAFETY: passed on
            unsafe { floats::<$lanes, T>(group, panel, sums) }
        }

        /// # Safety
        /// The processor must have the features; see [`input::encode`].
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $encode(encoding: Encoding, x: &[f32], out: &Encoded) {
            // SAFETY: passed on
            unsafe { input::encode(encoding, x, out) }
        }

        /// # Safety
        /// The processor must have the features.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $swiglu(gate: &mut [[f32; LANES]], up: &[[f32; LANES]]) {
            swiglu(gate, up);
        }

        /// # Safety
        /// The processor must have the features.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $dot(a: &[f32], b: &[f32]) -> f32 {
            // SAFETY: passed on
            unsafe { dot::<$lanes>(a, b) }
        }
    };
}

compile!(Avx2, "avx2,fma,f16c", blocks_avx2, floats_avx2, encode_avx2, swiglu_avx2, dot_avx2);
compile!(
    Avx512,
    "avx512f,avx512bw,avx512vnni,avx2,fma,f16c",
    blocks_avx512,
    floats_avx512,
    encode_avx512,
    swiglu_avx512,
    dot_avx512
);
