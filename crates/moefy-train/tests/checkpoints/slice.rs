//! Ordinary models of less width.

use candle_core::{DType, Device, Tensor};
use dynamoe::{Routes, tensors};
use dynamoe_model::RoutedModel;
use dynamoe_model::checkpoint::Checkpoint;
use dynamoe_model::export::ExportOptions;
use dynamoe_model::slice::{Compensation, Slice, export_slice};
use moefy_train::prepare::{ConvertOptions, convert};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use serde_json::json;
use tempfile::TempDir;

use crate::support::{ARCHITECTURES, HIDDEN, LAYERS, WIDTH, contents, values};
use crate::tools::{WIDTHS, assert_nothing_written, assert_says, calibration, options, rewrite, scratch};

/// A converted checkpoint whose separate weights and compensation are nobody's copies.
fn converted(architecture: &str, dtype: Dtype, separate_shells: usize) -> (TempDir, Checkpoint) {
    let (dir, source) = scratch(architecture, dtype, 1);
    let out = dir.path().join("converted");
    let options = ConvertOptions { separate_shells, ..options() };
    convert(&source, Some(&calibration(&source)), &options, &out).unwrap();
    let converted = Checkpoint::open(&out).unwrap();
    rewrite(&converted, |name, mut bytes| {
        if name.contains(".own.") || name.contains("compensation") {
            let shift = if name.contains("up_proj") { 2 } else { 4 };
            bytes.rotate_right(shift * 8);
        }
        vec![(name.to_owned(), bytes)]
    });
    (dir, Checkpoint::open(&out).unwrap())
}

fn tokens() -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let ids: Vec<u32> = (0..2 * 9).map(|_| rng.random_range(0..20)).collect();
    Tensor::from_vec(ids, (2, 9), &Device::Cpu).unwrap()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Logits where every token takes expert `expert`.
fn logits_of(checkpoint: &Checkpoint, expert: usize) -> Tensor {
    let model = RoutedModel::load(checkpoint, &Device::Cpu).unwrap();
    let routes = vec![Routes(vec![expert; 18]); LAYERS];
    model.logits(&model.forward_with(&tokens(), &routes).unwrap()).unwrap()
}

#[test]
fn a_slice_as_wide_as_an_expert_computes_what_the_expert_does() {
    for (dtype, shells, bound) in [(Dtype::F32, 0, 1e-5), (Dtype::F32, 1, 1e-5), (Dtype::F32, 2, 1e-5)] {
        let (dir, source) = converted("LlamaForCausalLM", dtype, shells);
        for (expert, &width) in WIDTHS[..2].iter().enumerate() {
            let slice = Slice::of(&source, width as f64 / WIDTH as f64).unwrap();
            assert_eq!((slice.width, slice.compensation), (width, Compensation::Bias));
            let out = dir.path().join(format!("slice-{expert}"));
            export_slice(&source, &slice, &ExportOptions::default(), &out, &mut |_, _| {}).unwrap();
            let cut = Checkpoint::open(&out).unwrap();
            assert!(cut.config().dynamoe.is_none() && cut.config().mlp_bias);
            assert_eq!(cut.config().intermediate_size, width);
            let (expected, found) = (logits_of(&source, expert), logits_of(&cut, 0));
            let size = largest_difference(&expected, &expected.zeros_like().unwrap());
            let difference = largest_difference(&expected, &found);
            // f32 sums in the same order; a wrong neuron or a lost bias moves them by a tenth and more
            assert!(difference <= bound * size.max(1.0), "{shells} shells, expert {expert}: {difference}");
            let whole = largest_difference(&expected, &logits_of(&source, 2));
            assert!(whole > 0.1, "the fixture tells nothing: {whole}");
        }
    }
}

#[test]
fn a_slice_between_two_experts_takes_from_both() {
    let (dir, source) = converted("LlamaForCausalLM", Dtype::F32, 1);
    let slice = Slice::of(&source, 0.7).unwrap();
    // 16.8 of 24 neurons; 8, 12 and 24 are multiples of 4
    assert_eq!((slice.width, slice.multiple, slice.separate), (16, 4, 8));
    let out = dir.path().join("slice");
    export_slice(&source, &slice, &ExportOptions::default(), &out, &mut |_, _| {}).unwrap();
    let cut = Checkpoint::open(&out).unwrap();
    for layer in 0..LAYERS {
        let name = |name: &str| tensors::full_name(layer, name);
        let gate = values(&cut, &name(tensors::GATE_PROJ));
        assert_eq!(gate[..8 * HIDDEN], values(&source, &name(tensors::SEPARATE_GATE_PROJ)));
        assert_eq!(gate[8 * HIDDEN..], values(&source, &name(tensors::GATE_PROJ))[8 * HIDDEN..16 * HIDDEN]);
        let down = values(&cut, &name(tensors::DOWN_PROJ));
        let (own, all) =
            (values(&source, &name(tensors::SEPARATE_DOWN_PROJ)), values(&source, &name(tensors::DOWN_PROJ)));
        for (d, row) in down.chunks(16).enumerate() {
            assert_eq!(row[..8], own[d * 8..][..8]);
            assert_eq!(row[8..], all[d * WIDTH..][8..16]);
        }
        // a third of the way from the second expert to the largest, which has no compensation
        let compensation = values(&source, &name(tensors::COMPENSATION));
        let bias = values(&cut, &name("down_proj.bias"));
        for (found, expert) in bias.iter().zip(&compensation[HIDDEN..]) {
            assert!((found - expert * 2.0 / 3.0).abs() < 1e-6, "{found} {expert}");
        }
        assert!(values(&cut, &name("gate_proj.bias")).iter().all(|bias| *bias == 0.0));
        assert_eq!(values(&cut, &name("up_proj.bias")).len(), 16);
    }
}

