//! Reading, converting and writing checkpoints, and everything that a broken one can bring.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use common::{ARCHITECTURES, HIDDEN, LAYERS, WIDTH, contents, values};
use dynamoe::tensors;
use dynamoe::{Budget, RouterConfig, RouterKind, Sensitivity};
use dynamoe_model::checkpoint::{Checkpoint, StagedFolder, save_model, write_atomic};
use dynamoe_model::export::{ExportOptions, export, export_dense};
use dynamoe_model::inspect::inspect;
use moefy_train::prepare::{Calibration, LayerStatistics};
use moefy_train::prepare::{ConvertOptions, convert};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

const WIDTHS: [usize; 3] = [8, 12, WIDTH];

/// A scratch folder with a dense checkpoint in `dense`.
fn scratch(architecture: &str, dtype: Dtype, shards: usize) -> (TempDir, Checkpoint) {
    let dir = TempDir::new().unwrap();
    common::write(&dir.path().join("dense"), &common::config(architecture), dtype, shards);
    let checkpoint = Checkpoint::open(&dir.path().join("dense")).unwrap();
    (dir, checkpoint)
}

fn options() -> ConvertOptions {
    ConvertOptions {
        expert_widths: WIDTHS.to_vec(),
        separate_shells: 0,
        router: RouterConfig { kind: RouterKind::Mlp, hidden_size: 5, compensation: true },
        seed: 3,
        sensitivity: 0.9,
        force: false,
        max_shard_bytes: None,
    }
}

fn calibration(source: &Checkpoint) -> Calibration {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut layer = || LayerStatistics {
        importance: (0..WIDTH).map(|_| rng.random_range(0.0..1.0)).collect(),
        mean_activation: (0..WIDTH).map(|_| rng.random_range(-1.0..1.0)).collect(),
    };
    Calibration {
        layers: (0..LAYERS).map(|_| layer()).collect(),
        tokens: 100,
        fingerprint: source.fingerprint().unwrap(),
    }
}

/// The whole chain of messages of an error.
fn message<T>(result: anyhow::Result<T>) -> String {
    match result {
        Ok(_) => panic!("an error was expected"),
        Err(error) => format!("{error:#}"),
    }
}

fn assert_says<T>(result: anyhow::Result<T>, words: &[&str]) {
    let message = message(result);
    for word in words {
        assert!(message.contains(word), "{word:?} not in: {message}");
    }
}

/// No finished and no partial output.
fn assert_nothing_written(dir: &Path, before: &BTreeMap<String, Vec<u8>>) {
    assert_eq!(contents(dir).keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
}

/// The neurons of a layer: gate row, up row and down column, as bits.
fn neurons(checkpoint: &Checkpoint, layer: usize) -> Vec<Vec<u32>> {
    let read = |name| values(checkpoint, &tensors::full_name(layer, name));
    let (gate, up, down) = (read(tensors::GATE_PROJ), read(tensors::UP_PROJ), read(tensors::DOWN_PROJ));
    let neuron = |j: usize| {
        let rows = gate[j * HIDDEN..(j + 1) * HIDDEN].iter().chain(&up[j * HIDDEN..(j + 1) * HIDDEN]);
        rows.chain((0..HIDDEN).map(|d| &down[d * WIDTH + j])).map(|v| v.to_bits()).collect()
    };
    (0..WIDTH).map(neuron).collect()
}

/// A layer's dense FFN in f64: `W_down (silu(W_gate x) ∘ (W_up x))`.
fn ffn(checkpoint: &Checkpoint, layer: usize, x: &[f64]) -> Vec<f64> {
    let floats = |bits: &[u32]| bits.iter().map(|&b| f64::from(f32::from_bits(b))).collect::<Vec<f64>>();
    let dot = |w: &[f64]| w.iter().zip(x).map(|(a, b)| a * b).sum::<f64>();
    let mut y = vec![0.0; HIDDEN];
    for neuron in neurons(checkpoint, layer) {
        let w = floats(&neuron);
        let g = dot(&w[..HIDDEN]);
        let h = g / (1.0 + (-g).exp()) * dot(&w[HIDDEN..2 * HIDDEN]);
        y.iter_mut().zip(&w[2 * HIDDEN..]).for_each(|(y, w)| *y += w * h);
    }
    y
}

#[test]
fn every_architecture_type_and_sharding_opens() {
    for architecture in ARCHITECTURES {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let (_one, single) = scratch(architecture, dtype, 1);
            let (_many, sharded) = scratch(architecture, dtype, 3);
            assert_eq!(single.config().architecture.name(), architecture);
            assert_eq!((single.shards().len(), sharded.shards().len()), (1, 3));
            assert_eq!(single.dtype(), dtype);
            assert!(single.names().eq(sharded.names()));
            for name in single.names() {
                assert_eq!(single.read_bytes(name).unwrap(), sharded.read_bytes(name).unwrap(), "{name}");
                assert!(values(&single, name).iter().all(|v| v.is_finite()));
            }
        }
    }
}

