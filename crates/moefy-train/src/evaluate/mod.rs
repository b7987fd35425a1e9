//! Loss, widths and cost of a model along its dial.
//!
//! [`mod@score`] measures one routing policy on padded batches. [`budget`] solves the dial for a mean width, by what
//! [`scores`] tell of all widths. [`oracle`] routes with hindsight. [`sparsity`] is a baseline that needs no training.
//! [`cost`] counts parameters and operations. [`curve`] and [`samples`] make what a report shows.

pub mod budget;
pub mod cost;
pub mod curve;
pub mod oracle;
pub mod samples;
pub mod score;
pub mod scores;
pub mod sparsity;

use anyhow::{Result, ensure};
use dynamoe::{Dial, dial::check_dial};
use rayon::prelude::*;

pub use score::{Policy, Score, score};

pub use crate::data::scored_tokens;
use crate::data::{BATCH_TOKENS, Choices, PaddedBatch, Pairs, scored_by_others};
use crate::progress::Progress;
use crate::ranks::{Alone, Ranks};
use crate::report::results::{ChoicesPoint, PairsPoint, Point};
use dynamoe_model::RoutedModel;
use sparsity::Thresholds;

/// A value of the dial and the sensitivity that each layer takes for it; or a sparsity of activations in its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// The mean width asked for, if one was.
    pub budget: Option<f64>,
    /// One for each layer.
    pub sensitivity: Vec<f64>,
    /// Of a dense model whose activations are made sparse.
    pub thresholds: Option<Thresholds>,
}

impl Setting {
    /// The same sensitivity for every layer.
    pub fn uniform(sensitivity: f64, layers: usize) -> Self {
        Self { budget: None, sensitivity: vec![sensitivity; layers], thresholds: None }
    }

    /// A dense model with these thresholds.
    pub fn sparse(thresholds: Thresholds) -> Self {
        let full = Self::uniform(1.0, thresholds.layers.len());
        Self { thresholds: Some(thresholds), ..full }
    }

    /// Looks a dial value up in the model's configuration.
    ///
    /// # Errors
    /// A value outside 0 to 1; a budget without a table.
    pub fn of(dial: Dial, model: &RoutedModel) -> Result<Self> {
        let layers = model.config().num_hidden_layers;
        let budget = if let Dial::Budget(width) = dial { Some(width) } else { None };
        let sensitivity = match (dial, &model.config().dynamoe) {
            (dial, Some(config)) => dial.sensitivities(config, layers)?,
            (Dial::Sensitivity(sensitivity), None) => {
                check_dial("sensitivity", sensitivity)?;
                vec![sensitivity; layers]
            }
            (Dial::Budget(width), None) => {
                check_dial("budget", width)?;
                ensure!(width >= 1.0, "a dense model has one width: a budget of {width} cannot be had");
                vec![1.0; layers]
            }
        };
        Ok(Self { budget, sensitivity, thresholds: None })
    }

    /// The sparsity of activations that was asked for, if one was.
    pub fn activation_sparsity(&self) -> Option<f64> {
        self.thresholds.as_ref().map(|thresholds| thresholds.sparsity)
    }

    fn policy(&self) -> Policy<'_> {
        match &self.thresholds {
            Some(thresholds) => Policy::Sparse(thresholds),
            None => Policy::Dial(&self.sensitivity),
        }
    }

    /// A score at this setting as a row of results.
    fn point(&self, model: &RoutedModel, score: &Score) -> Point {
        Point {
            sensitivity: self.mean(),
            budget: self.budget,
            activation_sparsity: self.activation_sparsity(),
            ..as_point(model, score)
        }
    }

    /// The mean over layers.
    pub fn mean(&self) -> f64 {
        self.sensitivity.iter().sum::<f64>() / self.sensitivity.len().max(1) as f64
    }
}

/// Measures one setting of the dial.
///
/// # Errors
/// No tokens to score.
pub fn point(
    model: &RoutedModel,
    batches: &[PaddedBatch],
    setting: &Setting,
    progress: &Progress,
    ranks: &dyn Ranks,
) -> Result<Point> {
    Ok(setting.point(model, &score(model, batches, &setting.policy(), progress, ranks)?))
}

