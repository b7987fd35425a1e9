//! Ratios of times, measured side by side: every round runs each candidate once over all layers, and ratios are
//! taken within a round.
//!
//! ```sh
//! cargo bench -p dynamoe --bench ratios -- decode llama q4k      # also: prefill, batch, matrix
//! ```

mod common;

use std::time::Instant;

use candle_core::{Module, Tensor};
use common::Layer;
use dynamoe::Routes;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What one candidate does with one layer.
type Run<'a> = Box<dyn Fn(&Layer) + 'a>;

/// Median of sorted numbers, and the quartiles around it.
fn quartiles(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|q| values[(values.len() - 1) * q / 4])
}

/// Times of every candidate in seconds per layer, round by round.
fn measure(layers: &[Layer], candidates: &[(String, Run)], seconds: f64) -> Vec<Vec<f64>> {
    let mut times = vec![Vec::new(); candidates.len()];
    let start = Instant::now();
    while times[0].len() < 5 || (start.elapsed().as_secs_f64() < seconds && times[0].len() < 1000) {
        for ((_, run), times) in candidates.iter().zip(&mut times) {
            let start = Instant::now();
            layers.iter().for_each(run);
            times.push(start.elapsed().as_secs_f64() / layers.len() as f64);
        }
    }
    // the first round warms up
    times.iter_mut().for_each(|t| _ = t.remove(0));
    times
}

fn print(candidates: &[(String, Run)], times: &[Vec<f64>], tokens: usize, layer: &Layer, params: usize) {
    println!(
        "  {:26} {:>10} {:>9} {:>9}   of candle (quartiles)      of ours dense",
        "", "µs", "GB/s", "GOP/s"
    );
    for ((name, _), own) in candidates.iter().zip(times) {
        let against = |other: &[f64]| {
            let [low, mid, high] = quartiles(own.iter().zip(other).map(|(a, b)| a / b).collect());
            format!("{mid:6.3} ({low:.3} to {high:.3})")
        };
        let [_, time, _] = quartiles(own.clone());
        println!(
            "  {name:26} {:10.1} {:9.1} {:9.1}   {}   {}",
            time * 1e6,
            layer.bytes as f64 / time / 1e9,
            2.0 * (params * tokens) as f64 / time / 1e9,
            against(&times[0]),
            against(&times[1]),
        );
    }
}

/// Uniformly drawn experts whose widths average to a quarter, a half, three quarters, one.
fn routes(rng: &mut ChaCha8Rng, tokens: usize, quarter: usize) -> Routes {
    let choices: &[usize] = [&[0][..], &[0, 1, 2], &[1, 2, 3], &[3]][quarter];
    Routes((0..tokens).map(|_| choices[rng.random_range(0..choices.len())]).collect())
}

/// As [`dynamoe::DynaMoeFfn::forward_routed`] runs: the router, then the routes that the benchmark chose.
fn routed(layer: &Layer, x: &Tensor, routes: &Routes) {
    if routes.0.iter().any(|&e| e < 3) {
        std::hint::black_box(layer.routed.router().route(x, &[0.0]).unwrap());
    }
    std::hint::black_box(layer.routed.forward_with(x, routes).unwrap());
}

fn dense<'a>(x: &'a Tensor) -> Vec<(String, Run<'a>)> {
    vec![
        ("candle dense".into(), Box::new(move |l| _ = std::hint::black_box(l.candle.forward(x).unwrap()))),
        ("ours dense".into(), Box::new(move |l| _ = std::hint::black_box(l.dense.forward(x).unwrap()))),
    ]
}

fn widths(layers: &[Layer], params: usize, d: usize, tokens: usize, seconds: f64) {
    println!(" {tokens} tokens");
    let (x, mut rng) = (common::input(tokens, d), ChaCha8Rng::seed_from_u64(1));
    let mut candidates = dense(&x);
    for quarter in 0..4 {
        let (routes, x) = (routes(&mut rng, tokens, quarter), &x);
        let width = routes.mean_width(&[1, 2, 3, 4]);
        let run: Run = Box::new(move |l| routed(l, x, &routes));
        candidates.push((format!("routed, mean width {width:.3}"), run));
    }
    let times = measure(layers, &candidates, seconds);
    print(&candidates, &times, tokens, &layers[0], params);
}

/// Cost of a batch that is routed at random, against its predictions.
fn batch(layers: &[Layer], d: usize, seconds: f64) {
    println!(" batches, experts uniformly drawn; ratio to ours dense at the same batch");
    println!("  {:>5} {:>28} {:>13} {:>11}", "batch", "measured (quartiles)", "widest token", "mean width");
    for tokens in [1, 2, 4, 8, 16] {
        let (x, mut rng) = (common::input(tokens, d), ChaCha8Rng::seed_from_u64(2));
        let draws: Vec<Routes> =
            (0..32).map(|_| Routes((0..tokens).map(|_| rng.random_range(0..4)).collect())).collect();
        let next = std::cell::Cell::new(0);
        let mut candidates = dense(&x).split_off(1);
        let (x, draws_of) = (&x, &draws);
        let run: Run = Box::new(move |l| {
            next.set(next.get() + 1);
            routed(l, x, &draws_of[next.get() % draws_of.len()]);
        });
        candidates.push(("routed".into(), run));
        let times = measure(layers, &candidates, seconds);
        let [low, mid, high] = quartiles(times[1].iter().zip(&times[0]).map(|(a, b)| a / b).collect());
        let mean = |f: &dyn Fn(&Routes) -> f64| draws.iter().map(f).sum::<f64>() / draws.len() as f64;
        let widest = mean(&|r| (r.0.iter().max().map_or(3, |&e| e) + 1) as f64 / 4.0);
        let average = mean(&|r| r.mean_width(&[1, 2, 3, 4]));
        println!("  {tokens:>5} {mid:12.3} ({low:.3} to {high:.3}) {widest:>13.3} {average:>11.3}");
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let mode = args.first().map_or("decode", String::as_str);
    let (shape_filter, type_filter) = (args.get(1).map_or("", |a| a), args.get(2).map_or("", |a| a));
    let seconds: f64 = args.get(3).and_then(|a| a.parse().ok()).unwrap_or(4.0);
    println!("kernels {}, {} threads", dynamoe::cpu::variant(), rayon::current_num_threads());
    for (shape, d, i) in common::SHAPES {
        for dtype in common::TYPES {
            let name = format!("{dtype:?}").to_lowercase();
            if !shape.contains(shape_filter) || !name.contains(type_filter) {
                continue;
            }
            let layers = common::layers(dtype, d, i);
            let (params, mib) = (3 * d * i, layers[0].bytes as f64 / (1 << 20) as f64);
            println!("{shape} {d} × {i}, {dtype:?}: {} layers of {mib:.1} MiB", layers.len());
            match mode {
                "decode" => [1, 2, 4, 8].into_iter().for_each(|t| widths(&layers, params, d, t, seconds)),
                "prefill" => widths(&layers[..1], params, d, 512, seconds),
                "batch" => batch(&layers, d, seconds),
                tokens => match tokens.parse() {
                    Ok(tokens) => widths(&layers, params, d, tokens, seconds),
                    Err(_) => panic!("expected decode, prefill, batch or a number of tokens, found {tokens}"),
                },
            }
        }
    }
}
