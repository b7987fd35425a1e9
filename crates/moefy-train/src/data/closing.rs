//! Which token ends a document: config.json may name several, so the model itself is asked.
//!
//! Some Llamas end a document with EOS (`BOS text EOS`) and some with the BOS of the next one (`BOS text BOS text`), and
//! both kinds name both tokens. Chat models name several tokens as EOS. The model has learned to write one of these tokens
//! after a text and gives the others next to no probability. It is asked after a few texts of this program, whatever
//! text a command reads. So the answer depends on the model alone, and all commands get the same one. A training writes
//! it into config.json, so that it stays what it was when the weights change.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, ops::softmax_last_dim};
use dynamoe::tensors::{DOWN_PROJ, GATE_PROJ, UP_PROJ, full_name};
use dynamoe_model::Checkpoint;
use dynamoe_model::checkpoint::float_dtype;
use dynamoe_model::model::Backbone;
use dynamoe_model::ops::linear;
use dynamoe_model::tensors::ffn_biases;
use tokenizers::Tokenizer;

use super::tokenizer::{Framing, named_ends};

/// Whole texts of several kinds and languages. It is enough if the model knows one of the kinds.
const TEXTS: [&str; 8] = [
    "Once upon a time, there was a little girl named Lily. She had a red ball. One day the ball rolled into the river. \
     Lily was sad. A big dog saw the ball and jumped into the water. He brought the ball back to Lily. \"Thank you!\" said \
     Lily. She gave the dog a hug, and they played all day. At night they were happy and went to sleep. The end.",
    "Tom found a small bird under the tree. It could not fly. He took it home and made a warm bed for it. Every day he \
     gave it food and water. After a week the bird could fly again. Tom opened the window, and the bird flew away. It \
     came back every morning to sing for him. They were friends ever after.",
    "The heron is a wading bird with long legs and a long neck. It lives near lakes and rivers on most continents and \
     feeds on fish, frogs and insects. Herons build their nests in trees, often in colonies. The female lays three to \
     five eggs, which both parents sit on for about four weeks.",
    "Q: How do I boil an egg?\nA: Put the egg into boiling water. Take it out after five minutes if you like it soft, or \
     after ten if you like it hard. Cool it under cold water, and peel it.",
    "def mean(values):\n    \"\"\"Returns the mean of a list of numbers.\"\"\"\n    if not values:\n        return 0.0\n    \
     return sum(values) / len(values)\n\n\nif __name__ == \"__main__\":\n    print(mean([1, 2, 3]))",
    "Die B\u{e4}ckerei am Markt \u{f6}ffnet um sechs Uhr. Dann riecht die ganze Stra\u{df}e nach frischem Brot, und die \
     Kinder kaufen auf dem Weg zur Schule noch schnell ein Br\u{f6}tchen. Am Abend ist alles verkauft.",
    "Le petit village se trouve au bord de la mer. Chaque matin, les p\u{ea}cheurs partent avant le lever du soleil et \
     reviennent \u{e0} midi avec leurs filets pleins. Le soir, tout le monde se retrouve au port.",
    "\u{4ece}\u{524d}\u{6709}\u{4e00}\u{4e2a}\u{5c0f}\u{5973}\u{5b69}\u{ff0c}\u{5979}\u{6709}\u{4e00}\u{53ea}\u{767d}\u{732b}\u{3002}\
     \u{6bcf}\u{5929}\u{665a}\u{4e0a}\u{ff0c}\u{732b}\u{7761}\u{5728}\u{5979}\u{7684}\u{8eab}\u{8fb9}\u{3002}\u{6545}\u{4e8b}\
     \u{8bb2}\u{5b8c}\u{4e86}\u{3002}",
];

