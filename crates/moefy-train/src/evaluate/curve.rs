//! Loss against width: the curves of a report.

use anyhow::Result;
use dynamoe::{Dial, TrainableFfn};
use dynamoe_model::RoutedModel;

use super::oracle::Oracle;
use super::score::{Policy, score};
use super::{Setting, as_point, point, scored_tokens};
use crate::data::{PaddedBatch, subsample};
use crate::progress::Progress;
use crate::ranks::{Alone, Ranks};
use crate::report::results::{Curve, Point};

/// Mean widths at which curves are measured, besides both ends of the dial.
pub const WIDTHS: [f64; 9] = [0.3, 0.375, 0.45, 0.5, 0.55, 0.625, 0.75, 0.875, 0.95];

/// Tokens on which the oracle searches: it makes tens of passes over them.
const ORACLE_TOKENS: usize = 8_000;
/// How often the oracle descends for each batch.
const ORACLE_ROUNDS: usize = 6;
/// Prices of a token's whole width, in nats: each gives a point of the oracle's curve.
const ORACLE_PRICES: [f64; 5] = [0.2, 0.5, 1.0, 2.0, 4.0];

/// A place of a curve.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Place {
    /// A value of the dial.
    Dial(Dial),
    /// Widths drawn at random for each token and layer, with this mean.
    Random(f64),
}

/// A trained model and what its curve is measured with.
pub struct Probe<'a> {
    /// The model.
    pub model: &'a RoutedModel,
    /// Held-out text.
    pub batches: &'a [PaddedBatch],
    /// Mean widths to measure at, besides both ends of the dial.
    pub widths: &'a [f64],
    /// Seed of random widths.
    pub seed: u64,
    /// Who measures it.
    pub ranks: &'a dyn Ranks,
}

impl Probe<'_> {
    /// `H_e / I` of each expert.
    pub fn width_shares(&self) -> Vec<f64> {
        self.model.config().width_shares()
    }

    /// The ones of [`Probe::widths`] between the ends of the dial.
    pub fn widths_between(&self) -> impl Iterator<Item = f64> {
        let narrowest = self.width_shares()[0];
        self.widths.iter().copied().filter(move |&width| width > narrowest && width < 1.0)
    }

    /// Measures the model at every one of `places`.
    ///
    /// # Errors
    /// No tokens to score; a budget without a table in the model's configuration.
    pub fn points(&self, places: &[Place]) -> Result<Vec<Point>> {
        let tokens = places.len() as u64 * scored_tokens(self.batches);
        let progress = Progress::new("measuring the curve", "tokens", tokens, 0);
        let points = places.iter().map(|place| self.point(place, &progress)).collect();
        progress.finish();
        points
    }

    fn point(&self, place: &Place, progress: &Progress) -> Result<Point> {
        match *place {
            Place::Dial(dial) => {
                point(self.model, self.batches, &Setting::of(dial, self.model)?, progress, self.ranks)
            }
            Place::Random(mean) => {
                let policy = Policy::Random { mean, seed: self.seed };
                let scored = score(self.model, self.batches, &policy, progress, self.ranks)?;
                Ok(Point { budget: Some(mean), ..as_point(self.model, &scored) })
            }
        }
    }
}

/// The oracle's curve: the same weights, routed with hindsight. `ffns` are the model's, first layer first.
///
/// The search takes long, so it runs on some of `batches` only. To compare with the other curves, its losses are moved by
/// the difference that the full-width loss has between all batches and those.
///
/// # Errors
/// No tokens to score.
pub fn oracle_curve(model: &RoutedModel, ffns: &[TrainableFfn], batches: &[PaddedBatch]) -> Result<Curve> {
    let layers = model.config().num_hidden_layers;
    let some = subsample(batches, ORACLE_TOKENS);
    let full = Setting::uniform(1.0, layers);
    let tokens = ORACLE_PRICES.len() as u64 * scored_tokens(&some);
    let hidden = Progress::hidden();
    let at_full = |batches: &[PaddedBatch]| point(model, batches, &full, &hidden, &Alone);
    let offset = at_full(batches)?.loss - at_full(&some)?.loss;
    let progress = Progress::new("searching the oracle's routes", "tokens", tokens, 0);
    let oracle = Oracle { model, ffns, rounds: ORACLE_ROUNDS, progress: &progress };
    let points = ORACLE_PRICES.iter().map(|&price| {
        let found = oracle.score(&some, &vec![0.5; layers], price)?;
        let point = as_point(model, &found);
        let loss = point.loss + offset;
        Ok(Point { loss, perplexity: loss.exp(), ..point })
    });
    let description = "The same weights, routed by a search that knows the next token: no router can be expected to \
                       reach this.";
    let points = points.collect::<Result<_>>()?;
    progress.finish();
    Ok(Curve::sorted("oracle routing", description, points))
}
