//! A default dial that follows the load: `--adaptive MIN..MAX --target-itl-ms N`.
//!
//! Once a period the controller looks at the inter-token latency of the period's tokens (their 95th percentile). Above
//! the target it lowers the default budget, below it raises it, within `MIN..MAX`. Requests that bring no dial follow it
//! at once, also in the middle of an answer. Requests that bring a dial of their own are left alone.
//!
//! ```text
//! budget ← clamp(budget · (target / latency)^GAIN, MIN, MAX)      by at most the factor STEP a period
//! ```
//!
//! A step costs a constant and a part that is proportional to the budget, so latency changes by a smaller factor than
//! the budget does: with a gain below 1 the rule approaches the target without overshooting it. The budget is all that
//! the controller remembers, and it is clamped, so nothing winds up while the target is out of reach.

use std::{str::FromStr, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::metrics::Metrics;
use crate::{Dial, LoadedModel, RequestDial};

/// Time between two decisions.
const PERIOD: Duration = Duration::from_millis(500);
/// How much of the error in latency, as a factor, one decision makes up for.
const GAIN: f64 = 0.5;
/// Largest change of the budget in one decision, as a factor.
const STEP: f64 = 1.25;
/// Within this factor of the target nothing changes: latencies are never twice the same.
const DEADBAND: f64 = 1.05;
/// The range of budgets that the controller may choose from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    /// The smallest budget.
    pub min: f64,
    /// The largest budget, which an idle server uses.
    pub max: f64,
}

impl FromStr for Range {
    type Err = String;

    /// `MIN..MAX`, both from 0 to 1.
    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected MIN..MAX with 0 <= MIN < MAX <= 1, as in 0.4..1, found {text:?}");
        let (min, max) = text.split_once("..").ok_or_else(expected)?;
        let number = |text: &str| text.trim().parse::<f64>().map_err(|_| expected());
        let (min, max) = (number(min)?, number(max)?);
        if !(0.0..=1.0).contains(&min) || !(0.0..=1.0).contains(&max) || min >= max {
            return Err(expected());
        }
        Ok(Self { min, max })
    }
}

/// What the default budget follows: a range, and the latency to aim at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Adaptive {
    pub range: Range,
    pub target: Duration,
}

impl Adaptive {
    /// Sets the default budget of a model to the largest one.
    ///
    /// # Errors
    /// A dense model, one without a table of budgets.
    pub fn begin(self, model: Option<&LoadedModel>) -> Result<()> {
        let model = model.context(
            "--adaptive sets the dial of a DynaMoE or MoE model, but the model that was loaded is dense",
        )?;
        model.set_dial(Dial::Budget(self.range.max)).context("--adaptive")
    }

    /// Sets the default budget of a model once a period, for ever.
    pub async fn follow(self, model: &LoadedModel, metrics: &Metrics) {
        let mut controller = Controller::new(self.range, self.target);
        let mut ticks = tokio::time::interval(PERIOD);
        loop {
            let now = ticks.tick().await.into_std();
            let before = controller.budget;
            let budget = controller.decide(metrics.latencies.p95(now, PERIOD));
            if budget != before
                && let Err(error) = model.set_dial(Dial::Budget(budget))
            {
                tracing::error!("the default budget cannot be set to {budget}: {error}");
            }
        }
    }

    /// As `GET /v1/dynamoe` tells it.
    pub fn describe(self) -> Value {
        let target = self.target.as_secs_f64() * 1000.0;
        json!({"min": self.range.min, "max": self.range.max, "target_itl_ms": target})
    }
}

/// What requests that bring no dial run with.
pub(super) fn default_request(adaptive: Option<Adaptive>, model: &Arc<LoadedModel>) -> Arc<RequestDial> {
    if adaptive.is_some() { model.following_request() } else { model.default_request() }
}

/// Chooses the default budget.
#[derive(Debug)]
struct Controller {
    range: Range,
    target: Duration,
    budget: f64,
}

impl Controller {
    /// Begins at the largest budget.
    pub fn new(range: Range, target: Duration) -> Self {
        Self { range, target, budget: range.max }
    }

