//! How a dense model's FFNs are cut into experts, as a user chooses it.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use dynamoe::{RouterConfig, RouterKind, config};
use dynamoe_model::ModelConfig;
use serde::{Deserialize, Serialize};

use super::ConvertOptions;

/// The dial's value in a new checkpoint. Publishing scales the routers so that it means a middling width.
const SENSITIVITY: f64 = 0.5;

/// Width of a router's hidden layer for a model of this hidden size. Wider ones were no better on models of up to 2.2
/// million parameters, and cost time in every layer.
fn router_hidden_size(hidden_size: usize) -> usize {
    (hidden_size / 2).clamp(16, 64)
}

/// The experts of every FFN.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Experts {
    /// This many; their widths are `e/N` of the FFN's, in blocks that quantization likes.
    Count(usize),
    /// Experts of these widths, ascending; the last is the FFN's width.
    Widths(Vec<usize>),
}

impl FromStr for Experts {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers = text
            .split(',')
            .map(|number| number.trim().parse())
            .collect::<Result<Vec<usize>, _>>()
            .with_context(|| format!("expected a count, or widths separated by commas, found {text:?}"))?;
        Ok(match numbers[..] {
            [count] => Self::Count(count),
            _ => Self::Widths(numbers),
        })
    }
}

impl fmt::Display for Experts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Widths(widths) => {
                let widths: Vec<String> = widths.iter().map(usize::to_string).collect();
                f.write_str(&widths.join(","))
            }
        }
    }
}

/// How a dense model's FFNs are cut into experts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct ExpertConfig {
    /// Their number or their widths.
    pub experts: Experts,
    /// How many of the first shells the smaller experts have separate weights for; none for half of them.
    pub separate_shells: Option<usize>,
}

impl Default for ExpertConfig {
    fn default() -> Self {
        Self { experts: Experts::Count(4), separate_shells: None }
    }
}

impl ExpertConfig {
    /// The options that convert a model of this configuration.
    ///
    /// # Errors
    /// Widths that do not fit the model; fewer than two experts.
    pub fn options(&self, config: &ModelConfig, seed: u64) -> Result<ConvertOptions> {
        let expert_widths = match &self.experts {
            Experts::Count(count) => config::even_widths(config.intermediate_size, *count)?,
            Experts::Widths(widths) => widths.clone(),
        };
        config::check_widths(&expert_widths, config.intermediate_size)?;
        ensure!(
            expert_widths.len() > 1,
            "--experts must make two experts or more, found one: that is the dense model"
        );
        let separate_shells = self.separate_shells.unwrap_or(expert_widths.len() / 2);
        config::check_separate_shells(separate_shells, expert_widths.len()).context("--separate-shells")?;
        Ok(ConvertOptions {
            expert_widths,
            separate_shells,
            router: RouterConfig {
                kind: RouterKind::Mlp,
                hidden_size: router_hidden_size(config.hidden_size),
                // an expert adds the mean of what it leaves out: free when served, and never found worse
                compensation: true,
            },
            seed,
            sensitivity: SENSITIVITY,
            force: false,
            max_shard_bytes: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_a_count_or_widths() {
        assert_eq!("4".parse::<Experts>().unwrap(), Experts::Count(4));
        assert_eq!("8, 16,32".parse::<Experts>().unwrap(), Experts::Widths(vec![8, 16, 32]));
        for text in ["4", "8,16,32"] {
            assert_eq!(text.parse::<Experts>().unwrap().to_string(), text);
        }
        for wrong in ["", "four", "8,,16", "-1"] {
            let error = format!("{:#}", wrong.parse::<Experts>().unwrap_err());
            assert!(error.contains("a count, or widths"), "{error}");
        }
        let config: ExpertConfig = serde_json::from_str(r#"{"experts": [8, 16]}"#).unwrap();
        assert_eq!(config, ExpertConfig { experts: Experts::Widths(vec![8, 16]), separate_shells: None });
    }
}