/// Measures one setting of the dial with each layer's widths shuffled among the tokens ([`Policy::Shuffled`]).
///
/// # Errors
/// As [`point`].
pub fn shuffled_point(
    model: &RoutedModel,
    batches: &[PaddedBatch],
    setting: &Setting,
    progress: &Progress,
    ranks: &dyn Ranks,
) -> Result<Point> {
    let policy = Policy::Shuffled(&setting.sensitivity);
    Ok(setting.point(model, &score(model, batches, &policy, progress, ranks)?))
}

/// A score as a row of results, without the dial that it was measured at.
pub(crate) fn as_point(model: &RoutedModel, score: &Score) -> Point {
    let mean_width = score.mean_width();
    let cost = cost::Cost::of(model.config());
    Point {
        sensitivity: f64::NAN,
        budget: None,
        activation_sparsity: None,
        loss: score.loss,
        stderr: score.stderr,
        perplexity: score.loss.exp(),
        mean_width,
        width_per_layer: score.width_per_layer.clone(),
        active_parameters: cost.active_parameters(mean_width),
        flops: cost.flops(mean_width),
        tokens: score.tokens,
    }
}

/// Accuracy on minimal pairs at one setting of the dial.
///
/// # Errors
/// A token outside the vocabulary.
pub fn pairs_point(
    model: &RoutedModel,
    pairs: &Pairs,
    setting: &Setting,
    ranks: &dyn Ranks,
) -> Result<PairsPoint> {
    let batches: Vec<PaddedBatch> = pairs.batches(BATCH_TOKENS).collect();
    let (log_likelihoods, mean_width) = log_likelihoods(model, &batches, 2 * pairs.len(), setting, ranks)?;
    let accuracy = pairs.score(&log_likelihoods)?;
    let (budget, activation_sparsity) = (setting.budget, setting.activation_sparsity());
    Ok(PairsPoint { sensitivity: setting.mean(), budget, activation_sparsity, mean_width, ..accuracy })
}

/// Accuracy on multiple choice at one setting of the dial.
///
/// # Errors
/// A token outside the vocabulary.
pub fn choices_point(
    model: &RoutedModel,
    choices: &Choices,
    setting: &Setting,
    ranks: &dyn Ranks,
) -> Result<ChoicesPoint> {
    let batches: Vec<PaddedBatch> = choices.batches(BATCH_TOKENS).collect();
    let items = choices.sequences().count();
    let (log_likelihoods, mean_width) = log_likelihoods(model, &batches, items, setting, ranks)?;
    let accuracy = choices.score(&log_likelihoods)?;
    Ok(ChoicesPoint {
        sensitivity: setting.mean(),
        budget: setting.budget,
        activation_sparsity: setting.activation_sparsity(),
        mean_width,
        ..accuracy
    })
}

/// The sum over the scored tokens of each of `items` items, and the mean width of all these tokens. Batches run in
/// parallel and on all ranks.
fn log_likelihoods(
    model: &RoutedModel,
    batches: &[PaddedBatch],
    items: usize,
    setting: &Setting,
    ranks: &dyn Ranks,
) -> Result<(Vec<f64>, f64)> {
    let progress = Progress::new("scoring tasks", "tokens", scored_tokens(batches), 0);
    let policy = setting.policy();
    let own = ranks.own(batches.len());
    let parts: Vec<Vec<f64>> = own
        .par_iter()
        .map(|&index| {
            let part = score(model, &batches[index..=index], &policy, &progress, &Alone)?;
            let items = part.items.iter().flat_map(|item| [item.item as f64, item.loss]);
            Ok([part.tokens as f64, part.mean_width()].into_iter().chain(items).collect())
        })
        .collect::<Result<_>>()?;
    let parts = ranks.all_gather_own(batches.len(), &parts);
    progress.add(scored_by_others(batches, &own));
    progress.finish();
    let mut log_likelihoods = vec![0.0; items];
    let (mut tokens, mut used) = (0.0, 0.0);
    for part in parts {
        part[2..].chunks_exact(2).for_each(|item| log_likelihoods[item[0] as usize] -= item[1]);
        tokens += part[0];
        used += part[0] * part[1];
    }
    Ok((log_likelihoods, used / tokens.max(1.0)))
}
