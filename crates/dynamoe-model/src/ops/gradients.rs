//! Gradients of parameters, summed in place.
//!
//! candle's backward pass allocates a tensor for every first gradient and another one for every sum. The fused operations
//! of [`crate::ops`] add to buffers instead, which live as long as the training, for weights on the CPU. candle has no way
//! to pass buffers to an operation, so [`Gradients::add`] leaves them in a thread-local while it runs a backward pass.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId, Var, bail};
use faer::Accum;
use rayon::prelude::*;

use super::cpu::{add_parts, axpy, matrix, read, sum};
use super::product::multiply_blocks;
use crate::params::Params;

/// Numbers whose squares are summed at a time.
pub const PART: usize = 1 << 14;

/// The sum of a parameter's gradients.
#[derive(Debug)]
pub enum Gradient {
    /// Of a parameter on the CPU; row-major.
    Host(Vec<f32>),
    /// Of a parameter on another device.
    Device(Tensor),
}

/// The gradients of parameters over one or more batches. A task of rayon's pool must not use it: while the task waits, its
/// thread may take up other work.
#[derive(Debug, Default)]
pub struct Gradients {
    sums: Sums,
}

/// The sum for each parameter.
type Sums = HashMap<TensorId, Sum>;

#[derive(Debug)]
struct Sum {
    gradient: Gradient,
    /// Whether the buffer holds a gradient; else it is kept for the next one.
    filled: bool,
}

thread_local! {
    /// The sums that this thread's backward pass adds to.
    static RUNNING: RefCell<Option<Sums>> = const { RefCell::new(None) };
}

/// Lends sums to the backward pass of this thread. They come back when this is dropped, also after a panic.
struct Lent<'a>(&'a mut Sums);

impl<'a> Lent<'a> {
    fn new(sums: &'a mut Sums) -> Self {
        RUNNING.set(Some(std::mem::take(sums)));
        Self(sums)
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        *self.0 = RUNNING.take().unwrap_or_default();
    }
}

impl Gradients {
    /// No gradients.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets all gradients, but keeps their memory.
    pub fn clear(&mut self) {
        self.sums.values_mut().for_each(|sum| sum.filled = false);
    }

    /// Adds the gradients of `loss`, a scalar, with respect to `params`.
    ///
    /// # Errors
    /// An operation of the graph that has no gradient, or that ran backwards before.
    pub fn add(&mut self, loss: &Tensor, params: &Params) -> Result<()> {
        self.add_and_take(loss, params).map(drop)
    }

    /// [`Gradients::add`] for a loss that starts from `input`, a result of earlier operations that are not in its graph.
    /// Returns the gradient with respect to `input`, zeros where there is none.
    ///
    /// # Errors
    /// As [`Gradients::add`].
    pub fn add_through(&mut self, loss: &Tensor, params: &Params, input: &Var) -> Result<Tensor> {
        match self.add_and_take(loss, params)?.remove(input) {
            Some(gradient) => Ok(gradient.detach()),
            None => Ok(input.zeros_like()?.detach()),
        }
    }

    /// Adds gradients; returns those that are not of `params`.
    fn add_and_take(&mut self, loss: &Tensor, params: &Params) -> Result<GradStore> {
        let lent = Lent::new(&mut self.sums);
        let store = loss.backward();
        drop(lent);
        let mut store = store?;
        for (_, var) in params.iter() {
            // operations other than ours give their gradients to candle
            if let Some(gradient) = store.remove(var) {
                self.add_tensor(var, &gradient)?;
            }
        }
        Ok(store)
    }

    fn add_tensor(&mut self, var: &Var, gradient: &Tensor) -> Result<()> {
        if var.device().is_cpu() {
            let (filled, sum) = host(&mut self.sums, var, var.elem_count());
            return read([gradient], |[gradient]| {
                if std::mem::replace(filled, true) {
                    axpy(sum, 1.0, gradient)
                } else {
                    sum.copy_from_slice(gradient)
                }
                Ok(())
            });
        }
        let sum = match self.sums.remove(&var.id()) {
            Some(Sum { gradient: Gradient::Device(sum), filled: true }) => (sum + gradient)?,
            _ => gradient.clone(),
        };
        self.set(var, Gradient::Device(sum.detach()));
        Ok(())
    }

