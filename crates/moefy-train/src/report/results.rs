//! What `evaluate`, `run` and the comparisons measure: the types behind `--json` and the report.

use serde::{Deserialize, Deserializer, Serialize};

/// JSON has no NaN and no infinity: `serde_json` writes them as null, which is read back as NaN here.
fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// The same for a list.
fn nulls_are_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
    let values = Vec::<Option<f64>>::deserialize(deserializer)?;
    Ok(values.into_iter().map(|v| v.unwrap_or(f64::NAN)).collect())
}

/// One point of the dial, measured on one data set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The dial's value: one number, or the mean over layers where a budget set one for each.
    #[serde(deserialize_with = "null_is_nan")]
    pub sensitivity: f64,
    /// The mean width that was asked for, if one was.
    pub budget: Option<f64>,
    /// The share of entries that were to be set to zero, where a dense model's activations were made sparse. The mean width
    /// is then the share of the FFN's weights that was really kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation_sparsity: Option<f64>,
    /// Mean loss in nats per token.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Standard error of `loss` over documents (or sequences).
    #[serde(deserialize_with = "null_is_nan")]
    pub stderr: f64,
    /// `exp(loss)`.
    #[serde(deserialize_with = "null_is_nan")]
    pub perplexity: f64,
    /// Mean FFN width over tokens and layers as a share of the dense width.
    #[serde(deserialize_with = "null_is_nan")]
    pub mean_width: f64,
    /// The same for each layer.
    #[serde(deserialize_with = "nulls_are_nan")]
    pub width_per_layer: Vec<f64>,
    /// Parameters a token uses on average, as a share of the dense model's.
    #[serde(deserialize_with = "null_is_nan")]
    pub active_parameters: f64,
    /// Floating point operations of a token on average, as a share of the dense model's (matrix products
    /// without attention scores).
    #[serde(deserialize_with = "null_is_nan")]
    pub flops: f64,
    /// Tokens scored.
    pub tokens: usize,
}

/// Accuracy on minimal pairs (BLiMP): how often the good sentence is the likelier one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PairsPoint {
    /// The dial's value.
    #[serde(deserialize_with = "null_is_nan")]
    pub sensitivity: f64,
    /// The mean width that was asked for, if one was.
    #[serde(default)]
    pub budget: Option<f64>,
    /// As [`Point::activation_sparsity`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation_sparsity: Option<f64>,
    /// Share of pairs whose good sentence has the larger log likelihood.
    #[serde(deserialize_with = "null_is_nan")]
    pub accuracy: f64,
    /// Standard error of `accuracy`.
    #[serde(deserialize_with = "null_is_nan")]
    pub stderr: f64,
    /// Pairs scored.
    pub pairs: usize,
    /// Mean FFN width over all tokens scored.
    #[serde(deserialize_with = "null_is_nan")]
    pub mean_width: f64,
    /// Accuracy by the pairs' `field`, where they have one.
    pub by_field: Vec<(String, f64)>,
    /// Whether each pair was judged right.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub right: Vec<bool>,
}

/// Accuracy on multiple choice (HellaSwag, PIQA).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ChoicesPoint {
    /// The file's name without its ending.
    pub name: String,
    /// The dial's value.
    #[serde(deserialize_with = "null_is_nan")]
    pub sensitivity: f64,
    /// The mean width that was asked for, if one was.
    pub budget: Option<f64>,
    /// As [`Point::activation_sparsity`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation_sparsity: Option<f64>,
    /// Share of questions whose right choice has the largest log likelihood.
    #[serde(deserialize_with = "null_is_nan")]
    pub acc: f64,
    /// Its standard error.
    #[serde(deserialize_with = "null_is_nan")]
    pub acc_stderr: f64,
    /// The same with log likelihoods divided by the choices' lengths in bytes.
    #[serde(deserialize_with = "null_is_nan")]
    pub acc_norm: f64,
    /// Its standard error.
    #[serde(deserialize_with = "null_is_nan")]
    pub acc_norm_stderr: f64,
    /// Mean FFN width over the tokens of the choices.
    #[serde(deserialize_with = "null_is_nan")]
    pub mean_width: f64,
    /// Whether each question was answered right, as `acc` counts.
    pub right: Vec<bool>,
    /// The same as `acc_norm` counts.
    #[serde(default)]
    pub right_norm: Vec<bool>,
    /// The log likelihood of each question's choices.
    pub log_likelihoods: Vec<Vec<f64>>,
}

/// How much more often `own` answers are right than `others` to the same questions, and the standard error of that: the
/// differences are taken question by question.
pub fn difference(own: &[bool], others: &[bool]) -> (f64, f64) {
    let pairs = own.iter().zip(others);
    let differences: Vec<f64> =
        pairs.map(|(&own, &other)| f64::from(u8::from(own)) - f64::from(u8::from(other))).collect();
    let count = differences.len() as f64;
    let mean = differences.iter().sum::<f64>() / count;
    let variance = differences.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / count;
    (mean, (variance / count).sqrt())
}

/// What `evaluate --json` prints.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// One for each dial value asked for.
    pub results: Vec<Point>,
    /// Minimal pairs, if asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pairs: Vec<PairsPoint>,
    /// Multiple choice, if asked for: each file at each dial value.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<ChoicesPoint>,
    /// The model's folder.
    pub model: String,
    /// The data scored.
    pub data: Vec<String>,
}

