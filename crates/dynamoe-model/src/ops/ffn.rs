//! The differentiable FFN in one: [`TrainableFfn::forward`] for f32 on the CPU.
//!
//! Each block of rows goes through gate, up, activation, mask and down while it is in the cache, and likewise
//! backwards. Gradients of the three matrices and of the compensation go straight into
//! [`super::Gradients`].

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp2, Device, Layout, Result, Shape, Tensor, bail};
use dynamoe::TrainableFfn;
use dynamoe::activation::Sigmoidal;
use dynamoe::train::glu::{NeuronRows, backward_rows, forward_rows};
use faer::Accum;
use rayon::prelude::*;

use super::cpu::{
    Host, add_parts, axpy, blocks, dot, fusable, host, lock, matrix, read, rows_per_block, slice,
};
use super::gradients::add_gradient;
use super::linear;
use super::product::{Factor, multiply_blocks};

/// The `reach (N, E)` of experts chosen on the host: row `n` holds `experts[n] + 1` ones.
///
/// # Errors
/// The device's.
pub fn reach_of(chosen: &[usize], experts: usize, device: &Device) -> Result<Tensor> {
    let reach: Vec<f32> = chosen.iter().flat_map(|&e| (0..experts).map(move |s| f32::from(s <= e))).collect();
    Tensor::from_vec(reach, (chosen.len(), experts), device)
}

/// `Σ_e p_e O_e(x)` for `x (N, D)` and `reach (N, E)`, as [`TrainableFfn::forward`].
///
/// # Errors
/// Shapes that do not fit.
pub fn ffn(weights: &TrainableFfn, x: &Tensor, reach: &Tensor) -> Result<Tensor> {
    if let Some([(shared, of_shared), (separate, of_separate)]) = weights.split(reach)? {
        let y = (ffn(&shared, x, &of_shared)? + ffn(&separate, x, &of_separate)?)?;
        return weights.compensate(y, reach);
    }
    let mut tensors = vec![&weights.gate_proj, &weights.up_proj, &weights.down_proj];
    tensors.extend(&weights.compensation);
    let keep = x.track_op() || reach.track_op();
    let trained = tensors.iter().any(|tensor| tensor.track_op());
    let whole = tensors.iter().all(|tensor| tensor.is_contiguous());
    // candle runs a backward pass where an input asks for it
    if !(whole && fusable(&tensors) && fusable(&[x, reach]) && (keep || !trained)) {
        return weights.forward_with(x, reach, linear);
    }
    let (i, d) = weights.gate_proj.dims2()?;
    let (n, e) = (x.dim(0)?, weights.widths.len());
    let fits = x.dims() == [n, d]
        && reach.dims() == [n, e]
        && weights.up_proj.dims() == [i, d]
        && weights.down_proj.dims() == [d, i]
        && weights.compensation.as_ref().is_none_or(|compensation| compensation.dims() == [e - 1, d])
        && weights.widths.last() == Some(&i);
    if !fits {
        bail!(
            "ffn: expected x (N, {d}) and reach (N, {e}) for widths {:?} of {i} neurons, found {:?} and {:?}",
            weights.widths,
            x.dims(),
            reach.dims()
        );
    }
    let op = Fused { weights: weights.clone(), keep, saved: Mutex::new(None) };
    x.contiguous()?.apply_op2(&reach.contiguous()?, op)
}

/// One forward and one backward pass.
struct Fused {
    weights: TrainableFfn,
    /// Whether there may be a backward pass.
    keep: bool,
    /// `x W_gateᵀ` and `x W_upᵀ`, each `(N, I)`; the backward pass takes them.
    saved: Mutex<Option<[Vec<f32>; 2]>>,
}

/// The weights' numbers.
struct Numbers<'a> {
    gate: Host<'a>,
    up: Host<'a>,
    down: Host<'a>,
    compensation: Option<Host<'a>>,
}

/// The weights as factors of one pass: transposed forward, as they are backward.
struct Weights<'a> {
    gate: Factor<'a>,
    up: Factor<'a>,
    down: Factor<'a>,
    compensation: Option<&'a [f32]>,
    widths: &'a [usize],
    act: Sigmoidal,
    d: usize,
    i: usize,
}

