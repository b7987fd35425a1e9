//! The importance of neurons: the order in which they are removed.
//!
//! An expert leaves out all neurons from its width on, together, and adds the mean of what they would have added.
//! Its mean squared error on a sample of tokens is a sum over pairs of the neurons left out,
//!
//! ```text
//! error(R) = Σ_{j, k ∈ R} cov(h_j, h_k) · (w_j · w_k)        w_j = W_down[:, j]
//! ```
//!
//! so neurons that often cancel each other can go together, however large each is, and of two that add the same
//! only one. From all neurons, the one that adds least to the error is left out, again and again.

use candle_core::{Result, Tensor};

/// The rank of each neuron, from 1 for the one removed first to `I` for the one removed last: `(I)`. `sample (S, I)` are
/// the neurons' activations for some tokens, `down_proj (D, I)` their directions.
pub fn importance(sample: &Tensor, down_proj: &Tensor) -> Result<Vec<f32>> {
    let (tokens, width) = sample.dims2()?;
    let products = |x: &Tensor| x.t()?.contiguous()?.matmul(x);
    let covariance = (products(&sample.broadcast_sub(&sample.mean_keepdim(0)?)?)? / tokens as f64)?;
    let errors = (covariance * products(down_proj)?)?.flatten_all()?.to_vec1::<f32>()?;
    // what each neuron would add to the error
    let mut costs: Vec<f64> = (0..width).map(|j| f64::from(errors[j * width + j])).collect();
    let mut kept: Vec<usize> = (0..width).collect();
    let mut ranks = vec![0.0; width];
    for step in 1..=width {
        let least = (0..kept.len()).min_by(|&a, &b| costs[kept[a]].total_cmp(&costs[kept[b]]));
        let Some(least) = least else { break };
        let out = kept.remove(least);
        ranks[out] = step as f32;
        let with_out = &errors[out * width..][..width];
        kept.iter().for_each(|&j| costs[j] += 2.0 * f64::from(with_out[j]));
    }
    Ok(ranks)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::testing::{normal, rng};

    /// Mean squared error of leaving out `neurons`, with the mean made up for.
    fn error(sample: &Tensor, down_proj: &Tensor, neurons: &[u32]) -> f32 {
        let neurons = Tensor::new(neurons, &Device::Cpu).unwrap();
        let h = sample.index_select(&neurons, 1).unwrap();
        let y = h.matmul(&down_proj.index_select(&neurons, 1).unwrap().t().unwrap()).unwrap();
        let y = y.broadcast_sub(&y.mean_keepdim(0).unwrap()).unwrap();
        y.sqr().unwrap().sum(1).unwrap().mean(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn each_neuron_left_out_adds_the_least_error() {
        let mut rng = rng();
        for (tokens, width, d) in [(40, 7, 3), (3, 9, 5), (200, 12, 1)] {
            let mut random = |rows, columns| (normal(&mut rng, 1.0, (rows, columns)) + 0.5).unwrap();
            let (sample, down_proj) = (random(tokens, width), random(d, width));
            let importances = importance(&sample, &down_proj).unwrap();
            let mut order: Vec<u32> = (0..width as u32).collect();
            order.sort_by(|&a, &b| importances[a as usize].total_cmp(&importances[b as usize]));
            assert_eq!(importances[order[0] as usize], 1.0);
            for step in 0..width {
                let (out, kept) = order.split_at(step);
                let with = |neuron: u32| error(&sample, &down_proj, &[out, &[neuron]].concat());
                let least = kept.iter().map(|&neuron| with(neuron)).fold(f32::INFINITY, f32::min);
                assert!(with(kept[0]) <= least * (1.0 + 1e-3) + 1e-5, "step {step} of {width}");
            }
        }
    }

    #[test]
    fn neurons_that_cancel_each_other_go_first() {
        let h = normal(&mut rng(), 1.0, (50, 2));
        // the first two always add opposite things
        let sample = h.index_select(&Tensor::new(&[0u32, 0, 1], &Device::Cpu).unwrap(), 1).unwrap();
        let down_proj = Tensor::new(&[[2f32, -2.0, 3.0]], &Device::Cpu).unwrap();
        let importances = importance(&sample, &down_proj).unwrap();
        assert_eq!(importances[2], 3.0, "{importances:?}");
    }
}
