//! Add-ons that are broken, or belong to another model.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use dynamoe::config::{RouterConfig, RouterKind};
use dynamoe::tensors;
use dynamoe_model::checkpoint::{ADD_ON_CONFIG, ADD_ON_TENSORS, AddOn, Checkpoint, write_add_on};
use moefy_train::prepare::{ConvertOptions, convert};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A base in `dense` and an add-on to it in `add-on`.
fn made(separate_shells: usize) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (dense, out, add_on) = (dir.path().join("dense"), dir.path().join("out"), dir.path().join("add-on"));
    support::write(&dense, &support::config("Qwen3ForCausalLM"), Dtype::BF16, 2);
    let base = Checkpoint::open(&dense).unwrap();
    let options = ConvertOptions {
        expert_widths: vec![8, 12, support::WIDTH],
        separate_shells,
        router: RouterConfig { kind: RouterKind::Mlp, hidden_size: 5, compensation: true },
        seed: 3,
        sensitivity: 0.9,
        force: false,
        max_shard_bytes: None,
    };
    convert(&base, None, &options, &out).unwrap();
    write_add_on(&Checkpoint::open(&out).unwrap(), &base, "org/base", &add_on, false).unwrap();
    (dir, add_on)
}

fn open(dir: &Path) -> anyhow::Result<Checkpoint> {
    Checkpoint::open(&dir.join("dense")).unwrap().with_add_on(&dir.join("add-on"))
}

fn message(dir: &Path) -> String {
    match open(dir) {
        Ok(_) => panic!("an error was expected"),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn base_and_add_on_read_like_the_whole_checkpoint() {
    for separate_shells in [0, 1, 2] {
        let (dir, add_on) = made(separate_shells);
        let (joined, whole) = (open(dir.path()).unwrap(), Checkpoint::open(&dir.path().join("out")).unwrap());
        assert_eq!(joined.config(), whole.config());
        assert_eq!(joined.json(), whole.json());
        assert!(joined.names().eq(whole.names()));
        for name in whole.names() {
            assert_eq!(joined.read_bytes(name).unwrap(), whole.read_bytes(name).unwrap(), "{name}");
        }
        let read = AddOn::read(&add_on).unwrap();
        assert_eq!((read.version, read.base.name.as_str()), (1, "org/base"));
        let again = dir.path().join("again");
        let base = Checkpoint::open(&dir.path().join("dense")).unwrap();
        write_add_on(&joined, &base, "org/base", &again, false).unwrap();
        assert_eq!(support::contents(&again), support::contents(&add_on));
    }
}

#[test]
fn broken_descriptions_are_refused() {
    type Change = fn(&mut Value);
    let cases: [(Change, &[&str]); 7] = [
        (|json| json["version"] = json!(2), &["version", "found 2", "newer"]),
        (|json| json["version"] = Value::Null, &["version", "null"]),
        (|json| json["extra"] = json!(1), &["extra"]),
        (|json| json["base"]["sha256"] = json!("00"), &["belongs to org/base", "another model"]),
        (|json| json["dynamoe"]["expert_widths"] = json!([8, 12, 23]), &["add_on.json", "23"]),
        (|json| json["dynamoe"]["base_architecture"] = json!("LlamaForCausalLM"), &["LlamaForCausalLM"]),
        (|json| drop(json.as_object_mut().unwrap().remove("dynamoe")), &["dynamoe"]),
    ];
    for (damage, words) in cases {
        let (dir, add_on) = made(1);
        let path = add_on.join(ADD_ON_CONFIG);
        let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        damage(&mut json);
        fs::write(&path, json.to_string()).unwrap();
        let message = message(dir.path());
        for word in words {
            assert!(message.contains(word), "{word:?} not in: {message}");
        }
    }
}

#[test]
fn broken_tensors_are_refused() {
    let order = tensors::full_name(1, tensors::ORDER);
    let fc1 = tensors::full_name(0, tensors::ROUTER_FC1_WEIGHT);
    let numbers = |values: Vec<f32>| values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
    let count = |from: usize| (from..from + support::WIDTH).map(|n| n as f32);
    let twice = numbers(count(0).map(|n| n.max(1.0)).collect());
    let beyond = numbers(count(1).collect());
    let halves = numbers(count(0).map(|n| n + 0.5).collect());
    for (name, bytes, word) in [
        (&order, Some(&twice), "once"),
        (&order, Some(&beyond), "once"),
        (&order, Some(&halves), "once"),
        (&order, None, "order of layer 1"),
        (&fc1, None, "router.fc1.weight"),
    ] {
        let (dir, add_on) = made(1);
        let path = add_on.join(ADD_ON_TENSORS);
        let text = fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&text).unwrap();
        let mut tensors = Vec::new();
        for (found, view) in file.iter() {
            let data = if found == name { bytes.map(Vec::as_slice) } else { Some(view.data()) };
            let Some(data) = data else { continue };
            tensors.push((found, TensorView::new(view.dtype(), view.shape().to_vec(), data).unwrap()));
        }
        let damaged = safetensors::serialize(tensors, None).unwrap();
        fs::write(&path, damaged).unwrap();
        let message = message(dir.path());
        assert!(message.contains(word), "{word:?} not in: {message}");
    }
    let (dir, add_on) = made(0);
    fs::copy(dir.path().join("out/model-00001-of-00002.safetensors"), add_on.join(ADD_ON_TENSORS)).unwrap();
    assert!(message(dir.path()).contains("is no part of an add-on"));
}

#[test]
fn an_add_on_knows_its_base_by_every_weight() {
    let (dir, _) = made(1);
    let path = dir.path().join("dense/model-00002-of-00002.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(message(dir.path()).contains("another model"));
    let (dir, _) = made(1);
    let base = Checkpoint::open(&dir.path().join("out")).unwrap();
    let error = base.with_add_on(&dir.path().join("add-on")).err().unwrap();
    assert!(format!("{error:#}").contains("belongs to a dense model"));
    let dense = Checkpoint::open(&dir.path().join("dense")).unwrap();
    let error = write_add_on(&dense, &dense, "x", &dir.path().join("no"), false).unwrap_err();
    assert!(format!("{error:#}").contains("nothing to add"));
    assert!(dense.with_add_on(dir.path()).err().unwrap().to_string().contains("add_on.json"));
    assert!(!dir.path().join("no").exists());
}
