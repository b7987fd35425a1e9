//! `evaluate`: loss, widths and cost along the dial, or of the baseline with sparse activations.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use dynamoe::{Dial, dial::check_dial};

use super::options::{DeviceArg, ModelArgs, PrecisionArg, TextArgs, fetched};
use super::print;
use dynamoe_model::RoutedModel;
use dynamoe_model::checkpoint::Checkpoint;
use dynamoe_model::ops::Precision;
use moefy_train::data::{
    CALIBRATION_TOKENS, DataSource, PaddedBatch, SampleShape, Scope, Split, Texts, calibration_batches,
    subsample,
};
use moefy_train::evaluate::{
    Setting, budget, choices_point, pairs_point, point, scored_tokens, shuffled_point, sparsity,
};
use moefy_train::progress::Progress;
use moefy_train::ranks::Ranks;
use moefy_train::report::results::{ChoicesPoint, Evaluation, PairsPoint, Point, difference};
use moefy_train::train::TrainConfig;

/// Tokens on which a missing budget is solved.
const SOLVE_TOKENS: usize = 32_768;

#[derive(Debug, Args)]
pub struct EvaluateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to score: a file (.txt, .jsonl, also .gz or .zst, or .parquet), a folder, a pattern of files,
    /// or hf://datasets/ORG/NAME[@REVISION][/PATTERN]; may be repeated
    #[arg(long, value_parser = DataSource::of_files)]
    data: Vec<DataSource>,
    /// Score each document by itself, not packed sequences
    #[arg(long)]
    documents: bool,
    /// Most tokens to score of each document [default: the model's positions]
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Tokens in a packed sequence
    #[arg(long, default_value_t = 256)]
    sequence_length: usize,
    /// Dial values, 0 to 1 [default: 0, 0.1, … 1 for DynaMoE, 1 for dense models]
    #[arg(long, value_delimiter = ',')]
    sensitivity: Vec<f64>,
    /// Mean widths, 0 to 1
    #[arg(long, value_delimiter = ',')]
    budget: Vec<f64>,
    /// Baseline: shuffle each layer's widths among the tokens, to see what the router's choice is worth
    #[arg(long)]
    shuffled: bool,
    /// Baseline on a dense model: set these shares of the FFNs' activations to zero, the smallest ones (TEAL), 0 to below 1
    #[arg(
        long,
        value_delimiter = ',',
        requires = "calibration_data",
        conflicts_with_all = ["sensitivity", "budget", "shuffled"]
    )]
    activation_sparsity: Vec<f64>,
    /// Text on which to solve --budget anew and store it in the checkpoint's table, or to find which activations
    /// --activation-sparsity takes for small
    #[arg(long, value_parser = DataSource::of_files)]
    calibration_data: Vec<DataSource>,
    /// Minimal pairs to compare: .jsonl with "good" and "bad"
    #[arg(long)]
    pairs: Option<PathBuf>,
    /// Multiple choice: .jsonl with "context", "choices" and "answer", the index of the right one; may be repeated
    #[arg(long)]
    choices: Vec<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Where to compute
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceArg,
    /// Precision of matrix products
    #[arg(long, value_enum, default_value = "f32")]
    precision: PrecisionArg,
    #[command(flatten)]
    text: TextArgs,
}

