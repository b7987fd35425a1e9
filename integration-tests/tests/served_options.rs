//! What is trained is what is served: for each architecture and each option of config.json, the engine's logits are
//! the trainer's, or the engine refuses the option by its key. docs/engine.md shows what came out.

#[path = "support/engine.rs"]
mod engine;
mod support;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use candle_core::{Device, Tensor};
use dynamoe_mistralrs::Dial;
use dynamoe_model::{Checkpoint, RoutedModel};
use engine::{Engine, plain, try_build};
use mistralrs::{RequestBuilder, SamplingParams, TextMessageRole, TextModelBuilder};
use serde_json::{Value, json};
use support::{
    ARCHITECTURES, SMALL, Shape, VOCAB_SIZE, largest_difference, numbers, random, write, write_checkpoints,
};
use tempfile::TempDir;

/// Those whose windows the engine computes.
const WINDOWED: [&str; 5] =
    ["MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"];

/// Those that do not know `attention_bias`.
const UNBIASED: [&str; 2] = ["MistralForCausalLM", "Qwen2ForCausalLM"];

const SHAPE: Shape = Shape { layers: 3, expert_widths: [32, 64, 96, 128], ..SMALL };

/// Of logits.
const TOLERANCE: f32 = 1e-4;

/// Tokens of the prompt: more than any window here.
const LENGTH: u32 = 48;
const WINDOW: usize = 12;

/// A way to write config.json.
struct Variant {
    /// As docs/engine.md calls it.
    name: &'static str,
    /// Keys to set; null removes one.
    keys: Value,
    /// The key that a refusal names.
    key: &'static str,
    heads: [usize; 3],
    /// Whether the model computes something else with it, for those architectures that know it.
    matters: bool,
}

fn variant(name: &'static str, key: &'static str, keys: Value) -> Variant {
    Variant { name, keys, key, heads: SHAPE.heads, matters: true }
}

fn rope(section: Value) -> Value {
    json!({"rope_scaling": section})
}

fn variants() -> Vec<Variant> {
    let same = |variant: Variant| Variant { matters: false, ..variant };
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32
    });
    let newer = json!({"rope_type": "default", "rope_theta": 500.0});
    let sliding = |from: usize| json!({"use_sliding_window": true, "sliding_window": WINDOW, "max_window_layers": from});
    let mut off = sliding(0);
    off["use_sliding_window"] = false.into();
    let mut listed = sliding(0);
    listed["layer_types"] = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    let both = |mut one: Value, two: &Value| {
        one.as_object_mut().unwrap().extend(two.as_object().unwrap().clone());
        one
    };
    let bias = json!({"attention_bias": true});
    vec![
        same(variant("transformers 4's keys", "", json!({}))),
        same(variant(
            "only keys without a default",
            "",
            json!({
                "num_key_value_heads": null, "rms_norm_eps": null, "rope_theta": null, "hidden_act": null,
                "tie_word_embeddings": null, "use_sliding_window": null, "sliding_window": null,
                "max_window_layers": null, "attention_bias": null
            }),
        )),
        variant(
            "`rope_parameters` (transformers 5)",
            "rope_parameters",
            json!({"rope_parameters": newer, "rope_theta": null}),
        ),
        variant("`rope_theta`", "rope_theta", json!({"rope_theta": 500.0})),
        variant("`rope_scaling`: linear", "rope_scaling", rope(json!({"type": "linear", "factor": 4.0}))),
        variant("`rope_scaling`: llama3", "rope_scaling", rope(llama3)),
        variant("`rope_scaling`: yarn", "rope_scaling", rope(yarn.clone())),
        variant(
            "`rope_scaling`: yarn with all its keys",
            "rope_scaling",
            rope(both(
                json!({"beta_fast": 8.0, "beta_slow": 0.5, "truncate": false, "mscale": 1.5, "mscale_all_dim": 0.5}),
                &yarn,
            )),
        ),
        same(variant(
            "`rope_scaling`: dynamic",
            "rope_scaling",
            rope(json!({"type": "dynamic", "factor": 4.0})),
        )),
        variant(
            "`rope_scaling`: longrope",
            "rope_scaling",
            rope(json!({"rope_type": "longrope", "factor": 4.0})),
        ),
        variant("`attention_bias`", "attention_bias", bias.clone()),
        variant("`attention_bias` and yarn", "rope_scaling", both(bias.clone(), &rope(yarn.clone()))),
        Variant {
            heads: [4, 2, 24],
            ..same(variant("`head_dim` of its own", "head_dim", json!({"head_dim": 24})))
        },
        Variant {
            heads: [4, 2, 24],
            ..same(variant(
                "`head_dim` and `attention_bias`",
                "head_dim",
                both(json!({"head_dim": 24}), &bias),
            ))
        },
        variant("`sliding_window`", "sliding_window", sliding(0)),
        variant("`sliding_window` and yarn", "rope_scaling", both(sliding(0), &rope(yarn))),
        variant("`sliding_window` from `max_window_layers` on", "sliding_window", sliding(1)),
        variant("`sliding_window` by `layer_types`", "sliding_window", listed),
        variant("`sliding_window`, `use_sliding_window` false", "sliding_window", off),
        same(variant("`tie_word_embeddings`", "tie_word_embeddings", json!({"tie_word_embeddings": true}))),
        variant("`rms_norm_eps`", "rms_norm_eps", json!({"rms_norm_eps": 0.1})),
        variant("`hidden_act`: gelu", "hidden_act", json!({"hidden_act": "gelu"})),
        variant("`hidden_act`: gelu_pytorch_tanh", "hidden_act", json!({"hidden_act": "gelu_pytorch_tanh"})),
        variant("`no_rope_layers`", "no_rope_layers", json!({"no_rope_layers": [0, 1, 1]})),
        variant("`query_pre_attn_scalar`", "query_pre_attn_scalar", json!({"query_pre_attn_scalar": 64})),
        variant("`attn_logit_softcapping`", "attn_logit_softcapping", json!({"attn_logit_softcapping": 2.0})),
        variant(
            "`final_logit_softcapping`",
            "final_logit_softcapping",
            json!({"final_logit_softcapping": 2.0}),
        ),
        variant("`rope_local_base_freq`", "rope_local_base_freq", json!({"rope_local_base_freq": 700.0})),
        variant("`embedding_multiplier`", "embedding_multiplier", json!({"embedding_multiplier": 2.5})),
        variant("`attention_multiplier`", "attention_multiplier", json!({"attention_multiplier": 0.5})),
        variant("`residual_multiplier`", "residual_multiplier", json!({"residual_multiplier": 0.3})),
        variant("`logits_scaling`", "logits_scaling", json!({"logits_scaling": 3.0})),
        variant("`mlp_bias`", "mlp_bias", json!({"mlp_bias": true})),
        variant("`partial_rotary_factor`", "partial_rotary_factor", json!({"partial_rotary_factor": 0.5})),
    ]
}

