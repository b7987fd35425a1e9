//! Routing objectives: how tokens choose experts while training, and what that choice is charged.
//!
//! An [`Objective`] turns a layer's input into `reach (N, E)` for
//! [`dynamoe::TrainableFfn::forward`] and may add a loss. A new one needs an implementation of the trait, a
//! [`Method`] and a line in [`objective`].

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::sigmoid;
use dynamoe::TrainableFfn;
use dynamoe::router::logit;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::config::{Method, TrainConfig};
use super::dial;

/// One layer's input and parameters at one training step.
pub struct LayerInput<'a> {
    /// The FFN's input, (N, D).
    pub x: &'a Tensor,
    /// The router's logits, (N, E-1); none where the method has no router.
    pub logits: Option<&'a Tensor>,
    /// The layer's weights.
    pub ffn: &'a TrainableFfn,
    /// Each sequence's dial, (B), as [`Objective::sample`] drew them.
    pub dials: &'a [f64],
    /// What width costs each sequence, (B): nats of a token's whole width (priced).
    pub prices: &'a [f32],
    /// Randomness of this layer and step.
    pub rng: &'a mut ChaCha8Rng,
}

/// What an objective made of a layer.
pub struct Routed {
    /// (N, E): 1 in the first column, never increasing along a row.
    pub reach: Tensor,
    /// Added to the step's loss, averaged over layers.
    pub loss: Option<Tensor>,
}

/// A way to route during training.
pub trait Objective: Send + Sync {
    /// Draws the dial of each of `sequences` sequences.
    fn sample(&self, rng: &mut ChaCha8Rng, sequences: usize) -> Vec<f64>;

    /// Routes one layer.
    ///
    /// # Errors
    /// candle's.
    fn route(&self, input: LayerInput<'_>) -> Result<Routed>;
}

/// The objective of a method, over experts of these shares of the width.
pub fn objective(config: &TrainConfig, width_shares: &[f64]) -> Box<dyn Objective> {
    let shares = width_shares.to_vec();
    match config.method {
        Method::Dense => Box::new(Dense { experts: shares.len() }),
        Method::Static => Box::new(Static { experts: shares.len() }),
        Method::Random => Box::new(Random { shares }),
        Method::Similarity => Box::new(Similarity { experts: shares.len(), config: config.clone() }),
        Method::Priced => Box::new(Priced { shares, config: config.clone() }),
    }
}

/// `reach` of experts chosen on the host: row `n` holds `experts[n] + 1` ones.
///
/// # Errors
/// The device's.
pub fn reach_of(chosen: &[usize], experts: usize, device: &Device) -> Result<Tensor> {
    let reach: Vec<f32> = chosen.iter().flat_map(|&e| (0..experts).map(move |s| f32::from(s <= e))).collect();
    Tensor::from_vec(reach, (chosen.len(), experts), device)
}

/// Each sequence's value, repeated for its tokens: (N).
fn per_token<T: Copy>(values: &[T], tokens: usize) -> impl Iterator<Item = T> + '_ {
    let positions = tokens / values.len().max(1);
    (0..tokens).map(move |n| values[n / positions])
}

struct Dense {
    experts: usize,
}

impl Objective for Dense {
    fn sample(&self, _: &mut ChaCha8Rng, sequences: usize) -> Vec<f64> {
        vec![1.0; sequences]
    }

    fn route(&self, input: LayerInput<'_>) -> Result<Routed> {
        let reach = Tensor::ones((input.x.dim(0)?, self.experts), DType::F32, input.x.device())?;
        Ok(Routed { reach, loss: None })
    }
}

/// The dial is the expert's index.
struct Static {
    experts: usize,
}

impl Objective for Static {
    fn sample(&self, rng: &mut ChaCha8Rng, sequences: usize) -> Vec<f64> {
        (0..sequences).map(|_| rng.random_range(0..self.experts) as f64).collect()
    }

    fn route(&self, input: LayerInput<'_>) -> Result<Routed> {
        let chosen: Vec<usize> = per_token(input.dials, input.x.dim(0)?).map(|e| e as usize).collect();
        Ok(Routed { reach: reach_of(&chosen, self.experts, input.x.device())?, loss: None })
    }
}