#[test]
fn names_are_hugging_faces() {
    let has = |architecture: &str, name: &str| scratch(architecture, Dtype::F32, 1).1.info(name).is_some();
    assert!(has("LlamaForCausalLM", "lm_head.weight"));
    assert!(has("LlamaForCausalLM", "model.layers.1.mlp.down_proj.weight"));
    assert!(!has("LlamaForCausalLM", "model.layers.0.self_attn.q_proj.bias"));
    assert!(has("Qwen2ForCausalLM", "model.layers.0.self_attn.v_proj.bias"));
    assert!(!has("Qwen2ForCausalLM", "model.layers.0.self_attn.o_proj.bias"));
    assert!(!has("Qwen2ForCausalLM", "lm_head.weight"), "tied");
    assert!(has("Qwen3ForCausalLM", "model.layers.0.self_attn.k_norm.weight"));
}

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
        let (shared, own) = (dir.path().join("shared"), dir.path().join("own"));
        let calibration = calibration(&source);
        convert(&source, Some(&calibration), &options(), &shared).unwrap();
        let with_separate = ConvertOptions { separate_shells, ..options() };
        convert(&source, Some(&calibration), &with_separate, &own).unwrap();
        let versions = [&shared, &own].map(|dir| {
            let config: Value =
                serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
            config["dynamoe"]["version"].clone()
        });
        assert_eq!(versions, [json!(1), json!(2)]);
        let (shared, converted) = (Checkpoint::open(&shared).unwrap(), Checkpoint::open(&own).unwrap());
        for name in shared.names() {
            assert_eq!(shared.read_bytes(name).unwrap(), converted.read_bytes(name).unwrap(), "{name}");
        }
        let p = WIDTHS[separate_shells - 1];
        for layer in 0..LAYERS {
            let names = [tensors::GATE_PROJ, tensors::UP_PROJ, tensors::DOWN_PROJ].into_iter();
            for (name, own) in names.zip(tensors::SEPARATE_TENSORS) {
                let (name, own) = (tensors::full_name(layer, name), tensors::full_name(layer, own));
                assert_eq!(converted.info(&own).unwrap().dtype, dtype);
                let columns = converted.info(&name).unwrap().shape[1];
                let all = values(&converted, &name);
                let first: Vec<f32> = if columns == HIDDEN {
                    all[..p * HIDDEN].to_vec()
                } else {
                    all.chunks_exact(columns).flat_map(|row| row[..p].to_vec()).collect()
                };
                assert_eq!(values(&converted, &own), first, "{own}");
            }
        }
        export_dense(&converted, &dir.path().join("back"), false).unwrap();
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
    export_dense(&converted, &back, false).unwrap();
    assert!(Checkpoint::open(&back).unwrap().names().eq(source.names()));
}

#[test]
fn tensors_that_the_model_does_not_read_are_kept() {
    // such as a layer for predicting several tokens, beyond num_hidden_layers
    let dir = TempDir::new().unwrap();
    let dense = dir.path().join("dense");
    let mut config = common::config("LlamaForCausalLM");
    config["num_hidden_layers"] = json!(LAYERS + 1);
    common::write(&dense, &config, Dtype::F32, 2);
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
fn dense_export_undoes_the_conversion() {
    for shards in [1, 3] {
        let (dir, source) = scratch("MistralForCausalLM", Dtype::BF16, shards);
        let (out, back) = (dir.path().join("out"), dir.path().join("back"));
        convert(&source, Some(&calibration(&source)), &options(), &out).unwrap();
        let converted = Checkpoint::open(&out).unwrap();
        export_dense(&converted, &back, false).unwrap();
        let dense = Checkpoint::open(&back).unwrap();
        assert_eq!(dense.config(), source.config());
        // every key of the base, in its order
        let text = |dir: &Path| std::fs::read_to_string(dir.join("config.json")).unwrap();
        assert_eq!(text(&back).trim(), text(source.dir()).trim());
        assert!(dense.names().eq(source.names()));
        for name in dense.names() {
            assert_eq!(dense.read_bytes(name).unwrap(), source.read_bytes(name).unwrap(), "{name}");
        }
        // any part of a reordered matrix can be read alone
        let view = converted.dense().unwrap();
        assert_eq!(view.content_fingerprint().unwrap(), source.content_fingerprint().unwrap());
        for name in [tensors::GATE_PROJ, tensors::DOWN_PROJ].map(|name| tensors::full_name(1, name)) {
            let whole = source.read_bytes(&name).unwrap();
            for range in [0..0, 0..1, 5..6, 7..whole.len() - 3, whole.len()..whole.len()] {
                assert_eq!(view.read_range(&name, range.clone()).unwrap(), whole[range], "{name}");
            }
        }
        assert_says(export_dense(&dense, &dir.path().join("again"), false), &["dense model already"]);
    }
}

#[test]
fn export_changes_type_and_sharding() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    let (routed, half, wide) = (dir.path().join("routed"), dir.path().join("half"), dir.path().join("wide"));
    convert(&source, None, &options(), &routed).unwrap();
    let routed = Checkpoint::open(&routed).unwrap();
    let to =
        |dtype, max_shard_bytes| ExportOptions { dtype: Some(dtype), max_shard_bytes, ..Default::default() };
    export(&routed, &to(Dtype::BF16, Some(2000)), &half).unwrap();
    let half = Checkpoint::open(&half).unwrap();
    assert!(half.shards().len() > 3);
    assert_eq!(half.config().dynamoe, routed.config().dynamoe);
    for name in routed.names() {
        let router = name.contains(".router.") || tensors::is_order(name);
        assert_eq!(half.info(name).unwrap().dtype, if router { Dtype::F32 } else { Dtype::BF16 }, "{name}");
        for (a, b) in values(&routed, name).iter().zip(values(&half, name)) {
            let expected = if router { *a } else { half::bf16::from_f32(*a).to_f32() };
            assert_eq!(expected, b, "{name}");
        }
    }
    let json: Value =
        serde_json::from_slice(&std::fs::read(half.dir().join("config.json")).unwrap()).unwrap();
    assert_eq!(json["torch_dtype"], "bfloat16");
    export(&half, &to(Dtype::F32, Some(u64::MAX)), &wide).unwrap();
    let wide = Checkpoint::open(&wide).unwrap();
    assert_eq!(wide.shards().len(), 1);
    assert_eq!(values(&wide, "model.norm.weight"), values(&half, "model.norm.weight"));
    assert_says(export(&wide, &to(Dtype::I8, None), &dir.path().join("x")), &["F32, F16 or BF16", "I8"]);
}

