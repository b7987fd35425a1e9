//! Times of the FFN: decode at one token and small batches, prefill at 512 tokens.
//!
//! ```sh
//! cargo bench -p dynamoe --bench ffn -- llama-3.2-1b/Q4K
//! ```
//!
//! Ratios with their spread are measured by the benchmark `ratios`, side by side.

mod common;

use std::hint::black_box;

use candle_core::Module;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dynamoe::Routes;

fn ffn(criterion: &mut Criterion) {
    // building weights takes longer than timing them: only those that the filter asks for
    let filter = std::env::args().skip(1).find(|a| !a.starts_with("--")).unwrap_or_default();
    for (shape, d, i) in common::SHAPES {
        for dtype in common::TYPES {
            let name = format!("{shape}/{dtype:?}");
            if !filter.is_empty() && !filter.starts_with(&name) && !name.contains(&filter) {
                continue;
            }
            let layers = common::layers(dtype, d, i);
            for tokens in [1, 2, 4, 8, 512] {
                let x = common::input(tokens, d);
                let mut group = criterion.benchmark_group(format!("{name}/{tokens}"));
                group.sample_size(10).throughput(Throughput::Elements((3 * d * i * tokens) as u64));
                let mut layer = layers.iter().cycle();
                let mut next = || layer.next().expect("there are layers");
                group.bench_function("candle", |b| b.iter(|| black_box(next().candle.forward(&x).unwrap())));
                group.bench_function("dense", |b| b.iter(|| black_box(next().dense.forward(&x).unwrap())));
                for expert in 0..4 {
                    let routes = Routes(vec![expert; tokens]);
                    let id = BenchmarkId::new("routed", (expert + 1) as f64 / 4.0);
                    group.bench_function(id, |b| {
                        b.iter(|| {
                            let layer = next();
                            black_box(layer.routed.router().route(&x, &[0.0]).unwrap());
                            black_box(layer.routed.forward_with(&x, &routes).unwrap())
                        })
                    });
                }
                group.finish();
            }
        }
    }
}

criterion_group!(benches, ffn);
criterion_main!(benches);
