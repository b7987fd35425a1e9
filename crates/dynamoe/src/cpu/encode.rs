//! Rounds rows of floats to 8 bits in ggml's blocks.

use super::format::Encoding;
use super::input::PanelMut;

/// Encodes `x`, whole blocks of one token, into `out`.
///
/// # Safety
/// `out` must have room for these blocks.
#[inline(always)]
pub(super) unsafe fn encode(encoding: Encoding, x: &[f32], out: &PanelMut) {
    // SAFETY: all indices are below what the blocks of `x` need
    unsafe {
        match encoding {
            Encoding::F32 => {
                for (at, &x) in x.iter().enumerate() {
                    out.words.add(at * out.stride).write(x.to_bits() as i32);
                }
            }
            Encoding::Block32 { offset } => {
                for (block, x) in x.as_chunks::<32>().0.iter().enumerate() {
                    let (scale, codes) = round32(x);
                    store_codes(&codes, out, block);
                    out.scales.add(block * out.stride).write(scale);
                    out.sums.add(block * out.stride).write(-offset * sum(&codes));
                }
            }
            Encoding::Block256 { offset } => {
                for (block, x) in x.as_chunks::<256>().0.iter().enumerate() {
                    let (scale, codes) = round256(x);
                    store_codes(&codes, out, block);
                    out.scales.add(block * out.stride).write(scale);
                    for (at, codes) in codes.as_chunks::<16>().0.iter().enumerate() {
                        out.sums.add((block * 16 + at) * out.stride).write(-offset * sum(codes));
                    }
                }
            }
            Encoding::Block256Pairs => {
                for (block, x) in x.as_chunks::<256>().0.iter().enumerate() {
                    let (scale, codes) = round256(x);
                    store_codes(&codes, out, block);
                    out.scales.add(block * out.stride).write(scale);
                    for (at, codes) in codes.as_chunks::<64>().0.iter().enumerate() {
                        let pair = (sum(&codes[..32]) & 0xffff) | (sum(&codes[32..]) << 16);
                        out.sums.add((block * 4 + at) * out.stride).write(pair);
                    }
                }
            }
        }
    }
}

/// Stores the codes of block `block`.
///
/// # Safety
/// As for [`encode`].
#[inline(always)]
unsafe fn store_codes(codes: &[u8], out: &PanelMut, block: usize) {
    let quads = codes.as_chunks::<4>().0;
    for (at, &quad) in quads.iter().enumerate() {
        // SAFETY: the caller has room for the block
        unsafe { out.words.add((block * quads.len() + at) * out.stride).write(i32::from_le_bytes(quad)) }
    }
}

/// The sum of signed bytes.
#[inline(always)]
fn sum(codes: &[u8]) -> i32 {
    codes.iter().map(|&c| i32::from(c as i8)).sum()
}

/// The signed byte of a float that is already whole and small.
#[inline(always)]
fn byte(whole: f32) -> u8 {
    // adding 1.5 · 2^23 puts the number into the lowest bits
    (whole + 12_582_912.0).to_bits() as u8
}

/// ggml's Q8_0: the scale (of half precision) and 32 signed codes.
#[inline(always)]
fn round32(x: &[f32; 32]) -> (f32, [u8; 32]) {
    let mut largest = [0f32; 8];
    for x in x.as_chunks::<8>().0 {
        for (largest, x) in largest.iter_mut().zip(x) {
            *largest = if x.abs() > *largest { x.abs() } else { *largest };
        }
    }
    let scale = largest.iter().fold(0f32, |a, &b| if b > a { b } else { a }) / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    (half::f16::from_f32(scale).to_f32(), x.map(|x| byte((x * inverse).round())))
}

/// ggml's Q8_K: the scale and 256 signed codes; the input of largest magnitude becomes -128.
#[inline(always)]
fn round256(x: &[f32; 256]) -> (f32, [u8; 256]) {
    let (mut low, mut high) = ([0f32; 16], [0f32; 16]);
    for x in x.as_chunks::<16>().0 {
        for ((low, high), &x) in low.iter_mut().zip(&mut high).zip(x) {
            *low = if x < *low { x } else { *low };
            *high = if x > *high { x } else { *high };
        }
    }
    let low = low.iter().fold(0f32, |a, &b| if b < a { b } else { a });
    let high = high.iter().fold(0f32, |a, &b| if b > a { b } else { a });
    let largest = if high > -low {
        high
    } else if high < -low {
        low
    } else {
        // as large on both sides: the first one counts
        x.iter().copied().find(|x| x.abs() == high).unwrap_or(0.0)
    };
    if largest == 0.0 {
        return (0.0, [0; 256]);
    }
    let inverse = -128.0 / largest;
    let code = |x: f32| {
        let whole = (inverse * x).round();
        byte(if whole < 127.0 { whole } else { 127.0 })
    };
    (1.0 / inverse, x.map(code))
}
