//! The middle of a gated FFN with a mask for each shell, as one operation with a gradient.
//!
//! ```text
//! h[t, j] = act(gate[t, j]) · up[t, j] · reach[t, shell(j)]
//! ```
//!
//! `reach[t, s]` says how much token `t` uses shell `s`: 1 or 0 where it is routed, in between where a router
//! is trained. As `O_e` is linear in the shells, `W_down h` is then `Σ_e p_e O_e` with
//! `reach_s = Σ_{e ≥ s} p_e`: a full-width pass costs what a dense one does and has every expert's gradient.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};
use candle_nn::{Activation, Module};
use rayon::prelude::*;

use crate::activation::{HiddenAct, Sigmoidal};

/// `act(gate) ∘ up`, made of candle's operations.
///
/// # Errors
/// Shapes that do not fit.
pub fn glu(act: HiddenAct, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Activation::from(act).forward(gate)? * up
}

/// `act(gate) ∘ up ∘ reach`, for `gate (N, I)`, `up (N, I)`, `reach (N, E)` → `(N, I)`.
///
/// One pass on a CPU in f32; elsewhere made of candle's operations.
///
/// # Errors
/// Shapes that do not fit.
pub fn masked_glu(
    act: HiddenAct,
    gate: &Tensor,
    up: &Tensor,
    reach: &Tensor,
    widths: &[usize],
) -> Result<Tensor> {
    let (n, i) = gate.dims2()?;
    if up.dims() != [n, i] || reach.dims() != [n, widths.len()] || widths.last() != Some(&i) {
        bail!(
            "masked_glu: expected up ({n}, {i}) and reach ({n}, {}) for widths {widths:?}, found {:?} and {:?}",
            widths.len(),
            up.dims(),
            reach.dims()
        );
    }
    if gate.device().is_cpu() && gate.dtype() == candle_core::DType::F32 {
        let op = MaskedGlu { act: act.function(), widths: widths.to_vec() };
        return gate.contiguous()?.apply_op3(&up.contiguous()?, &reach.contiguous()?, op);
    }
    masked_glu_reference(act, gate, up, reach, widths)
}

/// [`masked_glu`] made of candle's operations.
pub fn masked_glu_reference(
    act: HiddenAct,
    gate: &Tensor,
    up: &Tensor,
    reach: &Tensor,
    widths: &[usize],
) -> Result<Tensor> {
    let shells: Vec<u32> =
        shell_ranges(widths).enumerate().flat_map(|(s, r)| r.map(move |_| s as u32)).collect();
    let mask = reach.index_select(&Tensor::new(shells, reach.device())?, 1)?; // (N, I)
    glu(act, gate, up)? * mask
}

/// The neurons of each shell.
pub fn shell_ranges(widths: &[usize]) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
    widths.iter().scan(0, |start, &end| Some(std::mem::replace(start, end)..end))
}

struct MaskedGlu {
    act: Sigmoidal,
    widths: Vec<usize>,
}

/// Rows that one task of the thread pool takes.
const ROWS: usize = 32;

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("masked_glu: expected contiguous inputs, found strides {:?}", layout.stride()),
    }
}

fn tensor_slice<T>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(read(slice(storage, layout)?)),
        _ => bail!("masked_glu: expected tensors on the CPU"),
    }
}

impl CustomOp3 for MaskedGlu {
    fn name(&self) -> &'static str {
        "masked-glu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
        reach: &CpuStorage,
        reach_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up, reach) =
            (slice(gate, gate_layout)?, slice(up, up_layout)?, slice(reach, reach_layout)?);
        let (i, e) = (self.widths[self.widths.len() - 1], self.widths.len());
        let mut h = vec![0f32; gate.len()];
        let inputs = gate.par_chunks(ROWS * i).zip(up.par_chunks(ROWS * i)).zip(reach.par_chunks(ROWS * e));
        h.par_chunks_mut(ROWS * i)
            .zip(inputs)
            .for_each(|(h, ((gate, up), reach))| forward_rows(self.act, [gate, up], reach, &self.widths, h));
        Ok((CpuStorage::F32(h), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        reach: &Tensor,
        _h: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (n, i) = gate.dims2()?;
        let e = self.widths.len();
        let copy = |x: &Tensor| tensor_slice(x, <[f32]>::to_vec);
        let (mut d_gate, mut d_up, mut h) = (copy(gate)?, copy(up)?, copy(grad)?);
        let mut d_reach = vec![0f32; n * e];
        tensor_slice(reach, |reach| {
            let rows = d_gate.par_chunks_mut(ROWS * i).zip(d_up.par_chunks_mut(ROWS * i));
            let rows = rows.zip(h.par_chunks_mut(ROWS * i)).zip(d_reach.par_chunks_mut(ROWS * e));
            rows.zip(reach.par_chunks(ROWS * e)).for_each(|((((gate, up), h), d_reach), reach)| {
                backward_rows(self.act, NeuronRows { gate, up, h }, reach, &self.widths, d_reach);
            });
        })?;
        let device = gate.device();
        Ok((
            Some(Tensor::from_vec(d_gate, (n, i), device)?),
            Some(Tensor::from_vec(d_up, (n, i), device)?),
            Some(Tensor::from_vec(d_reach, (n, e), device)?),
        ))
    }
}

/// [`masked_glu`] of some rows: `gate`, `up` and `reach` → `h`, all row-major.
pub fn forward_rows(act: Sigmoidal, [gate, up]: [&[f32]; 2], reach: &[f32], widths: &[usize], h: &mut [f32]) {
    let (i, e) = (widths[widths.len() - 1], widths.len());
    let rows = gate.chunks_exact(i).zip(up.chunks_exact(i)).zip(reach.chunks_exact(e));
    for (((gate, up), reach), h) in rows.zip(h.chunks_exact_mut(i)) {
        for (range, &m) in shell_ranges(widths).zip(reach) {
            let (gate, up) = (&gate[range.clone()], &up[range.clone()]);
            for ((h, &g), &u) in h[range].iter_mut().zip(gate).zip(up) {
                *h = act.value(g) * u * m;
            }
        }
    }
}