/// A curve of one method: loss against width.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Name shown in the legend, such as `static nested`.
    pub name: String,
    /// One sentence on what it is.
    pub description: String,
    /// Ascending in mean width.
    pub points: Vec<Point>,
}

/// A width this little outside a curve's ends is taken for the end: a width is met only to within a token or two.
const NEAR_AN_END: f64 = 0.01;

impl Curve {
    /// A curve of `points` in any order.
    pub fn sorted(name: &str, description: &str, mut points: Vec<Point>) -> Self {
        points.sort_by(|a, b| a.mean_width.total_cmp(&b.mean_width));
        Self { name: name.to_owned(), description: description.to_owned(), points }
    }

    /// A quantity at a mean width, linear between the two measured points around it; none where the curve does not
    /// reach.
    pub fn at(&self, width: f64, value: impl Fn(&Point) -> f64) -> Option<f64> {
        at_width(&self.points, width, value)
    }
}

/// A quantity of a curve's points at a mean width: see [`Curve::at`].
pub fn at_width(points: &[Point], width: f64, value: impl Fn(&Point) -> f64) -> Option<f64> {
    let mut known: Vec<(f64, f64)> = points.iter().map(|point| (point.mean_width, value(point))).collect();
    known.retain(|(width, value)| width.is_finite() && value.is_finite());
    known.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (first, last) = (known.first()?, known.last()?);
    if width <= first.0 || width >= last.0 {
        let end = if width <= first.0 { first } else { last };
        return ((end.0 - width).abs() <= NEAR_AN_END).then_some(end.1);
    }
    let above = known.partition_point(|(known, _)| *known < width);
    let ((w0, v0), (w1, v1)) = (known[above - 1], known[above]);
    Some(v0 + (v1 - v0) * (width - w0) / (w1 - w0))
}

/// A line of the training log (metrics.jsonl).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainMetrics {
    /// Optimizer steps done.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Language-model loss of the step, nats per token.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// All that was minimised: the loss above, distillation, price, router objective.
    #[serde(deserialize_with = "null_is_nan")]
    pub objective: f64,
    /// Mean FFN width of the step's routing.
    #[serde(deserialize_with = "null_is_nan")]
    pub mean_width: f64,
    /// Norm of the gradient before clipping.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// Learning rate.
    #[serde(deserialize_with = "null_is_nan")]
    pub lr: f64,
    /// Tokens per second since the last line.
    #[serde(deserialize_with = "null_is_nan")]
    pub tokens_per_second: f64,
}

/// A token of a sample text with the width it used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SampleToken {
    /// The token's text.
    pub text: String,
    /// Mean FFN width over layers for this token, as a share of the dense width.
    #[serde(deserialize_with = "null_is_nan")]
    pub width: f64,
    /// Width at each layer.
    #[serde(deserialize_with = "nulls_are_nan")]
    pub width_per_layer: Vec<f64>,
    /// Loss of predicting this token from those before it, nats; none for the first.
    pub loss: Option<f64>,
}

/// A sample text at one dial value.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The dial's value.
    #[serde(deserialize_with = "null_is_nan")]
    pub sensitivity: f64,
    /// Where the text is from, such as `held-out document 3`.
    pub source: String,
    /// The text, token by token.
    pub tokens: Vec<SampleToken>,
}

/// All that the report shows; written as report.json beside report.html.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Shown as the page's title, such as the model's name.
    pub title: String,
    /// Facts as label and value, in order: base model, data, tokens trained, time, machine.
    pub facts: Vec<(String, String)>,
    /// Loss against width: the DynaMoE checkpoint's curve first, baselines after it.
    pub curves: Vec<Curve>,
    /// Loss of the dense model that was converted, if measured.
    pub dense_loss: Option<f64>,
    /// Loss of the dense model fine-tuned on the same tokens, if measured.
    pub dense_finetuned_loss: Option<f64>,
    /// Training log of each method trained, by curve name.
    pub training: Vec<(String, Vec<TrainMetrics>)>,
    /// Minimal pairs, if measured.
    #[serde(default)]
    pub pairs: Vec<PairsPoint>,
    /// Coloured sample texts.
    pub samples: Vec<Sample>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_compared_question_by_question() {
        let (mean, stderr) = difference(&[true, true, true, false], &[true, false, true, false]);
        assert!((mean - 0.25).abs() < 1e-12 && (stderr - (0.1875f64 / 4.0).sqrt()).abs() < 1e-12);
        assert_eq!(difference(&[true, false], &[true, false]), (0.0, 0.0));
    }

    #[test]
    fn losses_are_linear_between_points_and_absent_outside() {
        let points = [(0.25, 3.0), (0.5, 2.0), (1.0, 1.0)];
        let point = |(mean_width, loss)| Point { mean_width, loss, ..Point::default() };
        let curve = Curve { points: points.map(point).to_vec(), ..Curve::default() };
        for (width, expected) in [
            (0.25, Some(3.0)),
            (0.375, Some(2.5)),
            (0.75, Some(1.5)),
            (1.0, Some(1.0)),
            (0.245, Some(3.0)),
            (0.2, None),
        ] {
            assert_eq!(curve.at(width, |point| point.loss), expected, "{width}");
        }
        assert_eq!(Curve::default().at(0.5, |point| point.loss), None);
    }
}
