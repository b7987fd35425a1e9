//! Matrix products on a CPU, in f32 or in bf16.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Result, bail};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// With which precision this process computes the matrix products of f32 tensors on a CPU. Sums are f32 always.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32.
    #[default]
    F32,
    /// Factors are rounded to bf16: twice as fast on processors with AVX-512's bf16 dot products, and refused on others.
    /// Routers, small products and all that is no matrix product stay f32.
    Bf16,
}

/// Whether it is bf16.
static BF16: AtomicBool = AtomicBool::new(false);

impl Precision {
    /// Makes it the process's, from now on.
    ///
    /// # Errors
    /// bf16 on a processor without the instructions.
    pub fn set(self) -> Result<()> {
        if self == Self::Bf16 && !bf16::supported() {
            bail!(
                "bf16: expected a processor with AVX-512's bf16 dot products (avx512_bf16), found none; use f32"
            );
        }
        BF16.store(self == Self::Bf16, Ordering::Relaxed);
        Ok(())
    }
}

/// A right factor `(k, n)`, made ready for products with the process's precision.
pub(super) enum Factor<'a> {
    F32(MatRef<'a, f32>),
    Bf16(bf16::Packed),
}

impl<'a> Factor<'a> {
    /// `b`, whose rows or columns are neighbours.
    pub(super) fn new(b: MatRef<'a, f32>) -> Self {
        // smaller products would be mostly edges
        let large = b.nrows() >= 32 && b.ncols() >= 32;
        if large && BF16.load(Ordering::Relaxed) { Self::Bf16(bf16::Packed::new(b)) } else { Self::F32(b) }
    }

    /// `c = a b` or `c += a b`, row-major, on this thread. Of `b` it takes as many rows as `a` has columns, and as many
    /// columns as `c` has.
    pub(super) fn multiply(&self, c: &mut [f32], accum: Accum, a: MatRef<'_, f32>) {
        let columns = c.len() / a.nrows().max(1);
        match self {
            Self::F32(b) => multiply(c, accum, a, b.submatrix(0, 0, a.ncols(), columns)),
            Self::Bf16(b) => bf16::multiply(c, accum, a, b, columns),
        }
    }
}

/// `c = a b` or `c += a b`, row-major, on this thread, in f32.
pub(super) fn multiply(c: &mut [f32], accum: Accum, a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    matmul(MatMut::from_row_major_slice_mut(c, a.nrows(), b.ncols()), accum, a, b, 1.0, Par::Seq);
}

/// `c = a b` or `c += a b`, row-major, with the process's [`Precision`], blocks of rows in parallel. Neither the
/// blocks nor the results depend on the number of threads.
pub(super) fn multiply_blocks(c: &mut [f32], accum: Accum, a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    let (rows, columns, b) = (a.nrows(), b.ncols(), Factor::new(b));
    let block = (rows / 4).clamp(32, 128);
    c.par_chunks_mut((block * columns).max(1)).enumerate().for_each(|(index, c)| {
        b.multiply(c, accum, a.subrows(index * block, c.len() / columns));
    });
}

#[cfg(target_arch = "x86_64")]
use super::bf16;

/// Other processors.
#[cfg(not(target_arch = "x86_64"))]
mod bf16 {
    use faer::{Accum, MatRef};

    /// There is none.
    pub(in crate::ops) enum Packed {}

    impl Packed {
        pub(super) fn new(_b: MatRef<'_, f32>) -> Self {
            unreachable!("Precision::set refuses bf16")
        }
    }

    pub(super) fn supported() -> bool {
        false
    }

    pub(super) fn multiply(_c: &mut [f32], _accum: Accum, _a: MatRef<'_, f32>, b: &Packed, _n: usize) {
        match *b {}
    }
}