/// The dial is the mean width.
struct Random {
    shares: Vec<f64>,
}

impl Objective for Random {
    fn sample(&self, rng: &mut ChaCha8Rng, sequences: usize) -> Vec<f64> {
        (0..sequences).map(|_| rng.random_range(self.shares[0]..=1.0)).collect()
    }

    fn route(&self, input: LayerInput<'_>) -> Result<Routed> {
        let tokens = input.x.dim(0)?;
        let tables: Vec<Vec<f64>> = input.dials.iter().map(|&w| widths_with_mean(&self.shares, w)).collect();
        let positions = tokens / tables.len().max(1);
        let chosen: Vec<usize> = (0..tokens).map(|n| draw(&tables[n / positions], input.rng)).collect();
        Ok(Routed { reach: reach_of(&chosen, self.shares.len(), input.x.device())?, loss: None })
    }
}

/// Probabilities of the experts whose mean width is `mean`, as even as that allows (`∝ exp(β·width)`).
pub fn widths_with_mean(shares: &[f64], mean: f64) -> Vec<f64> {
    let at = |beta: f64| {
        let weights: Vec<f64> = shares.iter().map(|w| (beta * (w - 0.5)).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / sum).collect::<Vec<f64>>()
    };
    let (mut low, mut high) = (-400.0, 400.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        let found: f64 = at(middle).iter().zip(shares).map(|(p, w)| p * w).sum();
        if found < mean { low = middle } else { high = middle }
    }
    at(0.5 * (low + high))
}

/// An index drawn with these probabilities.
pub fn draw(probabilities: &[f64], rng: &mut impl Rng) -> usize {
    let mut u: f64 = rng.random();
    for (index, p) in probabilities.iter().enumerate() {
        u -= p;
        if u < 0.0 {
            return index;
        }
    }
    probabilities.len() - 1
}

/// Scores are cosine similarities of `O_e` with `O_E`; tokens are routed by the scores that the router
/// predicts, as they will be when served.
struct Similarity {
    experts: usize,
    config: TrainConfig,
}

impl Objective for Similarity {
    fn sample(&self, rng: &mut ChaCha8Rng, sequences: usize) -> Vec<f64> {
        (0..sequences).map(|_| dial::even(rng, &self.config)).collect()
    }

    fn route(&self, input: LayerInput<'_>) -> Result<Routed> {
        let Some(logits) = input.logits else {
            candle_core::bail!("the similarity objective needs a router")
        };
        let outputs = input.ffn.expert_outputs(&input.x.detach())?;
        let full = &outputs[self.experts - 1];
        let labels: Vec<Tensor> =
            outputs[..self.experts - 1].iter().map(|o| cosine(o, full)).collect::<Result<_>>()?;
        let labels = Tensor::stack(&labels, 1)?.clamp(0f32, 1f32)?.detach(); // (N, E-1)
        // binary cross entropy from logits: softplus(l) - y·l, whose minimum is the expected similarity
        let loss = (softplus(logits)? - (labels * logits)?)?.mean_all()?;
        let thresholds: Vec<f32> = per_token(input.dials, input.x.dim(0)?).map(logit).collect();
        let rows = logits.detach().to_vec2::<f32>()?;
        let chosen: Vec<usize> =
            rows.iter().zip(&thresholds).map(|(row, &t)| dynamoe::router::choose(row, t)).collect();
        Ok(Routed { reach: reach_of(&chosen, self.experts, input.x.device())?, loss: Some(loss) })
    }
}

/// Cosine of the rows of `a` and `b`, (N).
fn cosine(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let norm = |t: &Tensor| t.sqr()?.sum(D::Minus1)?.sqrt();
    let dot = (a * b)?.sum(D::Minus1)?;
    dot / ((norm(a)? * norm(b)?)? + 1e-12)?
}

/// `ln(1 + e^x)`.
fn softplus(x: &Tensor) -> Result<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

