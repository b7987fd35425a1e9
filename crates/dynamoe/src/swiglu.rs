//! SwiGLU's middle with a mask for each shell, as one operation with a gradient.
//!
//! ```text
//! h[t, j] = silu(gate[t, j]) · up[t, j] · reach[t, shell(j)]
//! ```
//!
//! `reach[t, s]` says how much token `t` uses shell `s`: 1 or 0 where it is routed, in between where a router
//! is trained. As `O_e` is linear in the shells, `W_down h` is then `Σ_e p_e O_e` with
//! `reach_s = Σ_{e ≥ s} p_e`: a full-width pass costs what a dense one does and has every expert's gradient.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

/// `silu(gate) ∘ up ∘ reach`, for `gate (N, I)`, `up (N, I)`, `reach (N, E)` → `(N, I)`.
///
/// One pass on a CPU in f32; elsewhere made of candle's operations.
///
/// # Errors
/// Shapes that do not fit; candle's.
pub fn masked_swiglu(gate: &Tensor, up: &Tensor, reach: &Tensor, widths: &[usize]) -> Result<Tensor> {
    let (n, i) = gate.dims2()?;
    if up.dims() != [n, i] || reach.dims() != [n, widths.len()] || widths.last() != Some(&i) {
        bail!(
            "masked_swiglu: expected up ({n}, {i}) and reach ({n}, {}) for widths {widths:?}, found {:?} and {:?}",
            widths.len(),
            up.dims(),
            reach.dims()
        );
    }
    if gate.device().is_cpu() && gate.dtype() == candle_core::DType::F32 {
        let op = MaskedSwiglu { widths: widths.to_vec() };
        return gate.contiguous()?.apply_op3(&up.contiguous()?, &reach.contiguous()?, op);
    }
    masked_swiglu_reference(gate, up, reach, widths)
}

/// [`masked_swiglu`] made of candle's operations.
///
/// # Errors
/// candle's.
pub fn masked_swiglu_reference(
    gate: &Tensor,
    up: &Tensor,
    reach: &Tensor,
    widths: &[usize],
) -> Result<Tensor> {
    let shells: Vec<u32> =
        shell_ranges(widths).enumerate().flat_map(|(s, r)| r.map(move |_| s as u32)).collect();
    let mask = reach.index_select(&Tensor::new(shells, reach.device())?, 1)?; // (N, I)
    (gate.silu()? * up)? * mask
}

/// The neurons of each shell.
pub fn shell_ranges(widths: &[usize]) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
    widths.iter().scan(0, |start, &end| Some(std::mem::replace(start, end)..end))
}

struct MaskedSwiglu {
    widths: Vec<usize>,
}

/// Rows that one task of the thread pool takes.
const ROWS: usize = 32;

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("masked_swiglu: expected contiguous inputs, found strides {:?}", layout.stride()),
    }
}

fn tensor_slice<T>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(read(slice(storage, layout)?)),
        _ => bail!("masked_swiglu: expected tensors on the CPU"),
    }
}

/// `1 / (1 + e^-x)` with an exponential that vectorises: 2^k · p(r), relative error below 2e-7.
#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let k = (x * std::f32::consts::LOG2_E).round_ties_even();
    // ln 2 in two parts keeps the remainder exact
    let r = (x - k * 0.693_359_4) + k * 2.121_944_4e-4;
    let p = r * (r * (r * (r * (r * (1.0 / 720.0) + 1.0 / 120.0) + 1.0 / 24.0) + 1.0 / 6.0) + 0.5) + 1.0;
    let p = p * r + 1.0;
    p * f32::from_bits(((k as i32).wrapping_add(127) as u32) << 23)
}

