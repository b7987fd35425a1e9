//! Solves the table of budgets of an MoE model on text: what the binary `dynamoe-budgets` is made of.
//!
//! The engine runs the text as prompts. For each token of each MoE layer the weights of the experts are recorded as shares
//! of the largest, `w_k / w_1`. The sensitivity of a budget is 1 less the quantile of these shares above which as many
//! experts are as the budget allows. What a layer leaves out changes what later layers see, so the text is run again at
//! that sensitivity, until the budget is met.

use std::{
    io::Write,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use anyhow::{Context, Result, bail, ensure};
use clap::{CommandFactory, FromArgMatches, Parser};
use dynamoe::{Budget, Sensitivity};
use dynamoe_model::files::read_text;
use mistralrs_core::{
    NormalRequest, Request, RequestMessage, Response, SamplingParams,
    row_data::{ExpertChoice, RowData},
};
use tokio::sync::mpsc::channel;

use super::{
    budgets::{FILE, Table},
    experts_to_run,
};
use crate::{ModelKind, dial::Carrier, locks::lock, serve};

/// How far from its budget a row of the table may be.
const TOLERANCE: f64 = 0.002;
/// Most runs over the text for one row.
const TRIES: usize = 6;

/// Solves the table of budgets of an MoE model on text, and writes it beside the model.
#[derive(Debug, Parser)]
#[command(name = "dynamoe-budgets", version)]
pub struct Options {
    /// The model: a folder, or an id on the Hugging Face hub
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: String,
    /// A text file like what the model will read and write
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Tokens of the text to use
    #[arg(long, default_value_t = 8192)]
    tokens: usize,
    /// Mean shares of the experts to solve for
    #[arg(long, value_delimiter = ',', default_values_t = [0.25, 0.375, 0.5, 0.625, 0.75, 0.875])]
    budget: Vec<f64>,
    /// Tokens that are run at a time
    #[arg(long, default_value_t = 512)]
    sequence_length: usize,
    /// Quantize while loading, as the server will: q4k, q8_0, …
    #[arg(long, value_name = "TYPE")]
    isq: Option<String>,
    /// Run on the CPU even where there is an accelerator
    #[arg(long)]
    cpu: bool,
    /// The file to write [default: dynamoe_budgets.json in the model's folder]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Replace a file that is there
    #[arg(long)]
    force: bool,
}

/// The whole of `dynamoe-budgets`, from the command line to the exit code. `version` is what `--version` says.
pub async fn main(version: &'static str) -> ExitCode {
    let matches = Options::command().version(version).get_matches();
    let options = Options::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let mut stderr = std::io::stderr();
    let (code, line) = match run(options).await {
        Ok(line) => (ExitCode::SUCCESS, line),
        Err(error) => (ExitCode::FAILURE, format!("error: {error:#}")),
    };
    // where nobody can be told there is nothing more to do
    let _ = writeln!(stderr, "{line}");
    code
}

async fn run(options: Options) -> Result<String> {
    for &budget in &options.budget {
        ensure!(budget > 0.0 && budget < 1.0, "--budget: expected numbers between 0 and 1, found {budget}");
    }
    ensure!(options.sequence_length > 0, "--sequence-length: expected 1 or more, found 0");
    let server = server_options(&options)?;
    let folder = || server.folder().context("the model has no folder to write to: give --out");
    let out = options.out.clone().map_or_else(|| Ok(folder()?.join(FILE)), anyhow::Ok)?;
    // known before a large model is read
    ensure!(
        options.force || !out.exists(),
        "{} is there already: give --force to replace it, or another --out",
        out.display()
    );
    let text = read_text(&options.data).with_context(|| options.data.display().to_string())?;
    let served = serve::load(&server).await?;
    let model = served.model.clone();
    let Some(ModelKind::Moe(moe)) = model.as_deref().map(crate::LoadedModel::kind) else {
        bail!("{} is no MoE model that has a dial: a DynaMoE checkpoint has its own table", options.model);
    };
    let mut tokens = served.language.tokens(&text, false)?;
    ensure!(!tokens.is_empty(), "{} holds no text", options.data.display());
    tokens.truncate(options.tokens);
    let text = Text { served, tokens, length: options.sequence_length };
    let budgets = text.solve(moe.experts.experts_per_token, options.budget).await?;
    Table::new(&moe.experts, text.tokens.len(), budgets).write(&out)?;
    Ok(format!("wrote {}", out.display()))
}

/// How the server would load the same model.
fn server_options(options: &Options) -> Result<serve::Options> {
    let mut line = vec!["dynamoe-serve", "--model", &options.model, "--prefix-cache", "0", "--max-seqs", "1"];
    if let Some(isq) = &options.isq {
        line.extend(["--isq", isq]);
    }
    if options.cpu {
        line.push("--cpu");
    }
    Ok(serve::Options::try_parse_from(line)?)
}

/// A text and the model that runs it.
struct Text {
    served: serve::Served,
    tokens: Vec<u32>,
    length: usize,
}

impl Text {
    /// A row for each of `budgets` that lies above one expert of `experts_per_token`.
    async fn solve(&self, experts_per_token: usize, mut budgets: Vec<f64>) -> Result<Vec<Budget>> {
        budgets.sort_by(f64::total_cmp);
        let mut rows: Vec<Budget> = Vec::new();
        let mut seen = self.run(1.0).await?;
        for budget in budgets {
            if budget * experts_per_token as f64 <= 1.0 {
                continue;
            }
            let (width, sensitivity) = self.meet(budget, experts_per_token, &mut seen).await?;
            let _ =
                writeln!(std::io::stderr(), "budget {budget}: sensitivity {sensitivity:.4} gives {width:.4}");
            // where many experts tie, two budgets can have one width
            if rows.last().is_none_or(|last| last.width < width) {
                rows.push(Budget { width, sensitivity: Sensitivity::Uniform(sensitivity) });
            }
        }
        ensure!(
            !rows.is_empty(),
            "no budget lies between one expert and all of {experts_per_token}: there is nothing to solve"
        );
        Ok(rows)
    }

    /// The share of the experts that is met, and at which sensitivity. `seen` is of a run before, and then of the last.
    async fn meet(&self, budget: f64, experts_per_token: usize, seen: &mut Seen) -> Result<(f64, f64)> {
        let mut best = (f64::INFINITY, 0.0);
        for _ in 0..TRIES {
            let sensitivity = seen.sensitivity(budget, experts_per_token);
            *seen = self.run(sensitivity).await?;
            let width = seen.run as f64 / (seen.tokens * experts_per_token) as f64;
            if (width - budget).abs() < (best.0 - budget).abs() {
                best = (width, sensitivity);
            }
            if (width - budget).abs() <= TOLERANCE {
                break;
            }
        }
        Ok(best)
    }

    /// What all MoE layers saw of the text at a sensitivity.
    async fn run(&self, sensitivity: f64) -> Result<Seen> {
        let engine = self.served.engine.get_sender(None)?;
        let recorder = Arc::new(Recorder::new(sensitivity));
        for tokens in self.tokens.chunks(self.length.min(self.served.language.context.max(2) - 1)) {
            let (sender, mut answers) = channel(1);
            let messages = RequestMessage::CompletionTokens(tokens.to_vec());
            let sampling = SamplingParams { max_len: Some(1), ..SamplingParams::deterministic() };
            let mut request = NormalRequest::new_simple(messages, sampling, sender, 0, None, None);
            request.logits_processors = Some(vec![Arc::new(Carrier(recorder.clone()))]);
            engine.send(Request::Normal(Box::new(request))).await.context("the engine has ended")?;
            match answers.recv().await.context("the engine did not answer")? {
                Response::InternalError(error) | Response::ValidationError(error) => {
                    bail!("the engine: {error}")
                }
                Response::CompletionModelError(error, _) => bail!("the engine: {error}"),
                _ => {}
            }
        }
        let seen = std::mem::take(&mut *lock(&recorder.seen));
        ensure!(seen.tokens > 0, "no MoE layer saw a token");
        Ok(seen)
    }
}

/// What MoE layers saw.
#[derive(Debug, Default)]
struct Seen {
    /// Tokens, counted once for each layer.
    tokens: usize,
    /// Experts that they ran.
    run: usize,
    /// Weights of their experts but the first, as shares of the first's.
    shares: Vec<f32>,
}

impl Seen {
    /// The sensitivity at which the tokens would have run a share `budget` of their experts.
    fn sensitivity(&mut self, budget: f64, experts_per_token: usize) -> f64 {
        // the first expert of each token runs in any case
        let run = (budget * (self.tokens * experts_per_token) as f64).round() as usize;
        let others = run.saturating_sub(self.tokens).min(self.shares.len());
        self.shares.sort_unstable_by(|a, b| b.total_cmp(a));
        let above = others.checked_sub(1).map_or(1.0, |last| f64::from(self.shares[last]));
        let below = self.shares.get(others).map_or(0.0, |&share| f64::from(share));
        (1.0 - (above + below) / 2.0).clamp(0.0, 1.0)
    }
}

/// Runs experts at a sensitivity, and records what it sees.
#[derive(Debug)]
struct Recorder {
    sensitivity: f64,
    /// Its keys and values are nobody else's.
    key: u64,
    seen: Mutex<Seen>,
}

impl Recorder {
    fn new(sensitivity: f64) -> Self {
        static KEYS: AtomicU64 = AtomicU64::new(0);
        Self { sensitivity, key: KEYS.fetch_add(1, Relaxed), seen: Mutex::default() }
    }
}

impl RowData for Recorder {
    fn cache_key(&self) -> Option<u64> {
        Some(self.key)
    }

    fn expert_choice(&self) -> Option<&dyn ExpertChoice> {
        Some(self)
    }
}

impl ExpertChoice for Recorder {
    fn experts_to_run(&self, weights: &[f32]) -> usize {
        let run = experts_to_run(weights, self.sensitivity);
        let mut seen = lock(&self.seen);
        seen.tokens += 1;
        seen.run += run;
        if let Some((first, others)) = weights.split_first() {
            seen.shares.extend(others.iter().map(|weight| weight / first));
        }
        run
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    /// Weights of `count` tokens with four experts each, largest first.
    fn tokens(count: usize) -> Vec<[f32; 4]> {
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let token = |_| {
            let mut weights = std::array::from_fn(|_| rng.random::<f32>());
            weights.sort_by(|a: &f32, b| b.total_cmp(a));
            weights
        };
        (0..count).map(token).collect()
    }

    #[test]
    fn the_sensitivity_of_a_budget_meets_it() {
        let tokens = tokens(1000);
        let run = |sensitivity: f64| {
            let recorder = Recorder::new(sensitivity);
            tokens.iter().for_each(|weights| {
                recorder.experts_to_run(weights);
            });
            recorder.seen.into_inner().unwrap()
        };
        let mut seen = run(1.0);
        assert_eq!((seen.tokens, seen.run, seen.shares.len()), (1000, 4000, 3000));
        for budget in [0.26, 0.5, 0.75, 0.99] {
            let sensitivity = seen.sensitivity(budget, 4);
            let share = run(sensitivity).run as f64 / 4000.0;
            assert!((share - budget).abs() < TOLERANCE, "{budget}: {sensitivity} gives {share}");
        }
        // below one expert nothing but the first is left, and at 1 all are
        assert_eq!(run(seen.sensitivity(0.1, 4)).run, 1000);
        assert_eq!(run(seen.sensitivity(1.0, 4)).run, 4000);
    }
}
