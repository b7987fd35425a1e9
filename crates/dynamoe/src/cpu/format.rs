//! The types of weights: how a block of ggml's lies in memory when those of 16 rows are interleaved, and how
//! kernels read it.
//!
//! All weights are unsigned codes `q` of at most 8 bits with a scale for each 16 or 32 of them. Where ggml has
//! signed weights (`q - offset`), products take the offset from the sum of the inputs; where it has a minimum
//! for each 32, the sums of inputs are multiplied with it.

use candle_core::quantized::GgmlDType;

use super::lanes::Lanes;

/// The types that can be packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    F32,
    Q4_0,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// A block of one row in ggml's layout: words of 32 bits and, in some types, a scale of 16 bits.
pub(super) struct Layout {
    /// Bytes of a block.
    pub bytes: usize,
    /// Byte at which its words begin.
    pub words_at: usize,
    pub words: usize,
    /// Byte of the scale, if it is not among the words.
    pub scale_at: Option<usize>,
    /// Weights in a block.
    pub weights: usize,
}

impl Format {
    pub fn new(dtype: GgmlDType) -> Option<Self> {
        Some(match dtype {
            GgmlDType::F32 => Self::F32,
            GgmlDType::Q4_0 => Self::Q4_0,
            GgmlDType::Q8_0 => Self::Q8_0,
            GgmlDType::Q4K => Self::Q4K,
            GgmlDType::Q5K => Self::Q5K,
            GgmlDType::Q6K => Self::Q6K,
            _ => return None,
        })
    }

    pub fn dtype(self) -> GgmlDType {
        match self {
            Self::F32 => GgmlDType::F32,
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q5K => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }

    pub fn layout(self) -> Layout {
        let (words_at, words, scale_at, weights) = match self {
            Self::F32 => (0, 1, None, 1),
            Self::Q4_0 => (2, 4, Some(0), 32),
            Self::Q8_0 => (2, 8, Some(0), 32),
            Self::Q4K => (0, 36, None, 256),
            Self::Q5K => (0, 44, None, 256),
            Self::Q6K => (0, 52, Some(208), 256),
        };
        Layout { bytes: 4 * words + scale_at.map_or(0, |_| 2), words_at, words, scale_at, weights }
    }

    /// What this type wants its inputs to be.
    pub fn encoding(self) -> Encoding {
        match self {
            Self::F32 => Encoding::F32,
            Self::Q4_0 => Encoding::Block32 { offset: 8 },
            Self::Q8_0 => Encoding::Block32 { offset: 128 },
            Self::Q4K | Self::Q5K => Encoding::Block256Pairs,
            Self::Q6K => Encoding::Block256 { offset: 32 },
        }
    }
}

/// What a type of weights wants its inputs to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    F32,
    /// Blocks of 32 (ggml's Q8_0), with `-offset` times their sum.
    Block32 {
        offset: i32,
    },
    /// Blocks of 256 (ggml's Q8_K), with `-offset` times the sum of each 16.
    Block256 {
        offset: i32,
    },
    /// Blocks of 256 with the sums of each 32, as pairs of 16 bits.
    Block256Pairs,
}

impl Encoding {
    /// Inputs in a block.
    pub fn block(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Block32 { .. } => 32,
            Self::Block256 { .. } | Self::Block256Pairs => 256,
        }
    }

    /// Words of a block.
    pub fn words(self) -> usize {
        self.block().div_ceil(4)
    }

    /// Sums of a block.
    pub fn sums(self) -> usize {
        match self {
            Self::F32 => 0,
            Self::Block32 { .. } => 1,
            Self::Block256 { .. } => 16,
            Self::Block256Pairs => 4,
        }
    }
}

/// Bytes of one word of 16 rows.
pub(super) const LINE: usize = 64;

/// How a kernel reads a packed block. `p` is its first byte.
///
/// # Safety
/// Functions need the features of `L` and a whole block behind `p`.
pub(super) trait Blocks {
    /// Bytes of the block of 16 rows.
    const BYTES: usize;
    /// Parts of 32 weights.
    const PARTS: usize;
    /// Scales for each part: 1 or 2.
    const SCALES: usize;
    /// Whether parts have a minimum. If not, weights have an offset.
    const MINIMA: bool;
    /// Whether codes may exceed 127.
    const WIDE: bool;

