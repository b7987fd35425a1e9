//! What the fused operations share: access to f32 tensors on the CPU, and inner loops that the compiler vectorises.
//!
//! Sums run in a fixed order over fixed blocks, so results do not depend on the number of threads.

use std::cell::Cell;
use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLockReadGuard};

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};
pub(super) use dynamoe::math::{exp, mul_add, tanh};
use faer::{Accum, MatRef};

/// Numbers that an inner loop handles at once: two registers of AVX-512, four of AVX2.
pub(super) const LANES: usize = 32;

/// Minimum of numbers in a task of the thread pool.
const TASK: usize = 16384;

thread_local! {
    /// Whether fused operations are off for this thread.
    static COMPOSED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `body` without fused operations: what a GPU computes, on a CPU. Gradients have to be taken within `body` too. For
/// tests.
#[doc(hidden)]
pub fn composed<T>(body: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            COMPOSED.set(self.0);
        }
    }
    let _restore = Restore(COMPOSED.replace(true)); // also after a panic
    body()
}

/// Whether fused operations can be used: every tensor is f32 on the CPU.
pub(super) fn fusable(tensors: &[&Tensor]) -> bool {
    !COMPOSED.get() && tensors.iter().all(|tensor| tensor.device().is_cpu() && tensor.dtype() == DType::F32)
}

/// Rows of `width` numbers that make a task.
pub(super) fn rows_per_task(width: usize) -> usize {
    TASK.div_ceil(width.max(1))
}

/// Rows that go through several operations at once. Few, so that they stay in the cache and every thread gets some; but
/// enough for a fast matrix product.
pub(super) fn rows_per_block(rows: usize) -> usize {
    (rows / 8).clamp(32, 128)
}

/// The numbers of a contiguous f32 storage.
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("expected a contiguous tensor, found strides {:?}", layout.stride()),
    }
}

/// Derefs to the numbers of a tensor: see [`host`].
pub(super) struct Host<'a> {
    storage: RwLockReadGuard<'a, Storage>,
    range: (usize, usize),
}

/// The numbers of a contiguous f32 tensor on the CPU.
pub(super) fn host(tensor: &Tensor) -> Result<Host<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(_)), Some(range)) => Ok(Host { range, storage }),
        _ => bail!("expected a contiguous f32 tensor on the CPU, found {tensor:?}"),
    }
}

impl Deref for Host<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.0..self.range.1],
            _ => unreachable!("checked when it was made"),
        }
    }
}

/// Hands the numbers of `N` f32 tensors on the CPU to `body`.
pub(crate) fn read<const N: usize, T>(
    tensors: [&Tensor; N],
    body: impl FnOnce([&[f32]; N]) -> Result<T>,
) -> Result<T> {
    let mut contiguous = Vec::with_capacity(N);
    for tensor in tensors {
        contiguous.push(tensor.contiguous()?);
    }
    let hosts = contiguous.iter().map(host).collect::<Result<Vec<_>>>()?;
    let mut slices = [[].as_slice(); N];
    slices.iter_mut().zip(&hosts).for_each(|(to, host)| *to = host);
    body(slices)
}

/// A row-major matrix with this number of columns.
pub(super) fn matrix(x: &[f32], columns: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(x, x.len() / columns.max(1), columns)
}

/// Cuts row-major buffers, each given with its number of columns, into blocks of `rows` rows. All have `total` rows.
pub(super) fn blocks<const K: usize>(
    buffers: [(&mut [f32], usize); K],
    rows: usize,
    total: usize,
) -> Vec<[&mut [f32]; K]> {
    let mut rest = buffers;
    (0..total)
        .step_by(rows)
        .map(|first| {
            let count = rows.min(total - first);
            rest.each_mut().map(|(buffer, columns)| {
                buffer.split_off_mut(..count * *columns).expect("buffers have `total` rows")
            })
        })
        .collect()
}

/// Locks `mutex`. One that a panic poisoned is locked too: what operations keep in a mutex is replaced as a whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `to = Σ parts` or `to += Σ parts`, in their order.
pub(super) fn add_parts<P: AsRef<[f32]>>(parts: &[P], to: &mut [f32], accum: Accum) {
    if let Accum::Replace = accum {
        to.fill(0.0);
    }
    parts.iter().for_each(|part| axpy(to, 1.0, part.as_ref()));
}

/// The first number if it is larger, else the second. One instruction, unlike [`f32::max`], which looks for NaN.
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Combines the lanes by halves until one is left.
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
pub(crate) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for block in blocks {
        for l in 0..LANES {
            lanes[l] += f(block[l]);
        }
    }
    fold(lanes, |a, b| a + b) + rest.iter().map(|&x| f(x)).sum::<f32>()
}

/// `Σ a b` in [`LANES`] partial sums, for slices of one length.
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

/// The largest number; -∞ if there is none.
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
pub(crate) fn axpy(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = mul_add(a, x, *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_does_not_leave_fused_operations_off() {
        let x = Tensor::zeros(1, DType::F32, &candle_core::Device::Cpu).unwrap();
        let panicked = std::panic::catch_unwind(|| composed(|| panic!("on purpose")));
        assert!(panicked.is_err() && fusable(&[&x]));
        assert!(!composed(|| fusable(&[&x])));
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
