//! AdamW (decoupled weight decay) whose state can be saved, one pass over memory for each of its three updates.
//!
//! ```text
//! m ← β₁ m + (1-β₁) g        v ← β₂ v + (1-β₂) g²
//! w ← w - lr (m / (1-β₁ᵗ) / (√(v / (1-β₂ᵗ)) + ε) + decay · w)
//! ```

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use candle_core::{CpuStorage, Device, InplaceOp2, InplaceOp3, Layout, Tensor};
use rayon::prelude::*;

use crate::model::Params;

const BETA_1: f32 = 0.9;
const BETA_2: f32 = 0.95;
const EPSILON: f32 = 1e-8;

/// The first and second moments of every parameter.
#[derive(Debug)]
pub struct AdamW {
    moments: BTreeMap<String, (Tensor, Tensor)>,
    /// Updates done.
    pub step: u64,
}

/// What changes from step to step.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// Learning rate of everything but routers.
    pub lr: f64,
    /// Learning rate of router tensors.
    pub router_lr: f64,
    /// Decay of matrices.
    pub weight_decay: f64,
    /// Factor on all gradients, for clipping.
    pub scale: f64,
}

impl AdamW {
    /// Zero moments for each parameter.
    ///
    /// # Errors
    /// The device's.
    pub fn new(params: &Params) -> Result<Self> {
        let zeros = |name: &str, var: &candle_core::Var| -> Result<_> {
            Ok((name.to_owned(), (var.zeros_like()?.detach(), var.zeros_like()?.detach())))
        };
        let moments = params.iter().map(|(name, var)| zeros(name, var)).collect::<Result<_>>()?;
        Ok(Self { moments, step: 0 })
    }

    /// All moments by name: `NAME.m` and `NAME.v`.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let both = |(name, (m, v)): (&String, &(Tensor, Tensor))| {
            [(format!("{name}.m"), m.clone()), (format!("{name}.v"), v.clone())]
        };
        self.moments.iter().flat_map(both).collect()
    }

    /// Puts back what [`AdamW::state`] gave.
    ///
    /// # Errors
    /// A moment that is missing or of another shape.
    pub fn restore(&mut self, step: u64, mut state: BTreeMap<String, Tensor>) -> Result<()> {
        for (name, (m, v)) in &mut self.moments {
            for (suffix, moment) in [("m", m), ("v", v)] {
                let found = state.remove(&format!("{name}.{suffix}"));
                let found = found.with_context(|| format!("no optimizer state for {name}"))?;
                ensure!(found.dims() == moment.dims(), "optimizer state of {name} has another shape");
                *moment = found;
            }
        }
        self.step = step;
        Ok(())
    }

    /// Updates every parameter that has a gradient.
    ///
    /// # Errors
    /// candle's.
    pub fn update(
        &mut self,
        params: &Params,
        grads: &BTreeMap<String, Tensor>,
        update: Update,
    ) -> Result<()> {
        self.step += 1;
        let t = self.step as i32;
        let correction = [1.0 - f64::from(BETA_1).powi(t), 1.0 - f64::from(BETA_2).powi(t)];
        for (name, var) in params.iter() {
            let Some(grad) = grads.get(name) else { continue };
            let (m, v) = self.moments.get(name).with_context(|| format!("no optimizer state for {name}"))?;
            let lr = if name.contains(".mlp.router.") { update.router_lr } else { update.lr };
            let decay = if var.rank() > 1 { update.weight_decay } else { 0.0 };
            let apply = Apply {
                lr: (lr / correction[0]) as f32,
                root: correction[1].sqrt().recip() as f32,
                keep: (1.0 - lr * decay) as f32,
            };
            let grad = grad.contiguous()?.detach();
            let scale = update.scale as f32;
            if matches!(var.device(), Device::Cpu) {
                m.inplace_op2(&grad, &Moment { beta: BETA_1, scale, squared: false })?;
                v.inplace_op2(&grad, &Moment { beta: BETA_2, scale, squared: true })?;
                var.inplace_op3(m, v, &apply)?;
            } else {
                let grad = (grad * f64::from(scale))?;
                let (m, v) = self.composed_moments(name, &grad)?;
                let denominator = ((v.sqrt()? * f64::from(apply.root))? + f64::from(EPSILON))?;
                let step = ((m / denominator)? * f64::from(apply.lr))?;
                var.set(&((var.as_detached_tensor() * f64::from(apply.keep))? - step)?)?;
            }
        }
        Ok(())
    }

    /// The moments after `grad`, made of candle's operations, stored and returned.
    fn composed_moments(&mut self, name: &str, grad: &Tensor) -> Result<(Tensor, Tensor)> {
        let slot = self.moments.get_mut(name).with_context(|| format!("no optimizer state for {name}"))?;
        let mix = |old: &Tensor, new: &Tensor, beta: f32| -> candle_core::Result<Tensor> {
            (old * f64::from(beta))? + (new * f64::from(1.0 - beta))?
        };
        *slot = (mix(&slot.0, grad, BETA_1)?, mix(&slot.1, &grad.sqr()?, BETA_2)?);
        Ok(slot.clone())
    }
}