impl CustomOp3 for MaskedSwiglu {
    fn name(&self) -> &'static str {
        "masked-swiglu"
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
        h.par_chunks_mut(ROWS * i).enumerate().for_each(|(task, rows)| {
            for (row, h) in rows.chunks_exact_mut(i).enumerate() {
                let t = task * ROWS + row;
                for (range, &m) in shell_ranges(&self.widths).zip(&reach[t * e..][..e]) {
                    let (g, u) = (&gate[t * i..][range.clone()], &up[t * i..][range.clone()]);
                    for ((h, &g), &u) in h[range].iter_mut().zip(g).zip(u) {
                        *h = g * sigmoid(g) * u * m;
                    }
                }
            }
        });
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
        let mut d_gate = vec![0f32; n * i];
        let mut d_up = vec![0f32; n * i];
        let mut d_reach = vec![0f32; n * e];
        tensor_slice(gate, |gate| {
            tensor_slice(up, |up| {
                tensor_slice(reach, |reach| {
                    tensor_slice(grad, |grad| {
                        let out = d_gate.par_chunks_mut(ROWS * i).zip(d_up.par_chunks_mut(ROWS * i));
                        out.zip(d_reach.par_chunks_mut(ROWS * e)).enumerate().for_each(
                            |(task, ((d_gate, d_up), d_reach))| {
                                for row in 0..d_gate.len() / i {
                                    let t = task * ROWS + row;
                                    for (s, range) in shell_ranges(&self.widths).enumerate() {
                                        d_reach[row * e + s] = backward_shell(
                                            [gate, up, grad].map(|x| &x[t * i..][range.clone()]),
                                            reach[t * e + s],
                                            &mut d_gate[row * i..][range.clone()],
                                            &mut d_up[row * i..][range],
                                        );
                                    }
                                }
                            },
                        );
                    })
                })
            })
        })????;
        let device = gate.device();
        Ok((
            Some(Tensor::from_vec(d_gate, (n, i), device)?),
            Some(Tensor::from_vec(d_up, (n, i), device)?),
            Some(Tensor::from_vec(d_reach, (n, e), device)?),
        ))
    }
}

/// One token, one shell: fills the gradients of gate and up and returns that of the mask.
fn backward_shell([gate, up, grad]: [&[f32]; 3], mask: f32, d_gate: &mut [f32], d_up: &mut [f32]) -> f32 {
    // eight partial sums let the compiler vectorise a sum whose order must not change
    let mut sums = [0f32; 8];
    for (j, ((((&g, &u), &dh), d_gate), d_up)) in
        gate.iter().zip(up).zip(grad).zip(d_gate).zip(d_up).enumerate()
    {
        let sigma = sigmoid(g);
        let silu = g * sigma;
        sums[j % 8] += silu * u * dh;
        *d_gate = dh * u * mask * (sigma + silu * (1.0 - sigma));
        *d_up = dh * silu * mask;
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Var};

    #[test]
    fn exp_is_close_to_exp() {
        for step in -8_700..=8_800 {
            let x = step as f32 / 100.0;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(((ours - exact) / exact).abs() < 5e-7, "exp({x}) = {ours}, expected {exact}");
        }
        assert_eq!((sigmoid(-200.0) < 1e-37, sigmoid(200.0)), (true, 1.0));
    }

    #[test]
    fn values_and_gradients_equal_the_reference() {
        for (n, widths) in [(1, vec![1]), (3, vec![2, 5]), (67, vec![8, 16, 24, 32])] {
            let i = widths[widths.len() - 1];
            let var = |columns| Var::randn(0f32, 2.0, (n, columns), &Device::Cpu).unwrap();
            let (gate, up, reach) = (var(i), var(i), var(widths.len()));
            let weight = Tensor::randn(0f32, 1.0, (n, i), &Device::Cpu).unwrap();
            let run = |f: fn(&Tensor, &Tensor, &Tensor, &[usize]) -> Result<Tensor>| {
                let h = f(&gate, &up, &reach, &widths).unwrap();
                let grads = (&h * &weight).unwrap().sum_all().unwrap().backward().unwrap();
                let mut all = vec![h];
                all.extend([&gate, &up, &reach].map(|v| grads.get(v).unwrap().clone()));
                all
            };
            for (fast, slow) in run(masked_swiglu).iter().zip(run(masked_swiglu_reference)) {
                assert_eq!((fast.dims(), fast.dtype()), (slow.dims(), DType::F32));
                let (fast, slow) = (fast.flatten_all().unwrap(), slow.flatten_all().unwrap());
                for (a, b) in fast.to_vec1::<f32>().unwrap().iter().zip(slow.to_vec1::<f32>().unwrap()) {
                    assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{a} {b}");
                }
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let t = |rows, columns| Tensor::zeros((rows, columns), DType::F32, &Device::Cpu).unwrap();
        assert!(masked_swiglu(&t(2, 8), &t(2, 7), &t(2, 2), &[4, 8]).is_err());
        assert!(masked_swiglu(&t(2, 8), &t(2, 8), &t(2, 3), &[4, 8]).is_err());
        assert!(masked_swiglu(&t(2, 8), &t(2, 8), &t(2, 2), &[4, 9]).is_err());
    }
}
