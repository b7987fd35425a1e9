//! How fast a dense model trains on this machine: tokens per second of whole steps (forward, backward, clipping,
//! AdamW), and the share of time that its matrix products alone take. `benches/jax_step.py` is the same in JAX, and
//! `benches/torch_step.py` in PyTorch.
//!
//! ```text
//! cargo run -p moefy-train --example step_speed [RUNS [CASE [bf16]]]
//! ```

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use dynamoe::HiddenAct;
use dynamoe::train::TrainableFfn;
use dynamoe_model::Params;
use dynamoe_model::config::{Architecture, ModelConfig, Scales};
use dynamoe_model::model::Backbone;
use dynamoe_model::ops::{Gradients, Precision, ffn, linear};
use moefy_train::train::optimizer::{AdamW, Update};

/// The shape of a Llama with tied embeddings, and the batch to train it on.
struct Case {
    name: &'static str,
    hidden_size: usize,
    intermediate_size: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocab_size: usize,
    sequences: usize,
    positions: usize,
}

const CASES: [Case; 3] = [
    Case {
        name: "stories260k",
        hidden_size: 64,
        intermediate_size: 172,
        layers: 5,
        heads: 8,
        kv_heads: 4,
        vocab_size: 512,
        sequences: 16,
        positions: 256,
    },
    Case {
        name: "15M",
        hidden_size: 288,
        intermediate_size: 768,
        layers: 6,
        heads: 6,
        kv_heads: 6,
        vocab_size: 32000,
        sequences: 4,
        positions: 256,
    },
    // SmolLM2-135M's
    Case {
        name: "135M",
        hidden_size: 576,
        intermediate_size: 1536,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        vocab_size: 49152,
        sequences: 4,
        positions: 256,
    },
];

impl Case {
    fn config(&self) -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Llama,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.layers,
            num_attention_heads: self.heads,
            num_key_value_heads: self.kv_heads,
            head_dim: self.hidden_size / self.heads,
            vocab_size: self.vocab_size,
            max_position_embeddings: 512,
            rms_norm_eps: 1e-5,
            rope_theta: 10000.0,
            rope_scaling: None,
            local_rope_theta: None,
            tie_word_embeddings: true,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            norm_offset: 0.0,
            output_norms: false,
            hidden_act: HiddenAct::Silu,
            scales: Scales::plain(self.hidden_size / self.heads),
            rotary_layers: vec![true; self.layers],
            sliding_window: vec![None; self.layers],
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            closing_token_id: None,
            dynamoe: None,
        }
    }
}

fn main() -> Result<()> {
    moefy_train::allocator::keep_freed_memory();
    let runs = std::env::args().nth(1).map_or(Ok(10), |runs| runs.parse()).context("RUNS: a whole number")?;
    let only = std::env::args().nth(2);
    if std::env::args().nth(3).as_deref() == Some("bf16") {
        Precision::Bf16.set()?;
    }
    for case in CASES.iter().filter(|case| only.as_deref().is_none_or(|only| only == case.name)) {
        measure(case, runs)?;
    }
    Ok(())
}

