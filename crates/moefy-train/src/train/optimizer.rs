//! AdamW (decoupled weight decay) whose state can be saved, in one pass over memory.
//!
//! ```text
//! m ← β₁ m + (1-β₁) g        v ← β₂ v + (1-β₂) g²
//! w ← w - lr (m / (1-β₁ᵗ) / (√(v / (1-β₂ᵗ)) + ε) + decay · w)
//! ```

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Tensor, Var};
use rayon::prelude::*;

use super::blockwise::{Blockwise, Sign};
use super::config::MomentBits;
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
    kept: Kept,
}

/// How they are kept.
#[derive(Debug)]
enum Kept {
    Bits32 {
        m: Tensor,
        v: Tensor,
    },
    Bits8 {
        m: Blockwise,
        /// `√v`, which spans half as many decades.
        root: Blockwise,
    },
}

impl Kept {
    fn zeros(len: usize, bits: MomentBits, device: &Device) -> candle_core::Result<Self> {
        let zeros = || Tensor::zeros(len, DType::F32, device);
        Ok(match bits {
            MomentBits::Bits32 => Self::Bits32 { m: zeros()?, v: zeros()? },
            MomentBits::Bits8 => Self::Bits8 {
                m: Blockwise::zeros(len, Sign::Signed),
                root: Blockwise::zeros(len, Sign::Unsigned),
            },
        })
    }

    /// `m` and `v` in f32.
    fn tensors(&self) -> candle_core::Result<[Tensor; 2]> {
        match self {
            Self::Bits32 { m, v } => Ok([m.clone(), v.clone()]),
            Self::Bits8 { m, root } => {
                let tensor = |row: &Blockwise| {
                    let values = row.values();
                    let len = values.len();
                    Tensor::from_vec(values, len, &Device::Cpu)
                };
                Ok([tensor(m)?, tensor(root)?.sqr()?])
            }
        }
    }

    /// Takes back [`Kept::tensors`].
    fn set(&mut self, [new_m, new_v]: [Tensor; 2]) -> candle_core::Result<()> {
        match self {
            Self::Bits32 { m, v } => (*m, *v) = (new_m, new_v),
            Self::Bits8 { m, root } => {
                m.set(&new_m.to_vec1::<f32>()?);
                root.set(&new_v.sqrt()?.to_vec1::<f32>()?);
            }
        }
        Ok(())
    }
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
    /// Zero moments for each parameter, in f32.
    ///
    /// # Errors
    /// The device's.
    pub fn new(params: &Params) -> Result<Self> {
        Self::of_shard(params, &Shards::new(params, 1), 0, MomentBits::Bits32)
    }

    /// Zero moments for what a shard holds of each parameter.
    ///
    /// # Errors
    /// The device's.
    pub fn of_shard(params: &Params, shards: &Shards, shard: usize, bits: MomentBits) -> Result<Self> {
        let zeros = |(param, (name, var)): (usize, (&str, &Var))| -> Result<_> {
            let range = shards.range(shard, param);
            let kept = Kept::zeros(range.len(), bits, var.device())?;
            Ok((name.to_owned(), Moments { range, kept }))
        };
        let moments = params.iter().enumerate().map(zeros).collect::<Result<_>>()?;
        Ok(Self { moments, step: 0 })
    }

