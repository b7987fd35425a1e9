//! AdamW (decoupled weight decay) whose state can be saved, in one pass over memory.
//!
//! ```text
//! m ← β₁ m + (1-β₁) g        v ← β₂ v + (1-β₂) g²
//! w ← w - lr (m / (1-β₁ᵗ) / (√(v / (1-β₂ᵗ)) + ε) + decay · w)
//! ```

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Tensor, Var};
use rayon::prelude::*;

use super::group::Group;
use super::shards::Shards;
use dynamoe_model::Params;
use dynamoe_model::ops::{Gradient, Gradients};

const BETA_1: f32 = 0.9;
const BETA_2: f32 = 0.95;
const EPSILON: f32 = 1e-8;

/// The running means of the gradient of some numbers of a parameter, and of its square.
#[derive(Debug)]
struct Moments {
    /// Which numbers.
    range: Range<usize>,
    m: Tensor,
    v: Tensor,
}

/// The optimizer: the moments of every parameter, or of a shard.
#[derive(Debug)]
pub struct AdamW {
    moments: BTreeMap<String, Moments>,
    /// Updates done.
    pub step: u64,
}

/// What changes from step to step.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// Learning rate of the dense FFNs.
    pub ffn_lr: f64,
    /// Learning rate of the smaller experts' separate weights.
    pub separate_lr: f64,
    /// Learning rate of all but FFNs and routers.
    pub backbone_lr: f64,
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
        Self::of_shard(params, &Shards::new(params, 1), 0)
    }

    /// Zero moments for what a shard holds of each parameter.
    ///
    /// # Errors
    /// The device's.
    pub fn of_shard(params: &Params, shards: &Shards, shard: usize) -> Result<Self> {
        let zeros = |(param, (name, var)): (usize, (&str, &Var))| -> Result<_> {
            let range = shards.range(shard, param);
            let zeros = || Tensor::zeros(range.len(), DType::F32, var.device());
            Ok((name.to_owned(), Moments { m: zeros()?, v: zeros()?, range: range.clone() }))
        };
        let moments = params.iter().enumerate().map(zeros).collect::<Result<_>>()?;
        Ok(Self { moments, step: 0 })
    }

    /// The moments by name, `NAME.m` and `NAME.v`: those of all numbers that this optimizer updates.
    pub fn state(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.moments
            .iter()
            .flat_map(|(name, Moments { m, v, .. })| [(format!("{name}.m"), m), (format!("{name}.v"), v)])
    }

    /// Puts back what [`AdamW::state`] gave: `read` gets a name and which numbers of the parameter are wanted.
    ///
    /// # Errors
    /// Those of `read`; moments of another length.
    pub fn restore(
        &mut self,
        step: u64,
        mut read: impl FnMut(&str, Range<usize>) -> Result<Tensor>,
    ) -> Result<()> {
        for (name, Moments { range, m, v }) in &mut self.moments {
            for (suffix, moment) in [("m", m), ("v", v)] {
                let found = read(&format!("{name}.{suffix}"), range.clone())
                    .with_context(|| format!("no optimizer state for {name}"))?;
                ensure!(found.dims() == moment.dims(), "optimizer state of {name} has another shape");
                *moment = found;
            }
        }
        self.step = step;
        Ok(())
    }

    /// Updates the numbers of every parameter that has a gradient, which is that of these numbers.
    ///
    /// # Errors
    /// A parameter that this optimizer was not made for; a gradient of another shape.
    pub fn update(&mut self, params: &Params, grads: &Gradients, update: Update) -> Result<()> {
        self.step += 1;
        let t = self.step as i32;
        let correction = [1.0 - f64::from(BETA_1).powi(t), 1.0 - f64::from(BETA_2).powi(t)];
        for (name, var) in params.iter() {
            let Some(grad) = grads.get(var) else { continue };
            let moments = self.moments.get_mut(name);
            let moments = moments.with_context(|| format!("no optimizer state for {name}"))?;
            let lr = match Group::of(name) {
                Group::Router => update.router_lr,
                Group::Separate => update.separate_lr,
                Group::DenseFfn => update.ffn_lr,
                Group::Backbone => update.backbone_lr,
            };
            let decay = if var.rank() > 1 { update.weight_decay } else { 0.0 };
            let rule = Rule {
                lr: (lr / correction[0]) as f32,
                root: correction[1].sqrt().recip() as f32,
                keep: (1.0 - lr * decay) as f32,
                scale: update.scale as f32,
            };
            match grad {
                Gradient::Host(grad) => edit(&moments.m, |m| {
                    edit(&moments.v, |v| {
                        edit(var, |w| {
                            rule.apply(&mut w[moments.range.clone()], [m, v], grad);
                            Ok(())
                        })
                    })
                })?,
                Gradient::Device(grad) => rule.apply_composed(var, moments, grad)?,
            }
        }
        Ok(())
    }
}

