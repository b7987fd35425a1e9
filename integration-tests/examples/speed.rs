//! Tokens per second of a DynaMoE model against the dense model over the same random weights, in the same engine.
//!
//! ```sh
//! cargo run --release -p dynamoe-integration-tests --example speed -- [f32|q4k|q8_0] [repetitions]
//! ```
//!
//! Rounds alternate between the models, so that a machine that slows down slows all of them. The table has the
//! median over the rounds and, in brackets, the extremes; `ideal` is the share of bytes (decode) or multiplications
//! (prefill) that the width leaves.

#[path = "../tests/support/mod.rs"]
mod support;

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result};
use dynamoe_mistralrs::{Dial, LoadedModel, loaded};
use mistralrs::{IsqType, Model, ModelDType, RequestBuilder, TextMessageRole, TextModelBuilder};
use support::{Shape, checkpoints};

/// 113 million parameters, three quarters of them in FFNs.
const SHAPE: Shape =
    Shape { hidden_size: 768, expert_widths: [768, 1536, 2304, 3072], layers: 12, heads: 12 };
const PROMPT_TOKENS: usize = 256;
const NEW_TOKENS: usize = 32;

/// What is measured: a name, the model, and the sensitivity that gives the mean width.
struct Case<'a> {
    name: String,
    model: &'a Model,
    dial: Option<(Arc<LoadedModel>, f64)>,
    decode: Vec<f64>,
    prefill: Vec<f64>,
    width: f64,
}

impl Case<'_> {
    /// Seconds for a prompt and for `new` tokens after it, and the mean width used.
    async fn run(&self, new: usize) -> Result<(f64, f64, f64)> {
        let dial = self.dial.as_ref().map(|(handle, s)| handle.request(Dial::Sensitivity(*s))).transpose()?;
        let mut request = RequestBuilder::new()
            .set_deterministic_sampler()
            .set_sampler_max_len(new)
            .add_message(TextMessageRole::User, "x".repeat(PROMPT_TOKENS));
        if let Some(dial) = &dial {
            request = request.add_logits_processor(dial.processor());
        }
        let start = Instant::now();
        let usage = self.model.send_chat_request(request).await?.usage;
        let total = start.elapsed().as_secs_f64();
        let prompt = f64::from(usage.total_prompt_time_sec);
        let width = dial.and_then(|dial| dial.mean_width(SHAPE.expert_widths[3])).unwrap_or(1.0);
        // the first token comes out of the prompt
        let steps = (usage.completion_tokens.max(2) - 1) as f64;
        Ok((prompt / usage.prompt_tokens as f64, (total - prompt) / steps, width))
    }
}

fn median(times: &mut [f64]) -> (f64, f64, f64) {
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[0], times[times.len() - 1])
}

/// The sensitivity whose mean width is nearest to `target`.
async fn sensitivity_for(model: &Model, handle: &Arc<LoadedModel>, target: f64) -> Result<f64> {
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..12 {
        let middle = f64::midpoint(low, high);
        let dial = Some((Arc::clone(handle), middle));
        let case = Case { name: String::new(), model, dial, decode: vec![], prefill: vec![], width: 0.0 };
        let (_, _, width) = case.run(2).await?;
        if width < target { low = middle } else { high = middle }
    }
    Ok(f64::midpoint(low, high))
}

async fn load(folder: &str, isq: Option<IsqType>) -> Result<Model> {
    let builder = TextModelBuilder::new(folder).with_force_cpu().with_dtype(ModelDType::F32);
    let builder = isq.into_iter().fold(builder, TextModelBuilder::with_isq);
    builder.with_prefix_cache_n(None).build().await
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let precision = arguments.next().unwrap_or_else(|| "f32".into());
    let rounds: usize = arguments.next().map_or(Ok(7), |n| n.parse())?;
    let isq = match precision.as_str() {
        "f32" => None,
        other => Some(mistralrs::parse_isq_value(other, None).map_err(anyhow::Error::msg)?),
    };
    let checkpoints = checkpoints("LlamaForCausalLM", SHAPE, 1);
    let dense = load(&checkpoints.dense(), isq).await?;
    let routed = load(&checkpoints.dynamoe(), isq).await?;
    let handle = loaded().pop().context("the DynaMoE model is not listed")?;

    let case = |name: &str, model, dial| Case {
        name: name.into(),
        model,
        dial,
        decode: Vec::new(),
        prefill: Vec::new(),
        width: 1.0,
    };
    let mut cases =
        vec![case("dense", &dense, None), case("sensitivity 1", &routed, Some((handle.clone(), 1.0)))];
    for target in [0.75, 0.5, 0.25] {
        let sensitivity =
            if target == 0.25 { 0.0 } else { sensitivity_for(&routed, &handle, target).await? };
        cases.push(case(&format!("width {target}"), &routed, Some((handle.clone(), sensitivity))));
    }
    for round in 0..=rounds {
        for case in &mut cases {
            let (prefill, decode, width) = case.run(NEW_TOKENS).await?;
            // the first round warms up
            if round > 0 {
                case.prefill.push(prefill);
                case.decode.push(decode);
                case.width = width;
            }
        }
    }
    report(&precision, &mut cases);
    Ok(())
}

fn report(precision: &str, cases: &mut [Case]) {
    println!("{precision}, {PROMPT_TOKENS} prompt tokens, {NEW_TOKENS} new ones, one request at a time\n");
    println!("| | mean width | prefill tokens/s | × dense | decode tokens/s | × dense | ideal |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let (d, layers, full) = (SHAPE.hidden_size as f64, SHAPE.layers as f64, SHAPE.expert_widths[3] as f64);
    // q, o: D², k, v: half of it each
    let (attention, ffn) = (layers * 3.0 * d * d, layers * 3.0 * d * full);
    let mut dense = (0.0, 0.0);
    for case in cases {
        let (prefill, decode) = (median(&mut case.prefill), median(&mut case.decode));
        if case.name == "dense" {
            dense = (prefill.0, decode.0);
        }
        let rate = |(middle, low, high): (f64, f64, f64)| {
            format!("{:.1} [{:.1}–{:.1}]", 1.0 / middle, 1.0 / high, 1.0 / low)
        };
        println!(
            "| {} | {:.3} | {} | {:.3} | {} | {:.3} | {:.3} |",
            case.name,
            case.width,
            rate(prefill),
            dense.0 / prefill.0,
            rate(decode),
            dense.1 / decode.0,
            (attention + ffn) / (attention + ffn * case.width),
        );
    }
}
