//! The loss of a DynaMoE model in the engine is what the trainer says it is.

#[path = "support/engine.rs"]
mod engine;
#[path = "support/http.rs"]
mod http;
mod support;

use std::path::Path;

use candle_core::{Device, Tensor};
use dynamoe_mistralrs::Dial;
use dynamoe_model::{Checkpoint, RoutedModel};
use engine::{build, plain};
use http::{Server, chat, with};
use moefy_train::{
    data::{PaddedBatch, Scope, TextOptions, Texts, load_tokenizer},
    evaluate::{Setting, point},
    progress::Progress,
    ranks::Alone,
};
use rand::{Rng, SeedableRng};
use serde_json::Value;
use support::{SMALL, VOCAB_SIZE, checkpoints, numbers};

/// Nats per token.
const TOLERANCE: f64 = 1e-3;

/// The tokens of a batch's row and the token after each.
fn row(batch: &PaddedBatch, row: usize) -> (&[u32], &[u32]) {
    let all = row * batch.length..(row + 1) * batch.length;
    let tokens = batch.weights[all.clone()].iter().filter(|&&weight| weight > 0.0).count();
    let scored = all.start..all.start + tokens;
    (&batch.tokens[scored.clone()], &batch.targets[scored])
}

/// Sum over `targets` of the negative logarithm of their probability.
fn loss(logits: &[f32], targets: &[u32]) -> f64 {
    let of_token = |(logits, &target): (&[f32], &u32)| {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
        sum.ln() - f64::from(logits[target as usize] - largest)
    };
    logits.chunks_exact(logits.len() / targets.len()).zip(targets).map(of_token).sum()
}

/// Measures the same text in both, and prints what came out.
async fn losses_agree(folder: &Path, batches: &[PaddedBatch], sensitivities: [f64; 3]) {
    let engine = build(plain(&folder.display().to_string())).await;
    let checkpoint = Checkpoint::open(folder).unwrap();
    let model = RoutedModel::load(&checkpoint, &Device::Cpu).unwrap();
    for sensitivity in sensitivities {
        let (mut sum, mut tokens) = (0.0, 0);
        for batch in batches {
            for (inputs, targets) in (0..batch.batch_size).map(|n| row(batch, n)) {
                let logits = engine.token_logits(inputs, Some(Dial::Sensitivity(sensitivity))).await;
                sum += loss(&logits, targets);
                tokens += targets.len();
            }
        }
        let setting = Setting::uniform(sensitivity, model.config().num_hidden_layers);
        let trainers = point(&model, batches, &setting, &Progress::hidden(), &Alone).unwrap();
        let ours = sum / tokens as f64;
        println!(
            "sensitivity {sensitivity}, {tokens} tokens, mean width {:.3}: engine {ours:.5}, trainer {:.5}",
            trainers.mean_width, trainers.loss
        );
        assert_eq!(tokens, trainers.tokens);
        assert!((ours - trainers.loss).abs() <= TOLERANCE, "{ours}, {}", trainers.loss);
    }
}

#[tokio::test]
async fn the_engines_loss_is_the_trainers() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 31);
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(32);
    let (batch_size, length) = (6, 48);
    let mut tokens = || (0..batch_size * length).map(|_| rng.random_range(0..VOCAB_SIZE as u32)).collect();
    let batch = PaddedBatch {
        batch_size,
        length,
        tokens: tokens(),
        targets: tokens(),
        weights: vec![1.0; batch_size * length],
        items: (0..batch_size).collect(),
    };
    losses_agree(Path::new(&checkpoints.dynamoe()), &[batch], [0.4, 0.5, 1.0]).await;
}

/// A real checkpoint on real text:
///
/// ```sh
/// DYNAMOE_CHECKPOINT=DIR DYNAMOE_TEXT=FILE \
///   cargo test --release -p dynamoe-integration-tests --test loss -- --ignored --nocapture
/// ```
#[tokio::test]
#[ignore = "needs a checkpoint in DYNAMOE_CHECKPOINT and a text in DYNAMOE_TEXT"]
async fn the_loss_of_a_real_checkpoint_is_the_trainers() {
    let variable = |name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let (folder, text) = (variable("DYNAMOE_CHECKPOINT"), variable("DYNAMOE_TEXT"));
    let folder = Path::new(&folder);
    let cache = tempfile::tempdir().unwrap();
    let options = TextOptions { cache_dir: Some(cache.path().to_owned()), ..TextOptions::default() };
    let texts = Texts::open(&Checkpoint::open(folder).unwrap(), &options).unwrap();
    let batches = texts.scored(&[text.parse().unwrap()], Scope::Packed(256)).unwrap();
    let batches = &batches[..batches.len().min(4)];
    losses_agree(folder, batches, [0.5, 0.8, 1.0]).await;
}