    /// The scales of all parts.
    unsafe fn scales<L: Lanes>(p: *const u8, scales: &mut [L::F; 16]);
    /// Four weights of each row: those at `4 · quad` of part `part`.
    unsafe fn codes<L: Lanes>(p: *const u8, part: usize, quad: usize) -> L::I;
    /// The minima of all parts in pairs of 16 bits, and minus their scale.
    unsafe fn minima<L: Lanes>(_p: *const u8) -> ([L::I; 4], L::F) {
        // SAFETY: no memory is read
        unsafe { ([L::splat(0); 4], L::splat_f32(0.0)) }
    }
}

/// Blocks of 32 with one scale and signed weights of 4 bits.
pub(super) struct Q4_0;

impl Blocks for Q4_0 {
    const BYTES: usize = 4 * LINE + 32;
    const PARTS: usize = 1;
    const SCALES: usize = 1;
    const MINIMA: bool = false;
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn scales<L: Lanes>(p: *const u8, scales: &mut [L::F; 16]) {
        // SAFETY: the scales follow the four words
        scales[0] = unsafe { L::load_f16(p.add(4 * LINE)) };
    }

    #[inline(always)]
    unsafe fn codes<L: Lanes>(p: *const u8, _part: usize, quad: usize) -> L::I {
        // SAFETY: quad < 8; the lower halves of 16 bytes come first, then the upper ones
        unsafe {
            let v = L::load(p.add(quad % 4 * LINE));
            L::and(L::shr(v, quad as u32 / 4 * 4), L::splat(0x0f0f_0f0f))
        }
    }
}

/// Blocks of 32 with one scale and signed weights of 8 bits.
pub(super) struct Q8_0;

impl Blocks for Q8_0 {
    const BYTES: usize = 8 * LINE + 32;
    const PARTS: usize = 1;
    const SCALES: usize = 1;
    const MINIMA: bool = false;
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn scales<L: Lanes>(p: *const u8, scales: &mut [L::F; 16]) {
        // SAFETY: the scales follow the eight words
        scales[0] = unsafe { L::load_f16(p.add(8 * LINE)) };
    }

    #[inline(always)]
    unsafe fn codes<L: Lanes>(p: *const u8, _part: usize, quad: usize) -> L::I {
        // SAFETY: quad < 8. Packing has added 128 to the signed bytes.
        unsafe { L::load(p.add(quad * LINE)) }
    }
}

/// The 12 bytes of scales and minima (6 bits each) of Q4K and Q5K, as three words of each row.
///
/// # Safety
/// As for [`Blocks`].
#[inline(always)]
unsafe fn k_scales<L: Lanes>(p: *const u8) -> [L::I; 4] {
    // SAFETY: lines 1 to 3 hold the words
    unsafe {
        let [a, b, c] = [L::load(p.add(LINE)), L::load(p.add(2 * LINE)), L::load(p.add(3 * LINE))];
        let (six, four, upper) = (L::splat(0x3f3f_3f3f), L::splat(0x0f0f_0f0f), L::splat(0x3030_3030));
        [
            L::and(a, six),
            L::or(L::and(c, four), L::and(L::shr(a, 2), upper)),
            L::and(b, six),
            L::or(L::and(L::shr(c, 4), four), L::and(L::shr(b, 2), upper)),
        ]
    }
}

/// Blocks of 256 in parts of 32 with a scale and a minimum each; weights of 4 bits, or 5 with a `FIFTH`.
pub(super) struct KBlocks<const FIFTH: bool>;

pub(super) type Q4K = KBlocks<false>;
pub(super) type Q5K = KBlocks<true>;

impl<const FIFTH: bool> KBlocks<FIFTH> {
    /// The first line of the lower four bits; those of the fifth, if there is one, stand before.
    const LOWER: usize = if FIFTH { 12 } else { 4 };
}