/// Prints the median of `runs` steps and the spread.
fn measure(case: &Case, runs: usize) -> Result<()> {
    let (config, tokens) = (case.config(), case.sequences * case.positions);
    let mut params = Params::new();
    let mut init = |name: &str, shape: &[usize]| -> Result<Tensor> {
        let scale = if shape.len() == 1 { 0.0 } else { 0.05 };
        let mean = if shape.len() == 1 { 1.0 } else { 0.0 };
        Ok(params.insert(name, &Tensor::randn(mean, scale as f32, shape, &Device::Cpu)?)?.as_tensor().clone())
    };
    let (d, i, v) = (config.hidden_size, config.intermediate_size, config.vocab_size as f32);
    let model = Backbone::from_tensors(&config, &mut init)?;
    let ffns = (0..config.num_hidden_layers)
        .map(|layer| {
            let mut get =
                |name: &str, shape: &[usize]| init(&format!("model.layers.{layer}.mlp.{name}.weight"), shape);
            Ok(TrainableFfn {
                gate_proj: get("gate_proj", &[i, d])?,
                up_proj: get("up_proj", &[i, d])?,
                down_proj: get("down_proj", &[d, i])?,
                separate: None,
                compensation: None,
                widths: vec![i],
                hidden_act: config.hidden_act,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let batch =
        Tensor::rand(0f32, v, (case.sequences, case.positions), &Device::Cpu)?.to_dtype(DType::U32)?;
    let reach = Tensor::ones((tokens, 1), DType::F32, &Device::Cpu)?;
    let (mut optimizer, mut gradients) = (AdamW::new(&params)?, Gradients::new());
    let (mut forward, mut backward, mut step, mut cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs.max(1) + 1 {
        let (start, cpu_start) = (Instant::now(), cpu_seconds());
        let hidden = model.forward(&batch, &mut |layer, x| ffn(&ffns[layer], x, &reach))?;
        let weights = Tensor::full(1.0 / tokens as f32, tokens, &Device::Cpu)?;
        let loss = model.losses(&hidden, &batch.flatten_all()?, &weights)?.sum_all()?;
        forward.push(start.elapsed().as_secs_f64());
        gradients.clear();
        gradients.add(&loss, &params)?;
        backward.push(start.elapsed().as_secs_f64() - forward[forward.len() - 1]);
        let scale = gradients.norm(&params)?.recip().min(1.0);
        let update = Update {
            ffn_lr: 1e-3,
            separate_lr: 1e-3,
            backbone_lr: 1e-3,
            router_lr: 1.0,
            weight_decay: 0.1,
            scale,
        };
        optimizer.update(&params, &gradients, update)?;
        step.push(start.elapsed().as_secs_f64());
        cpu.push(cpu_seconds() - cpu_start);
        anyhow::ensure!(params.iter().all(|(_, var)| gradients.get(var).is_some()), "a gradient is missing");
    }
    let peak = peak_memory();
    let products = products(&config, tokens, runs)?;
    [&mut forward, &mut backward, &mut step, &mut cpu]
        .into_iter()
        .for_each(|times| times.sort_by(f64::total_cmp));
    let median = |times: &[f64]| times[times.len() / 2];
    let rate = |seconds: f64| tokens as f64 / seconds;
    let milliseconds = |times: &[f64]| 1e3 * median(times);
    let share = 100.0 * products.seconds / median(&step);
    println!("{}: {} parameters, {tokens} tokens a step", case.name, params.elements());
    println!(
        "  tokens/s          {:.0} (best {:.0}, worst {:.0})",
        rate(median(&step)),
        rate(step[0]),
        rate(step[step.len() - 1])
    );
    println!("  step              {:.1} ms, {:.0} ms of CPU", milliseconds(&step), milliseconds(&cpu));
    println!("  forward           {:.1} ms", milliseconds(&forward));
    println!("  backward          {:.1} ms", milliseconds(&backward));
    println!(
        "  products alone    {:.1} ms, {share:.0} % of the step, at {:.0} GFLOP/s",
        1e3 * products.seconds,
        products.flops / products.seconds / 1e9
    );
    println!("  peak memory       {peak:.0} MB");
    Ok(())
}

/// User and system time of this process and its threads so far (0 where the system does not tell): on a busy
/// machine it says more than the clock. Ticks are hundredths of a second.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = |index: usize| after_name.split_whitespace().nth(index).and_then(|n| n.parse::<f64>().ok());
    (ticks(11).unwrap_or(0.0) + ticks(12).unwrap_or(0.0)) / 100.0
}

/// Largest resident memory of this process so far in MB (0 where the system does not tell).
fn peak_memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    kilobytes.unwrap_or(0.0) * 1024.0 / 1e6
}

/// What the products of a step take by themselves.
struct Products {
    seconds: f64,
    flops: f64,
}

/// Times `x Wᵀ`, `g W` and `gᵀ x` for every projection of the model.
fn products(config: &ModelConfig, tokens: usize, runs: usize) -> Result<Products> {
    let (d, i, l) = (config.hidden_size, config.intermediate_size, config.num_hidden_layers);
    let (q, kv) =
        (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let projections =
        [(l, d, q), (2 * l, d, kv), (l, q, d), (2 * l, d, i), (l, i, d), (1, d, config.vocab_size)];
    let mut total = Products { seconds: 0.0, flops: 0.0 };
    for (count, from, to) in projections {
        let random = |rows: usize, columns: usize| Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu);
        let (x, w) = (Var::from_tensor(&random(tokens, from)?)?, Var::from_tensor(&random(to, from)?)?);
        let mut best = f64::INFINITY;
        for _ in 0..runs.max(1) {
            let start = Instant::now();
            linear(&x, &w)?.backward()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        total.seconds += count as f64 * best;
        total.flops += (count * 6 * tokens * from * to) as f64;
    }
    Ok(total)
}
