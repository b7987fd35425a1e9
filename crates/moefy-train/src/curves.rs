//! Loss against width: the curves of a report.

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use dynamoe::TrainableFfn;

use crate::data::PaddedBatch;
use crate::evaluate::oracle::Oracle;
use crate::evaluate::score::{Policy, score, token_losses};
use crate::evaluate::{Dial, Setting, as_point, point};
use crate::results::{Curve, Point, Sample};
use crate::texts::{Texts, TokenUse};
use crate::train::{Method, TrainModel};
use dynamoe_model::model::RoutedModel;

/// Mean widths at which curves are measured, besides both ends of the dial.
pub const WIDTHS: [f64; 9] = [0.3, 0.375, 0.45, 0.5, 0.55, 0.625, 0.75, 0.875, 0.95];

/// Tokens on which the oracle searches: it takes tens of passes.
const ORACLE_TOKENS: usize = 8_000;
/// Improvements that the oracle tries for each batch.
const ORACLE_ROUNDS: usize = 6;
/// Prices of a token's whole width, nats.
const ORACLE_PRICES: [f64; 5] = [0.2, 0.5, 1.0, 2.0, 4.0];

/// The curve of a trained model of `method` on `batches`: at both ends of its dial and at `widths`, or at its
/// experts' widths for static nesting. Routed models take their dial from the table of budgets in their
/// configuration.
///
/// # Errors
/// candle's.
pub fn curve(
    model: &RoutedModel,
    method: Method,
    batches: &[PaddedBatch],
    seed: u64,
    widths: &[f64],
) -> Result<Curve> {
    let layers = model.config().num_hidden_layers;
    let full = model.config().intermediate_size as f64;
    let shares: Vec<f64> = model.widths().iter().map(|&w| w as f64 / full).collect();
    let between = || widths.iter().copied().filter(|&w| w > shares[0] && w < 1.0);
    let at = |sensitivity: f64| point(model, batches, &Setting::uniform(sensitivity, layers));
    let points: Vec<Point> = match method {
        Method::Dense => vec![at(1.0)?],
        Method::Static => shares.iter().map(|&share| at(share)).collect::<Result<_>>()?,
        Method::Random => {
            let means = between().chain([shares[0], 1.0]);
            let random = |mean: f64| -> Result<Point> {
                let scored = score(model, batches, &Policy::Random { mean, seed })?;
                Ok(Point { budget: Some(mean), ..as_point(model, &scored) })
            };
            means.map(random).collect::<Result<_>>()?
        }
        Method::Similarity | Method::Priced => {
            let mut points = vec![at(0.0)?, at(1.0)?];
            for width in between() {
                points.push(point(model, batches, &Setting::of(Dial::Budget(width), model)?)?);
            }
            points
        }
    };
    let description = match method {
        Method::Dense => "Every token at full width, fine-tuned on the same tokens in the same order.",
        Method::Static => {
            "One width for all tokens and layers, drawn at random for each training sequence (MatFormer)."
        }
        Method::Random => "Every token of every layer draws its width at random, in training and here.",
        Method::Similarity => {
            "A router that predicts how similar each expert's output is to the whole FFN's."
        }
        Method::Priced => "A router trained through the loss, with a price on width.",
    };
    Ok(sorted(method.label(), description, points))
}

fn sorted(name: &str, description: &str, mut points: Vec<Point>) -> Curve {
    points.sort_by(|a, b| a.mean_width.total_cmp(&b.mean_width));
    Curve { name: name.to_owned(), description: description.to_owned(), points }
}

/// What hindsight reaches with the same weights: the oracle's curve.
///
/// It is searched on the first documents only; its loss there, less the full-width loss there, is added to the
/// full-width loss on all of `batches`, so that it compares with the other curves.
///
/// # Errors
/// candle's.
pub fn oracle_curve(model: &TrainModel, batches: &[PaddedBatch]) -> Result<Curve> {
    let routed = model.routed()?;
    let layers = routed.config().num_hidden_layers;
    let ffns: Vec<TrainableFfn> = (0..layers).map(|layer| model.ffn(layer)).collect::<Result<_>>()?;
    let some = spread(batches, ORACLE_TOKENS);
    let full = Setting::uniform(1.0, layers);
    let offset = point(&routed, batches, &full)?.loss - point(&routed, &some, &full)?.loss;
    let oracle = Oracle { model: &routed, ffns: &ffns, rounds: ORACLE_ROUNDS };
    let points = ORACLE_PRICES.iter().map(|&price| {
        let found = oracle.score(&some, &vec![0.5; layers], price)?;
        let point = as_point(&routed, &found);
        let loss = point.loss + offset;
        Ok(Point { loss, perplexity: loss.exp(), ..point })
    });
    let description = "The same weights routed with knowledge of the next token, by descent: a bound that a router \
                       could aim for, not one it can reach.";
    Ok(sorted("oracle routing", description, points.collect::<Result<_>>()?))
}

/// Every `n`-th batch, so that about `tokens` tokens are taken: batches are sorted by length, so the first ones
/// would not be like the rest.
pub fn spread(batches: &[PaddedBatch], tokens: usize) -> Vec<PaddedBatch> {
    let all: usize = batches.iter().map(|batch| batch.tokens.len()).sum();
    let step = (all / tokens.max(1)).max(1);
    batches.iter().skip(step / 2).step_by(step).cloned().collect()
}

/// Sample texts from the first rows of held-out batches, at several widths.
///
/// # Errors
/// candle's.
pub fn samples(
    model: &RoutedModel,
    texts: &Texts,
    batches: &[PaddedBatch],
    settings: &[Setting],
    count: usize,
    max_tokens: usize,
) -> Result<Vec<Sample>> {
    let full = model.config().intermediate_size as f64;
    let widths = model.widths();
    let device = model.device();
    let mut samples = Vec::new();
    // from the middle: batches are sorted by length
    for batch in batches.iter().skip(batches.len() / 2).take(count) {
        let length = batch.weights[..batch.length].iter().filter(|&&w| w > 0.0).count().min(max_tokens);
        let ids = &batch.tokens[..length];
        let targets = Tensor::from_slice(&batch.targets[..length], (1, length), device)?;
        let tokens = Tensor::from_slice(ids, (1, length), device)?;
        let ones = Tensor::ones((1, length), DType::F32, device)?;
        let item = batch.items.first().context("a batch holds at least one document")?;
        let source = format!("held-out document {}", item + 1);
        for setting in settings {
            let (hidden, routes) = model.forward(&tokens, &setting.sensitivity)?;
            let losses = token_losses(model, &hidden, &targets, &ones)?;
            let width_per_layer: Vec<Vec<f64>> =
                routes.iter().map(|r| r.0.iter().map(|&e| widths[e] as f64 / full).collect()).collect();
            let measured = TokenUse { width_per_layer: &width_per_layer, losses: &losses };
            samples.push(texts.sample(ids, setting.mean(), &source, &measured));
        }
    }
    Ok(samples)
}
