//! DynaMoE models in the real engine: full width equals the dense model, routed logits equal the trainer's,
//! quantization and UQFF keep both.

#[path = "support/engine.rs"]
mod engine;
mod support;

use std::path::PathBuf;

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor},
};
use dynamoe_mistralrs::Dial;
use dynamoe_model::{ModelConfig, RoutedModel};
use engine::{Engine, LOADING, PROMPT, build, plain};
use mistralrs::{IsqType, ModelDType, TextModelBuilder, UqffTextModelBuilder};
use support::{Checkpoints, FOR_K_QUANTS, SMALL, Shape, checkpoints, largest_difference, numbers};

/// The trainer's logits for the engine's tokens.
fn trainers_logits(checkpoints: &Checkpoints, tokens: &[u32], sensitivity: &[f64]) -> Vec<f32> {
    let config = ModelConfig::from_json(&checkpoints.config).unwrap();
    let model = RoutedModel::from_tensors(&config, &mut |name, shape| checkpoints.get(name, shape)).unwrap();
    let tokens = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let (hidden, _) = model.forward(&tokens, sensitivity).unwrap();
    numbers(&model.logits(&hidden).unwrap())
}

async fn full_width_equals_dense(architecture: &str, shape: Shape) -> (Checkpoints, Engine) {
    let checkpoints = checkpoints(architecture, shape, 1);
    let (dense, _, _) = build(plain(&checkpoints.dense())).await.logits(None).await;
    let engine = build(plain(&checkpoints.dynamoe())).await;
    let (full, _, width) = engine.logits(Some(Dial::Sensitivity(1.0))).await;
    assert_eq!(width, Some(1.0));
    let difference = largest_difference(&dense, &full);
    let largest = dense.iter().fold(1f32, |largest, x| largest.max(x.abs()));
    println!("{architecture}: dense and full width differ by {difference:e} in logits of up to {largest}");
    assert!(difference <= 1e-5 * largest, "{architecture}: {difference}");

    let (narrow, _, width) = engine.logits(Some(Dial::Sensitivity(0.0))).await;
    assert_eq!(width, Some(0.25));
    assert!(largest_difference(&dense, &narrow) > 1e-2, "{architecture}: the dial has no effect");
    (checkpoints, engine)
}

async fn routed_equals_the_trainers(architecture: &str, shape: Shape) {
    let (checkpoints, engine) = full_width_equals_dense(architecture, shape).await;
    for sensitivity in [0.0, 0.4, 0.5, 0.6, 1.0] {
        let (ours, tokens, width) = engine.logits(Some(Dial::Sensitivity(sensitivity))).await;
        let theirs = trainers_logits(&checkpoints, &tokens, &[sensitivity; SMALL.layers]);
        let difference = largest_difference(&ours, &theirs);
        println!("{architecture} at {sensitivity}: mean width {width:?}, difference {difference:e}");
        assert!(difference <= 1e-4, "{architecture} at {sensitivity}: {difference}");
        if sensitivity == 0.5 {
            assert!(
                width.is_some_and(|width| width > 0.3 && width < 0.95),
                "routes are all alike: {width:?}"
            );
        }
    }
    let (ours, tokens, _) = engine.logits(Some(Dial::Budget(0.5))).await;
    let theirs = trainers_logits(&checkpoints, &tokens, &[0.3, 0.4]);
    assert!(largest_difference(&ours, &theirs) <= 1e-4, "{architecture}: a budget, layer by layer");
}

#[tokio::test]
async fn llama() {
    routed_equals_the_trainers("LlamaForCausalLM", SMALL).await;
}

#[tokio::test]
async fn mistral() {
    routed_equals_the_trainers("MistralForCausalLM", SMALL).await;
}

#[tokio::test]
async fn qwen2() {
    routed_equals_the_trainers("Qwen2ForCausalLM", SMALL).await;
}

#[tokio::test]
async fn qwen3() {
    routed_equals_the_trainers("Qwen3ForCausalLM", SMALL).await;
}

#[tokio::test]
async fn smollm3() {
    routed_equals_the_trainers("SmolLM3ForCausalLM", SMALL).await;
}

