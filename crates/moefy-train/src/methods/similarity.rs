//! The paper's method: the router predicts how similar each expert's output is to the whole FFN's.
//!
//! The label of expert `e` is the cosine of `O_e` with `O_E`. A token takes the smallest expert whose predicted similarity
//! reaches the threshold, in training as when served; each training sequence draws its threshold.

use candle_core::{D, Result, Tensor};
use dynamoe::router::{choose, logit};
use dynamoe_model::ops::reach_of;
use rand_chacha::ChaCha8Rng;

use super::{Definition, LayerInput, Objective, Routed, Routing, draws, logits, per_token, routed_places};
use crate::evaluate::curve::{Place, Probe};

pub(super) struct Similarity;

impl Definition for Similarity {
    fn name(&self) -> &'static str {
        "similarity"
    }

    fn label(&self) -> &'static str {
        "similarity router"
    }

    fn description(&self) -> &'static str {
        "A router that predicts how similar each expert's output is to the whole FFN's."
    }

    fn has_router(&self) -> bool {
        true
    }

    fn objective(&self, routing: &Routing) -> Box<dyn Objective> {
        Box::new(PredictedSimilarity(routing.clone()))
    }

    fn places(&self, probe: &Probe<'_>) -> Vec<Place> {
        routed_places(probe)
    }
}

/// The dial is the threshold.
struct PredictedSimilarity(Routing);

impl Objective for PredictedSimilarity {
    fn sample(&self, rng: &mut ChaCha8Rng, sequences: usize) -> Vec<f64> {
        (0..sequences).map(|_| draws::uniform(rng, &self.0)).collect()
    }

    fn route(&self, input: LayerInput<'_>) -> Result<Routed> {
        let logits = logits(&input, "similarity")?;
        let experts = self.0.width_shares.len();
        let outputs = input.ffn.expert_outputs(&input.x.detach())?;
        let full = &outputs[experts - 1];
        let labels: Vec<Tensor> =
            outputs[..experts - 1].iter().map(|o| cosine(o, full)).collect::<Result<_>>()?;
        let labels = Tensor::stack(&labels, 1)?.clamp(0f32, 1f32)?.detach(); // (N, E-1)
        // binary cross entropy from logits: softplus(l) - y·l, whose minimum is the expected similarity
        let loss = (softplus(logits)? - (labels * logits)?)?.mean_all()?;
        let thresholds: Vec<f32> = per_token(input.dials, input.x.dim(0)?).map(logit).collect();
        let rows = logits.detach().to_vec2::<f32>()?;
        let chosen: Vec<usize> = rows.iter().zip(&thresholds).map(|(row, &t)| choose(row, t)).collect();
        Ok(Routed { reach: reach_of(&chosen, experts, input.x.device())?, loss: Some(loss) })
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

#[cfg(test)]
mod tests {
    use super::super::tests::{ffn, routing};
    use super::*;
    use crate::testing::{normal, rng};
    use candle_core::{DType, Device};
    use candle_nn::ops::sigmoid;

    #[test]
    fn similarity_labels_are_learnable() {
        let mut rng = rng();
        let (x, ffn) = (normal(&mut rng, 1.0, (16, 4)), ffn(&mut rng, 4, &[2, 4, 8]));
        let similarity = PredictedSimilarity(routing(&[0.25, 0.5, 1.0]));
        let logits = candle_core::Var::zeros((16, 2), DType::F32, &Device::Cpu).unwrap();
        for _ in 0..400 {
            let input = |rng| LayerInput { x: &x, logits: Some(&logits), ffn: &ffn, dials: &[0.5], rng };
            let loss = similarity.route(input(&mut rng)).unwrap().loss.unwrap();
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