/// Writes the checkpoints of a variant, `dense` and `dynamoe`.
fn checkpoints(architecture: &str, variant: &Variant) -> TempDir {
    let folder = TempDir::new().unwrap();
    let set = |key: &str| variant.keys.get(key);
    let mut shape =
        Shape { heads: variant.heads, tied: set("tie_word_embeddings") == Some(&true.into()), ..SHAPE };
    if set("num_key_value_heads") == Some(&Value::Null) {
        shape.heads[1] = shape.heads[0];
        if architecture == "Qwen3ForCausalLM" {
            shape.heads[2] = 128;
        }
    }
    let (mut tensors, config) = write_checkpoints(folder.path(), architecture, shape, 7);
    if !UNBIASED.contains(&architecture) && set("attention_bias") == Some(&true.into()) {
        let [heads, kv_heads, head_dim] = shape.heads;
        let sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, shape.hidden_size];
        for layer in 0..shape.layers {
            for (seed, (name, size)) in ["q", "k", "v", "o"].into_iter().zip(sizes).enumerate() {
                let name = format!("model.layers.{layer}.self_attn.{name}_proj.bias");
                tensors.insert(name, random(&[size], (10 * layer + seed) as u64));
            }
        }
    }
    for kind in ["dense", "dynamoe"] {
        let mut config = config.clone();
        if kind == "dense" {
            config["architectures"] = json!([architecture]);
            config["model_type"] = config["dynamoe"]["base_model_type"].take();
            config.as_object_mut().unwrap().shift_remove("dynamoe");
        }
        let map = config.as_object_mut().unwrap();
        for (key, value) in variant.keys.as_object().unwrap() {
            match value {
                Value::Null => drop(map.shift_remove(key)),
                value => drop(map.insert(key.clone(), value.clone())),
            }
        }
        if shape.heads[2] == 128 {
            map.shift_remove("head_dim");
        }
        if let Some(section) =
            map.get_mut("dynamoe").filter(|_| set("hidden_act") == Some(&"gelu_pytorch_tanh".into()))
        {
            section["version"] = 3.into();
            section["hidden_act"] = "gelu_pytorch_tanh".into();
        }
        write(&folder.path().join(kind), &config, &tensors);
    }
    folder
}

fn prompt() -> Vec<u32> {
    (0..LENGTH).map(|n| (n * 31 + n * n * 7) % VOCAB_SIZE as u32).collect()
}

fn trainers(folder: &Path) -> RoutedModel {
    RoutedModel::load(&Checkpoint::open(folder).unwrap(), &Device::Cpu).unwrap()
}

