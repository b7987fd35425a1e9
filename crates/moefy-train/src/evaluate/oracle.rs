//! Routing with hindsight: how far is a router from the best choice?
//!
//! There are `E^(L·T)` ways to route, too many to try all. This oracle knows the true next tokens and descends from the
//! routers' choice. It takes the gradient of the loss with respect to each token's use of each shell,
//!
//! ```text
//! cost_e = Σ_{s ≤ e} ∂loss/∂reach_s + price · width_e
//! ```
//!
//! and moves a random half of all tokens in all layers to their cheapest expert, again and again. It keeps the routes with
//! the lowest loss plus price. Its result is a loss that some routes have, so a perfect router reaches it too. The optimum
//! may be lower still.

use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use dynamoe::train::glu::shell_ranges;
use dynamoe::{Routes, TrainableFfn};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::score::{BatchScore, Score, batch_score, combine, token_losses};
use crate::data::PaddedBatch;
use crate::progress::Progress;
use crate::random::in_step;
use dynamoe_model::RoutedModel;
use dynamoe_model::ops::{ffn, reach_of};

/// The oracle of a model.
pub struct Oracle<'a> {
    /// The model.
    pub model: &'a RoutedModel,
    /// The same FFNs in their differentiable form, first layer first.
    pub ffns: &'a [TrainableFfn],
    /// How often it descends for each batch.
    pub rounds: usize,
    /// Counts the tokens that are done.
    pub progress: &'a Progress,
}

impl Oracle<'_> {
    /// The oracle's loss if a token's whole width costs `price` nats. The search starts from the routes at `sensitivity`.
    ///
    /// # Errors
    /// No tokens to score.
    pub fn score(&self, batches: &[PaddedBatch], sensitivity: &[f64], price: f64) -> Result<Score> {
        let parts = batches
            .par_iter()
            .enumerate()
            .map(|(index, batch)| {
                let found = self.batch(batch, sensitivity, price, index as u64);
                self.progress.add(batch.scored() as u64);
                found
            })
            .collect::<Result<Vec<_>>>()?;
        combine(parts)
    }

    fn batch(&self, batch: &PaddedBatch, start: &[f64], price: f64, index: u64) -> Result<BatchScore> {
        let (tokens, targets, weights) = batch.tensors(self.model.device())?;
        let (hidden, mut routes) = self.model.forward(&tokens, start)?;
        let losses = token_losses(self.model, &hidden, &targets, &weights)?;
        let mut best = batch_score(self.model, batch, &losses, &routes);
        for round in 0..self.rounds as u64 {
            let gradients = self.gradients(&tokens, &targets, &weights, &routes)?;
            self.improve(&mut routes, &gradients, price, &mut in_step(index, round, u64::MAX));
            let hidden = self.model.forward_with(&tokens, &routes)?;
            let losses = token_losses(self.model, &hidden, &targets, &weights)?;
            let found = batch_score(self.model, batch, &losses, &routes);
            if loss_and_price(&found, price) < loss_and_price(&best, price) {
                best = found;
            }
        }
        Ok(best)
    }

    /// `∂loss/∂reach (N, E)` of each layer, the loss summed over tokens.
    fn gradients(
        &self,
        tokens: &Tensor,
        targets: &Tensor,
        weights: &Tensor,
        routes: &[Routes],
    ) -> Result<Vec<Vec<Vec<f32>>>> {
        let experts = self.model.widths().len();
        let reach: Vec<Var> = routes
            .iter()
            .map(|routes| Ok(Var::from_tensor(&reach_of(&routes.0, experts, tokens.device())?)?))
            .collect::<Result<_>>()?;
        let hidden = self
            .model
            .backbone()
            .forward(tokens, &mut |layer, x| ffn(&self.ffns[layer], x, &reach[layer]))?;
        let (targets, weights) = (targets.flatten_all()?, weights.flatten_all()?);
        let loss = self.model.backbone().losses(&hidden, &targets, &weights)?.sum_all()?;
        let grads = loss.backward()?;
        let rows = |var: &Var| -> Result<_> {
            Ok(grads.get(var).context("the oracle's loss does not depend on a layer")?.to_vec2::<f32>()?)
        };
        reach.iter().map(rows).collect()
    }

    /// Moves a random half of all tokens in all layers to their cheapest expert.
    fn improve(&self, routes: &mut [Routes], gradients: &[Vec<Vec<f32>>], price: f64, rng: &mut ChaCha8Rng) {
        let full = self.model.config().intermediate_size as f64;
        // the price is that of all layers together
        let price = price / routes.len() as f64;
        let shells: Vec<f64> =
            shell_ranges(&self.model.widths()).map(|shell| price * shell.len() as f64 / full).collect();
        for (routes, gradients) in routes.iter_mut().zip(gradients) {
            for (route, gradient) in routes.0.iter_mut().zip(gradients) {
                if rng.random::<bool>() {
                    *route = cheapest(gradient, &shells);
                }
            }
        }
    }
}

/// The expert whose shells together cost least.
fn cheapest(gradient: &[f32], shells: &[f64]) -> usize {
    let (mut sum, mut best) = (0.0, (f64::INFINITY, 0));
    for (expert, (&gradient, shell)) in gradient.iter().zip(shells).enumerate() {
        sum += f64::from(gradient) + shell;
        if sum < best.0 {
            best = (sum, expert);
        }
    }
    best.1
}

/// The loss of a batch plus the price of its width, nats.
fn loss_and_price(batch: &BatchScore, price: f64) -> f64 {
    let loss: f64 = batch.items.iter().map(|item| item.loss).sum();
    loss + price * batch.widths.iter().sum::<f64>() / batch.widths.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_expert_weighs_gain_against_price() {
        assert_eq!(cheapest(&[0.0, -1.0, -0.1], &[0.2, 0.2, 0.2]), 1);
        assert_eq!(cheapest(&[0.0, -0.1, -1.0], &[0.2, 0.2, 0.2]), 2);
        assert_eq!(cheapest(&[0.0, -0.1, -0.1], &[0.2, 0.2, 0.2]), 0);
    }
}