#[test]
fn a_value_too_large_for_the_new_type_is_refused() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    let big = dir.path().join("big");
    let weights = BTreeMap::from([(
        "model.norm.weight".to_owned(),
        Tensor::full(1e6f32, HIDDEN, &Device::Cpu).unwrap(),
    )]);
    save_model(&source, &weights, None, &big, &mut drop).unwrap();
    let options = ExportOptions { dtype: Some(Dtype::F16), ..Default::default() };
    let result = export(&Checkpoint::open(&big).unwrap(), &options, &dir.path().join("half"));
    assert_says(result, &["model.norm.weight", "[0]", "F16", "wider type"]);
    assert!(!dir.path().join("half").exists());
}

#[test]
fn save_model_replaces_weights_in_the_sources_type() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::BF16, 3);
    let out = dir.path().join("routed");
    convert(&source, None, &options(), &out).unwrap();
    let routed = Checkpoint::open(&out).unwrap();
    let fc2 = tensors::full_name(1, tensors::ROUTER_FC2_BIAS);
    let weights = BTreeMap::from([
        ("model.norm.weight".to_owned(), Tensor::full(1.01f32, HIDDEN, &Device::Cpu).unwrap()),
        (fc2.clone(), Tensor::full(1.01f32, 2, &Device::Cpu).unwrap()),
    ]);
    let mut section = routed.config().dynamoe.clone().unwrap();
    section.budgets = vec![Budget { width: 0.5, sensitivity: Sensitivity::PerLayer(vec![0.1, 0.2]) }];
    let mut bytes = 0;
    save_model(&routed, &weights, Some(&section), &dir.path().join("tuned"), &mut |tensor| bytes += tensor)
        .unwrap();
    assert_eq!(bytes, routed.names().map(|name| routed.info(name).unwrap().len as u64).sum::<u64>());
    let mut tuned = Checkpoint::open(&dir.path().join("tuned")).unwrap();
    assert_eq!(values(&tuned, "model.norm.weight")[0], half::bf16::from_f32(1.01).to_f32());
    assert_eq!(values(&tuned, &fc2), [1.01, 1.01]);
    assert_eq!(tuned.config().dynamoe.as_ref(), Some(&section));
    assert_eq!(tuned.shards().len(), 3);
    let embedding = "model.embed_tokens.weight";
    assert_eq!(tuned.read_bytes(embedding).unwrap(), source.read_bytes(embedding).unwrap());

    section.sensitivity = 0.25;
    tuned.store_section(&section).unwrap();
    assert_eq!(tuned.config().dynamoe.as_ref(), Some(&section));
    assert_eq!(Checkpoint::open(tuned.dir()).unwrap().config().dynamoe.as_ref(), Some(&section));

    let unknown = BTreeMap::from([("model.extra".to_owned(), weights[&fc2].clone())]);
    assert_says(save_model(&routed, &unknown, None, &dir.path().join("x"), &mut drop), &["model.extra"]);
    let nan = BTreeMap::from([(fc2.clone(), Tensor::full(f32::NAN, 2, &Device::Cpu).unwrap())]);
    assert_says(save_model(&routed, &nan, None, &dir.path().join("x"), &mut drop), &[&fc2, "[0]", "NaN"]);
}