    /// The gradient with respect to `var`, if one reached it.
    pub fn get(&self, var: &Var) -> Option<&Gradient> {
        self.sums.get(&var.id()).filter(|sum| sum.filled).map(|sum| &sum.gradient)
    }

    /// Replaces the gradient with respect to `var`.
    pub fn set(&mut self, var: &Var, gradient: Gradient) {
        self.sums.insert(var.id(), Sum { gradient, filled: true });
    }

    /// Adds what `other` holds of `params`, in one addition for each number. A parameter that has no gradient yet takes that
    /// of `other` without a copy; `other` gets its buffer for the next one.
    ///
    /// # Errors
    /// The device's.
    pub fn absorb(&mut self, other: &mut Self, params: &Params) -> Result<()> {
        for (_, var) in params.iter() {
            if other.get(var).is_none() {
                continue;
            }
            if self.get(var).is_none() {
                let free = self.sums.remove(&var.id());
                if let Some(sum) = other.sums.remove(&var.id()) {
                    self.sums.insert(var.id(), sum);
                }
                if let Some(free) = free {
                    other.sums.insert(var.id(), free);
                }
                continue;
            }
            match other.get(var) {
                Some(Gradient::Host(gradient)) => {
                    let (_, sum) = host(&mut self.sums, var, gradient.len());
                    let parts = sum.par_chunks_mut(PART).zip(gradient.par_chunks(PART));
                    parts.for_each(|(sum, part)| axpy(sum, 1.0, part));
                }
                Some(Gradient::Device(gradient)) => self.add_tensor(var, gradient)?,
                None => {}
            }
        }
        Ok(())
    }

    /// The gradient with respect to `len` numbers of a parameter on the CPU, to be written or added to; whether it holds a
    /// gradient already. From now on it does.
    pub fn part(&mut self, var: &Var, len: usize) -> (bool, &mut [f32]) {
        let (filled, values) = host(&mut self.sums, var, len);
        (std::mem::replace(filled, true), values)
    }

    /// Sums of the squares of up to [`PART`] neighbouring numbers, parameter by parameter; their sum is the square of the
    /// euclidean norm. A parameter on another device gives one sum.
    ///
    /// # Errors
    /// The device's.
    pub fn squares(&self, params: &Params) -> Result<Vec<f64>> {
        let mut squares = Vec::new();
        for (_, var) in params.iter() {
            match self.get(var) {
                None => {}
                Some(Gradient::Device(gradient)) => {
                    squares.push(f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?));
                }
                Some(Gradient::Host(gradient)) => {
                    let parts = gradient.par_chunks(PART).map(|part| f64::from(sum(part, |g| g * g)));
                    squares.extend(parts.collect::<Vec<f64>>());
                }
            }
        }
        Ok(squares)
    }

    /// The euclidean norm over all parameters.
    ///
    /// # Errors
    /// The device's.
    pub fn norm(&self, params: &Params) -> Result<f64> {
        Ok(self.squares(params)?.iter().sum::<f64>().sqrt())
    }
}

/// The buffer of `len` numbers of a parameter on the CPU, and whether it is filled.
fn host<'a>(sums: &'a mut Sums, var: &Tensor, len: usize) -> (&'a mut bool, &'a mut Vec<f32>) {
    let empty = || Sum { gradient: Gradient::Host(Vec::new()), filled: false };
    let sum = sums.entry(var.id()).or_insert_with(empty);
    if let Gradient::Device(_) = sum.gradient {
        *sum = empty();
    }
    let Gradient::Host(values) = &mut sum.gradient else { unreachable!("just made") };
    values.resize(len, 0.0);
    (&mut sum.filled, values)
}

