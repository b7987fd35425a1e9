//! Tokens per second of a DynaMoE model against the dense model over the same random weights, in the same engine.
//!
//! ```sh
//! cargo run --release -p dynamoe-integration-tests --example speed -- SHAPE PRECISION [ROUNDS] [FOLDER] [batch]
//! ```
//!
//! SHAPE of an MoE model is `qwen3-30b-a3b` (2 of its layers), `olmoe` (3 layers) or `moe-small`: these are measured at
//! budgets of their experts. SHAPE of a dense model is `llama-617m` (8 layers of Llama-3.2-1B's shape, 32,000 tokens), `qwen3-0.6b`, or `small` (a second's work),
//! with `+N` behind it if the smaller experts have separate weights for N shells; PRECISION is `f32` or a quantization of the
//! engine's, as `q8_0` and `q4k`. FOLDER keeps the checkpoints and, quantized, UQFF files for the next time. `batch`
//! measures concurrent requests instead of single ones.
//!
//! Rounds alternate between the models, so that a machine that slows down slows all of them. Tables show medians
//! over the rounds with the extremes in brackets; ratios are those of a round. `ideal` is the ratio of the bytes
//! (decode) or multiplications (prefill) that all matrices leave at the mean width that was used.

#[path = "../../tests/support/mod.rs"]
mod support;

mod batch;
mod models;
mod moe;
mod single;

use std::path::PathBuf;

use anyhow::{Result, bail};
use support::{SMALL, Shape};

use models::Models;

const LLAMA: Shape = Shape {
    hidden_size: 2048,
    expert_widths: [2048, 4096, 6144, 8192],
    separate_shells: 0,
    layers: 8,
    heads: [32, 8, 64],
    vocab_size: 32_000,
    tied: false,
    positions: 2048,
    router_hidden_size: 64,
};

const QWEN3: Shape = Shape {
    hidden_size: 1024,
    expert_widths: [768, 1536, 2304, 3072],
    separate_shells: 0,
    layers: 28,
    heads: [16, 8, 128],
    vocab_size: 151_936,
    tied: true,
    positions: 2048,
    router_hidden_size: 64,
};

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let batches = arguments.last().is_some_and(|last| last == "batch");
    if batches {
        arguments.pop();
    }
    let argument = |n: usize| arguments.get(n).map(String::as_str);
    let name = argument(0).unwrap_or("small");
    let precision = argument(1).unwrap_or("f32");
    let rounds = argument(2).map_or(Ok(5), str::parse)?;
    let temporary = tempfile::tempdir()?;
    let folder = argument(3).map_or_else(|| temporary.path().to_owned(), PathBuf::from).join(name);
    let moe = match name {
        "qwen3-30b-a3b" => Some(moe::QWEN3_30B),
        "olmoe" => Some(moe::OLMOE),
        "moe-small" => Some(moe::SMALL),
        _ => None,
    };
    if let Some(shape) = moe {
        return moe::measure(&folder, name, shape, precision, rounds).await;
    }
    let (base, separate_shells) = match name.split_once('+') {
        Some((base, shells)) => (base, shells.parse()?),
        None => (name, 0),
    };
    let (architecture, shape) = match base {
        "llama-617m" => ("LlamaForCausalLM", LLAMA),
        "qwen3-0.6b" => ("Qwen3ForCausalLM", QWEN3),
        "small" => ("LlamaForCausalLM", Shape { positions: 1024, ..SMALL }),
        other => {
            bail!("expected llama-617m, qwen3-0.6b, small, qwen3-30b-a3b, olmoe or moe-small, found {other}")
        }
    };
    let shape = Shape { separate_shells, ..shape };
    let models = Models::load(&folder, architecture, shape, precision).await?;
    println!("{name}, {precision}, {} threads, {rounds} rounds\n", std::thread::available_parallelism()?);
    match batches {
        true => batch::measure(&models, rounds).await,
        false => single::measure(&models, rounds).await,
    }
}