/// The trainer's logits of every one of `tokens`, at sensitivity 1.
fn expected(model: &RoutedModel, tokens: &[u32]) -> Vec<f32> {
    let input = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let (hidden, _) = model.forward(&input, &vec![1.0; model.config().num_hidden_layers]).unwrap();
    numbers(&model.logits(&hidden).unwrap())
}

/// Whether both checkpoints of a variant are served as they were trained. Otherwise both must be refused by the key.
async fn is_served(architecture: &str, variant: &Variant) -> bool {
    let folder = checkpoints(architecture, variant);
    let [dense, dynamoe] = ["dense", "dynamoe"].map(|kind| folder.path().join(kind));
    let case = format!("{architecture}, {}", variant.name);
    let engine = match load(&dynamoe).await {
        Ok(engine) => engine,
        Err(error) => {
            assert!(error.contains(&format!("\"{}\"", variant.key)), "{case}: {error}");
            // the engine itself has other activations
            if variant.key != "hidden_act" {
                let error = load(&dense).await.err().unwrap_or_else(|| panic!("{case}: dense is served"));
                assert!(error.contains(&format!("\"{}\"", variant.key)), "{case}: {error}");
            }
            return false;
        }
    };
    let expected = expected(&trainers(&dynamoe), &prompt());
    let served = engine.token_logits(&prompt(), Some(Dial::Sensitivity(1.0))).await;
    let difference = largest_difference(&served, &expected);
    assert!(difference <= TOLERANCE, "{case}: {difference}");
    drop(engine);
    let served = load(&dense).await.unwrap().token_logits(&prompt(), None).await;
    let difference = largest_difference(&served, &expected);
    assert!(difference <= TOLERANCE, "{case}, dense: {difference}");
    true
}

async fn load(folder: &Path) -> Result<Engine, String> {
    try_build(plain(&folder.display().to_string())).await.map_err(|error| format!("{error:#}"))
}

#[tokio::test]
async fn every_option_is_served_or_refused_as_the_table_says() {
    let mut table = String::from("| config.json |");
    for architecture in ARCHITECTURES {
        table += &format!(" {} |", architecture.trim_end_matches("ForCausalLM"));
    }
    table += &format!("\n| --- |{}\n", " --- |".repeat(ARCHITECTURES.len()));
    for variant in variants() {
        table += &format!("| {} |", variant.name);
        for architecture in ARCHITECTURES {
            let answer = if is_served(architecture, &variant).await { "served" } else { "refused" };
            table += &format!(" {answer} |");
        }
        table += "\n";
    }
    let docs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/engine.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    assert!(docs.contains(&table), "docs/engine.md should hold this table:\n{table}");
}

/// The test above would prove nothing about an option that the fixture makes no use of.
#[test]
fn the_options_matter() {
    for variant in variants().iter().filter(|variant| variant.matters) {
        let logits = |architecture: &str, keys: Value| {
            let variant = Variant { keys, ..self::variant("", "", Value::Null) };
            let folder = checkpoints(architecture, &variant);
            let checkpoint = Checkpoint::open(&folder.path().join("dynamoe")).ok()?;
            Some(expected(&RoutedModel::load(&checkpoint, &Device::Cpu).unwrap(), &prompt()))
        };
        let moved = |architecture: &str| {
            let plain = logits(architecture, json!({})).unwrap();
            // what the trainer refuses matters, too
            logits(architecture, variant.keys.clone())
                .is_none_or(|logits| largest_difference(&plain, &logits) > 0.01)
        };
        assert!(ARCHITECTURES.into_iter().any(moved), "{}", variant.name);
    }
}

fn windowed(architecture: &str) -> TempDir {
    let keys = json!({"use_sliding_window": true, "sliding_window": WINDOW, "max_window_layers": 1});
    checkpoints(architecture, &variant("", "", keys))
}

/// A text that the template of the fixture makes longer than a window.
const TEXT: &str = "Once upon a time there was a window.";

