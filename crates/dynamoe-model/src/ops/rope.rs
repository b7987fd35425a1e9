//! Rotary position embedding, half-split as in Hugging Face's models: pair `i` of a head is
//! `(x[i], x[i + d/2])`. The backward pass turns the gradient back by the same angles.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::{fusable, mul_add, read, rows_per_task, slice};
use super::rotary::Rotary;

/// Turns the heads of `x (N, heads·d)`. Row `n` is at position `n mod T`; `T` and `d` are those of the tables.
///
/// # Errors
/// Columns that are no multiple of `d`, or `N` that is no multiple of `T`.
pub fn rope(x: &Tensor, rotary: &Rotary) -> Result<Tensor> {
    let (positions, half) = rotary.cos.dims2()?;
    let (n, width) = x.dims2()?;
    if n % positions.max(1) != 0 || width % (2 * half).max(1) != 0 {
        bail!(
            "rope: expected a multiple of {positions} rows and of {} columns, found {:?}",
            2 * half,
            x.dims()
        );
    }
    if fusable(&[x, &rotary.cos, &rotary.sin]) {
        return x.contiguous()?.apply_op1(Rope { rotary: rotary.clone() });
    }
    rope_composed(x, rotary)
}

/// [`rope`], composed of candle's operations.
///
/// # Errors
/// As [`rope`].
pub fn rope_composed(x: &Tensor, rotary: &Rotary) -> Result<Tensor> {
    let (positions, half) = rotary.cos.dims2()?;
    let (n, width) = x.dims2()?;
    let x = x.reshape((n / positions, positions, width / (2 * half), 2 * half))?; // (B, T, heads, d)
    let cos = rotary.cos.reshape((1, positions, 1, half))?.to_dtype(x.dtype())?;
    let sin = rotary.sin.reshape((1, positions, 1, half))?.to_dtype(x.dtype())?;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let turned_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let turned_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[turned_a, turned_b], D::Minus1)?.reshape((n, width))
}

/// Which way heads are turned.
#[derive(Clone, Copy)]
pub(super) enum Direction {
    /// As the embedding says.
    Forward,
    /// Back, as the gradient is.
    Back,
}

/// The angles of all positions.
#[derive(Clone, Copy)]
pub(super) struct Rotation<'a> {
    /// Cosines, `(T, d/2)`.
    pub cos: &'a [f32],
    /// Sines, `(T, d/2)`.
    pub sin: &'a [f32],
    /// `d/2`
    pub half: usize,
}

impl Rotation<'_> {
    /// Turns the heads of rows of `width` numbers in place. The first row is number `first` of all.
    pub(super) fn turn(&self, x: &mut [f32], width: usize, first: usize, direction: Direction) {
        let positions = self.cos.len() / self.half;
        for (row, x) in x.chunks_exact_mut(width).enumerate() {
            let at = (first + row) % positions * self.half;
            let (cos, sin) = (&self.cos[at..][..self.half], &self.sin[at..][..self.half]);
            for head in x.chunks_exact_mut(2 * self.half) {
                turn_head(head, cos, sin, direction);
            }
        }
    }
}

/// `(a, b)` → `(a cos - b sin, b cos + a sin)` for the pairs of one head.
#[inline(always)]
fn turn_head(x: &mut [f32], cos: &[f32], sin: &[f32], direction: Direction) {
    let sign = match direction {
        Direction::Forward => 1.0,
        Direction::Back => -1.0,
    };
    let (a, b) = x.split_at_mut(cos.len());
    for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        let sin = sign * sin;
        (*a, *b) = (mul_add(*a, *cos, -(*b * sin)), mul_add(*b, *cos, *a * sin));
    }
}

struct Rope {
    rotary: Rotary,
}

impl Rope {
    /// Turns every head of `x (N, width)`.
    fn turn(&self, x: &[f32], width: usize, direction: Direction) -> Result<Vec<f32>> {
        let half = self.rotary.cos.dim(1)?;
        let rows = rows_per_task(width);
        let mut y = x.to_vec();
        read([&self.rotary.cos, &self.rotary.sin], |[cos, sin]| {
            let rotation = Rotation { cos, sin, half };
            let tasks = y.par_chunks_mut(rows * width).enumerate();
            tasks.for_each(|(task, y)| rotation.turn(y, width, task * rows, direction));
            Ok(())
        })?;
        Ok(y)
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_at: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = self.turn(slice(x, x_at)?, x_at.shape().dims2()?.1, Direction::Forward)?;
        Ok((CpuStorage::F32(y), x_at.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let dx = read([g], |[g]| self.turn(g, x.dim(1)?, Direction::Back))?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}
