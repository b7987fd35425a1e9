//! Gradients of parameters, summed in place.
//!
//! candle's backward pass fills a tensor with zeros for every first gradient and makes a new one for every sum.
//! For weights on the CPU, the fused operations of [`crate::ops`] add to buffers instead that live as long as the
//! training does: while [`Gradients::add`] runs the backward pass, its thread holds them.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{Result, Tensor, TensorId, Var};
use faer::Accum;
use rayon::prelude::*;

use super::cpu::{axpy, read, sum};
use crate::params::Params;

/// The sum of a parameter's gradients.
#[derive(Debug)]
pub enum Gradient {
    /// In the memory of a CPU; row-major.
    Host(Vec<f32>),
    /// On another device.
    Device(Tensor),
}

/// The gradients of parameters over one or more batches. Not to be used from within a task of rayon's pool, whose
/// threads may take up other work meanwhile.
#[derive(Debug, Default)]
pub struct Gradients {
    sums: Sums,
}

/// By parameter: whether there is a gradient yet, and the gradient. Buffers without one are kept for the next.
type Sums = HashMap<TensorId, (bool, Gradient)>;

thread_local! {
    /// The sums of the backward pass that this thread runs.
    static RUNNING: RefCell<Option<Sums>> = const { RefCell::new(None) };
}

impl Gradients {
    /// No gradients.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets all gradients, but keeps their memory.
    pub fn clear(&mut self) {
        self.sums.values_mut().for_each(|(some, _)| *some = false);
    }

    /// Adds the gradients of `loss`, a scalar, by `params`.
    ///
    /// # Errors
    /// candle's.
    pub fn add(&mut self, loss: &Tensor, params: &Params) -> Result<()> {
        RUNNING.set(Some(std::mem::take(&mut self.sums)));
        let store = loss.backward();
        self.sums = RUNNING.take().unwrap_or_default();
        let mut store = store?;
        for (_, var) in params.iter() {
            // what reached the parameter through other operations than ours
            if let Some(gradient) = store.remove(var) {
                self.add_tensor(var, &gradient)?;
            }
        }
        Ok(())
    }

    fn add_tensor(&mut self, var: &Var, gradient: &Tensor) -> Result<()> {
        if var.device().is_cpu() {
            let (some, sum) = host(&mut self.sums, var);
            read([gradient], |[gradient]| {
                if *some {
                    axpy(sum, 1.0, gradient)
                } else {
                    sum.copy_from_slice(gradient)
                }
                *some = true;
                Ok(())
            })
        } else {
            let sum = match self.sums.remove(&var.id()) {
                Some((true, Gradient::Device(sum))) => (sum + gradient)?,
                _ => gradient.clone(),
            };
            self.sums.insert(var.id(), (true, Gradient::Device(sum.detach())));
            Ok(())
        }
    }

    /// The gradient by `var`, if one reached it.
    pub fn get(&self, var: &Var) -> Option<&Gradient> {
        self.sums.get(&var.id()).filter(|(some, _)| *some).map(|(_, gradient)| gradient)
    }

    /// Replaces the gradient by `var`.
    pub fn set(&mut self, var: &Var, gradient: Gradient) {
        self.sums.insert(var.id(), (true, gradient));
    }

    /// The euclidean norm over all parameters.
    ///
    /// # Errors
    /// candle's.
    pub fn norm(&self, params: &Params) -> Result<f64> {
        let mut squares = 0.0;
        for (_, var) in params.iter() {
            squares += match self.get(var) {
                None => 0.0,
                Some(Gradient::Device(gradient)) => f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?),
                Some(Gradient::Host(gradient)) => {
                    let parts: Vec<f64> =
                        gradient.par_chunks(1 << 14).map(|part| f64::from(sum(part, |g| g * g))).collect();
                    parts.iter().sum()
                }
            };
        }
        Ok(squares.sqrt())
    }
}

/// The buffer of a parameter on the CPU, of the parameter's size.
fn host<'a>(sums: &'a mut Sums, var: &Tensor) -> (&'a mut bool, &'a mut Vec<f32>) {
    let (some, gradient) = sums.entry(var.id()).or_insert_with(|| (false, Gradient::Host(Vec::new())));
    if let Gradient::Device(_) = gradient {
        (*some, *gradient) = (false, Gradient::Host(Vec::new()));
    }
    let Gradient::Host(values) = gradient else { unreachable!("just made") };
    values.resize(var.elem_count(), 0.0);
    (some, values)
}

/// Hands the gradient by `weight`, a tensor on the CPU, to `write`, which replaces or adds to all of its numbers.
/// It is that of the backward pass that runs on this thread, or else a new one, which is returned for candle's own
/// sums. Nothing happens where the weight is not trained.
pub(super) fn add_gradient(weight: &Tensor, write: impl FnOnce(&mut [f32], Accum)) -> Result<Option<Tensor>> {
    if !weight.track_op() {
        return Ok(None);
    }
    // The sums are put back before `write` runs, whose tasks might run other operations on this thread.
    let held = RUNNING.with_borrow_mut(|running| {
        let sums = running.as_mut().filter(|_| weight.is_variable())?;
        let (some, values) = host(sums, weight);
        Some((std::mem::replace(some, true), std::mem::take(values)))
    });
    let Some((some, mut values)) = held else {
        let mut values = vec![0f32; weight.elem_count()];
        write(&mut values, Accum::Replace);
        return Tensor::from_vec(values, weight.shape(), weight.device()).map(Some);
    };
    write(&mut values, if some { Accum::Add } else { Accum::Replace });
    RUNNING.with_borrow_mut(|running| {
        if let Some(sums) = running {
            *host(sums, weight).1 = values;
        }
    });
    Ok(None)
}