/// What [`backward_rows`] works on, in place: rows of numbers, one for each neuron, `(N, I)`.
#[derive(Debug)]
pub struct NeuronRows<'a> {
    /// gate; becomes the gradient with respect to it.
    pub gate: &'a mut [f32],
    /// up; becomes the gradient with respect to it.
    pub up: &'a mut [f32],
    /// dL/dh; becomes h.
    pub h: &'a mut [f32],
}

/// Backwards through [`forward_rows`], in place. Writes the gradient with respect to `reach`. All row-major.
pub fn backward_rows(
    act: Sigmoidal,
    rows: NeuronRows<'_>,
    reach: &[f32],
    widths: &[usize],
    d_reach: &mut [f32],
) {
    let (i, e) = (widths[widths.len() - 1], widths.len());
    let NeuronRows { gate, up, h } = rows;
    let rows = gate.chunks_exact_mut(i).zip(up.chunks_exact_mut(i)).zip(h.chunks_exact_mut(i));
    let reaches = reach.chunks_exact(e).zip(d_reach.chunks_exact_mut(e));
    for (((gate, up), h), (reach, d_reach)) in rows.zip(reaches) {
        for ((range, &mask), d_mask) in shell_ranges(widths).zip(reach).zip(d_reach) {
            let (gate, up) = (&mut gate[range.clone()], &mut up[range.clone()]);
            *d_mask = backward_shell(act, NeuronRows { gate, up, h: &mut h[range] }, mask);
        }
    }
}

/// Numbers that the inner loops handle at once.
const LANES: usize = 16;

/// One token, one shell of [`backward_rows`]. Returns the gradient with respect to the mask, the sum of
/// `act(gate) ∘ up ∘ dh`: [`LANES`] partial sums, whose order does not change.
fn backward_shell(act: Sigmoidal, shell: NeuronRows<'_>, mask: f32) -> f32 {
    let one = |gate: &mut f32, up: &mut f32, h: &mut f32| {
        let (g, u, dh) = (*gate, *up, *h);
        let (value, slope) = act.value_and_slope(g);
        *gate = dh * u * mask * slope;
        *up = dh * value * mask;
        *h = value * u * mask;
        value * u * dh
    };
    let [(gates, gate), (ups, up), (hs, h)] =
        [shell.gate, shell.up, shell.h].map(|x| x.as_chunks_mut::<LANES>());
    let mut sums = [0f32; LANES];
    for ((gate, up), h) in gates.iter_mut().zip(ups).zip(hs) {
        for l in 0..LANES {
            sums[l] += one(&mut gate[l], &mut up[l], &mut h[l]);
        }
    }
    for ((gate, up), h) in gate.iter_mut().zip(up).zip(h) {
        sums[0] += one(gate, up, h);
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{rng, uniform};
    use candle_core::{DType, Device, Var};

    #[test]
    fn values_and_gradients_equal_the_reference() {
        let mut rng = rng();
        let shapes = [(1, vec![1]), (3, vec![2, 5]), (67, vec![8, 16, 24, 32]), (5, vec![43, 86, 172])];
        let cases = HiddenAct::ALL.into_iter().flat_map(|act| shapes.iter().map(move |shape| (act, shape)));
        for (act, (n, widths)) in cases {
            let n = *n;
            let i = widths[widths.len() - 1];
            let mut var = |columns| Var::from_tensor(&uniform(&mut rng, 4.0, (n, columns))).unwrap();
            let (gate, up, reach) = (var(i), var(i), var(widths.len()));
            let weight = uniform(&mut rng, 2.0, (n, i));
            let run = |f: fn(HiddenAct, &Tensor, &Tensor, &Tensor, &[usize]) -> Result<Tensor>| {
                let h = f(act, &gate, &up, &reach, widths).unwrap();
                let grads = (&h * &weight).unwrap().sum_all().unwrap().backward().unwrap();
                let mut all = vec![h];
                all.extend([&gate, &up, &reach].map(|v| grads.get(v).unwrap().clone()));
                all
            };
            // the gradients of the mask are sums of at most I terms below 4 · 4 · 2, added in another order
            let sum = i as f32 * 32.0 * f32::EPSILON / 2.0;
            let rounding = [0.0, 0.0, 0.0, sum];
            let (fast, slow) = (run(masked_glu), run(masked_glu_reference));
            for ((fast, slow), rounding) in fast.iter().zip(slow).zip(rounding) {
                assert_eq!((fast.dims(), fast.dtype()), (slow.dims(), DType::F32));
                let (fast, slow) = (fast.flatten_all().unwrap(), slow.flatten_all().unwrap());
                for (a, b) in fast.to_vec1::<f32>().unwrap().iter().zip(slow.to_vec1::<f32>().unwrap()) {
                    assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()) + rounding, "{a} {b}");
                }
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let t = |rows, columns| Tensor::zeros((rows, columns), DType::F32, &Device::Cpu).unwrap();
        let run = |up, reach, widths: &[usize]| masked_glu(HiddenAct::Silu, &t(2, 8), &up, &reach, widths);
        assert!(run(t(2, 7), t(2, 2), &[4, 8]).is_err());
        assert!(run(t(2, 8), t(2, 3), &[4, 8]).is_err());
        assert!(run(t(2, 8), t(2, 2), &[4, 9]).is_err());
    }
}