/// Samples an answer over HTTP, and compares the probabilities of its tokens. `prompt` are the tokens of the
/// prompt in the served template.
fn logprobs_agree(server: &Server, folder: &str, text: &str, prompt: &[u32], sensitivities: [f64; 3]) {
    let model = RoutedModel::load(&Checkpoint::open(Path::new(folder)).unwrap(), &Device::Cpu).unwrap();
    let (vocab_size, layers) = (model.config().vocab_size, model.config().num_hidden_layers);
    for sensitivity in sensitivities {
        let mut body = with(chat(text, 16), "sensitivity", sensitivity);
        for (field, value) in
            [("temperature", Value::from(1)), ("logprobs", true.into()), ("top_logprobs", vocab_size.into())]
        {
            body = with(body, field, value);
        }
        let answer = server.json("/v1/chat/completions", &body);
        let steps = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
        let mut tokens = prompt.to_vec();
        tokens.extend(steps.iter().map(|step| token_of(folder, step)));
        let (mut ours, mut theirs) = (0.0, 0.0);
        let input = Tensor::new(&tokens[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let (hidden, _) = model.forward(&input, &vec![sensitivity; layers]).unwrap();
        let logits = numbers(&model.logits(&hidden).unwrap());
        for (n, step) in steps.iter().enumerate() {
            let position = prompt.len() + n;
            let logits = &logits[(position - 1) * vocab_size..position * vocab_size];
            theirs += loss(logits, &tokens[position..=position]);
            ours -= step["logprob"].as_f64().unwrap();
        }
        let (ours, theirs) = (ours / steps.len() as f64, theirs / steps.len() as f64);
        println!("sensitivity {sensitivity}, {} tokens: server {ours:.5}, trainer {theirs:.5}", steps.len());
        assert!(!steps.is_empty() && (ours - theirs).abs() <= TOLERANCE, "{ours}, {theirs}");
    }
}

#[test]
fn the_servers_logprobs_are_the_trainers() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 33);
    let server = Server::start(&checkpoints.dynamoe(), &["--max-top-logprobs", "300"]);
    // the template of the fixture: <s>, the text, a newline
    let prompt: Vec<u32> = [256].into_iter().chain("Once upon a time\n".bytes().map(u32::from)).collect();
    logprobs_agree(&server, &checkpoints.dynamoe(), "Once upon a time", &prompt, [0.4, 0.5, 1.0]);
}

/// A real checkpoint, whose tokenizer adds a token at the beginning:
///
/// ```sh
/// DYNAMOE_CHECKPOINT=DIR cargo test --release -p dynamoe-integration-tests --test loss -- --ignored --nocapture
/// ```
#[test]
#[ignore = "needs a checkpoint in DYNAMOE_CHECKPOINT"]
fn the_servers_logprobs_of_a_real_checkpoint_are_the_trainers() {
    let folder = std::env::var("DYNAMOE_CHECKPOINT").expect("DYNAMOE_CHECKPOINT is not set");
    let checkpoint = Checkpoint::open(Path::new(&folder)).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let template = scratch.path().join("template.jinja");
    std::fs::write(&template, "{{ messages[0]['content'] }}").unwrap();
    let server = Server::start(
        &folder,
        &["--max-top-logprobs", "1000", "--chat-template", &template.display().to_string()],
    );
    for text in
        ["Once upon a time, there was a", "The little dog was", "One day, Lily and her mom went to the"]
    {
        let tokenizer = load_tokenizer(checkpoint.dir(), checkpoint.config().vocab_size).unwrap();
        let prompt = tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        logprobs_agree(&server, &folder, text, &prompt, [0.5, 0.8, 1.0]);
    }
}

/// The token that an answer's step took, by its name.
fn token_of(folder: &str, step: &Value) -> u32 {
    let bytes: Vec<u8> =
        step["bytes"].as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8).collect();
    match bytes.as_slice() {
        // the fixture's tokens are bytes
        [byte] if is_fixture(folder) => u32::from(*byte),
        _ => {
            let tokenizer = load_tokenizer(Path::new(folder), usize::MAX).unwrap();
            let name = step["token"].as_str().unwrap();
            let id = tokenizer.token_to_id(name).or(tokenizer.token_to_id(&name.replace(' ', "▁")));
            id.unwrap_or_else(|| panic!("{step}"))
        }
    }
}

/// Whether a checkpoint is one of the tests' own.
fn is_fixture(folder: &str) -> bool {
    Checkpoint::open(Path::new(folder)).unwrap().config().vocab_size == VOCAB_SIZE
}