/// Some rows of a backward pass.
struct BackwardRows<'a> {
    /// `(N, E)`.
    reach: &'a [f32],
    /// The gradient with respect to `y`, `(N, D)`.
    g: &'a [f32],
    /// As the forward pass left it, `(N, I)`; becomes the gradient with respect to it.
    gate: &'a mut [f32],
    /// Likewise.
    up: &'a mut [f32],
    /// Becomes h, `(N, I)`.
    h: &'a mut [f32],
    /// Becomes the gradient with respect to `reach`.
    d_reach: &'a mut [f32],
    /// Becomes the gradient with respect to `x`, `(N, D)`.
    dx: &'a mut [f32],
}

/// The neurons of all rows, as the backward pass left them, `(N, I)`.
struct Neurons<'a> {
    d_gate: &'a [f32],
    d_up: &'a [f32],
    h: &'a [f32],
}

impl<'a> Numbers<'a> {
    fn new(weights: &'a TrainableFfn) -> Result<Self> {
        Ok(Self {
            gate: host(&weights.gate_proj)?,
            up: host(&weights.up_proj)?,
            down: host(&weights.down_proj)?,
            compensation: weights.compensation.as_ref().map(host).transpose()?,
        })
    }

    /// `factor` makes a factor of a matrix given with its number of columns.
    fn factors<'b>(
        &'b self,
        weights: &'b TrainableFfn,
        factor: impl Fn(&'b [f32], usize) -> Factor<'b>,
    ) -> Weights<'b> {
        let d = weights.gate_proj.dims()[1];
        let i = self.gate.len() / d;
        Weights {
            gate: factor(&self.gate, d),
            up: factor(&self.up, d),
            down: factor(&self.down, i),
            compensation: self.compensation.as_deref(),
            widths: &weights.widths,
            act: weights.hidden_act.function(),
            d,
            i,
        }
    }
}

impl Weights<'_> {
    /// Rows of `y`, and of `gate` and `up` on the way.
    fn forward(&self, x: &[f32], reach: &[f32], [gate, up]: [&mut [f32]; 2], y: &mut [f32]) {
        let x = matrix(x, self.d);
        self.gate.multiply(gate, Accum::Replace, x);
        self.up.multiply(up, Accum::Replace, x);
        let mut h = vec![0f32; gate.len()];
        forward_rows(self.act, [gate, up], reach, self.widths, &mut h);
        self.down.multiply(y, Accum::Replace, matrix(&h, self.i));
        if let Some(compensation) = &self.compensation {
            let e = self.widths.len();
            for (y, reach) in y.chunks_exact_mut(self.d).zip(reach.chunks_exact(e)) {
                for (constant, p) in compensation.chunks_exact(self.d).zip(reach.windows(2)) {
                    axpy(y, p[0] - p[1], constant);
                }
            }
        }
    }

    /// Backwards through [`Weights::forward`]. Returns the gradient with respect to the compensation.
    fn backward(&self, rows: BackwardRows<'_>) -> Vec<f32> {
        let BackwardRows { reach, g, gate, up, h, d_reach, dx } = rows;
        self.down.multiply(h, Accum::Replace, matrix(g, self.d));
        let neurons = NeuronRows { gate: &mut *gate, up: &mut *up, h };
        backward_rows(self.act, neurons, reach, self.widths, d_reach);
        self.gate.multiply(dx, Accum::Replace, matrix(gate, self.i));
        self.up.multiply(dx, Accum::Add, matrix(up, self.i));
        let Some(compensation) = &self.compensation else { return Vec::new() };
        let mut sums = vec![0f32; compensation.len()];
        let e = self.widths.len();
        let rows = reach.chunks_exact(e).zip(d_reach.chunks_exact_mut(e)).zip(g.chunks_exact(self.d));
        for ((reach, d_reach), g) in rows {
            for smaller in 0..e - 1 {
                let at = smaller * self.d..(smaller + 1) * self.d;
                let with_respect_to_p = dot(g, &compensation[at.clone()]);
                d_reach[smaller] += with_respect_to_p;
                d_reach[smaller + 1] -= with_respect_to_p;
                axpy(&mut sums[at], reach[smaller] - reach[smaller + 1], g);
            }
        }
        sums
    }
}