pub fn evaluate(args: &EvaluateArgs, ranks: &dyn Ranks) -> Result<()> {
    ensure!(
        !args.data.is_empty() || args.pairs.is_some() || !args.choices.is_empty(),
        "nothing to score: give --data, --pairs or --choices"
    );
    // before a large model is read
    args.sensitivity.iter().try_for_each(|&s| check_dial("sensitivity", s))?;
    args.budget.iter().try_for_each(|&width| check_dial("budget", width))?;
    Precision::from(args.precision).set().context("--precision")?;
    sparsity::check_sparsities(&args.activation_sparsity)?;
    let device = args.device.open()?;
    let mut checkpoint = ranks.first_then_others(|| args.model.open())?;
    if !args.activation_sparsity.is_empty() {
        sparsity::check_dense(checkpoint.config()).with_context(|| checkpoint.dir().display().to_string())?;
    }
    let texts = Texts::open(&checkpoint, &args.text.options())?;
    let mut model = RoutedModel::load(&checkpoint, &device)?;
    let scope = if args.documents {
        Scope::Documents(args.max_tokens.unwrap_or(checkpoint.config().max_position_embeddings))
    } else {
        Scope::Packed(args.sequence_length)
    };
    let data = ranks.first_then_others(|| fetched(&args.data))?;
    let read = |data: &[DataSource]| ranks.first_then_others(|| texts.scored(data, scope));
    let batches = if data.is_empty() { Vec::new() } else { read(&data)? };
    if needs_solving(args, &model) {
        let text = match args.calibration_data.as_slice() {
            [] => batches.clone(),
            sources => read(&ranks.first_then_others(|| fetched(sources))?)?,
        };
        store_budgets(args, &mut checkpoint, &model, &text, ranks)?;
        if !ranks.is_first() {
            checkpoint = args.model.open()?; // as the first rank has stored it
        }
        model = RoutedModel::load(&checkpoint, &device)?;
    }
    let settings = if args.activation_sparsity.is_empty() {
        settings(args, &model)?
    } else {
        sparse_settings(args, &model, &texts, ranks)?
    };
    let mut evaluation = Evaluation {
        model: args.model.model.clone(),
        data: data.iter().map(DataSource::name).collect(),
        ..Evaluation::default()
    };
    let pairs = args.pairs.as_deref().map(|path| texts.pairs(path)).transpose()?;
    let choices = args.choices.iter().map(|path| texts.choices(path)).collect::<Result<Vec<_>>>()?;
    let tokens = settings.len() as u64 * scored_tokens(&batches);
    let progress = Progress::new("evaluating", "tokens", tokens, 0);
    for setting in &settings {
        if !batches.is_empty() {
            let measure = if args.shuffled { shuffled_point } else { point };
            let point = measure(&model, &batches, setting, &progress, ranks)?;
            if !args.json {
                print_point(&point, evaluation.results.is_empty())?;
            }
            evaluation.results.push(point);
        }
        if let Some(pairs) = &pairs {
            evaluation.pairs.push(pairs_point(&model, pairs, setting, ranks)?);
        }
        for choices in &choices {
            evaluation.choices.push(choices_point(&model, choices, setting, ranks)?);
        }
    }
    if tokens > 0 {
        progress.finish();
    }
    if args.json {
        print(&format_args!("{}", serde_json::to_string_pretty(&evaluation)?))?;
    } else {
        print_pairs(&evaluation.pairs)?;
        print_choices(&evaluation.choices)?;
    }
    Ok(())
}

/// Budgets are solved where text is given for it, and where there is no table to look them up in.
fn needs_solving(args: &EvaluateArgs, model: &RoutedModel) -> bool {
    let empty = model.config().dynamoe.as_ref().is_some_and(|config| config.budgets.is_empty());
    model.config().dynamoe.is_some()
        && args.budget.iter().any(|&width| width < 1.0)
        && (empty || !args.calibration_data.is_empty())
}

fn store_budgets(
    args: &EvaluateArgs,
    checkpoint: &mut Checkpoint,
    model: &RoutedModel,
    text: &[PaddedBatch],
    ranks: &dyn Ranks,
) -> Result<()> {
    ensure!(!text.is_empty(), "--budget must be solved on text first: give --calibration-data or --data");
    if args.calibration_data.is_empty() {
        tracing::warn!(
            "the checkpoint has no table of budgets: it is solved on --data; --calibration-data avoids that"
        );
    }
    let mut section = model.config().dynamoe.clone().context("only a DynaMoE checkpoint has budgets")?;
    let text = subsample(text, SOLVE_TOKENS);
    let found = budget::solve(model, &text, &args.budget, false, ranks)?.table;
    section.budgets.retain(|row| found.iter().all(|new| (new.width - row.width).abs() > 1e-6));
    section.budgets.extend(found);
    section.budgets.sort_by(|a, b| a.width.total_cmp(&b.width));
    ranks.first(|| checkpoint.store_section(&section).context("storing the solved budgets in the checkpoint"))
}

fn settings(args: &EvaluateArgs, model: &RoutedModel) -> Result<Vec<Setting>> {
    let sensitivities = args.sensitivity.iter().map(|&s| Dial::Sensitivity(s));
    let budgets = args.budget.iter().map(|&width| Dial::Budget(width));
    let mut dials: Vec<Dial> = sensitivities.chain(budgets).collect();
    if dials.is_empty() {
        let steps = if model.config().dynamoe.is_some() { 0..=10 } else { 10..=10 };
        dials = steps.map(|tenth| Dial::Sensitivity(f64::from(tenth) / 10.0)).collect();
    }
    dials.into_iter().map(|dial| Setting::of(dial, model)).collect()
}