/// Lets `write` fill in the gradient with respect to `weight`, a tensor on the CPU: it replaces all numbers of a buffer or
/// adds to them. The buffer is that of the [`Gradients::add`] that runs on this thread. Where none runs, it is a new one,
/// which is returned for candle to add up. A weight that is not trained is skipped.
pub(super) fn add_gradient(weight: &Tensor, write: impl FnOnce(&mut [f32], Accum)) -> Result<Option<Tensor>> {
    if !weight.track_op() {
        return Ok(None);
    }
    // The sums are put back before `write` runs, whose tasks might run other operations on this thread.
    let held = RUNNING.with_borrow_mut(|running| {
        let sums = running.as_mut().filter(|_| weight.is_variable())?;
        let (filled, values) = host(sums, weight, weight.elem_count());
        Some((std::mem::replace(filled, true), std::mem::take(values)))
    });
    let Some((filled, mut values)) = held else {
        let mut values = vec![0f32; weight.elem_count()];
        write(&mut values, Accum::Replace);
        return Tensor::from_vec(values, weight.shape(), weight.device()).map(Some);
    };
    write(&mut values, if filled { Accum::Add } else { Accum::Replace });
    RUNNING.with_borrow_mut(|running| {
        if let Some(sums) = running {
            *host(sums, weight, weight.elem_count()).1 = values;
        }
    });
    Ok(None)
}

/// As [`add_gradient`], for a weight that is no input of `operation` in candle's graph.
///
/// # Errors
/// No [`Gradients::add`] runs: candle has no place for the gradient.
pub(super) fn hand_over(
    operation: &str,
    weight: &Tensor,
    write: impl FnOnce(&mut [f32], Accum),
) -> Result<()> {
    match add_gradient(weight, write)? {
        None => Ok(()),
        Some(_) => bail!("{operation}: expected the backward pass to be run by Gradients::add"),
    }
}

/// Hands over the gradient with respect to a matrix `(out, in)`: `gᵀ x` for `g (N, out)` and `x (N, in)`.
pub(super) fn hand_over_matrix(operation: &str, weight: &Tensor, g: &[f32], x: &[f32]) -> Result<()> {
    let (out, from) = weight.dims2()?;
    hand_over(operation, weight, |dw, accum| {
        multiply_blocks(dw, accum, matrix(g, out).transpose(), matrix(x, from));
    })
}

/// Hands over the gradient with respect to a bias `(out)`: the sum of the rows of `g (N, out)`.
pub(super) fn hand_over_bias(operation: &str, bias: &Tensor, g: &[f32]) -> Result<()> {
    let rows: Vec<&[f32]> = g.chunks_exact(bias.elem_count()).collect();
    hand_over(operation, bias, |db, accum| add_parts(&rows, db, accum))
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape};

    use super::*;
    use crate::ops::linear;

    struct Panics;

    impl CustomOp1 for Panics {
        fn name(&self) -> &'static str {
            "panics"
        }

        fn cpu_fwd(&self, x: &CpuStorage, at: &Layout) -> Result<(CpuStorage, Shape)> {
            Ok((x.clone(), at.shape().clone()))
        }

        fn bwd(&self, _x: &Tensor, _y: &Tensor, _g: &Tensor) -> Result<Option<Tensor>> {
            panic!("on purpose")
        }
    }

    #[test]
    fn a_panic_in_a_backward_pass_loses_nothing() {
        let mut params = Params::new();
        let w = params.insert("w", &Tensor::ones((1, 2), DType::F32, &Device::Cpu).unwrap()).unwrap();
        let x = Tensor::new(&[[3f32, 4.0]], &Device::Cpu).unwrap();
        let loss = || linear(&x, &w).unwrap().sum_all().unwrap(); // its gradient is x
        let mut gradients = Gradients::new();
        gradients.add(&loss(), &params).unwrap();
        let broken = loss().apply_op1(Panics).unwrap();
        assert!(catch_unwind(AssertUnwindSafe(|| gradients.add(&broken, &params))).is_err());
        let value = |gradients: &Gradients| match gradients.get(&w) {
            Some(Gradient::Host(values)) => values.clone(),
            found => panic!("{found:?}"),
        };
        assert_eq!(value(&gradients), [3.0, 4.0]);
        // another backward pass on this thread does not add to sums that were left behind
        loss().backward().unwrap();
        gradients.add(&loss(), &params).unwrap();
        assert_eq!(value(&gradients), [6.0, 8.0]);
    }
}