impl CustomOp2 for Fused {
    fn name(&self) -> &'static str {
        "ffn"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        reach: &CpuStorage,
        reach_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, reach) = (slice(x, x_at)?, slice(reach, reach_at)?);
        let numbers = Numbers::new(&self.weights)?;
        let weights = numbers
            .factors(&self.weights, |values, columns| Factor::new(matrix(values, columns).transpose()));
        let (d, i, e) = (weights.d, weights.i, weights.widths.len());
        let n = x.len() / d;
        let rows = rows_per_block(n);
        let mut y = vec![0f32; n * d];
        let mut saved = [i, i].map(|i| vec![0f32; if self.keep { n * i } else { 0 }]);
        let [gate, up] = saved.each_mut().map(|saved| (&mut saved[..], if self.keep { i } else { 0 }));
        blocks([(&mut y[..], d), gate, up], rows, n)
            .into_par_iter()
            .zip(x.par_chunks(rows * d).zip(reach.par_chunks(rows * e)))
            .for_each(|([y, gate, up], (x, reach))| {
                if self.keep {
                    weights.forward(x, reach, [gate, up], y);
                } else {
                    let mut gate = vec![0f32; x.len() / d * i];
                    let mut up = gate.clone();
                    weights.forward(x, reach, [&mut gate, &mut up], y);
                }
            });
        if self.keep {
            *lock(&self.saved) = Some(saved);
        }
        Ok((CpuStorage::F32(y), x_at.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        reach: &Tensor,
        _y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let saved = lock(&self.saved).take();
        let Some([mut gate, mut up]) = saved else {
            bail!("ffn: expected one forward pass, then one backward pass");
        };
        read([x, reach, g], |[x_values, reach_values, g]| {
            let numbers = Numbers::new(&self.weights)?;
            let weights =
                numbers.factors(&self.weights, |values, columns| Factor::new(matrix(values, columns)));
            let (d, i, e) = (weights.d, weights.i, weights.widths.len());
            let n = x_values.len() / d;
            let rows = rows_per_block(n);
            let (mut h, mut dx, mut d_reach) = (vec![0f32; n * i], vec![0f32; n * d], vec![0f32; n * e]);
            let out = [(&mut gate[..], i), (&mut up[..], i), (&mut h, i), (&mut d_reach, e), (&mut dx, d)];
            let constants: Vec<Vec<f32>> = blocks(out, rows, n)
                .into_par_iter()
                .zip(reach_values.par_chunks(rows * e).zip(g.par_chunks(rows * d)))
                .map(|([gate, up, h, d_reach, dx], (reach, g))| {
                    weights.backward(BackwardRows { reach, g, gate, up, h, d_reach, dx })
                })
                .collect();
            self.add_gradients(x_values, g, &Neurons { d_gate: &gate, d_up: &up, h: &h }, &constants)?;
            let tensor = |of: &Tensor, values| Tensor::from_vec(values, of.shape(), of.device());
            Ok((Some(tensor(x, dx)?), Some(tensor(reach, d_reach)?)))
        })
    }
}

impl Fused {
    /// Adds the gradients of the weights to those of the backward pass at hand.
    fn add_gradients(&self, x: &[f32], g: &[f32], neurons: &Neurons, constants: &[Vec<f32>]) -> Result<()> {
        let Neurons { d_gate, d_up, h } = neurons;
        let TrainableFfn { gate_proj, up_proj, down_proj, compensation, .. } = &self.weights;
        let mut lost = false;
        for (weight, g, x) in [(gate_proj, *d_gate, x), (up_proj, *d_up, x), (down_proj, g, *h)] {
            let (to, from) = weight.dims2()?;
            let product = |dw: &mut [f32], accum| {
                multiply_blocks(dw, accum, matrix(g, to).transpose(), matrix(x, from));
            };
            lost |= add_gradient(weight, product)?.is_some();
        }
        if let Some(weight) = compensation {
            lost |= add_gradient(weight, |dw, accum| add_parts(constants, dw, accum))?.is_some();
        }
        if lost {
            bail!("ffn: expected the backward pass to be run by Gradients::add");
        }
        Ok(())
    }
}
