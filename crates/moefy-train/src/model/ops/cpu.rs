//! What the fused operations share: access to f32 tensors on the CPU and inner loops that vectorise.
//!
//! Sums run in a fixed order over fixed blocks, whatever the number of threads: results repeat bit for bit.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};

/// Numbers that an inner loop handles at once: two AVX-512 registers, four of AVX2.
pub(super) const LANES: usize = 32;

/// Numbers that one task of the thread pool should handle at least.
const TASK: usize = 16384;

/// Whether fused operations apply: every tensor is f32 on the CPU.
pub(super) fn fusable(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|tensor| tensor.device().is_cpu() && tensor.dtype() == DType::F32)
}

/// Rows of `width` numbers that make a task.
pub(super) fn rows_per_task(width: usize) -> usize {
    TASK.div_ceil(width.max(1))
}

/// The numbers of a contiguous f32 storage.
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("expected a contiguous tensor, found strides {:?}", layout.stride()),
    }
}

/// Reads `N` f32 tensors on the CPU.
pub(super) fn read<const N: usize, T>(
    tensors: [&Tensor; N],
    body: impl FnOnce([&[f32]; N]) -> Result<T>,
) -> Result<T> {
    let mut contiguous = Vec::with_capacity(N);
    for tensor in tensors {
        contiguous.push(tensor.contiguous()?);
    }
    let guards: Vec<_> = contiguous.iter().map(Tensor::storage_and_layout).collect();
    let mut slices = [[].as_slice(); N];
    for (to, (storage, layout)) in slices.iter_mut().zip(&guards) {
        *to = match &**storage {
            Storage::Cpu(storage) => slice(storage, layout)?,
            _ => bail!("expected a tensor on the CPU"),
        };
    }
    body(slices)
}

/// `a · b + c`, in one instruction where the CPU at hand has it (the library function is slow elsewhere).
#[inline(always)]
pub(super) fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` without branches, so that loops vectorise: `2^k · p(r)` with `x = k ln 2 + r`. Relative error below
/// 2e-7 from -87 to 88; 1.6e-38 below; meaningless, but safe, above; NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2²³ rounds to a whole number, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let k = shifted - ROUND;
    // ln 2 in two parts: k times the first is exact.
    let r = mul_add(k, -0.693_359_4, x);
    let r = mul_add(k, 2.121_944_4e-4, r);
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = mul_add(p, r, c);
    }
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1f32.to_bits()))
}

/// The first of two numbers if it is larger, else the second: one instruction, unlike [`f32::max`].
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Halves the lanes until one is left.
#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            lanes[l] = f(lanes[l], lanes[l + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// `Σ f(x)` in [`LANES`] partial sums.
#[inline(always)]
pub(super) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for block in blocks {
        for l in 0..LANES {
            lanes[l] += f(block[l]);
        }
    }
    fold(lanes, |a, b| a + b) + rest.iter().map(|&x| f(x)).sum::<f32>()
}

/// `Σ a b` in [`LANES`] partial sums; the two are equally long.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            lanes[l] = mul_add(a[l], b[l], lanes[l]);
        }
    }
    let mut rest = 0.0;
    for (&a, &b) in a_rest.iter().zip(b_rest) {
        rest = mul_add(a, b, rest);
    }
    fold(lanes, |a, b| a + b) + rest
}

/// The largest number, -∞ for none.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for block in blocks {
        for l in 0..LANES {
            lanes[l] = larger(block[l], lanes[l]);
        }
    }
    rest.iter().copied().fold(fold(lanes, larger), larger)
}

/// `y += a x`.
#[inline(always)]
pub(super) fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = mul_add(a, x, *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_exp() {
        for step in -8_700..=8_800 {
            let x = step as f32 / 100.0;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(((ours - exact) / exact).abs() < 2e-7, "exp({x}) = {ours}, expected {exact}");
        }
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_take_every_number_once() {
        for len in [0, 1, LANES - 1, LANES, LANES + 1, 5 * LANES + 3] {
            let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let total = (0..len).sum::<usize>() as f32;
            assert_eq!(sum(&x, |x| 2.0 * x), 2.0 * total);
            assert_eq!(dot(&x, &vec![3.0; len]), 3.0 * total);
            assert_eq!(max(&x), x.last().copied().unwrap_or(f32::NEG_INFINITY));
            // The largest in every place.
            for at in 0..len {
                let mut x = vec![-1.0; len];
                x[at] = 1.0;
                assert_eq!(max(&x), 1.0);
            }
        }
    }
}