#[tokio::test]
async fn gemma() {
    routed_equals_the_trainers("GemmaForCausalLM", SMALL).await;
}

#[tokio::test]
async fn gemma2() {
    routed_equals_the_trainers("Gemma2ForCausalLM", SMALL).await;
}

#[tokio::test]
async fn gemma3() {
    routed_equals_the_trainers("Gemma3ForCausalLM", SMALL).await;
}

#[tokio::test]
async fn granite() {
    routed_equals_the_trainers("GraniteForCausalLM", SMALL).await;
}

#[tokio::test]
async fn smaller_experts_with_separate_shells() {
    for separate_shells in [1, 3] {
        routed_equals_the_trainers("LlamaForCausalLM", Shape { separate_shells, ..SMALL }).await;
    }
}

/// Shell widths that fit the blocks of a quantization give the very blocks of the dense matrices. What is left between
/// dense and full width is the rounding of activations to 8 bits: shells are summed in another order than a whole FFN,
/// which moves some activations of later layers to the next step. So both are as far from the blocks' exact logits, which
/// candle computes without either.
async fn quantized_equals_dense_quantized(isq: IsqType, blocks: GgmlDType) {
    let checkpoints = checkpoints("LlamaForCausalLM", FOR_K_QUANTS, 2);
    let rounded = checkpoints.write_dense("rounded", |name, weight| {
        if !name.contains("proj") && !name.contains("lm_head") {
            return weight.clone();
        }
        QTensor::quantize(weight, blocks).unwrap().dequantize(&Device::Cpu).unwrap()
    });
    let (original, _, _) = build(plain(&checkpoints.dense())).await.logits(None).await;
    let (exact, _, _) = build(plain(&rounded)).await.logits(None).await;
    let (dense, _, _) = build(plain(&checkpoints.dense()).with_isq(isq)).await.logits(None).await;
    let engine = build(plain(&checkpoints.dynamoe()).with_isq(isq)).await;
    let (full, _, _) = engine.logits(Some(Dial::Sensitivity(1.0))).await;
    let (of_weights, of_dense, of_full) = (
        largest_difference(&original, &exact),
        largest_difference(&exact, &dense),
        largest_difference(&exact, &full),
    );
    let apart = largest_difference(&dense, &full);
    println!(
        "{isq:?}: rounding weights moves logits by {of_weights:e}, rounding activations by {of_dense:e} (dense) and \
         {of_full:e} (full width), {apart:e} apart"
    );
    assert!(of_weights > 1e-3, "{isq:?} quantized nothing");
    // the largest of some ten thousand differences of one spread: another draw of it is within a factor of 1.5
    assert!(of_full <= 1.5 * of_dense, "{isq:?}: full width is farther from the blocks' logits than dense");
    // two draws of that spread differ by less than the sum of both
    assert!(apart <= of_dense + of_full, "{isq:?}: {apart}");
}

#[tokio::test]
async fn q8_0_equals_dense_quantized() {
    quantized_equals_dense_quantized(IsqType::Q8_0, GgmlDType::Q8_0).await;
}

#[tokio::test]
async fn q4k_equals_dense_quantized() {
    quantized_equals_dense_quantized(IsqType::Q4K, GgmlDType::Q4K).await;
}

#[tokio::test]
async fn uqff_round_trip() {
    uqff_keeps_logits(FOR_K_QUANTS).await;
    uqff_keeps_logits(Shape { separate_shells: 1, ..FOR_K_QUANTS }).await;
}

async fn uqff_keeps_logits(shape: Shape) {
    let checkpoints = checkpoints("Qwen3ForCausalLM", shape, 3);
    let folder = checkpoints.folder().join("uqff");
    let writer = plain(&checkpoints.dynamoe()).with_isq(IsqType::Q8_0).write_uqff(folder.join("q8_0.uqff"));
    let written = build(writer).await;
    let reader = UqffTextModelBuilder::new(folder.display(), vec![PathBuf::from("q8_0-0.uqff")]);
    let read = build(reader.into_inner().with_prefix_cache_n(None)).await;
    for sensitivity in [0.0, 0.5, 1.0] {
        let (before, _, width) = written.logits(Some(Dial::Sensitivity(sensitivity))).await;
        let (after, _, width_after) = read.logits(Some(Dial::Sensitivity(sensitivity))).await;
        assert_eq!(width, width_after, "routers are kept in full precision");
        assert_eq!(largest_difference(&before, &after), 0.0, "at {sensitivity}");
    }
}

