//! Several requests at a time: where weights are streamed, a step costs what the widest token of the batch needs.

use std::time::Instant;

use anyhow::Result;
use futures::future::try_join_all;
use mistralrs::Model;

use crate::models::{Models, Spread, prompt};

const SIZES: [usize; 5] = [1, 2, 4, 8, 16];
const PROMPT_TOKENS: usize = 8;
const NEW_TOKENS: usize = 24;

/// Prints the time of a step at each batch size: dense, at full width, and at a mean width of one half.
pub async fn measure(models: &Models, rounds: usize) -> Result<()> {
    let half = models.sensitivity_for(0.5).await?;
    println!("decode steps, {NEW_TOKENS} tokens of each request\n");
    println!(
        "| batch | dense, ms | sensitivity 1, ms | width ½, ms | ÷ dense | ÷ sensitivity 1 | mean width | expected widest | bytes left |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    let (others, ffn) = models.weights();
    for size in SIZES {
        let cases = [(&models.dense, None), (&models.routed, Some(1.0)), (&models.routed, Some(half))];
        let mut times = [const { Vec::new() }; 3];
        for round in 0..=rounds {
            for ((model, sensitivity), times) in cases.into_iter().zip(&mut times) {
                // what is left in the counters is the last case's
                models.handle.counters().reset();
                let time = step(models, model, sensitivity, size).await?;
                // the first round warms up
                if round > 0 {
                    times.push(1e3 * time);
                }
            }
        }
        let (mean, widest) = widths(models, size);
        let [dense, full, half] = times;
        let ratio =
            |other: &[f64]| Spread::of(half.iter().zip(other).map(|(half, other)| half / other)).show(2);
        let ms = |times: &[f64]| Spread::of(times.iter().copied()).show(2);
        println!(
            "| {size} | {} | {} | {} | {} | {} | {mean:.3} | {widest:.3} | {:.3} |",
            ms(&dense),
            ms(&full),
            ms(&half),
            ratio(&dense),
            ratio(&full),
            (others + ffn * widest) / (others + ffn)
        );
    }
    Ok(())
}

/// Seconds of a decode step of `size` requests, prompts not counted.
async fn step(models: &Models, model: &Model, sensitivity: Option<f64>, size: usize) -> Result<f64> {
    let prompts: Vec<Vec<u32>> = (0..size).map(|n| prompt(100 + n as u64, PROMPT_TOKENS)).collect();
    let mut times = [0.0; 2];
    for (time, new) in times.iter_mut().zip([1, NEW_TOKENS]) {
        let start = Instant::now();
        try_join_all(prompts.iter().map(|prompt| models.run(model, sensitivity, prompt, new))).await?;
        *time = start.elapsed().as_secs_f64();
    }
    Ok((times[1] - times[0]) / (NEW_TOKENS - 1) as f64)
}

/// Mean width, and the mean over layers of the expected largest of `size` independent widths, as shares.
fn widths(models: &Models, size: usize) -> (f64, f64) {
    let widths = models.shape.expert_widths.map(|width| width as f64 / models.shape.expert_widths[3] as f64);
    let (mut mean, mut widest) = (0.0, 0.0);
    let layers = models.handle.counters().layers();
    for layer in &layers {
        let all: u64 = layer.tokens.iter().sum();
        let (mut below, mut before) = (0.0, 0.0);
        for (&tokens, width) in layer.tokens.iter().zip(widths) {
            let share = tokens as f64 / all as f64;
            below += share;
            let largest = below.powi(size as i32);
            mean += share * width;
            widest += (largest - before) * width;
            before = largest;
        }
    }
    (mean / layers.len() as f64, widest / layers.len() as f64)
}
