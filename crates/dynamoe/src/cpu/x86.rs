//! AVX2 and AVX-512 with VNNI: their vectors, and the loops compiled for them.

use std::arch::x86_64::*;

use super::lanes::Lanes;
use super::loops::compile;

/// Functions of [`Lanes`], each an expression over intrinsics.
macro_rules! intrinsics {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty = $body:expr;)+) => {$(
        #[inline(always)]
        unsafe fn $name($($argument: $type),*) -> $result {
            // SAFETY: the contract of `Lanes`: the processor has the instructions, and pointers have 16 lanes behind them
            unsafe { $body }
        }
    )+};
}

/// One register of 512 bits.
pub(super) struct Avx512;

impl Lanes for Avx512 {
    type I = __m512i;
    type F = __m512;

    intrinsics! {
        load(p: *const u8) -> Self::I = _mm512_loadu_si512(p.cast());
        load_f32(p: *const f32) -> Self::F = _mm512_loadu_ps(p);
        load_f16(p: *const u8) -> Self::F = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        store_f32(p: *mut f32, v: Self::F) -> () = _mm512_storeu_ps(p, v);
        splat(v: i32) -> Self::I = _mm512_set1_epi32(v);
        splat_f32(v: f32) -> Self::F = _mm512_set1_ps(v);
        and(a: Self::I, b: Self::I) -> Self::I = _mm512_and_si512(a, b);
        or(a: Self::I, b: Self::I) -> Self::I = _mm512_or_si512(a, b);
        shl(v: Self::I, bits: u32) -> Self::I = _mm512_sll_epi32(v, _mm_cvtsi32_si128(bits as i32));
        shr(v: Self::I, bits: u32) -> Self::I = _mm512_srl_epi32(v, _mm_cvtsi32_si128(bits as i32));
        upper_i8(v: Self::I) -> Self::I = _mm512_srai_epi32::<24>(v);
        lower_f16(v: Self::I) -> Self::F = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
        to_f32(v: Self::I) -> Self::F = _mm512_cvtepi32_ps(v);
        add(a: Self::F, b: Self::F) -> Self::F = _mm512_add_ps(a, b);
        mul(a: Self::F, b: Self::F) -> Self::F = _mm512_mul_ps(a, b);
        fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F = _mm512_fmadd_ps(a, b, c);
        dot8(acc: Self::I, w: Self::I, x: i32, _wide: bool) -> Self::I = _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x));
        dot16(acc: Self::I, w: Self::I, x: i32) -> Self::I = _mm512_dpwssd_epi32(acc, w, _mm512_set1_epi32(x));
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

    intrinsics! {
        load(p: *const u8) -> Self::I = [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())];
        load_f32(p: *const f32) -> Self::F = [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))];
        load_f16(p: *const u8) -> Self::F = {
            let [a, b] = [_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(16).cast())];
            [_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)]
        };
        store_f32(p: *mut f32, v: Self::F) -> () = {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        };
        splat(v: i32) -> Self::I = [_mm256_set1_epi32(v); 2];
        splat_f32(v: f32) -> Self::F = [_mm256_set1_ps(v); 2];
        and(a: Self::I, b: Self::I) -> Self::I = both!(|a, b| _mm256_and_si256(a, b));
        or(a: Self::I, b: Self::I) -> Self::I = both!(|a, b| _mm256_or_si256(a, b));
        shl(v: Self::I, bits: u32) -> Self::I = both!(|v| _mm256_sll_epi32(v, _mm_cvtsi32_si128(bits as i32)));
        shr(v: Self::I, bits: u32) -> Self::I = both!(|v| _mm256_srl_epi32(v, _mm_cvtsi32_si128(bits as i32)));
        upper_i8(v: Self::I) -> Self::I = both!(|v| _mm256_srai_epi32::<24>(v));
        lower_f16(v: Self::I) -> Self::F = {
            both!(|v| {
                let halves = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
                let (a, b) = (_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
                _mm256_cvtph_ps(_mm_packus_epi32(a, b))
            })
        };
        to_f32(v: Self::I) -> Self::F = both!(|v| _mm256_cvtepi32_ps(v));
        add(a: Self::F, b: Self::F) -> Self::F = both!(|a, b| _mm256_add_ps(a, b));
        mul(a: Self::F, b: Self::F) -> Self::F = both!(|a, b| _mm256_mul_ps(a, b));
        fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F = both!(|a, b, c| _mm256_fmadd_ps(a, b, c));
        dot8(acc: Self::I, w: Self::I, x: i32, wide: bool) -> Self::I = {
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
        };
        dot16(acc: Self::I, w: Self::I, x: i32) -> Self::I = {
            let x = _mm256_set1_epi32(x);
            both!(|acc, w| _mm256_add_epi32(acc, _mm256_madd_epi16(w, x)))
        };
    }
}

compile!(
    /// For AVX2.
    avx2, super::Avx2, target_feature(enable = "avx2,fma,f16c")
);
compile!(
    /// For AVX-512 with VNNI.
    avx512, super::Avx512, target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")
);