/// Finds the thresholds of each activation sparsity, on a sample of the calibration text as `calibrate` takes it.
fn sparse_settings(
    args: &EvaluateArgs,
    model: &RoutedModel,
    texts: &Texts,
    ranks: &dyn Ranks,
) -> Result<Vec<Setting>> {
    let sources = ranks.first_then_others(|| fetched(&args.calibration_data))?;
    let shape = SampleShape { batch_size: TrainConfig::BATCH_SIZE, sequence_length: args.sequence_length };
    let batches = ranks.first_then_others(|| texts.training(&sources, Split::All, shape, 0))?;
    let batches = calibration_batches(&batches, CALIBRATION_TOKENS);
    let thresholds = sparsity::calibrate(model, &batches, &args.activation_sparsity, ranks)?;
    Ok(thresholds.into_iter().map(Setting::sparse).collect())
}

fn print_point(point: &Point, first: bool) -> Result<()> {
    if first {
        let setting = match point.activation_sparsity {
            Some(_) => "activation sparsity",
            None => "sensitivity  budget",
        };
        print(&format_args!("{setting}    loss  ± stderr  perplexity  mean width  params  FLOPs  tokens"))?;
    }
    let setting = match (point.activation_sparsity, point.budget) {
        (Some(sparsity), _) => format!("{sparsity:19.4}"),
        (None, Some(width)) => format!("{:11.4}  {width:6.3}", point.sensitivity),
        (None, None) => format!("{:11.4}       -", point.sensitivity),
    };
    print(&format_args!(
        "{setting}  {:6.4}  {:8.4}  {:10.3}  {:10.3}  {:6.3}  {:5.3}  {}",
        point.loss,
        point.stderr,
        point.perplexity,
        point.mean_width,
        point.active_parameters,
        point.flops,
        point.tokens
    ))?;
    let layers: Vec<String> = point.width_per_layer.iter().map(|width| format!("{width:.2}")).collect();
    print(&format_args!("             width per layer: {}", layers.join(" ")))
}

/// What was set where something was measured.
fn setting_name(sensitivity: f64, activation_sparsity: Option<f64>) -> String {
    match activation_sparsity {
        Some(sparsity) => format!("activation sparsity {sparsity:.4}"),
        None => format!("sensitivity {sensitivity:.4}"),
    }
}

/// One line for each dial value, with the difference to the widest setting.
fn print_pairs(pairs: &[PairsPoint]) -> Result<()> {
    let widest = pairs.iter().max_by(|a, b| a.mean_width.total_cmp(&b.mean_width));
    for point in pairs {
        let widest = widest.unwrap_or(point);
        let (difference, error) = difference(&point.right, &widest.right);
        let fields: Vec<String> =
            point.by_field.iter().map(|(field, accuracy)| format!("{field} {accuracy:.3}")).collect();
        print(&format_args!(
            "minimal pairs at {}: {:.4} ± {:.4} of {} right, mean width {:.3}, {difference:+.4} ± {error:.4} against \
             width {:.3}  {}",
            setting_name(point.sensitivity, point.activation_sparsity),
            point.accuracy,
            point.stderr,
            point.pairs,
            point.mean_width,
            widest.mean_width,
            fields.join("  ")
        ))?;
    }
    Ok(())
}

/// One line for each file at each dial value, with the difference to the widest setting of the same file.
fn print_choices(points: &[ChoicesPoint]) -> Result<()> {
    for point in points {
        let of_file = points.iter().filter(|other| other.name == point.name);
        let widest = of_file.max_by(|a, b| a.mean_width.total_cmp(&b.mean_width)).unwrap_or(point);
        let (acc, acc_error) = difference(&point.right, &widest.right);
        let (norm, norm_error) = difference(&point.right_norm, &widest.right_norm);
        print(&format_args!(
            "{} at {}: acc {:.4} ± {:.4}, acc_norm {:.4} ± {:.4} of {} questions, mean width {:.3}, acc \
             {acc:+.4} ± {acc_error:.4} and acc_norm {norm:+.4} ± {norm_error:.4} against width {:.3}",
            point.name,
            setting_name(point.sensitivity, point.activation_sparsity),
            point.acc,
            point.acc_stderr,
            point.acc_norm,
            point.acc_norm_stderr,
            point.right.len(),
            point.mean_width,
            widest.mean_width,
        ))?;
    }
    Ok(())
}