    /// The moments by name, `NAME.m` and `NAME.v`, in f32: those of all numbers that this optimizer updates.
    pub fn state(&self) -> impl Iterator<Item = candle_core::Result<[(String, Tensor); 2]>> {
        self.moments.iter().map(|(name, moments)| {
            let [m, v] = moments.kept.tensors()?;
            Ok([(format!("{name}.m"), m), (format!("{name}.v"), v)])
        })
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
        for (name, Moments { range, kept }) in &mut self.moments {
            let mut read = |suffix| {
                let found = read(&format!("{name}.{suffix}"), range.clone())
                    .with_context(|| format!("no optimizer state for {name}"))?;
                ensure!(found.dims() == [range.len()], "optimizer state of {name} has another shape");
                Ok(found)
            };
            kept.set([read("m")?, read("v")?])?;
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
            let range = moments.range.clone();
            match (grad, &mut moments.kept) {
                (Gradient::Host(grad), Kept::Bits32 { m, v }) => edit(m, |m| {
                    edit(v, |v| {
                        edit(var, |w| {
                            rule.apply(&mut w[range], [m, v], grad);
                            Ok(())
                        })
                    })
                })?,
                (Gradient::Host(grad), Kept::Bits8 { m, root }) => edit(var, |w| {
                    rule.apply_to_blocks(&mut w[range], [m, root], grad);
                    Ok(())
                })?,
                (Gradient::Device(grad), Kept::Bits32 { m, v }) => rule.apply_composed(var, [m, v], grad)?,
                (Gradient::Device(_), Kept::Bits8 { .. }) => bail!("moments in 8 bits are for --device cpu"),
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
        let all = w.par_chunks_mut(CHUNK).zip(moments.zip(grad.par_chunks(CHUNK)));
        all.for_each(|(w, ((m, v), grad))| self.apply_to_chunk(w, [m, v], grad));
    }

    fn apply_to_chunk(&self, w: &mut [f32], [m, v]: [&mut [f32]; 2], grad: &[f32]) {
        for (((w, m), v), grad) in w.iter_mut().zip(m).zip(v).zip(grad) {
            let grad = grad * self.scale;
            *m = BETA_1 * *m + (1.0 - BETA_1) * grad;
            *v = BETA_2 * *v + (1.0 - BETA_2) * (grad * grad);
            *w = *w * self.keep - self.lr * *m / (v.sqrt() * self.root + EPSILON);
        }
    }

    /// [`Rule::apply`] to moments in 8 bits. Each weight is moved by them as they are before they are rounded.
    fn apply_to_blocks(&self, w: &mut [f32], [m, root]: [&mut Blockwise; 2], grad: &[f32]) {
        let moments = m.par_blocks(CHUNK).zip(root.par_blocks(CHUNK));
        let all = w.par_chunks_mut(CHUNK).zip(moments.zip(grad.par_chunks(CHUNK)));
        all.for_each(|(w, ((mut kept_m, mut kept_root), grad))| {
            let [mut m, mut v] = [(); 2].map(|()| vec![0f32; w.len()]);
            kept_m.get(&mut m);
            kept_root.get(&mut v);
            v.iter_mut().for_each(|root| *root *= *root);
            self.apply_to_chunk(w, [&mut m, &mut v], grad);
            // far below ε: squares of what is kept stay normal numbers, so that a checkpoint has them exactly
            v.iter_mut().for_each(|v| *v = if *v < 1e-30 { 0.0 } else { v.sqrt() });
            kept_m.set(&m);
            kept_root.set(&v);
        });
    }

    /// [`Rule::apply`] out of candle's operations, for all numbers of a parameter on any device.
    fn apply_composed(&self, w: &Var, [m, v]: [&mut Tensor; 2], grad: &Tensor) -> Result<()> {
        let mix = |old: &Tensor, new: &Tensor, beta: f32| -> candle_core::Result<Tensor> {
            (old * f64::from(beta))? + (new * f64::from(1.0 - beta))?
        };
        let grad = (grad.flatten_all()? * f64::from(self.scale))?;
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
    use crate::train::blockwise::BLOCK;

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
    fn moments_in_8_bits_lead_to_nearly_the_same_weights() {
        let (mut rng, mut params) = (rng(), Params::new());
        let (len, steps) = (3 * BLOCK + 17, 200);
        let start = normal(&mut rng, 1.0, (1, len));
        let vars = ["32", "8"].map(|name| params.insert(name, &start).unwrap());
        let goal = values(&normal(&mut rng, 1.0, (1, len)));
        let of = |bits| AdamW::of_shard(&params, &Shards::new(&params, 1), 0, bits).unwrap();
        let mut optimizers = [of(MomentBits::Bits32), of(MomentBits::Bits8)];
        for _ in 0..steps {
            let noise = values(&normal(&mut rng, 1.0, (1, len)));
            for (var, optimizer) in vars.iter().zip(&mut optimizers) {
                // curvatures over three decades
                let slope = |((i, w), (goal, noise)): ((usize, f32), (&f32, &f32))| {
                    10f32.powi(-((i % 4) as i32)) * (w - goal + 0.3 * noise)
                };
                let grad = values(var).into_iter().enumerate().zip(goal.iter().zip(&noise)).map(slope);
                let mut grads = Gradients::new();
                grads.set(var, Gradient::Host(grad.collect()));
                optimizer.update(&params, &grads, UPDATE).unwrap();
            }
        }
        let moved = |w: &[f32], from: &[f32]| -> f32 {
            w.iter().zip(from).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt()
        };
        let [exact, rounded] = vars.map(|var| values(&var));
        let (way, difference) = (moved(&exact, &values(&start)), moved(&exact, &rounded));
        assert!(difference > 0.0 && difference < 0.1 * way, "{difference} of a way of {way}");
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
        restored(MomentBits::Bits32, Gradient::Device);
        restored(MomentBits::Bits8, |grad| Gradient::Host(values(&grad)));
    }

    fn restored(bits: MomentBits, gradient: fn(Tensor) -> Gradient) {
        let (mut rng, mut params) = (rng(), Params::new());
        let start = normal(&mut rng, 1.0, (5, 130));
        let var = params.insert("weight", &start).unwrap();
        let step = |optimizer: &mut AdamW, var: &candle_core::Var, grad: &Tensor| {
            let mut grads = Gradients::new();
            grads.set(var, gradient(grad.clone()));
            optimizer.update(&params, &grads, UPDATE).unwrap();
            values(var)
        };
        let [first, second] = [(); 2].map(|()| normal(&mut rng, 1.0, (5, 130)));
        let new = || AdamW::of_shard(&params, &Shards::new(&params, 1), 0, bits).unwrap();
        let mut optimizer = new();
        step(&mut optimizer, &var, &first);
        let middle = var.as_tensor().copy().unwrap();
        let state: BTreeMap<_, _> =
            optimizer.state().flat_map(Result::unwrap).map(|(name, t)| (name, t.copy().unwrap())).collect();
        let expected = step(&mut optimizer, &var, &second);
        let mut again = new();
        let read = |name: &str, _| state.get(name).cloned().context("missing");
        again.restore(1, read).unwrap();
        var.set(&middle).unwrap();
        assert_eq!(step(&mut again, &var, &second), expected);
        let error = again.restore(1, |_, _| anyhow::bail!("missing")).unwrap_err().to_string();
        assert!(error.contains("no optimizer state for weight"), "{error}");
    }
}
