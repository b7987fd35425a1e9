//! The router for few tokens: dot products with the rows of its matrices, without candle's cost for each operation.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::Linear;

use super::host::Host;
use super::isa::Isa;
use super::lanes::LANES;
use super::output::{Output, unset};
use super::parallel::{Phase, run};

/// More tokens go to candle's matrix product.
const FEW: usize = 8;

/// Rows of `fc1` that one item takes.
const ROWS: usize = 4;

/// A linear layer's numbers: `weight (out, in)`, row-major, and `bias (out)`.
struct Layer<'a> {
    weight: Host<'a>,
    bias: Host<'a>,
}

impl<'a> Layer<'a> {
    fn of(linear: &'a Linear, bias: &'a Tensor) -> Result<Self> {
        Ok(Self { weight: Host::of(linear.weight())?, bias: Host::of(bias)? })
    }
}

/// `fc2 · silu(fc1 · x + b1) + b2`, `(T, E-1)`, for `x (T, D)`. None where this path does not serve: for many tokens,
/// and for weights that are not contiguous f32 on the CPU.
pub(crate) fn logits(fc1: &Linear, fc2: &Linear, x: &Tensor) -> Option<Result<Tensor>> {
    let served = |t: &Tensor| t.device().is_cpu() && t.is_contiguous() && t.dtype() == DType::F32;
    let (tokens, d) = x.dims2().ok()?;
    let (r, columns) = fc1.weight().dims2().ok()?;
    let (outputs, inner) = fc2.weight().dims2().ok()?;
    let (b1, b2) = (fc1.bias()?, fc2.bias()?);
    let tensors = [x, fc1.weight(), fc2.weight(), b1, b2];
    let fits = d == columns && inner == r && b1.dims() == [r] && b2.dims() == [outputs] && r > 0 && d > 0;
    if !fits || !(1..=FEW).contains(&tokens) || !tensors.into_iter().all(served) {
        return None;
    }
    let logits = || {
        let y = forward(Isa::best(), &Host::of(x)?, &Layer::of(fc1, b1)?, &Layer::of(fc2, b2)?);
        Tensor::from_vec(y, (tokens, outputs), &Device::Cpu)
    };
    Some(logits())
}

fn forward(isa: Isa, x: &[f32], fc1: &Layer, fc2: &Layer) -> Vec<f32> {
    let r = fc1.bias.len();
    let d = fc1.weight.len() / r;
    let tokens = x.len() / d;
    let mut hidden = unset(tokens * r);
    let out = Output::new(&mut hidden, r);
    let rows = |item: usize| {
        for row in item * ROWS..((item + 1) * ROWS).min(r) {
            for (token, x) in x.chunks_exact(d).enumerate() {
                let z = isa.dot(&fc1.weight[row * d..][..d], x) + fc1.bias[row];
                // SAFETY: each row is in one item
                unsafe { out.store(token, row, &[z * crate::math::sigmoid(z); LANES], 1) }
            }
        }
    };
    run(&[Phase { items: r.div_ceil(ROWS), cost: 4 * fc1.weight.len(), run: &rows }]);
    let mut logits = Vec::with_capacity(tokens * fc2.bias.len());
    for hidden in hidden.chunks_exact(r) {
        logits.extend(fc2.weight.chunks_exact(r).zip(&*fc2.bias).map(|(w, b)| isa.dot(w, hidden) + b));
    }
    logits
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{rng, uniform};
    use candle_nn::Module;

    #[test]
    fn logits_equal_candles() {
        let shapes = [(1, 1, 1), (7, 3, 1), (64, 16, 3), (131, 33, 7), (1024, 64, 3)];
        let mut rng = rng();
        // Miri takes minutes for large ones
        for (d, r, e) in shapes.into_iter().take(if cfg!(miri) { 3 } else { 5 }) {
            let mut random = |rows, columns| uniform(&mut rng, 2.0, (rows, columns));
            let mut linear = |n, k| Linear::new(random(n, k), Some(random(1, n).squeeze(0).unwrap()));
            let (fc1, fc2) = (linear(r, d), linear(e, r));
            for tokens in [1, 2, 8] {
                let x = random(tokens, d);
                let expected = fc2.forward(&fc1.forward(&x).unwrap().silu().unwrap()).unwrap();
                let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                for isa in Isa::available() {
                    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    let [fc1, fc2] = [&fc1, &fc2].map(|l| Layer::of(l, l.bias().unwrap()).unwrap());
                    let found = forward(isa, &flat(&x), &fc1, &fc2);
                    assert_eq!(found.len(), expected.len());
                    for (a, b) in found.iter().zip(&expected) {
                        assert!((a - b).abs() <= 1e-5 * (r as f32 * (d as f32).sqrt()), "{a} {b}");
                    }
                }
                assert_eq!(logits(&fc1, &fc2, &x).unwrap().unwrap().dims(), [tokens, e]);
                assert!(logits(&fc1, &fc2, &random(9, d)).is_none());
                assert!(logits(&fc1, &fc2, &x.to_dtype(DType::F16).unwrap()).is_none());
            }
        }
    }
}