/// The router's decisions are sampled: token `n` stops at expert `e` where `logit_e + noise ≥ logit(dial)`,
/// logistic noise of spread `temperature`. The forward pass takes the sampled widths, the gradient that of
/// their probabilities (straight-through); the expected width is charged at the price that keeps sequences as wide
/// as they are meant to be ([`super::dial`]).
struct Priced {
    shares: Vec<f64>,
    config: TrainConfig,
}

/// Keeps infinite thresholds, of the ends of the dial, finite: no logit reaches this.
const FAR: f32 = 60.0;

impl Objective for Priced {
    fn sample(&self, rng: &mut ChaCha8Rng, sequences: usize) -> Vec<f64> {
        (0..sequences).map(|_| dial::crowded(rng, &self.config, self.shares[0])).collect()
    }

    fn route(&self, input: LayerInput<'_>) -> Result<Routed> {
        let Some(logits) = input.logits else { candle_core::bail!("the priced objective needs a router") };
        let (tokens, narrower) = logits.dims2()?;
        let device = logits.device();
        let column = |values: Vec<f32>| Tensor::from_vec(values, (tokens, 1), device);
        let thresholds: Vec<f32> =
            per_token(input.dials, tokens).map(|d| logit(d).clamp(-FAR, FAR)).collect();
        let prices: Vec<f32> = per_token(input.prices, tokens).collect();
        let temperature = self.config.temperature;
        let noise: Vec<f32> =
            (0..tokens * narrower).map(|_| logit(input.rng.random_range(1e-6..1.0 - 1e-6))).collect();
        let noise = Tensor::from_vec(noise, (tokens, narrower), device)?;

        let margin = logits.broadcast_sub(&column(thresholds)?)?; // (N, E-1)
        let go_on = sigmoid(&(margin.neg()? / temperature)?)?; // probability of a wider expert than e
        let noise = (noise * self.config.noise)?;
        let sampled = (margin.detach() + noise)?.lt(0f64)?.to_dtype(DType::F32)?;
        let (mut soft, mut hard) = (vec![Tensor::ones((tokens, 1), DType::F32, device)?], Vec::new());
        hard.push(soft[0].clone());
        for e in 0..narrower {
            soft.push((&soft[e] * go_on.narrow(1, e, 1)?)?);
            hard.push((&hard[e] * sampled.narrow(1, e, 1)?)?);
        }
        let (soft, hard) = (Tensor::cat(&soft, 1)?, Tensor::cat(&hard, 1)?); // (N, E)
        let reach = (hard + (&soft - soft.detach())?)?;

        let mut steps: Vec<f32> = self.shares.iter().map(|&w| w as f32).collect();
        for e in (1..steps.len()).rev() {
            steps[e] -= steps[e - 1];
        }
        let steps = Tensor::from_vec(steps, (narrower + 1, 1), device)?;
        let loss = (soft.matmul(&steps)? * column(prices)?)?.mean_all()?;
        Ok(Routed { reach, loss: Some(loss) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn random_widths_have_the_mean_asked_for() {
        let shares = [0.25, 0.5, 0.75, 1.0];
        for mean in [0.25, 0.3, 0.5, 0.625, 0.9, 1.0] {
            let p = widths_with_mean(&shares, mean);
            let found: f64 = p.iter().zip(shares).map(|(p, w)| p * w).sum();
            assert!((found - mean).abs() < 1e-3, "{mean}: {found}");
        }
        let even = widths_with_mean(&shares, 0.625);
        assert!(even.iter().all(|p| (p - 0.25).abs() < 1e-6));
    }

    #[test]
    fn draws_follow_their_probabilities() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut counts = [0; 3];
        (0..30_000).for_each(|_| counts[draw(&[0.2, 0.5, 0.3], &mut rng)] += 1);
        for (count, p) in counts.iter().zip([0.2, 0.5, 0.3]) {
            assert!((f64::from(*count) / 30_000.0 - p).abs() < 0.01);
        }
    }

    fn input<'a>(
        x: &'a Tensor,
        logits: &'a Tensor,
        ffn: &'a TrainableFfn,
        dials: &'a [f64],
        rng: &'a mut ChaCha8Rng,
    ) -> LayerInput<'a> {
        LayerInput { x, logits: Some(logits), ffn, dials, prices: &[1.0], rng }
    }

