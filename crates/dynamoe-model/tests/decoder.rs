//! Token by token, a model computes what it computes of whole sequences.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use dynamoe_model::model::Decoder;
use dynamoe_model::{Checkpoint, ModelConfig, RoutedModel};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEQUENCES: usize = 5;
const POSITIONS: usize = 21;
/// Where a sequence leaves, and which ones stay.
const LEAVES: (usize, [u32; 4]) = (9, [0, 1, 3, 4]);

/// Compares the hidden states and logits of every position with those of the full forward pass.
fn check(model: &RoutedModel) -> Result<()> {
    let config = model.config();
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut rows: Vec<Vec<u32>> = (0..SEQUENCES)
        .map(|_| (0..POSITIONS).map(|_| rng.random_range(0..config.vocab_size as u32)).collect())
        .collect();
    let full = vec![1.0; config.num_hidden_layers];
    let tokens = Tensor::new(rows.clone(), &Device::Cpu)?;
    let (hidden, _) = model.forward(&tokens, &full)?;
    let mut expected = model.logits(&hidden)?.reshape((SEQUENCES, POSITIONS, ()))?;
    let spread = expected.abs()?.max_all()?.to_scalar::<f32>()?;
    ensure!(spread > 0.1, "the logits are too small to tell anything: {spread}");

    let mut decoder = Decoder::new(model, SEQUENCES, POSITIONS)?;
    for position in 0..POSITIONS {
        if position == LEAVES.0 {
            decoder.keep(&LEAVES.1)?;
            rows = LEAVES.1.iter().map(|&row| rows[row as usize].clone()).collect();
            expected = expected.index_select(&Tensor::new(&LEAVES.1, &Device::Cpu)?, 0)?;
        }
        let tokens: Vec<u32> = rows.iter().map(|row| row[position]).collect();
        let found = model.logits(&decoder.step(&tokens)?)?;
        let difference = (found - expected.narrow(1, position, 1)?.squeeze(1)?)?.abs()?.max_all()?;
        let difference = difference.to_scalar::<f32>()?;
        // sums of f32 in another order; a key in the wrong place moves logits by 1e-2
        ensure!(difference < 1e-4, "position {position}: logits differ by {difference}");
    }
    ensure!(decoder.step(&[0; 4]).is_err(), "beyond the last position");
    Ok(())
}

#[test]
fn token_by_token_is_as_all_at_once_in_every_architecture() -> Result<()> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut checked = 0;
    for entry in std::fs::read_dir(&fixtures)? {
        let dir = entry?.path();
        if dir.join("config.json").exists() {
            let name = || dir.display().to_string();
            let model = RoutedModel::load(&Checkpoint::open(&dir)?, &Device::Cpu).with_context(name)?;
            check(&model).with_context(name)?;
            checked += 1;
        }
    }
    ensure!(checked >= 31, "only {checked} fixtures");
    Ok(())
}

/// Windows shorter than the sequence, layers without rotary embeddings, capped scores, biases of `down_proj`: all at once,
/// whether or not a fixture has them together.
#[test]
fn shapes_of_attention_may_be_mixed() -> Result<()> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    for (name, windows) in [("gemma2", [Some(3), None]), ("qwen3", [Some(1), Some(POSITIONS)])] {
        let checkpoint = Checkpoint::open(&fixtures.join(name))?;
        let mut config: ModelConfig = checkpoint.config().clone();
        ensure!(config.num_hidden_layers == windows.len(), "{name}: {} layers", config.num_hidden_layers);
        config.sliding_window = windows.to_vec();
        config.rotary_layers = vec![false, true];
        config.scales.attention_cap = Some(5.0);
        let model = RoutedModel::from_tensors(&config, &mut |name, shape| {
            checkpoint.tensor(name, shape, candle_core::DType::F32, &Device::Cpu)
        })?;
        check(&model).with_context(|| name.to_owned())?;
    }
    Ok(())
}

#[test]
fn tokens_that_do_not_fit_are_refused() -> Result<()> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama");
    let model = RoutedModel::load(&Checkpoint::open(&dir)?, &Device::Cpu)?;
    let mut decoder = Decoder::new(&model, 2, 1)?;
    for tokens in [&[1u32][..], &[1, 1, 1], &[1, model.config().vocab_size as u32]] {
        ensure!(decoder.step(tokens).is_err(), "{tokens:?}");
    }
    decoder.step(&[1, 2])?;
    let error = decoder.step(&[1, 2]).err().context("a second position")?.to_string();
    ensure!(error.contains("one of 1 positions"), "{error}");
    Ok(())
}
