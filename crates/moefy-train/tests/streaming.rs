//! Memory and speed of converting a large checkpoint: run by hand, alone in its process.
//!
//! ```text
//! cargo test -p moefy-train --test streaming -- --ignored --nocapture
//! ```

use std::path::Path;
use std::time::Instant;

use dynamoe::config::{RouterConfig, RouterKind, even_widths};
use dynamoe_model::checkpoint::{Checkpoint, TensorSpec, Writer, plan_shards};
use dynamoe_model::config::ModelConfig;
use dynamoe_model::tensors::expected_tensors;
use moefy_train::prepare::{ConvertOptions, convert};
use safetensors::Dtype;
use serde_json::json;

/// 4 layers of Mistral 7B's shape in bf16, in shards of 500 MB: 2.27 GB.
fn write_large(dir: &Path) -> u64 {
    let config = json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000,
    });
    std::fs::create_dir(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let specs: Vec<TensorSpec> = expected_tensors(&ModelConfig::from_json(&config).unwrap())
        .into_iter()
        .map(|(name, shape)| TensorSpec { name, dtype: Dtype::BF16, shape })
        .collect();
    let mut writer = Writer::create(dir, plan_shards(specs.clone(), 500_000_000)).unwrap();
    let mut state = 1u64;
    for spec in &specs {
        let mut left = spec.len() as usize / 2;
        while left > 0 {
            let count = left.min(1 << 20);
            // a multiplicative generator is random enough, and fast
            let values = (0..count).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                half::bf16::from_f32((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5)
            });
            let bytes: Vec<u8> = values.flat_map(half::bf16::to_le_bytes).collect();
            writer.push(&spec.name, &bytes).unwrap();
            left -= count;
        }
    }
    writer.finish().unwrap();
    specs.iter().map(TensorSpec::len).sum()
}

/// The process's highest resident memory so far, in MB.
fn peak_resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024 / 1_000_000
}

/// Seconds of CPU that the process has used, in its own code and in the kernel.
fn cpu_seconds() -> (f64, f64) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let ticks: Vec<f64> = stat.rsplit(')').next().unwrap().split_whitespace().flat_map(str::parse).collect();
    // fields 14 and 15, in hundredths; what is left of the line starts with field 3, a letter
    (ticks[10] / 100.0, ticks[11] / 100.0)
}

#[test]
#[ignore = "writes 7 GB"]
fn a_large_checkpoint_converts_in_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let (dense, copy) = (dir.path().join("dense"), dir.path().join("copy"));
    let bytes = write_large(&dense);
    let pace = |what: &str, start: Instant| {
        let seconds = start.elapsed().as_secs_f64();
        eprintln!("{what}: {seconds:.1} s, {:.0} MB/s", bytes as f64 / 1e6 / seconds);
        seconds
    };
    std::process::Command::new("sync").status().unwrap();
    let start = Instant::now();
    std::process::Command::new("cp").arg("-r").arg(&dense).arg(&copy).status().unwrap();
    std::process::Command::new("sync").arg("-f").arg(&copy).status().unwrap();
    pace("cp and sync", start);
    std::fs::remove_dir_all(&copy).unwrap();

    let options = ConvertOptions {
        expert_widths: even_widths(14336, 4).unwrap(),
        separate_shells: 1,
        router: RouterConfig { kind: RouterKind::Mlp, hidden_size: 64, compensation: true },
        seed: 0,
        sensitivity: 0.9,
        force: false,
        max_shard_bytes: None,
    };
    let (before, start) = (cpu_seconds(), Instant::now());
    let source = Checkpoint::open(&dense).unwrap();
    convert(&source, None, &options, &dir.path().join("out")).unwrap();
    pace("convert", start);
    let after = cpu_seconds();
    eprintln!("of it CPU: {:.1} s own, {:.1} s kernel", after.0 - before.0, after.1 - before.1);
    Checkpoint::open(&dir.path().join("out")).unwrap();
    eprintln!("{bytes} bytes, {} shards, peak resident {} MB", source.shards().len(), peak_resident());
    assert!(peak_resident() < 700, "{} MB", peak_resident());
}
