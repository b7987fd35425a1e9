//! Several requests at a time: where weights are streamed, a step costs what the widest token of the batch needs.

use std::time::Instant;

use anyhow::Result;
use futures::future::try_join_all;
use mistralrs::Model;

use crate::models::{Models, Spread, prompt};

const SIZES: [usize; 5] = [1, 2, 4, 8, 16];
const PROMPT_TOKENS: usize = 8;
const NEW_TOKENS: usize = 24;

/// Prints the time of a step at each batch size, dense and at a mean width of one half.
pub async fn measure(models: &Models, rounds: usize) -> Result<()> {
    let half = models.sensitivity_for(0.5).await?;
    println!("decode steps, {NEW_TOKENS} tokens of each request\n");
    println!("| batch | dense, ms | width ½, ms | × dense | mean width | expected widest | ideal |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let (others, ffn) = models.weights();
    for size in SIZES {
        let (mut dense, mut routed) = (Vec::new(), Vec::new());
        models.handle.counters().reset();
        for round in 0..=rounds {
            let times = (
                step(models, &models.dense, None, size).await?,
                step(models, &models.routed, Some(half), size).await?,
            );
            if round > 0 {
                dense.push(times.0);
                routed.push(times.1);
            }
        }
        let (mean, widest) = widths(models, size);
        let ratio = Spread::of(dense.iter().zip(&routed).map(|(dense, routed)| dense / routed));
        let ms = |times: Vec<f64>| Spread::of(times.into_iter().map(|time| 1e3 * time)).show(2);
        println!(
            "| {size} | {} | {} | {} | {mean:.3} | {widest:.3} | {:.3} |",
            ms(dense),
            ms(routed),
            ratio.show(3),
            (others + ffn) / (others + ffn * widest)
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