impl<const FIFTH: bool> Blocks for KBlocks<FIFTH> {
    const BYTES: usize = (Self::LOWER + 32) * LINE;
    const PARTS: usize = 8;
    const SCALES: usize = 1;
    const MINIMA: bool = true;
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn scales<L: Lanes>(p: *const u8, scales: &mut [L::F; 16]) {
        // SAFETY: line 0 holds the two scales of the block
        unsafe {
            let d = L::lower_f16(L::load(p));
            let [low, high, ..] = k_scales::<L>(p);
            for (part, scale) in scales[..8].iter_mut().enumerate() {
                let word = if part < 4 { low } else { high };
                let code = L::and(L::shr(word, part as u32 % 4 * 8), L::splat(0xff));
                *scale = L::mul(d, L::to_f32(code));
            }
        }
    }

    #[inline(always)]
    unsafe fn codes<L: Lanes>(p: *const u8, part: usize, quad: usize) -> L::I {
        // SAFETY: part and quad < 8; two parts share eight lines, as lower and upper halves of bytes; bit `part` of
        // lines 4 to 11 is the fifth
        unsafe {
            let low = L::load(p.add((Self::LOWER + part / 2 * 8 + quad) * LINE));
            let low = L::and(L::shr(low, part as u32 % 2 * 4), L::splat(0x0f0f_0f0f));
            if !FIFTH {
                return low;
            }
            let high = L::and(L::shr(L::load(p.add((4 + quad) * LINE)), part as u32), L::splat(0x0101_0101));
            L::or(low, L::shl(high, 4))
        }
    }

    #[inline(always)]
    unsafe fn minima<L: Lanes>(p: *const u8) -> ([L::I; 4], L::F) {
        // SAFETY: as for the scales
        unsafe {
            let scale = L::mul(L::lower_f16(L::shr(L::load(p), 16)), L::splat_f32(-1.0));
            let [.., low, high] = k_scales::<L>(p);
            let (first, second) = (L::splat(0xff), L::splat(0x00ff_0000));
            let mut pairs = [low, L::shr(low, 16), high, L::shr(high, 16)];
            for pair in &mut pairs {
                *pair = L::or(L::and(*pair, first), L::and(L::shl(*pair, 8), second));
            }
            (pairs, scale)
        }
    }
}

/// Blocks of 256 with a signed scale for each 16; signed weights of 6 bits.
pub(super) struct Q6K;

impl Blocks for Q6K {
    const BYTES: usize = 52 * LINE + 32;
    const PARTS: usize = 8;
    const SCALES: usize = 2;
    const MINIMA: bool = false;
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn scales<L: Lanes>(p: *const u8, scales: &mut [L::F; 16]) {
        // SAFETY: lines 48 to 51 hold the scales of 16 weights, their common scale follows
        unsafe {
            let d = L::load_f16(p.add(52 * LINE));
            for (at, scale) in scales.iter_mut().enumerate() {
                let word = L::load(p.add((48 + at / 4) * LINE));
                let code = L::upper_i8(L::shl(word, 24 - at as u32 % 4 * 8));
                *scale = L::mul(d, L::to_f32(code));
            }
        }
    }

    #[inline(always)]
    unsafe fn codes<L: Lanes>(p: *const u8, part: usize, quad: usize) -> L::I {
        // SAFETY: part and quad < 8. Each half of the block has 16 lines of lower bits, whose bytes serve the
        // parts 0 and 2, then 1 and 3, and 8 lines of upper bits, two for each part.
        unsafe {
            let (half, part) = (part / 4, part % 4);
            let low = L::load(p.add((16 * half + 8 * (part % 2) + quad) * LINE));
            let low = L::and(L::shr(low, part as u32 / 2 * 4), L::splat(0x0f0f_0f0f));
            let high = L::load(p.add((32 + 8 * half + quad) * LINE));
            let high = L::and(L::shr(high, part as u32 * 2), L::splat(0x0303_0303));
            L::or(low, L::shl(high, 4))
        }
    }
}
