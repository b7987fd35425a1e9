//! Numbers in 8 bits each, with a scale for each block, after Dettmers et al. (arXiv 2110.02861).
//!
//! A number is kept as its share of the block's largest magnitude, in a small float: 4 bits of exponent, and 3 of mantissa
//! beside a sign or 4 without. Shares below 2^-15 become 0 where there is a sign. Where there is none, they become the least
//! one that is not 0: such numbers are divided by.

use rayon::prelude::*;

/// Numbers in a block.
pub const BLOCK: usize = 256;

/// Whether numbers have a sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// They may be negative: the upper bit of a code says so.
    Signed,
    /// They are 0 or more.
    Unsigned,
}

impl Sign {
    const fn mantissa_bits(self) -> u32 {
        match self {
            Self::Signed => 3,
            Self::Unsigned => 4,
        }
    }

    /// What a code's exponent lacks to an f32's, in the place of the code's exponent: 1 has the largest exponent, 15.
    const fn offset(self) -> u32 {
        (127 - 15) << self.mantissa_bits()
    }

    /// The code of a share, from 0 to 1.
    fn code(self, share: f32) -> u8 {
        let cut = 23 - self.mantissa_bits();
        let rounded = (share.abs().to_bits() + (1 << (cut - 1))) >> cut;
        let top = 15 << self.mantissa_bits();
        let least = u32::from(self == Self::Unsigned && share > 0.0);
        let code = rounded.saturating_sub(self.offset()).clamp(least, top) as u8;
        if self == Self::Signed && share < 0.0 && code > 0 { code | 0x80 } else { code }
    }

    /// The share that a code stands for.
    fn share(self, code: u8) -> f32 {
        let (magnitude, negative) = match self {
            Self::Signed => (code & 0x7f, code >= 0x80),
            Self::Unsigned => (code, false),
        };
        if magnitude == 0 {
            return 0.0;
        }
        let share = f32::from_bits((u32::from(magnitude) + self.offset()) << (23 - self.mantissa_bits()));
        if negative { -share } else { share }
    }

    /// The numbers of one block.
    fn decode(self, codes: &[u8], largest: f32, values: &mut [f32]) {
        for (value, &code) in values.iter_mut().zip(codes) {
            *value = self.share(code) * largest;
        }
    }
}

/// A row of numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Blockwise {
    sign: Sign,
    codes: Vec<u8>,
    /// Each block's largest magnitude.
    largest: Vec<f32>,
}

/// Neighbouring blocks of a row.
#[derive(Debug)]
pub struct Blocks<'a> {
    sign: Sign,
    codes: &'a mut [u8],
    largest: &'a mut [f32],
}

impl Blockwise {
    /// Zeros.
    pub fn zeros(len: usize, sign: Sign) -> Self {
        Self { sign, codes: vec![0; len], largest: vec![0.0; len.div_ceil(BLOCK)] }
    }

    /// The nearest to these numbers. Those of [`Blockwise::values`] come back as they are.
    pub fn set(&mut self, values: &[f32]) {
        self.par_blocks(BLOCK)
            .zip(values.par_chunks(BLOCK))
            .for_each(|(mut block, values)| block.set(values));
    }

    /// All of them.
    pub fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.codes.len()];
        let blocks = values.par_chunks_mut(BLOCK).zip(self.codes.par_chunks(BLOCK).zip(&self.largest));
        blocks.for_each(|(values, (codes, &largest))| self.sign.decode(codes, largest, values));
        values
    }

    /// Parts of `len` numbers, a multiple of [`BLOCK`].
    pub fn par_blocks(&mut self, len: usize) -> impl IndexedParallelIterator<Item = Blocks<'_>> {
        let sign = self.sign;
        let parts = self.codes.par_chunks_mut(len).zip(self.largest.par_chunks_mut(len / BLOCK));
        parts.map(move |(codes, largest)| Blocks { sign, codes, largest })
    }
}

impl Blocks<'_> {
    /// Writes all numbers to `values`.
    pub fn get(&self, values: &mut [f32]) {
        let blocks = self.codes.chunks(BLOCK).zip(&*self.largest);
        for (values, (codes, &largest)) in values.chunks_mut(BLOCK).zip(blocks) {
            self.sign.decode(codes, largest, values);
        }
    }

    /// Takes the nearest to `values`.
    pub fn set(&mut self, values: &[f32]) {
        let blocks = self.codes.chunks_mut(BLOCK).zip(&mut *self.largest);
        for (values, (codes, largest)) in values.chunks(BLOCK).zip(blocks) {
            *largest = values.iter().fold(0.0, |largest, value| value.abs().max(largest));
            let scale = if *largest > 0.0 { *largest } else { 1.0 };
            for (code, &value) in codes.iter_mut().zip(values) {
                *code = self.sign.code(value / scale);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{normal, rng};

    fn stored(values: &[f32], sign: Sign) -> (Blockwise, Vec<f32>) {
        let mut row = Blockwise::zeros(values.len(), sign);
        row.set(values);
        let back = row.values();
        (row, back)
    }

    #[test]
    fn numbers_are_near_and_come_back_as_they_are() {
        let mut rng = rng();
        for sign in [Sign::Signed, Sign::Unsigned] {
            for len in [1, BLOCK - 1, BLOCK, 3 * BLOCK + 5] {
                // over six decades
                let exponents =
                    normal(&mut rng, 2.0, (1, len)).flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let values: Vec<f32> = exponents
                    .iter()
                    .enumerate()
                    .map(|(i, e)| {
                        10f32.powf(*e) * if sign == Sign::Signed && i % 3 == 0 { -1.0 } else { 1.0 }
                    })
                    .collect();
                let (row, back) = stored(&values, sign);
                assert_eq!(stored(&back, sign), (row, back.clone()));
                for (block, back) in values.chunks(BLOCK).zip(back.chunks(BLOCK)) {
                    let largest = block.iter().fold(0f32, |a, b| a.max(b.abs()));
                    for (value, back) in block.iter().zip(back) {
                        let half = 0.5f32.powi(1 + sign.mantissa_bits() as i32);
                        let bound = (half * value.abs()).max(largest * 0.5f32.powi(14));
                        assert!((value - back).abs() <= bound, "{value} became {back}, of {largest}");
                        assert!(sign == Sign::Signed || *back > 0.0, "{value} became 0, of {largest}");
                    }
                    assert!(back.iter().any(|back| back.abs() == largest));
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for sign in [Sign::Signed, Sign::Unsigned] {
            let mut values = vec![0.0; 2 * BLOCK];
            values[0] = 3.0;
            assert_eq!(stored(&values, sign).1, values);
        }
    }
}
