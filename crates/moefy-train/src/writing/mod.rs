//! Text that a dense model writes itself, for trainings that have no text like the one that it was trained on.
//!
//! [`Plan`] is what is written. `script` says how documents begin and end, `documents` writes some of them side by side,
//! `sampling` draws their tokens, and `draft` keeps the file whole.
//!
//! Tokens are drawn at temperature 1 from the nucleus of 95 % of the probability (top-p, arXiv 1904.09751). What lies outside
//! is unreliable: one token of it leads a small model astray for the rest of the document, and what it writes from there is
//! harder to foretell than any text that it was trained on. A narrower nucleus, or the most likely token, would make the text
//! easier than text is, and what is fitted to it (prices of widths, the dial) too cheap. LLM-QAT (arXiv 2305.17888) begins
//! each document with another token of the vocabulary and goes on with a few most likely ones. Here the first token is
//! drawn like all others: so documents begin as the model's documents do. Conversations come as in Magpie (arXiv 2406.08464):
//! after the template's beginning of a user's turn, the model writes the question, and then the answer.
//!
//! Documents are written in groups, and a document's tokens depend on its own random numbers and on nothing that another
//! run could do otherwise. So a group that was cut off is written again, to the same bits.

mod documents;
mod draft;
mod plan;
mod sampling;
mod script;

use std::path::Path;

use anyhow::{Result, ensure};
use dynamoe_model::{ModelConfig, RoutedModel};

use crate::data::{OwnText, Texts};
use crate::progress::Progress;
use crate::train::TrainConfig;
use documents::{count, group};
use draft::Draft;
pub use plan::Plan;
use script::Script;

/// How often a training sees the text where no number of tokens is given. Up to four times, text is worth nearly as much as
/// new one (arXiv 2305.16264).
const EPOCHS: u64 = 4;
/// Documents in a row without a usable one after which the model is given up.
const PATIENCE: u64 = 1024;

/// What a training with these settings needs of a model of this configuration.
///
/// # Errors
/// Sequences longer than the model's positions; answers without a usable chat template.
pub fn plan(
    own: OwnText,
    train: &TrainConfig,
    answers_only: bool,
    texts: &Texts,
    config: &ModelConfig,
) -> Result<Plan> {
    let sequence_length = train.sequence_length;
    ensure!(
        (2..=texts.positions()).contains(&sequence_length),
        "--sequence-length must be 2 to the model's {} positions, found {sequence_length}",
        texts.positions()
    );
    let tokens = own.tokens.unwrap_or_else(|| train.tokens.div_ceil(EPOCHS));
    let plan = Plan { tokens, seed: train.seed, sequence_length, answers_only };
    Script::new(texts, config, &plan)?;
    Ok(plan)
}

/// Writes the text of `plan` into the .jsonl file at `path`, which appears when it is whole. What an earlier call wrote of
/// it is gone on with.
///
/// # Errors
/// The file system's; a model whose predictions are not finite, or that writes nothing.
pub fn write(model: &RoutedModel, texts: &Texts, plan: &Plan, path: &Path) -> Result<()> {
    let config = model.config();
    let script = Script::new(texts, config, plan)?;
    let mut draft = Draft::open(path, |written| plan.group(config, written), |text| count(texts, text))?;
    let progress = Progress::new("writing text", "tokens", plan.tokens, draft.tokens());
    let mut useless = 0;
    while draft.tokens() < plan.tokens {
        let before = draft.tokens();
        let (first, documents) = (draft.documents(), plan.group(config, before));
        // the tokens of the group as they are drawn; how many of them count is known when it is whole
        let mut drawn = 0;
        let group = group(model, &script, plan, first..first + documents as u64, &mut |more| {
            drawn += more as u64;
            progress.update((before + drawn).min(plan.tokens), String::new());
        })?;
        draft.append(&group, documents, plan.tokens)?;
        useless = if draft.tokens() > before { 0 } else { useless + documents as u64 };
        ensure!(
            useless < PATIENCE,
            "the model wrote {useless} documents and none to train on: {}",
            match plan.answers_only {
                true =>
                    "no question ended within --sequence-length; a longer one may help, or leave out --mask-prompt",
                false => "all of them are blank",
            }
        );
    }
    progress.update(plan.tokens, String::new());
    progress.finish();
    draft.finish()
}
