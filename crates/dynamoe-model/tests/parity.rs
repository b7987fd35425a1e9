//! The model agrees with transformers: fixtures made by tests/fixtures/make_fixtures.py.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, safetensors};
use dynamoe::train::glu::glu;
use dynamoe_model::config::ModelConfig;
use dynamoe_model::model::Backbone;

/// Every tensor of the folder, in f32.
fn tensors(dir: &Path) -> Result<HashMap<String, Tensor>> {
    let mut all = HashMap::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).context("a file without a name")?;
        if name.starts_with("model") && name.ends_with(".safetensors") {
            for (name, tensor) in safetensors::load(&path, &Device::Cpu)? {
                all.insert(name, tensor.to_dtype(DType::F32)?);
            }
        }
    }
    Ok(all)
}

/// `(B, T, V)` of the dense model in `dir`.
fn logits(dir: &Path, tokens: &Tensor) -> Result<Tensor> {
    let config = ModelConfig::read(dir)?;
    let tensors = tensors(dir)?;
    let get = |name: &str| tensors.get(name).cloned().with_context(|| format!("{name} is missing"));
    let model = Backbone::from_tensors(&config, &mut |name, _shape| get(name))?;
    let hidden = model.forward(&tokens.to_dtype(DType::U32)?, &mut |layer, x| {
        let w =
            |name: &str| get(&format!("model.layers.{layer}.mlp.{name}.weight")).expect("an FFN tensor").t();
        let h = glu(config.hidden_act, &x.matmul(&w("gate_proj")?)?, &x.matmul(&w("up_proj")?)?)?;
        h.matmul(&w("down_proj")?)
    })?;
    let (b, t) = tokens.dims2()?;
    Ok(model.logits(&hidden)?.reshape((b, t, config.vocab_size))?)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()?)
}

/// Compares the model in `fixture` with its expected logits.
fn check(fixture: &str) -> Result<()> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(fixture);
    let expected = safetensors::load(dir.join("expected.safetensors"), &Device::Cpu)?;
    let actual = logits(&dir, &expected["input_ids"])?;
    let spread = largest_difference(&expected["logits"], &expected["logits"].zeros_like()?)?;
    ensure!(spread > 1.0, "{fixture}: the fixture's logits are too small to tell anything: {spread}");
    let difference = largest_difference(&actual, &expected["logits"])?;
    // two layers of f32 sums in another order move logits of size 1 to 10 by some 1e-6; a wrong option moves them by 1e-2
    ensure!(difference < 1e-4, "{fixture}: logits differ by {difference}");
    Ok(())
}

macro_rules! fixtures {
    ($($test:ident: $folder:literal,)*) => {
        $(#[test]
        fn $test() -> Result<()> {
            check($folder)
        })*

        #[test]
        fn every_fixture_is_checked() -> Result<()> {
            let checked = [$($folder),*];
            for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"))? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                let fixture = entry.path().join("expected.safetensors").exists();
                ensure!(!fixture || checked.contains(&name.as_str()), "{name} has no test");
            }
            Ok(())
        }
    };
}

fixtures! {
    llama: "llama",
    llama_attention_bias: "llama-attention-bias",
    llama_bf16: "llama-bf16",
    llama_f16: "llama-f16",
    llama_linear_rope: "llama-linear-rope",
    llama_sharded: "llama-sharded",
    llama3_rope_tied: "llama3-rope-tied",
    llama3_rope_v5: "llama3-rope-v5",
    mistral_window: "mistral-window",
    qwen2_tied: "qwen2-tied",
    qwen2_window: "qwen2-window",
    qwen2_window_v5: "qwen2-window-v5",
    qwen3: "qwen3",
    qwen3_attention_bias: "qwen3-attention-bias",
    qwen3_window_v5: "qwen3-window-v5",
    llama_head_dim: "llama-head-dim",
    llama_dynamic_rope: "llama-dynamic-rope",
    mistral_linear_rope: "mistral-linear-rope",
    qwen2_linear_rope: "qwen2-linear-rope",
    qwen2_yarn: "qwen2-yarn",
    qwen3_yarn_v5: "qwen3-yarn-v5",
    smollm3: "smollm3",
    smollm3_window_bias: "smollm3-window-bias",
    gemma: "gemma",
    gemma_untied_bias_v5: "gemma-untied-bias-v5",
    gemma2: "gemma2",
    gemma2_uncapped_v5: "gemma2-uncapped-v5",
    gemma3: "gemma3",
    gemma3_capped_v5: "gemma3-capped-v5",
    granite: "granite",
    granite_bias_v5: "granite-bias-v5",
}
