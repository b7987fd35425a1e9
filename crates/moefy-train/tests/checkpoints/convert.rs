//! Conversion: neurons in order, routers, compensation and separate weights.

use std::collections::BTreeSet;

use dynamoe::{RouterConfig, RouterKind, tensors};
use dynamoe_model::checkpoint::Checkpoint;
use dynamoe_model::inspect::inspect;
use moefy_train::prepare::{Calibration, ConvertOptions, convert};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{self, HIDDEN, LAYERS, WIDTH, contents, values};
use crate::tools::{
    EMBEDDING, WIDTHS, assert_nothing_written, assert_says, calibration, export_dense, ffn, neurons, options,
    scratch,
};

#[test]
fn conversion_reorders_neurons_and_keeps_the_function() {
    for (dtype, shards) in [(Dtype::F32, 1), (Dtype::BF16, 3), (Dtype::F16, 2)] {
        let (dir, source) = scratch("LlamaForCausalLM", dtype, shards);
        let calibration = calibration(&source);
        let out = dir.path().join("out");
        convert(&source, Some(&calibration), &options(), &out).unwrap();
        let converted = Checkpoint::open(&out).unwrap();
        assert_eq!(converted.shards().len(), shards);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let x: Vec<f64> = (0..HIDDEN).map(|_| rng.random_range(-1.0..1.0)).collect();
        for layer in 0..LAYERS {
            let (before, after) = (neurons(&source, layer), neurons(&converted, layer));
            let importance = &calibration.layers[layer].importance;
            let mut order: Vec<usize> = (0..WIDTH).collect();
            order.sort_by(|&a, &b| importance[b].total_cmp(&importance[a]));
            for (place, &j) in order.iter().enumerate() {
                assert_eq!(after[place], before[j], "layer {layer}: neuron {j} belongs at {place}");
            }
            for (a, b) in ffn(&source, layer, &x).iter().zip(ffn(&converted, layer, &x)) {
                assert!((a - b).abs() < 1e-9 * a.abs().max(1.0), "{a} {b}");
            }
        }
        for name in source.names().filter(|name| !name.contains(".mlp.")) {
            assert_eq!(source.read_bytes(name).unwrap(), converted.read_bytes(name).unwrap(), "{name}");
        }
        assert!(out.join("tokenizer.json").exists() && out.join("LICENSE").exists());
        assert!(!out.join("training_args.bin").exists());
    }
}

#[test]
fn separate_shells_start_as_copies_and_leave_with_the_routers() {
    for (separate_shells, dtype, shards) in [(1, Dtype::F32, 1), (2, Dtype::BF16, 3)] {
        let (dir, source) = scratch("LlamaForCausalLM", dtype, shards);
        let (shared, separate) = (dir.path().join("shared"), dir.path().join("separate"));
        let calibration = calibration(&source);
        convert(&source, Some(&calibration), &options(), &shared).unwrap();
        let with_separate = ConvertOptions { separate_shells, ..options() };
        convert(&source, Some(&calibration), &with_separate, &separate).unwrap();
        let versions = [&shared, &separate].map(|dir| {
            let config: Value =
                serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
            config["dynamoe"]["version"].clone()
        });
        assert_eq!(versions, [json!(1), json!(2)]);
        let (shared, converted) = (Checkpoint::open(&shared).unwrap(), Checkpoint::open(&separate).unwrap());
        for name in shared.names() {
            assert_eq!(shared.read_bytes(name).unwrap(), converted.read_bytes(name).unwrap(), "{name}");
        }
        let p = WIDTHS[separate_shells - 1];
        for layer in 0..LAYERS {
            let names = [tensors::GATE_PROJ, tensors::UP_PROJ, tensors::DOWN_PROJ].into_iter();
            for (name, separate) in names.zip(tensors::SEPARATE_TENSORS) {
                let [name, separate] = [name, separate].map(|name| tensors::full_name(layer, name));
                assert_eq!(converted.info(&separate).unwrap().dtype, dtype);
                let columns = converted.info(&name).unwrap().shape[1];
                let all = values(&converted, &name);
                let first: Vec<f32> = if columns == HIDDEN {
                    all[..p * HIDDEN].to_vec()
                } else {
                    all.chunks_exact(columns).flat_map(|row| row[..p].to_vec()).collect()
                };
                assert_eq!(values(&converted, &separate), first, "{separate}");
            }
        }
        export_dense(&converted, &dir.path().join("back")).unwrap();
        let dense = Checkpoint::open(&dir.path().join("back")).unwrap();
        assert!(dense.names().eq(source.names()));
    }
}