#[test]
fn inspection_describes_dense_and_routed_models() {
    let (dir, source) = scratch("Qwen2ForCausalLM", Dtype::BF16, 3);
    convert(&source, None, &options(), &dir.path().join("out")).unwrap();
    let dense = inspect(source.dir()).unwrap();
    let routed = inspect(&dir.path().join("out")).unwrap();
    let bytes: u64 = dense.dtypes.values().sum();
    assert_eq!(bytes, 2 * dense.parameters as u64, "all tensors of the dense model are bf16");
    assert_eq!((dense.shards, &dense.dynamoe, routed.parameters), (3, &None, dense.parameters));
    let part = routed.dynamoe.clone().unwrap();
    let per_layer = 5 * HIDDEN + 5 + 2 * 5 + 2 + 2 * HIDDEN;
    assert_eq!(part.router_parameters, LAYERS * per_layer);
    assert_eq!(part.router_bytes, 4 * part.router_parameters as u64);
    assert_eq!(part.experts[0].share, 8.0 / WIDTH as f64);
    assert_eq!(part.experts[2].active_parameters, dense.parameters);
    assert_eq!(part.experts[0].active_parameters, dense.parameters - LAYERS * 3 * HIDDEN * (WIDTH - 8));
    let table = routed.to_string();
    for words in ["Qwen2ForCausalLM (DynaMoE)", "33.3%", "sensitivity      0.9", "no budgets yet"] {
        assert!(table.contains(words), "{words:?} not in\n{table}");
    }
    assert!(dense.to_string().contains("(dense)"));
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

// ---- broken files ----

/// Opens a dense checkpoint after `damage` to its config.json.
fn open_with_config(damage: impl Fn(&mut Value)) -> anyhow::Result<Checkpoint> {
    let dir = TempDir::new().unwrap();
    let mut config = common::config("LlamaForCausalLM");
    common::write(dir.path(), &config, Dtype::F32, 1);
    damage(&mut config);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    Checkpoint::open(dir.path())
}

/// Opens a dense checkpoint whose safetensors file went through `damage`.
fn open_with_file(damage: impl Fn(Vec<u8>) -> Vec<u8>) -> anyhow::Result<Checkpoint> {
    let dir = TempDir::new().unwrap();
    common::write(dir.path(), &common::config("LlamaForCausalLM"), Dtype::F32, 1);
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, damage(std::fs::read(&path).unwrap())).unwrap();
    Checkpoint::open(dir.path())
}

/// As [`open_with_file`], for damage to the header alone.
fn open_with_header(damage: impl Fn(&mut Value)) -> anyhow::Result<Checkpoint> {
    open_with_file(|bytes| {
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
        damage(&mut header);
        let text = header.to_string();
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &bytes[8 + len..]].concat()
    })
}

const NORM: &str = "model.norm.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";
const LM_HEAD: &str = "lm_head.weight";