/// Elements that one task of the thread pool takes.
const CHUNK: usize = 1 << 14;

fn whole<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("adamw: expected contiguous tensors, found {layout:?}"),
    }
}

fn whole_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&mut data[start..end]),
        _ => candle_core::bail!("adamw: expected contiguous f32 tensors, found {layout:?}"),
    }
}

struct Moment {
    beta: f32,
    scale: f32,
    squared: bool,
}

impl InplaceOp2 for Moment {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(
        &self,
        moment: &mut CpuStorage,
        layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (moment, grad) = (whole_mut(moment, layout)?, whole(grad, grad_layout)?);
        moment.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK)).for_each(|(moment, grad)| {
            for (moment, &grad) in moment.iter_mut().zip(grad) {
                let grad = grad * self.scale;
                let new = if self.squared { grad * grad } else { grad };
                *moment = self.beta * *moment + (1.0 - self.beta) * new;
            }
        });
        Ok(())
    }
}

struct Apply {
    /// Learning rate over the first moment's correction.
    lr: f32,
    /// `1 / √` of the second moment's correction.
    root: f32,
    /// Share of the weight that decay leaves.
    keep: f32,
}

impl InplaceOp3 for Apply {
    fn name(&self) -> &'static str {
        "adamw-apply"
    }

    fn cpu_fwd(
        &self,
        weight: &mut CpuStorage,
        layout: &Layout,
        m: &CpuStorage,
        m_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (weight, m, v) = (whole_mut(weight, layout)?, whole(m, m_layout)?, whole(v, v_layout)?);
        let moments = m.par_chunks(CHUNK).zip(v.par_chunks(CHUNK));
        weight.par_chunks_mut(CHUNK).zip(moments).for_each(|(weight, (m, v))| {
            for ((w, &m), &v) in weight.iter_mut().zip(m).zip(v) {
                *w = *w * self.keep - self.lr * m / (v.sqrt() * self.root + EPSILON);
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The equations of the module's header, in f64.
    fn reference(w: &mut f64, state: &mut (f64, f64), g: f64, t: i32, lr: f64, decay: f64) {
        state.0 = 0.9 * state.0 + 0.1 * g;
        state.1 = 0.95 * state.1 + 0.05 * g * g;
        let (m, v) = (state.0 / (1.0 - 0.9f64.powi(t)), state.1 / (1.0 - 0.95f64.powi(t)));
        *w -= lr * (m / (v.sqrt() + 1e-8) + decay * *w);
    }

    #[test]
    fn updates_follow_the_equations() {
        let mut params = Params::new();
        let start = Tensor::randn(0f32, 1.0, (3, 7000), &Device::Cpu).unwrap();
        let var = params.insert("matrix", &start).unwrap();
        let mut optimizer = AdamW::new(&params).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut expected: Vec<f64> = values(&start).into_iter().map(f64::from).collect();
        let mut state = vec![(0.0, 0.0); expected.len()];
        for t in 1..=5 {
            let grad = Tensor::randn(0f32, 1.0, (3, 7000), &Device::Cpu).unwrap();
            for ((w, s), g) in expected.iter_mut().zip(&mut state).zip(values(&grad)) {
                reference(w, s, 0.5 * f64::from(g), t, 0.01, 0.1);
            }
            let update = Update { lr: 0.01, router_lr: 1.0, weight_decay: 0.1, scale: 0.5 };
            optimizer.update(&params, &BTreeMap::from([("matrix".into(), grad)]), update).unwrap();
        }
        for (found, expected) in values(&var).iter().zip(&expected) {
            assert!(
                (f64::from(*found) - expected).abs() < 1e-4 * (1.0 + expected.abs()),
                "{found} {expected}"
            );
        }
        let mut again = AdamW::new(&params).unwrap();
        again.restore(5, optimizer.state()).unwrap();
        assert!(again.restore(5, BTreeMap::new()).is_err());
    }
}