#[test]
fn without_calibration_neurons_are_ordered_by_their_weights() {
    let (dir, source) = scratch("Qwen3ForCausalLM", Dtype::F32, 1);
    convert(&source, None, &options(), &dir.path().join("out")).unwrap();
    let converted = Checkpoint::open(&dir.path().join("out")).unwrap();
    let norm = |bits: &[u32]| bits.iter().map(|&b| f64::from(f32::from_bits(b)).powi(2)).sum::<f64>().sqrt();
    for layer in 0..LAYERS {
        let importance: Vec<f64> = neurons(&converted, layer)
            .iter()
            .map(|n| norm(&n[..HIDDEN]) * norm(&n[HIDDEN..2 * HIDDEN]) * norm(&n[2 * HIDDEN..]))
            .collect();
        assert!(importance.windows(2).all(|pair| pair[0] >= pair[1] * (1.0 - 1e-6)), "{importance:?}");
        let set = |c| neurons(c, layer).into_iter().collect::<BTreeSet<_>>();
        assert_eq!(set(&source), set(&converted));
        let compensation = values(&converted, &tensors::full_name(layer, tensors::COMPENSATION));
        assert!(compensation.iter().all(|&v| v == 0.0), "nothing is known about mean activations");
    }
}

#[test]
fn compensation_is_the_mean_output_of_the_neurons_left_out() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    let calibration = calibration(&source);
    convert(&source, Some(&calibration), &options(), &dir.path().join("out")).unwrap();
    let converted = Checkpoint::open(&dir.path().join("out")).unwrap();
    for layer in 0..LAYERS {
        let statistics = &calibration.layers[layer];
        let down = values(&source, &tensors::full_name(layer, tensors::DOWN_PROJ));
        let found = values(&converted, &tensors::full_name(layer, tensors::COMPENSATION));
        assert_eq!(found.len(), (WIDTHS.len() - 1) * HIDDEN);
        let mut order: Vec<usize> = (0..WIDTH).collect();
        order.sort_by(|&a, &b| statistics.importance[b].total_cmp(&statistics.importance[a]));
        for (e, row) in found.chunks(HIDDEN).enumerate() {
            for (d, &value) in row.iter().enumerate() {
                let left_out = &order[WIDTHS[e]..];
                let expected: f32 =
                    left_out.iter().map(|&j| statistics.mean_activation[j] * down[d * WIDTH + j]).sum();
                assert!((value - expected).abs() < 1e-4, "expert {e}, {d}: {value} {expected}");
            }
        }
    }
}

#[test]
fn routers_start_as_static_ones_and_follow_the_seed() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::BF16, 1);
    let run = |name: &str, seed: u64| {
        let out = dir.path().join(name);
        convert(&source, None, &ConvertOptions { seed, ..options() }, &out).unwrap();
        out
    };
    let (first, again, other) = (run("a", 1), run("b", 1), run("c", 2));
    assert_eq!(contents(&first), contents(&again), "the same seed gives the same bytes");
    assert_ne!(contents(&first), contents(&other));
    let checkpoint = Checkpoint::open(&first).unwrap();
    let fc1 = tensors::full_name(0, tensors::ROUTER_FC1_WEIGHT);
    assert_eq!(checkpoint.info(&fc1).unwrap().dtype, Dtype::F32);
    assert_ne!(
        values(&checkpoint, &fc1),
        values(&checkpoint, &tensors::full_name(1, tensors::ROUTER_FC1_WEIGHT))
    );
    // the variance of n normal numbers is off by sqrt(2 / n) of itself: 0.16 of 80, and three times that is allowed
    let variance = values(&checkpoint, &fc1).iter().map(|v| v * v).sum::<f32>() / (5 * HIDDEN) as f32;
    assert!((variance * HIDDEN as f32 - 1.0).abs() < 0.5, "{variance}");
    for name in [tensors::ROUTER_FC1_BIAS, tensors::ROUTER_FC2_WEIGHT] {
        assert!(values(&checkpoint, &tensors::full_name(0, name)).iter().all(|&v| v == 0.0), "{name}");
    }
    let shares = checkpoint.config().dynamoe.as_ref().unwrap().width_shares();
    let expected: Vec<f32> =
        shares[..shares.len() - 1].iter().map(|share| (share / (1.0 - share)).ln() as f32).collect();
    assert_eq!(values(&checkpoint, &tensors::full_name(0, tensors::ROUTER_FC2_BIAS)), expected);
}

#[test]
fn static_routing_has_no_tensors() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    let router = RouterConfig { kind: RouterKind::Static, hidden_size: 0, compensation: false };
    convert(&source, None, &ConvertOptions { router, ..options() }, &dir.path().join("out")).unwrap();
    let converted = Checkpoint::open(&dir.path().join("out")).unwrap();
    assert!(source.names().eq(converted.names().filter(|name| !tensors::is_order(name))));
}