#[tokio::test]
async fn windows_hold_while_an_answer_is_written() {
    for architecture in WINDOWED {
        let folder = windowed(architecture);
        let model = trainers(&folder.path().join("dynamoe"));
        let engine = load(&folder.path().join("dynamoe")).await.unwrap();
        let dial = engine.handle().request(Dial::Sensitivity(1.0)).unwrap();
        let sampling = SamplingParams {
            temperature: Some(1.0),
            top_n_logprobs: VOCAB_SIZE,
            max_len: Some(16),
            ..SamplingParams::neutral()
        };
        let request = RequestBuilder::new()
            .return_logprobs(true)
            .set_sampling(sampling)
            .add_logits_processor(dial.processor())
            .add_message(TextMessageRole::User, TEXT);
        let answer = engine.model.send_chat_request(request).await.unwrap();
        let steps = answer.choices[0].logprobs.as_ref().unwrap().content.as_ref().unwrap();
        let mut tokens: Vec<u32> =
            [256].into_iter().chain(TEXT.bytes().chain(*b"\n").map(u32::from)).collect();
        for (n, step) in steps.iter().enumerate() {
            let logits = expected(&model, &tokens);
            let last = &logits[logits.len() - VOCAB_SIZE..];
            let sum: f64 = last.iter().map(|&logit| f64::from(logit).exp()).sum();
            for top in &step.top_logprobs {
                let ours = f64::from(top.logprob) * std::f64::consts::LN_10;
                let theirs = f64::from(last[top.token as usize]) - sum.ln();
                assert!((ours - theirs).abs() < 1e-3, "{architecture}, step {n}: {ours}, {theirs}");
            }
            let sampled = step.top_logprobs.iter().find(|top| top.logprob == step.logprob).unwrap();
            tokens.push(sampled.token);
        }
        assert!(!steps.is_empty());
    }
}

#[tokio::test]
async fn windows_hold_after_a_cached_prefix() {
    for architecture in WINDOWED {
        let folder = windowed(architecture);
        let dynamoe = folder.path().join("dynamoe").display().to_string();
        let without = try_build(plain(&dynamoe)).await.unwrap();
        let with = try_build(TextModelBuilder::new(&dynamoe).with_prefix_cache_n(Some(16))).await.unwrap();
        for text in [
            TEXT.to_owned(),
            format!("{TEXT}\nIt was clean."),
            format!("{TEXT}\nIt was not."),
            TEXT.to_owned(),
        ] {
            let dial = Dial::Sensitivity(1.0);
            assert_eq!(
                with.text(&text, dial).await,
                without.text(&text, dial).await,
                "{architecture}: {text}"
            );
        }
    }
}

/// What the server says of a model that it cannot serve, and its exit status.
fn server_says(model: &str, environment: &[(&str, &str)]) -> (String, Option<i32>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_serve"));
    command.args(["--model", model, "--port", "0", "--cpu", "--dtype", "f32"]).env("RUST_LOG", "error");
    let output = command.envs(environment.iter().copied()).output().unwrap();
    (String::from_utf8(output.stderr).unwrap(), output.status.code())
}

#[test]
fn the_hub_is_asked_as_the_environment_says() {
    let home = TempDir::new().unwrap();
    let home = ("HF_HOME", home.path().to_str().unwrap());
    // the discard port: refused at once
    let (said, status) = server_says("acme/tiny", &[home, ("HF_ENDPOINT", "http://127.0.0.1:9")]);
    assert!(
        said.contains("http://127.0.0.1:9/api/models/acme/tiny") && status == Some(1),
        "{status:?}: {said}"
    );
    let (said, status) = server_says("acme/tiny", &[home, ("HF_HUB_OFFLINE", "1")]);
    assert!(said.contains("HF_HUB_OFFLINE") && status == Some(1), "{status:?}: {said}");
}

#[tokio::test]
async fn weights_that_cannot_be_right_are_named() {
    let tied = variant("", "", json!({"tie_word_embeddings": true}));
    let broken = |variant: &Variant, kind: &str, name: &str, tensor: Tensor| {
        let folder = checkpoints("LlamaForCausalLM", variant);
        let file = folder.path().join(kind).join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        tensors.insert(name.to_owned(), tensor);
        candle_core::safetensors::save(&tensors, &file).unwrap();
        folder
    };
    let nan = |rows: usize, columns: usize| Tensor::full(f32::NAN, (rows, columns), &Device::Cpu).unwrap();
    for (kind, name, tensor) in [
        ("dynamoe", "model.layers.1.self_attn.q_proj.weight", nan(64, 64)),
        ("dynamoe", "model.layers.1.mlp.up_proj.weight", nan(128, 64)),
        ("dynamoe", "model.layers.2.mlp.router.fc1.weight", nan(8, 64)),
        ("dense", "model.layers.1.mlp.up_proj.weight", nan(128, 64)),
    ] {
        let folder = broken(&variant("", "", json!({})), kind, name, tensor);
        let error = load(&folder.path().join(kind)).await.err().unwrap_or_else(|| panic!("{kind}, {name}"));
        assert!(error.contains(name) && error.contains("NaN"), "{error}");
        let (said, status) = server_says(folder.path().join(kind).to_str().unwrap(), &[]);
        assert!(said.contains(name) && status == Some(1), "{status:?}: {said}");
    }
    for kind in ["dynamoe", "dense"] {
        let folder = broken(&tied, kind, "lm_head.weight", random(&[VOCAB_SIZE, 64], 1));
        let error = load(&folder.path().join(kind)).await.err().unwrap_or_else(|| panic!("{kind}"));
        assert!(error.contains("lm_head.weight") && error.contains("tie_word_embeddings"), "{error}");
    }
}
