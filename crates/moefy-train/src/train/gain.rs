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
use super::dial::TrainingDial;
use super::objective::{LayerInput, Objective, Routed, dial, reach_of};

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
    experts: usize,
    /// `--focus` as a share of the way from the narrowest width to the full one.
    focus: f64,
    config: TrainConfig,
}

impl Gain {
    /// For experts of these shares of the width.
    pub fn new(shares: &[f64], config: &TrainConfig) -> Self {
        let narrowest = shares[0].min(1.0 - 1e-9);
        let focus = ((config.focus - narrowest) / (1.0 - narrowest)).clamp(0.0, 1.0);
        Self { experts: shares.len(), focus, config: config.clone() }
    }
}

/// Moves `dial` towards `focus`, by its distance from there to the power of `power`; 0 and 1 stay.
fn crowded(dial: f64, focus: f64, power: f64) -> f64 {
    let end = if dial < focus { -focus } else { 1.0 - focus };
    if end == 0.0 { dial } else { focus + end * ((dial - focus) / end).powf(power) }
}

impl Objective for Gain {
    fn sample(&self, rng: &mut ChaCha8Rng, sequences: usize) -> Vec<f64> {
        let draw = |_| crowded(dial(rng, &self.config), self.focus, self.config.focus_power);
        (0..sequences).map(draw).collect()
    }

    fn route(&self, input: LayerInput<'_>) -> CandleResult<Routed> {
        let Some(logits) = input.logits else { candle_core::bail!("the gain objective needs a router") };
        let spread = self.config.noise as f32;
        let tokens = input.x.dim(0)?;
        let positions = tokens / input.thresholds.len().max(1);
        let mut rows = logits.detach().to_vec2::<f32>()?;
        let chosen: Vec<usize> = rows
            .iter_mut()
            .enumerate()
            .map(|(n, row)| {
                for l in row.iter_mut() {
                    *l += spread * logit(input.rng.random_range(1e-6..1.0 - 1e-6));
                }
                dynamoe::router::choose(row, input.thresholds[n / positions])
            })
            .collect();
        Ok(Routed { reach: reach_of(&chosen, self.experts, input.x.device())?, loss: None })
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
    fn dials_crowd_around_the_focus_and_reach_both_ends() {
        for focus in [0.0, 0.2, 0.5, 1.0] {
            let at = |dial| crowded(dial, focus, 2.0);
            assert_eq!([at(0.0), at(focus), at(1.0)], [0.0, focus, 1.0]);
            let steps: Vec<f64> = (0..=100).map(|k| at(f64::from(k) / 100.0)).collect();
            assert!(steps.windows(2).all(|pair| pair[0] <= pair[1] + 1e-12));
            assert!((crowded(0.3, focus, 1.0) - 0.3).abs() < 1e-12);
        }
        // widths of .25 to 1 and a focus of .5: a third of the way
        let shares = TrainConfig { full_share: 0.2, narrowest_share: 0.1, ..TrainConfig::default() };
        let config = TrainConfig { focus: 0.5, focus_power: 2.0, ..shares };
        let gain = Gain::new(&[0.25, 1.0], &config);
        let dials = gain.sample(&mut ChaCha8Rng::seed_from_u64(7), 20_000);
        let share = |from: f64, to: f64| {
            dials.iter().filter(|dial| (from..=to).contains(*dial)).count() as f64 / dials.len() as f64
        };
        let sides = [share(1e-9, 1.0 / 3.0), share(1.0 / 3.0, 1.0 - 1e-9)];
        for (found, expected) in [share(0.0, 0.0), share(1.0, 1.0), sides[0], sides[1]].into_iter().zip([
            0.1,
            0.2,
            0.7 / 3.0,
            1.4 / 3.0,
        ]) {
            assert!((found - expected).abs() < 0.015, "{found} for {expected}");
        }
        // a quarter of the way from the focus to an end holds half of its side
        assert!((share(0.25, 0.5) - 0.35).abs() < 0.015);
    }

    #[test]
    fn gain_routing_keeps_to_the_thresholds() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let gain = Gain::new(&[0.25, 0.5, 1.0], &TrainConfig { noise: 0.0, ..TrainConfig::default() });
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
            thresholds: &thresholds,
            rng: &mut rng,
        };
        let reach = gain.route(input).unwrap().reach.to_vec2::<f32>().unwrap();
        for (n, row) in logits.to_vec2::<f32>().unwrap().iter().enumerate() {
            let expected = dynamoe::router::choose(row, thresholds[n / 2]);
            assert_eq!(reach[n].iter().sum::<f32>() as usize, expected + 1);
        }
    }
}