#[test]
fn files_that_lie_are_refused() {
    assert!(open_with_file(|bytes| bytes).is_ok());
    assert!(open_with_header(|_| ()).is_ok());
    let says = |result, words: &[&str]| {
        assert_says(result, words);
    };
    let file = "model.safetensors";
    let claim = |len: u64| open_with_file(move |b| [&len.to_le_bytes()[..], &b[8..]].concat());
    says(claim(1 << 20), &[file, "header claims 1048576 bytes", "truncated"]);
    says(claim(u64::MAX), &[file, "header claims 18446744073709551615 bytes"]);
    says(claim(u64::MAX - 7), &[file, "header claims"]);
    says(claim(0), &[file, "header is not valid"]);
    says(open_with_file(|_| Vec::new()), &[file, "0 bytes are too few"]);
    says(open_with_file(|b| b[..b.len() - 1].to_vec()), &[file, "truncated"]);
    says(open_with_file(|b| b[..100].to_vec()), &[file, "truncated"]);
    says(open_with_file(|b| [&b[..], &[0]].concat()), &[file, "too long"]);

    let offsets = |header: &mut Value, name: &str, from: u64, to: u64| {
        header[name]["data_offsets"] = json!([from, to]);
    };
    // another tensor's place, of the right length
    says(open_with_header(|h| offsets(h, NORM, 0, 64)), &[file, "invalid offset for tensor"]);
    says(open_with_header(|h| offsets(h, NORM, 64, 0)), &[file, "invalid offset for tensor"]);
    says(open_with_header(|h| offsets(h, NORM, u64::MAX - 64, u64::MAX)), &[file, NORM, "invalid offset"]);
    says(open_with_header(|h| h[NORM]["shape"] = json!([u64::MAX, u64::MAX])), &[file, "overflow"]);
    says(open_with_header(|h| h[NORM]["shape"] = json!([HIDDEN + 1])), &[file, "invalid shape"]);
    says(open_with_header(|h| h[NORM]["dtype"] = json!("F31")), &[file, "header is not valid", "F31"]);
    says(open_with_header(|h| h[NORM] = json!(7)), &[file, "header is not valid"]);
    // eight tensors whose sizes add up to more than an offset can hold
    says(
        open_with_header(|h| {
            *h = json!({});
            let size = (1u64 << 61) - 1;
            (0..8).for_each(|i| {
                h[format!("t{i}")] =
                    json!({ "dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size] })
            });
        }),
        &[file, "18446744073709551608 bytes of data", "truncated"],
    );
}

#[test]
fn tensors_that_do_not_fit_the_config_are_refused() {
    let swap = |h: &mut Value| h[EMBEDDING]["shape"] = json!([HIDDEN, 20]);
    assert_says(open_with_header(swap), &["model.safetensors", EMBEDDING, "[20, 16]", "[16, 20]"]);
    let integers = |h: &mut Value| h[NORM]["dtype"] = json!("I32");
    assert_says(open_with_header(integers), &[NORM, "F32, F16 or BF16", "I32", "unquantized"]);
    let rename = |h: &mut Value| {
        let info = h.as_object_mut().unwrap().shift_remove(NORM).unwrap();
        h["model.norm.wait"] = info;
    };
    assert_says(open_with_header(rename), &[NORM, "missing"]);
    assert_says(
        open_with_config(|c| c["num_hidden_layers"] = json!(4)),
        &["layers.2.", "and 17 more missing"],
    );
}

#[test]
fn broken_configs_are_refused() {
    let says = |damage: &dyn Fn(&mut Value), words: &[&str]| {
        assert_says(open_with_config(damage), words);
        assert_says(open_with_config(damage), &["config.json"]);
    };
    says(
        &|c| c["architectures"] = json!(["GPT2LMHeadModel"]),
        &[
            "GPT2LMHeadModel",
            "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, DynaMoeForCausalLM",
        ],
    );
    says(
        &|c| (c["architectures"], c["model_type"]) = (json!([]), Value::Null),
        &["architectures", "model_type"],
    );
    says(&|c| c["architectures"] = json!(["DynaMoeForCausalLM"]), &["dynamoe", "not found"]);
    says(&|c| c["hidden_act"] = json!("gelu"), &["hidden_act", "silu", "gelu"]);
    says(&|c| c["mlp_bias"] = json!(true), &["mlp_bias"]);
    says(&|c| c["quantization_config"] = json!({ "quant_method": "gptq" }), &["gptq", "unquantized"]);
    says(&|c| c["rope_scaling"] = json!({ "rope_type": "longrope", "factor": 4 }), &["longrope", "llama3"]);
    says(&|c| c["rope_scaling"] = json!({ "type": "linear" }), &["rope_scaling", "factor", "missing"]);
    says(&|c| c["hidden_size"] = json!("16"), &["hidden_size", "\"16\""]);
    says(&|c| c["hidden_size"] = json!(0), &["hidden_size", "found 0"]);
    says(&|c| c["vocab_size"] = json!(u64::MAX), &["vocab_size"]);
    says(&|c| c["num_hidden_layers"] = json!(1 << 27), &["num_hidden_layers", "10000"]);
    says(&|c| c["num_key_value_heads"] = json!(3), &["num_key_value_heads", "multiple"]);
    says(&|c| c["eos_token_id"] = json!("end"), &["eos_token_id"]);
    says(&|c| c["tie_word_embeddings"] = json!(1), &["tie_word_embeddings", "true or false"]);
    assert_says(Checkpoint::open(Path::new("/nowhere/at/all")), &["/nowhere/at/all", "not a folder"]);
    let dir = TempDir::new().unwrap();
    assert_says(Checkpoint::open(dir.path()), &["config.json"]);
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert_says(Checkpoint::open(dir.path()), &["config.json", "JSON"]);
    std::fs::write(dir.path().join("config.json"), common::config("LlamaForCausalLM").to_string()).unwrap();
    assert_says(Checkpoint::open(dir.path()), &["model.safetensors.index.json", "safetensors weights"]);
}

#[test]
fn broken_sections_are_refused() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    let out = dir.path().join("out");
    convert(&source, None, &options(), &out).unwrap();
    let good: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    let says = |damage: &dyn Fn(&mut Value), words: &[&str]| {
        let mut config = good.clone();
        damage(&mut config["dynamoe"]);
        std::fs::write(out.join("config.json"), config.to_string()).unwrap();
        assert_says(Checkpoint::open(&out), words);
    };
    says(&|d| d["colour"] = json!("red"), &["unknown field", "colour"]);
    says(&|d| d["router"]["colour"] = json!("red"), &["unknown field", "colour"]);
    says(&|d| d["version"] = json!(3), &["version 3", "update"]);
    says(&|d| d["own_shells"] = json!(1), &["own_shells", "version 2", "version 1"]);
    says(&|d| d["version"] = json!(0), &["version"]);
    says(&|d| d["expert_widths"] = json!([12, 8, WIDTH]), &["expert_widths", "strictly increasing"]);
    says(&|d| d["expert_widths"] = json!([8, 12, 25]), &["expert_widths", "width 24"]);
    says(&|d| d["expert_widths"] = json!([8, WIDTH]), &["router.fc2.weight", "[1, 5]", "[2, 5]"]);
    says(&|d| d["sensitivity"] = json!(1.5), &["sensitivity", "1.5"]);
    says(&|d| d["base_architecture"] = json!("T5"), &["T5", "supported"]);
    says(&|d| d["router"]["hidden_size"] = json!(6), &["router.fc1.weight", "[6, 16]", "[5, 16]"]);
}

#[test]
fn an_index_stays_in_its_folder() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 3);
    let index = source.dir().join("model.safetensors.index.json");
    let good: Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    std::fs::copy(source.dir().join("model-00001-of-00003.safetensors"), dir.path().join("a.safetensors"))
        .unwrap();
    let absolute = dir.path().join("a.safetensors");
    for file in [
        "../a.safetensors",
        absolute.to_str().unwrap(),
        "..",
        "x/a.safetensors",
        "./a.safetensors",
        "",
        "..\\a",
    ] {
        let mut bad = good.clone();
        bad["weight_map"][EMBEDDING] = json!(file);
        std::fs::write(&index, bad.to_string()).unwrap();
        assert_says(Checkpoint::open(source.dir()), &["index.json", EMBEDDING, "in the same folder"]);
    }
    let says = |damage: &dyn Fn(&mut Value), words: &[&str]| {
        let mut bad = good.clone();
        damage(&mut bad);
        std::fs::write(&index, bad.to_string()).unwrap();
        assert_says(Checkpoint::open(source.dir()), words);
    };
    says(&|i| i["weight_map"][NORM] = json!("model-9.safetensors"), &["model-9.safetensors", "missing"]);
    says(&|i| i["weight_map"][NORM] = json!(3), &[NORM]);
    says(&|i| i["weight_map"] = json!({}), &["weight_map"]);
    says(&|i| *i = json!([]), &["weight_map"]);
    std::fs::write(&index, "{").unwrap();
    assert_says(Checkpoint::open(source.dir()), &["index.json", "JSON"]);
    std::fs::write(&index, good.to_string()).unwrap();
    assert!(Checkpoint::open(source.dir()).is_ok());
}