/// Elements that one task of the thread pool takes.
const CHUNK: usize = 1 << 14;

/// The update of one parameter.
struct Rule {
    /// Learning rate over the first moment's correction.
    lr: f32,
    /// `1 / √` of the second moment's correction.
    root: f32,
    /// Share of the weight that decay leaves.
    keep: f32,
    /// Factor on the gradient.
    scale: f32,
}

impl Rule {
    fn apply(&self, w: &mut [f32], [m, v]: [&mut [f32]; 2], grad: &[f32]) {
        let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        w.par_chunks_mut(CHUNK).zip(moments.zip(grad.par_chunks(CHUNK))).for_each(|(w, ((m, v), grad))| {
            for (((w, m), v), grad) in w.iter_mut().zip(m).zip(v).zip(grad) {
                let grad = grad * self.scale;
                *m = BETA_1 * *m + (1.0 - BETA_1) * grad;
                *v = BETA_2 * *v + (1.0 - BETA_2) * (grad * grad);
                *w = *w * self.keep - self.lr * *m / (v.sqrt() * self.root + EPSILON);
            }
        });
    }

    /// [`Rule::apply`] out of candle's operations, for all numbers of a parameter on any device.
    fn apply_composed(&self, w: &Var, moments: &mut Moments, grad: &Tensor) -> Result<()> {
        let mix = |old: &Tensor, new: &Tensor, beta: f32| -> candle_core::Result<Tensor> {
            (old * f64::from(beta))? + (new * f64::from(1.0 - beta))?
        };
        let grad = (grad.flatten_all()? * f64::from(self.scale))?;
        let Moments { m, v, .. } = moments;
        (*m, *v) = (mix(m, &grad, BETA_1)?, mix(v, &grad.sqr()?, BETA_2)?);
        let step = (&*m / ((v.sqrt()? * f64::from(self.root))? + f64::from(EPSILON))?)?.reshape(w.shape())?;
        w.set(&((w.as_detached_tensor() * f64::from(self.keep))? - (step * f64::from(self.lr))?)?)?;
        Ok(())
    }
}

