//! The gain router: what would the next shell of neurons be worth to this token?
//!
//! A token's output is linear in its use of each shell, so the backward pass that trains the weights also says, for
//! every token, layer and shell, what using it is worth to the loss, of that token and of all that follow:
//!
//! ```text
//! gain_s = -d loss / d reach_s, per width                      known with hindsight only
//! exp(-logit_e) → E[gain_{e+1} | x] / scale                    what the router learns
//! a token goes on past expert e while logit_e < threshold      so while the next shell is worth its price
//! ```
//!
//! Nothing passes from the router's loss to the rest of the model.

use anyhow::{Context as _, Result};
use candle_core::backprop::GradStore;
use candle_core::{Result as CandleResult, Tensor, Var};
use candle_nn::ops::sigmoid;
use dynamoe::router::logit;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::config::TrainConfig;
use super::dial::{self, TrainingDial};
use super::objective::{LayerInput, Objective, Routed, reach_of};

/// Keeps thresholds at the ends of the dial finite.
const FAR: f32 = 60.0;

/// A layer's use of shells, whose gradient says what each shell gains.
pub struct LayerGains {
    /// (N, E-1), in the router's graph.
    pub logits: Tensor,
    /// (N, E)
    pub reach: Var,
}

/// Where gains were measured.
pub struct Place<'a> {
    /// Each sequence's threshold, (B).
    pub thresholds: &'a [f32],
    /// Each shell's share of the width, (E).
    pub shares: &'a [f32],
    /// How far from its threshold a decision counts, in logits.
    pub temperature: f64,
}

/// What the routers of all layers learn from the gradients of the loss: a scalar of their graph; none where there
/// is one expert only.
///
/// # Errors
/// A layer that the loss does not depend on; candle's.
pub fn router_loss(
    layers: &[LayerGains],
    gradients: &GradStore,
    dial: &TrainingDial,
    place: &Place<'_>,
) -> Result<Option<Tensor>> {
    let narrower = place.shares.len() - 1;
    let Some(first) = layers.first().filter(|_| narrower > 0) else { return Ok(None) };
    let (tokens, device) = (first.reach.dim(0)?, first.reach.device());
    let positions = tokens / place.thresholds.len();
    let thresholds: Vec<f32> =
        (0..tokens).map(|n| place.thresholds[n / positions].clamp(-FAR, FAR)).collect();
    let thresholds = Tensor::from_vec(thresholds, (tokens, 1), device)?;
    // the loss is a mean over tokens, the width one over layers
    let unit = -((tokens * layers.len()) as f32);
    let per_width: Vec<f32> = place.shares[1..].iter().map(|share| unit / share).collect();
    let per_width = Tensor::new(per_width, device)?;
    let gains = |layer: &LayerGains| -> Result<Tensor> {
        let found = gradients.get(&layer.reach).context("the loss does not depend on a layer's shells")?;
        Ok(found.narrow(1, 1, narrower)?.broadcast_mul(&per_width)?.detach())
    };
    let gains: Vec<Tensor> = layers.iter().map(gains).collect::<Result<_>>()?;
    let lessons: Vec<GainLesson<'_>> = layers
        .iter()
        .zip(&gains)
        .map(|(layer, gains)| {
            let (logits, thresholds) = (&layer.logits, &thresholds);
            GainLesson { logits, gains, thresholds, temperature: place.temperature }
        })
        .collect();
    let (mut gained, mut predicted) = (0.0, 0.0);
    for lesson in &lessons {
        let sums = lesson.sums()?;
        gained += sums.0;
        predicted += sums.1;
    }
    let scale = dial.scale(gained / predicted)?;
    let losses = lessons.iter().map(|lesson| lesson.loss(scale)).collect::<CandleResult<Vec<_>>>()?;
    Ok(Some(Tensor::stack(&losses, 0)?.mean_all()?))
}

/// Routes by the router's logits, with noise, and thresholds that keep widths where the dial wants them
/// ([`super::dial`]); what the router learns is [`router_loss`].
pub struct Gain {
    /// Experts' shares of the width.
    pub shares: Vec<f64>,
    /// `--noise` and where the dial's draws crowd.
    pub config: TrainConfig,
}

impl Objective for Gain {
    fn sample(&self, rng: &mut ChaCha8Rng, sequences: usize) -> Vec<f64> {
        (0..sequences).map(|_| dial::crowded(rng, &self.config, self.shares[0])).collect()
    }

    fn route(&self, input: LayerInput<'_>) -> CandleResult<Routed> {
        let Some(logits) = input.logits else { candle_core::bail!("the gain objective needs a router") };
        let spread = self.config.noise as f32;
        let tokens = input.x.dim(0)?;
        let positions = tokens / input.steering.len().max(1);
        let mut rows = logits.detach().to_vec2::<f32>()?;
        let chosen: Vec<usize> = rows
            .iter_mut()
            .enumerate()
            .map(|(n, row)| {
                for l in row.iter_mut() {
                    *l += spread * logit(input.rng.random_range(1e-6..1.0 - 1e-6));
                }
                dynamoe::router::choose(row, input.steering[n / positions])
            })
            .collect();
        Ok(Routed { reach: reach_of(&chosen, self.shares.len(), input.x.device())?, loss: None })
    }
}