#[test]
fn where_a_tensor_is_only_the_shards_say() {
    let (_dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 3);
    let index = source.dir().join("model.safetensors.index.json");
    let good: Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    let opened = |damage: &dyn Fn(&mut Value)| {
        let mut changed = good.clone();
        damage(&mut changed["weight_map"]);
        std::fs::write(&index, changed.to_string()).unwrap();
        Checkpoint::open(source.dir())
    };
    let same = |checkpoint: Checkpoint| {
        assert!(checkpoint.names().eq(source.names()));
        assert_eq!(checkpoint.read_bytes(NORM).unwrap(), source.read_bytes(NORM).unwrap());
    };
    same(opened(&|map| map[NORM] = map[EMBEDDING].clone()).unwrap());
    same(opened(&|map| map["no.such.tensor"] = map[NORM].clone()).unwrap());
    same(opened(&|map| drop(map.as_object_mut().unwrap().shift_remove(NORM))).unwrap());
    let third = good["weight_map"][NORM].clone();
    let without = opened(&|map| map.as_object_mut().unwrap().retain(|_, file| *file != third));
    assert_says(without, &["missing"]);
}

#[test]
fn a_decoder_saved_alone_gets_its_prefix() {
    let (dir, source) = scratch("Qwen2ForCausalLM", Dtype::F32, 1);
    let (_renamed, renamed) =
        open_renamed("Qwen2ForCausalLM", |name| name.trim_start_matches("model.").to_owned());
    let renamed = renamed.unwrap();
    assert!(renamed.names().eq(source.names()));
    convert(&renamed, None, &options(), &dir.path().join("out")).unwrap();
    convert(&source, None, &options(), &dir.path().join("same")).unwrap();
    let tensors = |out: &str| std::fs::read(dir.path().join(out).join("model.safetensors")).unwrap();
    assert_eq!(tensors("out"), tensors("same"));
    // without an output matrix, one that is not the embedding is missing
    let head = |name: &str| if name == LM_HEAD { "x".to_owned() } else { name.replacen("model.", "", 1) };
    assert_says(open_renamed("LlamaForCausalLM", head).1, &[LM_HEAD, "missing"]);
}

/// Opens a checkpoint whose tensors have other names.
fn open_renamed(architecture: &str, name: impl Fn(&str) -> String) -> (TempDir, anyhow::Result<Checkpoint>) {
    let (dir, source) = scratch(architecture, Dtype::F32, 1);
    rewrite(&source, |old, bytes| vec![(name(old), bytes)]);
    let opened = Checkpoint::open(source.dir());
    (dir, opened)
}

/// Writes the weights of `source` anew: `change` makes the tensors of each one's name and bytes.
fn rewrite(source: &Checkpoint, change: impl Fn(&str, Vec<u8>) -> Vec<(String, Vec<u8>)>) {
    let mut tensors = Vec::new();
    for name in source.names() {
        let info = source.info(name).unwrap();
        for (name, bytes) in change(name, source.read_bytes(name).unwrap()) {
            tensors.push((name, info.dtype, info.shape.clone(), bytes));
        }
    }
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &source.dir().join("model.safetensors")).unwrap();
}

