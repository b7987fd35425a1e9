//! Constants of training that nobody should have to choose. `--set KEY=VALUE` and `compare --variants` can change them,
//! for research.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The constants, with where each value comes from. A learning rate of 0 leaves its weights as they are. "Measured" means
/// on stories260k, see docs/log.md.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tuning {
    /// Learning rate of routers and compensation, as a multiple of the training's. Measured.
    pub router_lr: f64,
    /// Learning rate of the smaller experts' separate weights, likewise. Measured.
    pub separate_lr: f64,
    /// Learning rate of the dense FFN where smaller experts have separate weights: every width uses these weights, so a
    /// small rate keeps the full model what it was. Measured.
    pub shared_lr: f64,
    /// Learning rate of all but FFNs and routers, for the same reason. Measured.
    pub backbone_lr: f64,
    /// Share of the steps over which the learning rate rises from 0. Common practice.
    pub warmup: f64,
    /// Where the cosine ends, as a share of the peak. Common practice.
    pub final_lr: f64,
    /// Decay of matrices per step and unit of learning rate. Small, since fine-tuning starts from trained weights.
    pub weight_decay: f64,
    /// Largest norm of the gradient; larger ones are scaled down. Common practice.
    pub clip: f64,
    /// Share of the dense model's predictions in the target at full distillation; the rest is the text. Measured.
    pub distill_predictions: f64,
    /// Weight of the difference from the dense model's hidden states at full distillation, relative to their size.
    /// Measured.
    pub distill_hidden: f64,
    /// Softness of the router's decisions for its gradient, in logits (priced). Measured.
    pub temperature: f64,
    /// Spread of the noise on router logits (priced). Measured.
    pub noise: f64,
    /// How strongly target widths concentrate near the focus; 1 means uniform (priced). Measured.
    pub focus_power: f64,
    /// Share of sequences trained at full width, where all weights are trained. Measured.
    pub full_share: f64,
    /// Share of sequences trained at the narrowest width. A matter of taste: 0.1 is better there and a little worse
    /// elsewhere.
    pub narrowest_share: f64,
    /// Steps between lines of metrics.
    pub log_every: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            router_lr: 10.0,
            separate_lr: 2.0,
            shared_lr: 0.3,
            backbone_lr: 0.15,
            warmup: 0.05,
            final_lr: 0.05,
            weight_decay: 0.01,
            clip: 1.0,
            distill_predictions: 0.8,
            distill_hidden: 3.0,
            temperature: 1.0,
            noise: 0.1,
            focus_power: 2.0,
            full_share: 0.12,
            narrowest_share: 0.06,
            log_every: 10,
        }
    }
}

impl Tuning {
    /// Changes one constant, as `KEY=VALUE` names it.
    ///
    /// # Errors
    /// No such key, or a value that is no number.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let parts = assignment.split_once('=');
        let (key, value) = parts.with_context(|| format!("expected KEY=VALUE, found {assignment:?}"))?;
        let mut fields = serde_json::to_value(&*self)?;
        let key = key.trim().replace('_', "-");
        let Some(field) = fields.get_mut(&key) else {
            let known: Vec<String> =
                fields.as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect();
            bail!("unknown key {key:?}; keys are {}", known.join(", "))
        };
        let number: Value = serde_json::from_str(value.trim())
            .ok()
            .filter(Value::is_number)
            .with_context(|| format!("{key}: expected a number, found {value:?}"))?;
        *field = number;
        *self = serde_json::from_value(fields).with_context(|| format!("{key} = {value}"))?;
        Ok(())
    }

    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<()> {
        let positive =
            [("clip", self.clip), ("temperature", self.temperature), ("focus-power", self.focus_power)];
        for (name, value) in positive {
            ensure!(value.is_finite() && value > 0.0, "{name} must be a number above 0, found {value}");
        }
        // a rate of 0 leaves a group of weights as it is
        let rates = [
            ("router-lr", self.router_lr),
            ("separate-lr", self.separate_lr),
            ("shared-lr", self.shared_lr),
            ("backbone-lr", self.backbone_lr),
        ];
        for (name, value) in rates {
            ensure!(value.is_finite() && value >= 0.0, "{name} must be a number from 0 up, found {value}");
        }
        let ranges = [
            ("warmup", self.warmup, 1.0),
            ("final-lr", self.final_lr, 1.0),
            ("distill-predictions", self.distill_predictions, 1.0),
            ("distill-hidden", self.distill_hidden, 1000.0),
            ("full-share", self.full_share, 0.5),
            ("narrowest-share", self.narrowest_share, 0.5),
            ("noise", self.noise, 100.0),
            ("weight-decay", self.weight_decay, 1.0),
        ];
        for (name, value, top) in ranges {
            ensure!((0.0..=top).contains(&value), "{name} must be from 0 to {top}, found {value}");
        }
        ensure!(self.log_every > 0, "log-every must be 1 or more, found 0");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_lists_every_constant_with_its_value() {
        let text = include_str!("../../../../docs/method.md");
        let section = text.split("\n## ").find(|section| section.starts_with("Constants\n")).unwrap();
        let row = |line: &str| {
            let mut cells = line.split('|').map(str::trim).skip(1);
            let key = cells.next()?.strip_prefix('`')?.strip_suffix('`')?.to_owned();
            Some((key, cells.next()?.parse::<f64>().ok()?))
        };
        let documented: Vec<(String, f64)> = section.lines().filter_map(row).collect();
        let constants = serde_json::to_value(Tuning::default()).unwrap();
        let constants = constants.as_object().unwrap().iter();
        let constants: Vec<(String, f64)> =
            constants.map(|(key, value)| (key.clone(), value.as_f64().unwrap())).collect();
        assert_eq!(documented, constants);
    }

    #[test]
    fn constants_are_set_by_name() {
        let mut tuning = Tuning::default();
        tuning.set("focus_power=1").unwrap();
        tuning.set("log-every = 3").unwrap();
        assert_eq!(tuning, Tuning { focus_power: 1.0, log_every: 3, ..Tuning::default() });
        for (wrong, word) in [
            ("clip", "KEY=VALUE"),
            ("clop=1", "keys are router-lr"),
            ("clip=much", "expected a number"),
            ("clip=[1]", "expected a number"),
            ("log-every=0.5", "log-every"),
        ] {
            let error = format!("{:#}", tuning.set(wrong).unwrap_err());
            assert!(error.contains(word), "{wrong}: {error}");
        }
        tuning.set("clip=-1").unwrap();
        assert!(tuning.validate().unwrap_err().to_string().contains("clip must be"));
    }
}