/// Hands the numbers of a contiguous f32 tensor on the CPU to `change`.
pub(super) fn edit(
    tensor: &Tensor,
    change: impl FnOnce(&mut [f32]) -> candle_core::Result<()>,
) -> candle_core::Result<()> {
    struct Edit<F>(Mutex<Option<F>>);
    impl<F: FnOnce(&mut [f32]) -> candle_core::Result<()>> InplaceOp1 for Edit<F> {
        fn name(&self) -> &'static str {
            "adamw"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            let change = self.0.lock().ok().and_then(|mut change| change.take());
            match (storage, layout.contiguous_offsets(), change) {
                (CpuStorage::F32(data), Some((start, end)), Some(change)) => change(&mut data[start..end]),
                _ => candle_core::bail!("adamw: expected contiguous f32 tensors, found {layout:?}"),
            }
        }
    }
    tensor.inplace_op1(&Edit(Mutex::new(Some(change))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{normal, rng};
    use candle_core::Device;

    /// The equations of the module's header, in f64.
    fn reference(w: &mut f64, state: &mut (f64, f64), g: f64, t: i32, lr: f64, decay: f64) {
        state.0 = 0.9 * state.0 + 0.1 * g;
        state.1 = 0.95 * state.1 + 0.05 * g * g;
        let (m, v) = (state.0 / (1.0 - 0.9f64.powi(t)), state.1 / (1.0 - 0.95f64.powi(t)));
        *w -= lr * (m / (v.sqrt() + 1e-8) + decay * *w);
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    const UPDATE: Update = Update {
        ffn_lr: 0.02,
        separate_lr: 0.03,
        backbone_lr: 0.01,
        router_lr: 0.04,
        weight_decay: 0.1,
        scale: 0.5,
    };

    #[test]
    fn updates_follow_the_equations() {
        let (mut rng, mut params) = (rng(), Params::new());
        let start = normal(&mut rng, 1.0, (3, 7000));
        let vars = ["fused", "composed"].map(|name| params.insert(name, &start).unwrap());
        let mut optimizer = AdamW::new(&params).unwrap();
        let mut expected: Vec<f64> = values(&start).into_iter().map(f64::from).collect();
        let mut state = vec![(0.0, 0.0); expected.len()];
        for t in 1..=5 {
            let grad = normal(&mut rng, 1.0, (3, 7000));
            for ((w, s), g) in expected.iter_mut().zip(&mut state).zip(values(&grad)) {
                reference(w, s, UPDATE.scale * f64::from(g), t, UPDATE.backbone_lr, UPDATE.weight_decay);
            }
            let mut grads = Gradients::new();
            grads.set(&vars[0], Gradient::Host(values(&grad)));
            grads.set(&vars[1], Gradient::Device(grad));
            optimizer.update(&params, &grads, UPDATE).unwrap();
        }
        for var in &vars {
            for (found, expected) in values(var).iter().zip(&expected) {
                // an update is 0.01 at most; its moments are sums of 5 terms in f32, of which single ones may cancel
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-4 * (1.0 + expected.abs()),
                    "{found} {expected}"
                );
            }
        }
    }

    #[test]
    fn each_group_of_weights_has_its_rate() {
        let names = [
            ("model.layers.0.self_attn.q_proj.weight", UPDATE.backbone_lr),
            ("model.layers.0.mlp.down_proj.weight", UPDATE.ffn_lr),
            ("model.layers.0.mlp.own.down_proj.weight", UPDATE.separate_lr),
            ("model.layers.0.mlp.router.fc1.weight", UPDATE.router_lr),
        ];
        let mut params = Params::new();
        let ones = Tensor::ones(4, candle_core::DType::F32, &Device::Cpu).unwrap();
        let vars = names.map(|(name, _)| params.insert(name, &ones).unwrap());
        let mut grads = Gradients::new();
        vars.iter().for_each(|var| grads.set(var, Gradient::Host(vec![1.0; 4])));
        AdamW::new(&params).unwrap().update(&params, &grads, UPDATE).unwrap();
        for (var, (name, rate)) in vars.iter().zip(names) {
            // the first update moves a weight by its rate, whatever the gradient; a bias-like vector does not decay
            let moved = 1.0 - f64::from(values(var)[0]);
            assert!((moved - rate).abs() < 1e-6, "{name}: {moved}, expected {rate}");
        }
    }

    #[test]
    fn a_restored_optimizer_goes_on_where_it_was() {
        let (mut rng, mut params) = (rng(), Params::new());
        let start = normal(&mut rng, 1.0, (5, 3));
        let var = params.insert("weight", &start).unwrap();
        let step = |optimizer: &mut AdamW, var: &candle_core::Var, grad: &Tensor| {
            let mut grads = Gradients::new();
            grads.set(var, Gradient::Device(grad.clone()));
            optimizer.update(&params, &grads, UPDATE).unwrap();
            values(var)
        };
        let [first, second] = [(); 2].map(|()| normal(&mut rng, 1.0, (5, 3)));
        let mut optimizer = AdamW::new(&params).unwrap();
        step(&mut optimizer, &var, &first);
        let middle = var.as_tensor().copy().unwrap();
        let state: BTreeMap<_, _> =
            optimizer.state().map(|(name, tensor)| (name, tensor.copy().unwrap())).collect();
        let expected = step(&mut optimizer, &var, &second);
        let mut again = AdamW::new(&params).unwrap();
        let read = |name: &str, _| state.get(name).cloned().context("missing");
        again.restore(1, read).unwrap();
        var.set(&middle).unwrap();
        assert_eq!(step(&mut again, &var, &second), expected);
        let error = again.restore(1, |_, _| anyhow::bail!("missing")).unwrap_err().to_string();
        assert!(error.contains("no optimizer state for weight"), "{error}");
    }
}
