//! Sixteen lanes, one for each row of a group: what the kernels ask of a processor, and a portable answer.

/// Rows of a group: lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Vectors of 16 lanes of 32 bits.
///
/// # Safety
/// All functions need the processor features of the implementation; those that take pointers need 16 lanes
/// behind them (64 bytes, or 32 for `load_f16`), aligned or not.
pub(super) trait Lanes {
    /// Integers.
    type I: Copy;
    /// Floats.
    type F: Copy;

    unsafe fn load(p: *const u8) -> Self::I;
    unsafe fn load_f32(p: *const f32) -> Self::F;
    unsafe fn load_f16(p: *const u8) -> Self::F;
    unsafe fn store_f32(p: *mut f32, v: Self::F);
    unsafe fn splat(v: i32) -> Self::I;
    unsafe fn splat_f32(v: f32) -> Self::F;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn shl(v: Self::I, bits: u32) -> Self::I;
    unsafe fn shr(v: Self::I, bits: u32) -> Self::I;
    /// The upper byte of each lane as a signed number.
    unsafe fn upper_i8(v: Self::I) -> Self::I;
    /// The lower half of each lane as a half-precision number.
    unsafe fn lower_f16(v: Self::I) -> Self::F;
    unsafe fn to_f32(v: Self::I) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `acc + Σ w_i · x_i` over the four bytes of each lane, `w` unsigned (below 128 unless `wide`), `x` signed
    /// and the same for all lanes.
    unsafe fn dot8(acc: Self::I, w: Self::I, x: i32, wide: bool) -> Self::I;
    /// `acc + Σ w_i · x_i` over the two signed halves of each lane, `x` the same for all lanes.
    unsafe fn dot16(acc: Self::I, w: Self::I, x: i32) -> Self::I;
}

/// Arrays, which any processor has.
pub(super) struct Portable;

fn map<A: Copy, B>(a: [A; LANES], f: impl Fn(A) -> B) -> [B; LANES] {
    a.map(f)
}

impl Lanes for Portable {
    type I = [i32; LANES];
    type F = [f32; LANES];

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self::I {
        // SAFETY: the caller has 64 bytes there
        unsafe { p.cast::<Self::I>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f32(p: *const f32) -> Self::F {
        // SAFETY: the caller has 16 floats there
        unsafe { p.cast::<Self::F>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::F {
        // SAFETY: the caller has 32 bytes there
        map(unsafe { p.cast::<[u16; LANES]>().read_unaligned() }, |bits| half::f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    unsafe fn store_f32(p: *mut f32, v: Self::F) {
        // SAFETY: the caller has room for 16 floats there
        unsafe { p.cast::<Self::F>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn splat(v: i32) -> Self::I {
        [v; LANES]
    }

    #[inline(always)]
    unsafe fn splat_f32(v: f32) -> Self::F {
        [v; LANES]
    }

    #[inline(always)]
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|r| a[r] & b[r])
    }

    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|r| a[r] | b[r])
    }

    #[inline(always)]
    unsafe fn shl(v: Self::I, bits: u32) -> Self::I {
        map(v, |v| v << bits)
    }

    #[inline(always)]
    unsafe fn shr(v: Self::I, bits: u32) -> Self::I {
        map(v, |v| ((v as u32) >> bits) as i32)
    }

    #[inline(always)]
    unsafe fn upper_i8(v: Self::I) -> Self::I {
        map(v, |v| v >> 24)
    }

    #[inline(always)]
    unsafe fn lower_f16(v: Self::I) -> Self::F {
        map(v, |v| half::f16::from_bits(v as u16).to_f32())
    }

    #[inline(always)]
    unsafe fn to_f32(v: Self::I) -> Self::F {
        map(v, |v| v as f32)
    }

    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|r| a[r] + b[r])
    }

    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|r| a[r] * b[r])
    }

    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // not `mul_add`, which calls a function where the processor has no such instruction
        std::array::from_fn(|r| a[r] * b[r] + c[r])
    }

    #[inline(always)]
    unsafe fn dot8(acc: Self::I, w: Self::I, x: i32, _wide: bool) -> Self::I {
        let x = x.to_le_bytes().map(|x| i32::from(x as i8));
        std::array::from_fn(|r| {
            let w = w[r].to_le_bytes().map(i32::from);
            acc[r] + w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3]
        })
    }

    #[inline(always)]
    unsafe fn dot16(acc: Self::I, w: Self::I, x: i32) -> Self::I {
        let (x0, x1) = (i32::from(x as i16), x >> 16);
        std::array::from_fn(|r| acc[r] + i32::from(w[r] as i16) * x0 + (w[r] >> 16) * x1)
    }
}