/// What a router learns from the gains of shells.
struct GainLesson<'a> {
    /// The router's logits, (N, E-1), in the router's graph.
    logits: &'a Tensor,
    /// Nats that each shell but the first gains for each token, per whole width: (N, E-1).
    gains: &'a Tensor,
    /// Each token's threshold, (N, 1), finite.
    thresholds: &'a Tensor,
    /// How far from its threshold a decision counts, in logits.
    temperature: f64,
}

impl GainLesson<'_> {
    /// `(Σ weight · gain, Σ weight · prediction)`, weights being those of the loss.
    fn sums(&self) -> CandleResult<(f64, f64)> {
        let (weights, predicted) = (self.weights()?, self.predicted()?.detach());
        let sum = |t: Tensor| -> CandleResult<f64> {
            Ok(f64::from((t * &weights)?.sum_all()?.to_scalar::<f32>()?))
        };
        Ok((sum(self.gains.clone())?, sum(predicted)?))
    }

    /// Decisions close to their threshold count most: there the gain is that of the context it is needed in.
    fn weights(&self) -> CandleResult<Tensor> {
        let margin = (self.logits.detach().broadcast_sub(self.thresholds)? / self.temperature)?;
        let p = sigmoid(&margin)?;
        ((&p * 4.0)? * (1.0 - &p)?)? + 1e-3
    }

    fn predicted(&self) -> CandleResult<Tensor> {
        self.logits.neg()?.clamp(-15f32, 15f32)?.exp()
    }

    /// The loss whose minimum is `exp(-logit_e) = E[gain of shell e+1 | x] / scale`, a Poisson regression with each
    /// expert's errors relative to its mean prediction.
    fn loss(&self, scale: f64) -> CandleResult<Tensor> {
        let (weights, predicted) = (self.weights()?, self.predicted()?);
        let mean = (predicted.detach() * &weights)?.sum_keepdim(0)?.div(&weights.sum_keepdim(0)?)?; // (1, E-1)
        let gains = (self.gains / scale)?;
        let loss = (predicted + (gains * self.logits)?)?; // exp(z) - gain · z, z = -logit
        (loss * weights)?.broadcast_div(&mean)?.mean_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use dynamoe::TrainableFfn;
    use rand::SeedableRng;

    #[test]
    fn the_gain_router_learns_expected_gains_relative_to_each_other() {
        let mut rng = ChaCha8Rng::seed_from_u64(rand::random());
        // two kinds of token, two shells; what a token gains is noisy, and sometimes less than nothing
        let expected = [[3.0f32, 0.5], [1.0, 0.25]];
        let logits = Var::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
        let kind = Tensor::from_vec((0..64).map(|n| n % 2).collect::<Vec<u32>>(), 64, &Device::Cpu).unwrap();
        let thresholds = Tensor::zeros((64, 1), DType::F32, &Device::Cpu).unwrap();
        let scale = 10.0;
        for step in 0..3000 {
            let rows = logits.index_select(&kind, 0).unwrap();
            let noisy = (0..64)
                .flat_map(|n| expected[n % 2].map(|g| g * 10.0))
                .map(|g| g * rng.random_range(-1.0..3.0));
            let gains = Tensor::from_vec(noisy.collect::<Vec<f32>>(), (64, 2), &Device::Cpu).unwrap();
            let lesson =
                GainLesson { logits: &rows, gains: &gains, thresholds: &thresholds, temperature: 2.0 };
            let grad = lesson.loss(scale).unwrap().backward().unwrap().get(&logits).unwrap().clone();
            let rate = if step < 1500 { 1.0 } else { 0.1 };
            logits.set(&(logits.as_tensor() - (grad * rate).unwrap()).unwrap()).unwrap();
        }
        let found = logits.to_vec2::<f32>().unwrap();
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!(((-found).exp() / expected - 1.0).abs() < 0.15, "{found} for {expected}");
        }
    }

    #[test]
    fn gain_routing_keeps_to_the_thresholds() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let config = TrainConfig { noise: 0.0, ..TrainConfig::default() };
        let gain = Gain { shares: vec![0.25, 0.5, 1.0], config };
        let weight = |rows, columns| Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu).unwrap();
        let ffn = TrainableFfn {
            gate_proj: weight(8, 4),
            up_proj: weight(8, 4),
            down_proj: weight(4, 8),
            own: None,
            compensation: None,
            widths: vec![2, 4, 8],
        };
        let (x, logits) = (weight(8, 4), weight(8, 2));
        let thresholds = [f32::NEG_INFINITY, -0.3, 0.3, f32::INFINITY];
        let input = LayerInput {
            x: &x,
            logits: Some(&logits),
            ffn: &ffn,
            dials: &[0.0, 0.4, 0.6, 1.0],
            steering: &thresholds,
            rng: &mut rng,
        };
        let reach = gain.route(input).unwrap().reach.to_vec2::<f32>().unwrap();
        for (n, row) in logits.to_vec2::<f32>().unwrap().iter().enumerate() {
            let expected = dynamoe::router::choose(row, thresholds[n / 2]);
            assert_eq!(reach[n].iter().sum::<f32>() as usize, expected + 1);
        }
    }
}