    fn ffn(d: usize, widths: &[usize]) -> TrainableFfn {
        let i = widths[widths.len() - 1];
        let weight = |rows, columns| Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu).unwrap();
        TrainableFfn {
            gate_proj: weight(i, d),
            up_proj: weight(i, d),
            down_proj: weight(d, i),
            own: None,
            compensation: None,
            widths: widths.to_vec(),
        }
    }

    #[test]
    fn priced_routing_is_nested_and_its_ends_are_certain() {
        let mut rng = ChaCha8Rng::seed_from_u64(rand::random());
        let (n, shares) = (120, vec![0.25, 0.5, 1.0]);
        let priced = Priced { shares, config: TrainConfig::default() };
        let (x, ffn) = (Tensor::randn(0f32, 1.0, (n, 4), &Device::Cpu).unwrap(), ffn(4, &[2, 4, 8]));
        let logits = Tensor::randn(0f32, 3.0, (n, 2), &Device::Cpu).unwrap();
        let routed = priced.route(input(&x, &logits, &ffn, &[0.0, 0.5, 1.0], &mut rng)).unwrap();
        let reach = routed.reach.to_vec2::<f32>().unwrap();
        for (token, row) in reach.iter().enumerate() {
            assert_eq!(row[0], 1.0);
            assert!(row.windows(2).all(|pair| pair[0] >= pair[1] - 1e-6), "{row:?}");
            let sum: f32 = row.iter().sum();
            match token / 40 {
                0 => assert!((sum - 1.0).abs() < 1e-6, "{row:?}"),
                2 => assert!((sum - 3.0).abs() < 1e-6, "{row:?}"),
                _ => assert!((sum - sum.round()).abs() < 1e-5, "{row:?}"),
            }
        }
    }

    #[test]
    fn the_price_pushes_towards_narrow_experts() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let priced = Priced { shares: vec![0.25, 0.5, 1.0], config: TrainConfig::default() };
        let (x, ffn) = (Tensor::randn(0f32, 1.0, (8, 4), &Device::Cpu).unwrap(), ffn(4, &[2, 4, 8]));
        let logits = candle_core::Var::zeros((8, 2), DType::F32, &Device::Cpu).unwrap();
        let loss = priced.route(input(&x, &logits, &ffn, &[0.5], &mut rng)).unwrap().loss.unwrap();
        let grad = loss.backward().unwrap().get(&logits).unwrap().to_vec2::<f32>().unwrap();
        assert!(grad.iter().flatten().all(|&g| g < 0.0), "a higher score must be cheaper: {grad:?}");
    }

    #[test]
    fn similarity_labels_are_learnable() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let (x, ffn) = (Tensor::randn(0f32, 1.0, (16, 4), &Device::Cpu).unwrap(), ffn(4, &[2, 4, 8]));
        let similarity = Similarity { experts: 3, config: TrainConfig::default() };
        let logits = candle_core::Var::zeros((16, 2), DType::F32, &Device::Cpu).unwrap();
        for _ in 0..400 {
            let loss = similarity.route(input(&x, &logits, &ffn, &[0.5], &mut rng)).unwrap().loss.unwrap();
            let grad = loss.backward().unwrap().get(&logits).unwrap().clone();
            logits.set(&(logits.as_tensor() - (grad * 32.0).unwrap()).unwrap()).unwrap();
        }
        let outputs = ffn.expert_outputs(&x).unwrap();
        let scores = sigmoid(&logits).unwrap().to_vec2::<f32>().unwrap();
        for e in 0..2 {
            let labels = cosine(&outputs[e], &outputs[2]).unwrap().to_vec1::<f32>().unwrap();
            for (score, label) in scores.iter().zip(labels) {
                assert!((score[e] - label.clamp(0.0, 1.0)).abs() < 0.03, "{} {label}", score[e]);
            }
        }
    }
}