#[test]
fn widths_are_rounded_to_blocks_that_fit_the_experts() {
    let (dir, source) = scratch("Qwen3ForCausalLM", Dtype::F32, 1);
    let width = |widths: [usize; 3], share: f64| {
        let out = dir.path().join("out");
        convert(
            &source,
            None,
            &ConvertOptions { expert_widths: widths.to_vec(), force: true, ..options() },
            &out,
        )
        .unwrap();
        let slice = Slice::of(&Checkpoint::open(&out).unwrap(), share).unwrap();
        (slice.width, slice.multiple)
    };
    assert_eq!(width([8, 16, 24], 0.5), (16, 8));
    assert_eq!(width([8, 16, 24], 0.01), (8, 8), "at least one block");
    assert_eq!(width([7, 12, 24], 0.3), (7, 1));
    assert_eq!(width([8, 12, 24], 1.0), (24, 4));
}

#[test]
fn where_the_ffn_has_no_biases_the_compensation_is_left_out() {
    for architecture in ARCHITECTURES {
        let (dir, source) = converted(architecture, Dtype::BF16, 1);
        let slice = Slice::of(&source, 0.5).unwrap();
        let biased = ["LlamaForCausalLM", "SmolLM3ForCausalLM", "GraniteForCausalLM"].contains(&architecture);
        assert_eq!(slice.compensation == Compensation::Bias, biased, "{architecture}");
        assert_eq!(slice.compensation == Compensation::LeftOut, !biased, "{architecture}");
        let out = dir.path().join("slice");
        let options =
            ExportOptions { dtype: Some(Dtype::F32), max_shard_bytes: Some(4000), ..Default::default() };
        export_slice(&source, &slice, &options, &out, &mut |_, _| {}).unwrap();
        let cut = Checkpoint::open(&out).unwrap();
        assert!(
            cut.shards().len() > 1 && cut.names().all(|name| cut.info(name).unwrap().dtype == Dtype::F32)
        );
        assert_eq!(cut.names().any(|name| name.ends_with("down_proj.bias")), biased);
        assert_eq!(cut.json()["mlp_bias"] == json!(true), biased);
        assert_eq!(
            (&cut.json()["architectures"], &cut.json()["torch_dtype"], &cut.json()["intermediate_size"]),
            (&json!([architecture]), &json!("float32"), &json!(12))
        );
        assert!(cut.json().get("auto_map").is_none() && !out.join("modeling_dynamoe.py").exists());
        assert_eq!(logits_of(&cut, 0).dims(), [18, 20]);
        // read and measured, but neither converted nor trained again
        if biased {
            let again = dir.path().join("again");
            let narrow = ConvertOptions { expert_widths: vec![8, 12], ..crate::tools::options() };
            assert_says(convert(&cut, None, &narrow, &again), &["mlp_bias"]);
            rewrite(&cut_whole(&source, dir.path()), |name, mut bytes| {
                if name.ends_with("up_proj.bias") {
                    bytes[3] = 1;
                }
                vec![(name.to_owned(), bytes)]
            });
            let biased = Checkpoint::open(&dir.path().join("whole")).unwrap();
            assert_says(RoutedModel::load(&biased, &Device::Cpu), &["up_proj.bias", "expected zeros"]);
        }
    }
}

/// A slice in one file.
fn cut_whole(source: &Checkpoint, dir: &std::path::Path) -> Checkpoint {
    let options = ExportOptions { dtype: Some(Dtype::F32), ..Default::default() };
    export_slice(source, &Slice::of(source, 0.5).unwrap(), &options, &dir.join("whole"), &mut |_, _| {})
        .unwrap();
    Checkpoint::open(&dir.join("whole")).unwrap()
}

#[test]
fn widths_that_are_none_and_dense_models_are_refused() {
    let (dir, source) = converted("LlamaForCausalLM", Dtype::F32, 0);
    let before = contents(dir.path());
    for share in [0.0, -0.5, 1.01, 2048.0, f64::NAN] {
        assert_says(Slice::of(&source, share), &["--width", "above 0 and at most 1"]);
    }
    let dense = Checkpoint::open(&dir.path().join("dense")).unwrap();
    assert_says(Slice::of(&dense, 0.5), &["dense", "a dense model; --width cuts a DynaMoE checkpoint"]);
    let slice = Slice::of(&source, 0.5).unwrap();
    assert_says(
        export_slice(&source, &slice, &ExportOptions::default(), &dir.path().join("dense"), &mut |_, _| {}),
        &["exists", "--force"],
    );
    assert_nothing_written(dir.path(), &before);
    let values = source.tensor("model.norm.weight", &[HIDDEN], DType::F32, &Device::Cpu);
    assert!(values.is_ok(), "the source is as it was");
}