#[test]
fn a_tied_output_matrix_is_left_out_of_what_is_written() {
    // Qwen2's configuration ties it here
    let (dir, source) = scratch("Qwen2ForCausalLM", Dtype::BF16, 1);
    let copy = |name: &str, bytes: Vec<u8>| match name {
        EMBEDDING => vec![(name.to_owned(), bytes.clone()), (LM_HEAD.to_owned(), bytes)],
        _ => vec![(name.to_owned(), bytes)],
    };
    rewrite(&source, copy);
    let both = Checkpoint::open(source.dir()).unwrap();
    assert!(both.names().eq(source.names()));
    let (converted, trained) = (dir.path().join("converted"), dir.path().join("trained"));
    convert(&both, None, &options(), &converted).unwrap();
    let converted = Checkpoint::open(&converted).unwrap();
    let embedding = Tensor::zeros((20, HIDDEN), candle_core::DType::F32, &Device::Cpu).unwrap();
    let weights = BTreeMap::from([(EMBEDDING.to_owned(), embedding)]);
    save_model(&converted, &weights, None, &trained, &mut drop).unwrap();
    export_dense(&Checkpoint::open(&trained).unwrap(), &dir.path().join("back"), false).unwrap();
    for folder in ["converted", "trained", "back"] {
        let file = std::fs::read(dir.path().join(folder).join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert!(tensors.tensor(LM_HEAD).is_err(), "{folder}");
    }

    rewrite(&source, |name, mut bytes| match name {
        EMBEDDING => {
            let original = bytes.clone();
            bytes[7] ^= 1;
            vec![(name.to_owned(), original), (LM_HEAD.to_owned(), bytes)]
        }
        _ => vec![(name.to_owned(), bytes)],
    });
    assert_says(Checkpoint::open(source.dir()), &[LM_HEAD, "differs from", "tie_word_embeddings"]);
}

#[test]
fn numbers_that_json_does_not_have_are_read_and_not_written() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    let path = source.dir().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen('{', "{\"temperature\": NaN, \"list\": {\"top_p\": -Infinity},", 1))
        .unwrap();
    let source = Checkpoint::open(source.dir()).unwrap();
    convert(&source, None, &options(), &dir.path().join("out")).unwrap();
    let written = std::fs::read_to_string(dir.path().join("out/config.json")).unwrap();
    let written: Value = serde_json::from_str(&written).unwrap();
    assert_eq!((written.get("temperature"), &written["list"]), (None, &json!({})));
    std::fs::write(&path, text.replace("1e-5", "NaN").replace("0.00001", "NaN")).unwrap();
    assert_says(Checkpoint::open(source.dir()), &["rms_norm_eps", "NaN"]);
}

#[test]
fn random_damage_never_panics() {
    let dir = TempDir::new().unwrap();
    common::write(dir.path(), &common::config("LlamaForCausalLM"), Dtype::F32, 1);
    let path = dir.path().join("model.safetensors");
    let good = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut refused = 0;
    for _ in 0..2000 {
        let mut bad = good.clone();
        for _ in 0..rng.random_range(1..4) {
            let place = rng.random_range(0..header);
            bad[place] = if rng.random() { rng.random_range(b'0'..=b'9') } else { rng.random() };
        }
        if rng.random_bool(0.1) {
            bad.truncate(rng.random_range(0..bad.len()));
        }
        std::fs::write(&path, bad).unwrap();
        refused += usize::from(Checkpoint::open(dir.path()).is_err());
    }
    assert!(refused > 1500, "{refused}");
}

#[test]
fn ranges_and_shapes_are_checked() {
    let (_dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    assert_eq!(source.read_range(NORM, 4..8).unwrap(), source.read_bytes(NORM).unwrap()[4..8]);
    assert_says(source.read_range(NORM, 0..65), &[NORM, "0..65", "64"]);
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = source.read_range(NORM, 8..4);
    assert_says(reversed, &[NORM]);
    assert_says(source.read_bytes("no.such"), &["no.such", "not found"]);
    let wrong = source.tensor(NORM, &[3], candle_core::DType::F32, &Device::Cpu);
    assert_says(wrong, &["model.safetensors", NORM, "[3]", "[16]"]);
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

#[test]
fn existing_output_needs_force_and_is_replaced_whole() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    convert(&source, None, &options(), &out).expect("an empty folder is not in the way");
    std::fs::write(out.join("note.txt"), "mine").unwrap();
    let before = contents(&out);
    assert_says(convert(&source, None, &options(), &out), &["exists", "--force"]);
    assert_eq!(contents(&out), before);
    let force = ConvertOptions { force: true, ..options() };
    // a failure keeps the old folder even with force
    let bad = ConvertOptions { expert_widths: vec![8], ..force.clone() };
    assert!(convert(&source, None, &bad, &out).is_err());
    assert_eq!(contents(&out), before);
    convert(&source, None, &force, &out).unwrap();
    assert!(!out.join("note.txt").exists() && Checkpoint::open(&out).is_ok());
    assert_eq!(contents(dir.path()).len(), 2, "only the source and the output remain");

    let files = contents(source.dir());
    assert_says(convert(&source, None, &force, source.dir()), &["overlaps the source"]);
    assert_says(convert(&source, None, &force, dir.path()), &["overlaps the source"]);
    assert_says(convert(&source, None, &force, &source.dir().join("../dense")), &["overlaps the source"]);
    assert_eq!(contents(source.dir()), files);
    let other = dir.path().join("photos");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("cat.jpg"), "cat").unwrap();
    assert_says(convert(&source, None, &force, &other), &["config.json", "choose another --out"]);
    assert!(other.join("cat.jpg").exists());
}