    /// The budget after a period with this latency; none if no token came, so that an idle server has its full quality.
    pub fn decide(&mut self, latency: Option<Duration>) -> f64 {
        self.budget = match latency {
            None => self.range.max,
            Some(latency) => {
                let error = self.target.as_secs_f64() / latency.as_secs_f64().max(1e-6);
                let within = (1.0 / DEADBAND..=DEADBAND).contains(&error);
                let factor = if within { 1.0 } else { error.powf(GAIN).clamp(1.0 / STEP, STEP) };
                (self.budget * factor).clamp(self.range.min, self.range.max)
            }
        };
        self.budget
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    const RANGE: Range = Range { min: 0.3, max: 1.0 };
    const TARGET: Duration = Duration::from_millis(20);

    /// A server whose step takes `fixed` and, at full width, `ffn` more milliseconds; with this share of noise.
    struct Plant {
        fixed: f64,
        ffn: f64,
        noise: f64,
        rng: StdRng,
    }

    impl Plant {
        fn latency(&mut self, budget: f64) -> Duration {
            let noise = 1.0 + self.noise * self.rng.random_range(-1.0..1.0);
            Duration::from_secs_f64((self.fixed + self.ffn * budget) * noise / 1000.0)
        }
    }

    /// Budgets of `periods` decisions; what is decided shows in the latency `lag` periods later.
    fn run(controller: &mut Controller, plant: &mut Plant, periods: usize, lag: usize) -> Vec<f64> {
        let mut budgets = vec![controller.budget; lag + 1];
        for _ in 0..periods {
            let acting = budgets[budgets.len() - 1 - lag];
            let latency = plant.latency(acting);
            budgets.push(controller.decide(Some(latency)));
        }
        budgets.split_off(lag + 1)
    }

    fn plant(fixed: f64, ffn: f64, noise: f64) -> Plant {
        let seed = rand::random();
        println!("seed {seed}");
        Plant { fixed, ffn, noise, rng: StdRng::seed_from_u64(seed) }
    }

    #[test]
    fn it_settles_at_the_target_and_stays_there() {
        // full width takes 28 ms, and 20 ms are had at a budget of (20 - 4) / 24 = 0.667
        for lag in [0, 1, 2] {
            let mut controller = Controller::new(RANGE, TARGET);
            let budgets = run(&mut controller, &mut plant(4.0, 24.0, 0.0), 60, lag);
            let settled = &budgets[20..];
            for &budget in settled {
                assert!((budget - 0.667).abs() < 0.07, "lag {lag}: {budgets:?}");
            }
            // no oscillation: once settled, the budget does not change at all
            assert_eq!(
                settled[20..].iter().filter(|&&budget| budget != settled[20]).count(),
                0,
                "{budgets:?}"
            );
        }
    }

    #[test]
    fn noise_moves_it_little() {
        let mut controller = Controller::new(RANGE, TARGET);
        let budgets = run(&mut controller, &mut plant(4.0, 24.0, 0.15), 200, 1);
        let settled = &budgets[20..];
        let mean = settled.iter().sum::<f64>() / settled.len() as f64;
        assert!((mean - 0.667).abs() < 0.08, "{mean}");
        // latencies scatter by 0.087 (uniform, ± 0.15), and with one period of lag the rule lets the logarithm of the
        // budget scatter by 0.78 times that, 0.068; three halves of it are room for a sample of 180
        let spread =
            settled.iter().map(|budget| (budget / mean).ln().powi(2)).sum::<f64>() / settled.len() as f64;
        assert!(spread.sqrt() < 0.1, "{} {settled:?}", spread.sqrt());
    }

    #[test]
    fn it_recovers_at_once_from_a_target_out_of_reach() {
        let mut controller = Controller::new(RANGE, TARGET);
        // even the smallest budget takes 60 ms, for long
        let budgets = run(&mut controller, &mut plant(30.0, 100.0, 0.0), 500, 1);
        assert_eq!(budgets[499], RANGE.min);
        // as soon as there is room, the budget rises with every decision
        let budgets = run(&mut controller, &mut plant(1.0, 5.0, 0.0), 10, 1);
        assert!(budgets[1] > RANGE.min && budgets[9] == RANGE.max, "{budgets:?}");
    }

    #[test]
    fn an_idle_server_has_full_quality() {
        let mut controller = Controller::new(RANGE, TARGET);
        run(&mut controller, &mut plant(30.0, 100.0, 0.0), 50, 0);
        assert_eq!(controller.decide(None), RANGE.max);
    }

    #[test]
    fn a_range_is_two_budgets() {
        assert_eq!("0.4..1".parse(), Ok(Range { min: 0.4, max: 1.0 }));
        for wrong in ["", "0.4", "1..0.4", "0.5..0.5", "-1..1", "0..2", "NaN..1", "a..b"] {
            assert!(wrong.parse::<Range>().unwrap_err().contains("MIN..MAX"), "{wrong}");
        }
    }
}
