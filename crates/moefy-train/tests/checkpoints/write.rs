//! Export, and checkpoints with new weights.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use dynamoe::{Budget, Sensitivity, tensors};
use dynamoe_model::checkpoint::{Checkpoint, save_model};
use dynamoe_model::export::{ExportOptions, export};
use moefy_train::prepare::convert;
use safetensors::Dtype;
use serde_json::Value;

use crate::support::{HIDDEN, values};
use crate::tools::{assert_says, calibration, export_dense, options, scratch};

#[test]
fn dense_export_undoes_the_conversion() {
    for shards in [1, 3] {
        let (dir, source) = scratch("MistralForCausalLM", Dtype::BF16, shards);
        let (out, back) = (dir.path().join("out"), dir.path().join("back"));
        convert(&source, Some(&calibration(&source)), &options(), &out).unwrap();
        let converted = Checkpoint::open(&out).unwrap();
        export_dense(&converted, &back).unwrap();
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
        assert_says(export_dense(&dense, &dir.path().join("again")), &["dense model already"]);
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
    let mut told = Vec::new();
    export(&routed, &to(Dtype::BF16, Some(2000)), &half, &mut |done, all| told.push((done, all))).unwrap();
    let half = Checkpoint::open(&half).unwrap();
    assert!(half.shards().len() > 3);
    let bytes: usize = half.names().map(|name| half.info(name).unwrap().len).sum();
    assert!(told.is_sorted() && told.iter().all(|(_, all)| *all == bytes as u64), "{told:?}");
    assert_eq!((told.len(), told.last().unwrap().0), (half.names().count(), bytes as u64));
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
    export(&half, &to(Dtype::F32, Some(u64::MAX)), &wide, &mut |_, _| {}).unwrap();
    let wide = Checkpoint::open(&wide).unwrap();
    assert_eq!(wide.shards().len(), 1);
    assert_eq!(values(&wide, "model.norm.weight"), values(&half, "model.norm.weight"));
    assert_says(
        export(&wide, &to(Dtype::I8, None), &dir.path().join("x"), &mut |_, _| {}),
        &["F32, F16 or BF16", "I8"],
    );
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
    let result = export(&Checkpoint::open(&big).unwrap(), &options, &dir.path().join("half"), &mut |_, _| {});
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