#[test]
fn one_expert_is_the_dense_model() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::BF16, 1);
    let (out, back) = (dir.path().join("out"), dir.path().join("back"));
    convert(&source, None, &ConvertOptions { expert_widths: vec![WIDTH], ..options() }, &out).unwrap();
    let converted = Checkpoint::open(&out).unwrap();
    assert!(values(&converted, &tensors::full_name(0, tensors::ROUTER_FC2_WEIGHT)).is_empty());
    export_dense(&converted, &back).unwrap();
    assert!(Checkpoint::open(&back).unwrap().names().eq(source.names()));
}

#[test]
fn tensors_that_the_model_does_not_read_are_kept() {
    // such as a layer for predicting several tokens, beyond num_hidden_layers
    let dir = TempDir::new().unwrap();
    let dense = dir.path().join("dense");
    let mut config = support::config("LlamaForCausalLM");
    config["num_hidden_layers"] = json!(LAYERS + 1);
    support::write(&dense, &config, Dtype::F32, 2);
    config["num_hidden_layers"] = json!(LAYERS);
    std::fs::write(dense.join("config.json"), config.to_string()).unwrap();
    let source = Checkpoint::open(&dense).unwrap();
    assert_eq!(inspect(&dense).unwrap().unused_tensors.len(), 9);
    convert(&source, None, &options(), &dir.path().join("out")).unwrap();
    let converted = Checkpoint::open(&dir.path().join("out")).unwrap();
    let extra = tensors::full_name(LAYERS, tensors::DOWN_PROJ);
    assert_eq!(converted.read_bytes(&extra).unwrap(), source.read_bytes(&extra).unwrap());
}

#[test]
fn calibration_round_trips_and_belongs_to_one_model() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    let calibration = calibration(&source);
    let file = dir.path().join("calibration.safetensors");
    calibration.save(&file).unwrap();
    assert_eq!(Calibration::load(&file).unwrap(), calibration);
    std::fs::write(&file, b"something else").unwrap();
    assert_says(Calibration::load(&file), &["calibration.safetensors", "not a calibration file"]);

    let (_other, stranger) = scratch("MistralForCausalLM", Dtype::F32, 1);
    let out = dir.path().join("out");
    assert_says(
        convert(&stranger, Some(&calibration), &options(), &out),
        &["another model", "calibrate again"],
    );
    let mut short = calibration.clone();
    short.layers[1].importance.pop();
    assert_says(convert(&source, Some(&short), &options(), &out), &["layer 1", "importance", "23"]);
    assert!(!out.exists());
}

// ---- conversions that fail leave nothing ----

#[test]
fn values_that_are_not_finite_are_named() {
    for (dtype, bad) in [
        (Dtype::F32, f32::NAN.to_le_bytes().to_vec()),
        (Dtype::F32, f32::NEG_INFINITY.to_le_bytes().to_vec()),
        (Dtype::BF16, half::bf16::INFINITY.to_le_bytes().to_vec()),
        (Dtype::F16, half::f16::NAN.to_le_bytes().to_vec()),
    ] {
        for tensor in [EMBEDDING, "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"]
        {
            let (dir, source) = scratch("LlamaForCausalLM", dtype, 1);
            let path = source.dir().join("model.safetensors");
            let mut bytes = std::fs::read(&path).unwrap();
            let info = source.info(tensor).unwrap();
            let place = info.offset as usize + (2 * info.shape[1] + 5) * bad.len();
            bytes[place..place + bad.len()].copy_from_slice(&bad);
            std::fs::write(&path, bytes).unwrap();
            let (before, files) = (contents(dir.path()), contents(source.dir()));
            for calibration in [None, Some(calibration(&source))] {
                let result = convert(&source, calibration.as_ref(), &options(), &dir.path().join("out"));
                assert_says(result, &[tensor, "[2, 5]", "NaN or infinite"]);
                assert_nothing_written(dir.path(), &before);
            }
            assert_eq!(contents(source.dir()), files, "the source was touched");
        }
    }
}

#[test]
fn conversions_that_make_no_sense_are_refused() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    let (before, files) = (contents(dir.path()), contents(source.dir()));
    let out = dir.path().join("out");
    let with_widths = |widths: &[usize]| ConvertOptions { expert_widths: widths.to_vec(), ..options() };
    for widths in [&[12, 8, 24][..], &[8, 8, 24], &[8, 12], &[8, 30], &[0, 24], &[]] {
        assert_says(convert(&source, None, &with_widths(widths), &out), &["expert_widths", "24"]);
    }
    let dial = ConvertOptions { sensitivity: f64::NAN, ..options() };
    assert_says(convert(&source, None, &dial, &out), &["sensitivity"]);
    assert_nothing_written(dir.path(), &before);
    convert(&source, None, &options(), &out).unwrap();
    let routed = Checkpoint::open(&out).unwrap();
    assert_says(
        convert(&routed, None, &options(), &dir.path().join("twice")),
        &["already", "export --dense"],
    );
    assert_eq!(contents(source.dir()), files);
}
