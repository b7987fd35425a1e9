//! Documents that are written side by side, a token of each at a time.

use std::ops::Range;

use anyhow::{Error, Result};
use candle_core::{DType, Device};
use dynamoe_model::RoutedModel;
use dynamoe_model::model::Decoder;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::plan::Plan;
use super::sampling::{NUCLEUS, draw};
use super::script::Script;
use crate::data::Texts;
use crate::random;

/// What the model writes at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// A document that is no conversation.
    Text,
    Question,
    Answer,
}

/// A line of the file: a text, or a prompt and its completion.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The number of the document.
    pub document: u64,
    #[serde(flatten)]
    pub words: Words,
}

/// What a document says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Words {
    Plain { text: String },
    Conversation { prompt: String, completion: String },
}

/// A document in the making.
struct Row {
    number: u64,
    rng: ChaCha8Rng,
    /// From the opening token on.
    ids: Vec<u32>,
    part: Part,
    /// Where the words of this part begin in `ids`.
    start: usize,
    over: bool,
}

/// Writes the documents with these numbers, without those of which nothing can be used. `drawn` hears how many tokens were
/// drawn at each position.
pub(super) fn group(
    model: &RoutedModel,
    script: &Script<'_>,
    plan: &Plan,
    numbers: Range<u64>,
    drawn: &mut dyn FnMut(usize),
) -> Result<Vec<Record>> {
    let mut open: Vec<Row> = numbers.map(|number| Row::new(script, plan, number)).collect();
    let mut closed = Vec::new();
    let mut decoder = Decoder::new(model, open.len(), plan.sequence_length)?;
    for position in 0.. {
        let going = open.iter().filter(|row| !row.over).count();
        if going == 0 {
            break;
        }
        // rows that are over cost as much as others, and so does moving the others together
        if 4 * going <= 3 * open.len() {
            let places = (0..).zip(&open).filter(|(_, row)| !row.over).map(|(place, _)| place);
            decoder.keep(&places.collect::<Vec<u32>>())?;
            closed.extend(open.extract_if(.., |row| row.over));
        }
        let tokens = open.iter().map(|row| row.ids.get(position).copied().unwrap_or(script.framing.opening));
        let hidden = decoder.step(&tokens.collect::<Vec<u32>>())?;
        let waiting = open.iter().filter(|row| row.waits_at(position)).count();
        if waiting == 0 {
            continue;
        }
        let logits = model.logits(&hidden)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let (size, logits) = (logits.dim(1)?, logits.flatten_all()?.to_vec1::<f32>()?);
        open.par_iter_mut().zip(logits.par_chunks(size)).try_for_each(|(row, logits)| {
            if row.waits_at(position) { row.go_on(script, plan, logits) } else { Ok(()) }
        })?;
        drawn(waiting);
    }
    closed.append(&mut open);
    closed.sort_by_key(|row| row.number);
    let records = closed.iter().filter_map(|row| row.record(script, plan).transpose());
    records.collect()
}

impl Row {
    fn new(script: &Script<'_>, plan: &Plan, number: u64) -> Self {
        let mut ids = vec![script.framing.opening];
        let turns = script.turns_of(number);
        ids.extend(turns.iter().flat_map(|turns| &turns.before));
        let part = if turns.is_some() { Part::Question } else { Part::Text };
        Self { number, rng: random::document(plan.seed, number), start: ids.len(), ids, part, over: false }
    }

    /// Whether the next token is to be drawn from what the model says after this position.
    fn waits_at(&self, position: usize) -> bool {
        !self.over && self.ids.len() == position + 1
    }

    /// Draws the next token. A part has one token at least.
    fn go_on(&mut self, script: &Script<'_>, plan: &Plan, logits: &[f32]) -> Result<()> {
        let begun = self.ids.len() > self.start;
        let allowed = |token: u32| (begun || !script.ends(token)) && script.knows(token);
        let token = draw(logits, NUCLEUS, allowed, &mut self.rng)?;
        self.ids.push(token);
        let after = match script.turns_of(self.number) {
            Some(turns) if self.part == Part::Question => {
                turns.after_question(script, &self.ids[self.start..])?
            }
            _ => None,
        };
        if let Some(after) = after {
            if script.ends(token) {
                self.ids.pop();
            }
            self.ids.extend(after);
            (self.part, self.start) = (Part::Answer, self.ids.len());
        } else if script.ends(token) {
            // what stands around every document is no part of its text
            if self.part == Part::Text || [script.framing.opening, script.framing.closing].contains(&token) {
                self.ids.pop();
            }
            self.over = true;
        }
        if self.ids.len() >= plan.sequence_length {
            self.ids.truncate(plan.sequence_length);
            self.over = true;
        }
        Ok(())
    }

    /// The record of the document, with its number; none where only answers are wanted and there is none.
    fn record(&self, script: &Script<'_>, plan: &Plan) -> Result<Option<Record>> {
        let ids = &self.ids[1..];
        let whole = script.text(ids)?;
        // a letter may have been cut
        let text = whole.trim_end_matches('\u{fffd}');
        if self.part != Part::Answer || self.ids.len() <= self.start {
            let words = Words::Plain { text: text.to_owned() };
            return Ok((!plan.answers_only).then_some(Record { document: self.number, words }));
        }
        let prompt = script.text(&self.ids[1..self.start])?;
        let completion = match text.strip_prefix(&prompt) {
            Some(completion) => completion.to_owned(),
            None => script.text(&self.ids[self.start..])?,
        };
        Ok(Some(Record { document: self.number, words: Words::Conversation { prompt, completion } }))
    }
}

/// Tokens of a document in training, those around it included; 0 for one that is left out.
pub(super) fn count(texts: &Texts, record: &Record) -> Result<usize> {
    let text = match &record.words {
        Words::Plain { text } => text.clone(),
        Words::Conversation { prompt, completion } => prompt.clone() + completion,
    };
    if text.trim().is_empty() {
        return Ok(0);
    }
    let ids = texts.tokenizer.encode_fast(text.trim(), false).map_err(Error::from_boxed)?;
    Ok(ids.len() + if texts.framing().is_shared() { 1 } else { 2 })
}