#[tokio::test]
async fn quantizing_again_keeps_the_dial() {
    let checkpoints = checkpoints("LlamaForCausalLM", Shape { separate_shells: 2, ..FOR_K_QUANTS }, 4);
    let engine = build(plain(&checkpoints.dynamoe())).await;
    let (exact, _, width) = engine.logits(Some(Dial::Sensitivity(0.0))).await;
    engine.model.re_isq_model(IsqType::Q8_0).await.unwrap();
    let (again, _, width_after) = engine.logits(Some(Dial::Sensitivity(0.0))).await;
    assert_eq!((width, width_after), (Some(0.25), Some(0.25)));
    assert!(largest_difference(&exact, &again) > 0.0, "nothing was quantized");
    // the same blocks on the same kernels
    let at_once = build(plain(&checkpoints.dynamoe()).with_isq(IsqType::Q8_0)).await;
    let (at_once, _, _) = at_once.logits(Some(Dial::Sensitivity(0.0))).await;
    assert_eq!(largest_difference(&at_once, &again), 0.0);
}

/// A prefix that was computed at one dial must not serve another, and must serve its own.
#[tokio::test]
async fn the_prefix_cache_is_kept_apart_by_the_dial() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 5);
    let without = build(plain(&checkpoints.dynamoe())).await;
    let with = build(TextModelBuilder::new(checkpoints.dynamoe()).with_prefix_cache_n(Some(16))).await;
    let longer = format!("{PROMPT} And then?");
    for dial in [Dial::Sensitivity(0.0), Dial::Sensitivity(1.0), Dial::Sensitivity(0.5)] {
        assert_eq!(with.text(PROMPT, dial).await, without.text(PROMPT, dial).await);
        assert_eq!(with.text(&longer, dial).await, without.text(&longer, dial).await, "{dial:?}");
    }
    // tokens that came from the cache are not computed again: the hit shows in what a request counts
    let tokens = |engine: &Engine| -> u64 {
        engine.handle().counters().layers().iter().flat_map(|layer| layer.tokens.clone()).sum()
    };
    assert!(tokens(&with) < tokens(&without), "the cache was never hit");
}

#[tokio::test]
async fn the_default_dial_is_the_checkpoints_and_can_be_set() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 6);
    let engine = build(plain(&checkpoints.dynamoe())).await;
    let handle = engine.handle();
    assert_eq!(handle.dial(), Dial::Sensitivity(0.5));
    for dial in [Dial::Sensitivity(0.5), Dial::Sensitivity(0.0), Dial::Budget(0.75)] {
        handle.set_dial(dial).unwrap();
        let (default, _, _) = engine.logits(None).await;
        let (explicit, _, _) = engine.logits(Some(dial)).await;
        assert_eq!(default, explicit, "{dial:?}");
    }
}

#[tokio::test]
async fn a_broken_checkpoint_says_what_is_wrong() {
    let _one = LOADING.lock().await;
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 7);
    let path = PathBuf::from(checkpoints.dynamoe()).join("config.json");
    let error = |change: fn(&mut serde_json::Value)| {
        let mut config = checkpoints.config.clone();
        change(&mut config);
        std::fs::write(&path, config.to_string()).unwrap();
        let builder = plain(&checkpoints.dynamoe()).with_force_cpu().with_dtype(ModelDType::F32);
        async move { format!("{:#}", builder.build().await.map(|_| ()).unwrap_err()) }
    };
    let widths = error(|config| config["dynamoe"]["expert_widths"] = vec![64, 32].into()).await;
    assert!(widths.contains("expert_widths"), "{widths}");
    let router = error(|config| config["dynamoe"]["router"]["hidden_size"] = 9.into()).await;
    assert!(router.contains("router.fc1.weight"), "{router}");
    let base = error(|config| config["dynamoe"]["base_architecture"] = "PhiForCausalLM".into()).await;
    assert!(base.contains("PhiForCausalLM"), "{base}");
}