/// How documents are framed for a model: as its config.json says if it has only one token for it or names the closing
/// one, else with the token that the model itself writes after a text.
///
/// # Errors
/// A model that names no token to tell documents apart, or one beyond the embedding; weights that do not fit.
pub(super) fn framing(checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Result<Framing> {
    let config = checkpoint.config();
    let (mut bos, mut eos) = (config.bos_token_id, config.eos_token_ids.clone());
    if bos.is_none() && eos.is_empty() {
        let [named_bos, named_eos] = named_ends(checkpoint.dir(), tokenizer);
        (bos, eos) = (named_bos, named_eos.into_iter().collect());
    }
    let by_config = Framing::new(bos, &eos, config.vocab_size)?;
    if let Some(closing) = config.closing_token_id {
        ensure!(
            (closing as usize) < config.vocab_size,
            "config.json: \"closing_token_id\" {closing} lies beyond the embedding (vocab_size {}): remove the key",
            config.vocab_size
        );
        return Ok(Framing { closing, ..by_config });
    }
    let mut candidates: Vec<u32> = Vec::new();
    for id in eos.into_iter().chain(bos) {
        if (id as usize) < config.vocab_size && !candidates.contains(&id) {
            candidates.push(id);
        }
    }
    if candidates.len() < 2 {
        return Ok(by_config);
    }
    let asked = ask(checkpoint, tokenizer, by_config.opening, &candidates);
    let probabilities = asked.context("asking the model which token ends a document")?;
    let mut best = (by_config.closing, 0.0);
    for (&id, &probability) in candidates.iter().zip(&probabilities) {
        if probability > best.1 {
            best = (id, probability);
        }
    }
    let name = tokenizer.id_to_token(best.0).unwrap_or_default();
    tracing::info!("documents end with {name:?} (token {}), as the model itself ends a text", best.0);
    Ok(Framing { closing: best.0, ..by_config })
}

/// The probability of each candidate after one of [`TEXTS`], in the mean; 0 if the model takes none of the texts.
fn ask(checkpoint: &Checkpoint, tokenizer: &Tokenizer, opening: u32, candidates: &[u32]) -> Result<Vec<f64>> {
    let config = checkpoint.config();
    let takes = |id: &u32| (*id as usize) < config.vocab_size;
    let framed = TEXTS.iter().filter_map(|text| {
        let ids = tokenizer.encode_fast(*text, false).ok()?;
        let tokens: Vec<u32> = std::iter::once(opening).chain(ids.get_ids().iter().copied()).collect();
        (tokens.len() <= config.max_position_embeddings && tokens.iter().all(takes)).then_some(tokens)
    });
    let framed: Vec<Vec<u32>> = framed.collect();
    let length = framed.iter().map(Vec::len).max().unwrap_or(0);
    let mut sums = vec![0.0; candidates.len()];
    if length == 0 {
        return Ok(sums);
    }
    // padding stands at the end, where no token of a text attends to it
    let padded: Vec<u32> = framed
        .iter()
        .flat_map(|tokens| tokens.iter().copied().chain(std::iter::repeat_n(0, length - tokens.len())))
        .collect();
    let tokens = Tensor::from_vec(padded, (framed.len(), length), &Device::Cpu)?;
    let ends: Vec<u32> =
        (0..).zip(&framed).map(|(row, tokens)| row * length as u32 + tokens.len() as u32 - 1).collect();
    let probabilities = predict(checkpoint, &tokens, &Tensor::new(ends, &Device::Cpu)?)?.to_vec2::<f32>()?;
    for of_text in &probabilities {
        for (sum, &id) in sums.iter_mut().zip(candidates) {
            *sum += f64::from(of_text[id as usize]) / framed.len() as f64;
        }
    }
    Ok(sums)
}

/// What the dense model makes of `tokens (B, T)` after the tokens at `places (P)`: probabilities `(P, V)`. One FFN is in
/// memory at a time, and the other weights are in the type of the checkpoint.
fn predict(checkpoint: &Checkpoint, tokens: &Tensor, places: &Tensor) -> Result<Tensor> {
    let config = checkpoint.config();
    let cpu = &Device::Cpu;
    let backbone = Backbone::from_tensors(config, &mut |name, shape| {
        let stored = checkpoint.info(name).and_then(|info| float_dtype(info.dtype));
        checkpoint.tensor(name, shape, stored.unwrap_or(DType::F32), cpu)
    })?;
    let (d, i) = (config.hidden_size, config.intermediate_size);
    let hidden = backbone.forward(tokens, &mut |layer, x| {
        let get = |name: &str, shape: &[usize]| {
            let tensor = checkpoint.tensor(&full_name(layer, name), shape, DType::F32, cpu);
            tensor.map_err(|error| candle_core::Error::Msg(format!("{error:#}")))
        };
        let gate = linear(x, &get(GATE_PROJ, &[i, d])?)?.apply(&Activation::from(config.hidden_act))?;
        let h = (gate * linear(x, &get(UP_PROJ, &[i, d])?)?)?;
        let y = linear(&h, &get(DOWN_PROJ, &[d, i])?)?;
        // of the biases, only that of `down_proj` may be other than 0
        match ffn_biases(config) {
            Some([_, _, (name, shape)]) => y.broadcast_add(&get(name, &shape)?),
            None => Ok(y),
        }
    })?;
    Ok(softmax_last_dim(&backbone.logits(&hidden.index_select(places, 0)?)?)?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use dynamoe_model::RoutedModel;

    #[test]
    fn the_model_that_is_asked_is_the_dense_one() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dynamoe-model/tests/fixtures");
        for name in ["llama", "gemma", "gemma3", "granite"] {
            let checkpoint = Checkpoint::open(&fixtures.join(name)).unwrap();
            let tokens = Tensor::new(&[[1u32, 5, 3, 7], [2, 4, 6, 1]], &Device::Cpu).unwrap();
            let places = Tensor::new(&[0u32, 3, 7], &Device::Cpu).unwrap();
            let found = predict(&checkpoint, &tokens, &places).unwrap();
            let model = RoutedModel::load(&checkpoint, &Device::Cpu).unwrap();
            let full = vec![1.0; checkpoint.config().num_hidden_layers];
            let (hidden, _) = model.forward(&tokens, &full).unwrap();
            let logits = model.logits(&hidden.index_select(&places, 0).unwrap()).unwrap();
            let expected = softmax_last_dim(&logits).unwrap();
            let difference = (found - expected).unwrap().abs().unwrap().max_all().unwrap();
            let difference = difference.to_scalar::<f32>().unwrap();
            // sums of f32 in another order
            assert!(difference < 1e-5, "{name}: {difference}");
        }
    }
}