#[test]
fn places_that_cannot_be_written_are_named() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    let file = dir.path().join("file");
    std::fs::write(&file, "in the way").unwrap();
    let before = contents(dir.path());
    assert_says(convert(&source, None, &options(), &file), &["a file is in the way"]);
    assert_says(convert(&source, None, &options(), &file.join("out")), &["file/out", "cannot be created"]);
    assert_says(
        convert(&source, None, &options(), Path::new("/proc/out")),
        &["/proc/out", "cannot be created"],
    );
    assert_says(convert(&source, None, &options(), Path::new("/")), &["/"]);
    assert_says(write_atomic(&file.join("x"), b"x"), &["file/x", "cannot be written"]);
    assert_nothing_written(dir.path(), &before);
}

#[test]
fn output_folders_appear_on_commit_only() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("a/b/out");
    let staged = StagedFolder::create(&out, false).unwrap();
    std::fs::write(staged.path().join("x"), "1").unwrap();
    assert!(!out.exists());
    drop(staged);
    assert!(contents(out.parent().unwrap()).is_empty());
    let staged = StagedFolder::create(&out, false).unwrap();
    std::fs::create_dir(staged.path().join("sub")).unwrap();
    staged.commit().unwrap();
    assert!(out.join("sub").is_dir());
    assert_eq!(contents(out.parent().unwrap()).len(), 1);

    let file = dir.path().join("f");
    write_atomic(&file, b"one").unwrap();
    write_atomic(&file, b"two").unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), b"two");
    assert_eq!(contents(dir.path()).len(), 2);
}

#[test]
fn leftovers_of_killed_processes_are_removed() {
    let dir = TempDir::new().unwrap();
    let mut dead = std::process::Command::new("true").spawn().unwrap();
    dead.wait().unwrap();
    let (dead, alive) = (dead.id(), std::process::id());
    let leave = |name: &str, process: u32| {
        let path = dir.path().join(format!(".{name}.partial-{process}-0"));
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("weights"), "half").unwrap();
        path
    };
    let (gone, running, other) = (leave("out", dead), leave("out", alive), leave("out2", dead));
    std::fs::write(dir.path().join(format!(".note.partial-{dead}-3")), "half").unwrap();
    // Its process is gone from here, but somebody holds it: on another machine that shares the folder, say.
    let held = dir.path().join(format!(".out.partial-{dead}-1"));
    std::fs::create_dir(&held).unwrap();
    let lock = std::fs::File::open(&held).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();

    StagedFolder::create(&dir.path().join("out"), false).unwrap().commit().unwrap();
    write_atomic(&dir.path().join("note"), b"whole").unwrap();
    assert!(!gone.exists());
    assert!(running.exists() && other.exists() && held.exists());
    assert_eq!(contents(dir.path()).len(), 5, "{:?}", contents(dir.path()).keys());
}

/// A small filesystem of its own, gone at the end.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf) -> Option<Self> {
        std::fs::create_dir(&at).unwrap();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=20k", "tmpfs"])
            .arg(&at)
            .output();
        mount.is_ok_and(|o| o.status.success()).then_some(Self(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_disk_that_runs_full_leaves_nothing() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 3);
    let Some(disk) = SmallDisk::mount(dir.path().join("disk")) else {
        eprintln!("SKIPPED a_disk_that_runs_full_leaves_nothing: mounting a tmpfs needs root");
        return;
    };
    let model: usize = contents(source.dir()).values().map(Vec::len).sum();
    assert!(model > 20 << 10, "the model must not fit: {model}");
    let files = contents(source.dir());
    let result = convert(&source, None, &options(), &disk.0.join("out"));
    assert_says(result, &["disk/", "No space left on device"]);
    assert!(contents(&disk.0).is_empty(), "{:?}", contents(&disk.0).keys());
    assert_eq!(contents(source.dir()), files);
    std::fs::write(disk.0.join("config.json"), "old").unwrap();
    assert_says(write_atomic(&disk.0.join("config.json"), &[0; 100_000]), &["No space left"]);
    assert_eq!(contents(&disk.0), BTreeMap::from([("config.json".to_owned(), b"old".to_vec())]));
}
