//! Reading checkpoints, as they are and as others have saved them.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use dynamoe_model::checkpoint::{Checkpoint, save_model};
use dynamoe_model::inspect::inspect;
use moefy_train::prepare::convert;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::{ARCHITECTURES, HIDDEN, LAYERS, WIDTH, values};
use crate::tools::{
    EMBEDDING, LM_HEAD, NORM, assert_says, export_dense, open_renamed, options, rewrite, scratch,
};

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
    export_dense(&Checkpoint::open(&trained).unwrap(), &dir.path().join("back")).unwrap();
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
