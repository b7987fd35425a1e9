//! Multiple choice (HellaSwag, PIQA): a context and several ways to go on, one of them right. A model chooses the one that it
//! finds likeliest.

use std::path::Path;

use anyhow::{Context, Error, Result, ensure};
use serde_json::Value;
use tokenizers::Tokenizer;

use super::padded::{PaddedBatch, group_by_length};
use super::pieces::JsonLines;
use super::records::string_field;
use crate::report::results::ChoicesPoint;

/// Tokenized questions.
#[derive(Debug, Clone)]
pub struct Choices {
    name: String,
    /// Context and choice together, question by question.
    sequences: Vec<Sequence>,
    questions: Vec<Question>,
}

#[derive(Debug, Clone)]
struct Sequence {
    tokens: Vec<u32>,
    /// Tokens of the context, which are not scored.
    context: usize,
    /// Bytes of the choice.
    bytes: usize,
}

#[derive(Debug, Clone, Copy)]
struct Question {
    choices: usize,
    answer: usize,
}

impl Choices {
    /// Reads a `.jsonl` file whose objects hold `context`, `choices` (a list of strings) and `answer` (the index of the right
    /// one). A choice follows the context after one space. Both get the tokenizer's special tokens.
    ///
    /// # Errors
    /// A missing or empty file; a line that is no such object; a context or choice without tokens; both together with more
    /// than the model's `positions`. Errors of a line give its number.
    pub fn read(path: &Path, tokenizer: &Tokenizer, positions: usize) -> Result<Self> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut all = Self { name, sequences: Vec::new(), questions: Vec::new() };
        for line in JsonLines::open(path)? {
            let (number, object) = line?;
            all.add(&object, tokenizer, positions)
                .with_context(|| format!("{}: line {number}", path.display()))?;
        }
        ensure!(
            !all.questions.is_empty(),
            "{}: no questions: the file holds only white space",
            path.display()
        );
        Ok(all)
    }

    fn add(&mut self, object: &Value, tokenizer: &Tokenizer, positions: usize) -> Result<()> {
        let context = string_field(object, "context")?;
        let choices = object.get("choices").and_then(Value::as_array);
        let choices: Option<Vec<&str>> = choices.and_then(|all| all.iter().map(Value::as_str).collect());
        let choices =
            choices.filter(|all| all.len() > 1).context("\"choices\": expected two strings or more")?;
        let answer =
            object.get("answer").and_then(Value::as_u64).map_or(usize::MAX, |answer| answer as usize);
        let count = choices.len();
        ensure!(answer < count, "\"answer\": expected the index of a choice, from 0 to {}", count - 1);
        let encode = |text: String| -> Result<Vec<u32>> {
            Ok(tokenizer.encode_fast(text, true).map_err(Error::from_boxed)?.get_ids().to_vec())
        };
        // the context's tokens as they are before the space
        let before = encode(context.clone())?.len();
        ensure!(before > 0, "the context has no tokens");
        for choice in choices {
            let tokens = encode(format!("{context} {choice}"))?;
            let found = tokens.len();
            ensure!(found > before, "choice {choice:?} has no tokens");
            ensure!(
                found <= positions,
                "context and choice have {found} tokens, the model takes {positions}"
            );
            self.sequences.push(Sequence { tokens, context: before, bytes: choice.len() });
        }
        self.questions.push(Question { choices: count, answer });
        Ok(())
    }

    /// The file's name without its ending.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tokens of each context with each choice.
    pub(crate) fn sequences(&self) -> impl Iterator<Item = &[u32]> {
        self.sequences.iter().map(|sequence| sequence.tokens.as_slice())
    }

    /// All sequences in padded batches of at most `batch_tokens` positions, longest first. Only the choices' tokens count. A
    /// batch's `items` are choices, in the order of the file.
    pub fn batches(&self, batch_tokens: usize) -> impl ExactSizeIterator<Item = PaddedBatch> + '_ {
        let lengths = self.sequences().map(|tokens| tokens.len() - 1).enumerate().collect();
        group_by_length(lengths, batch_tokens).into_iter().map(|group| {
            let sequences: Vec<_> =
                group.iter().map(|&item| (item, self.sequences[item].tokens.clone())).collect();
            let mut batch = PaddedBatch::new(&sequences);
            for (weights, &item) in batch.weights.chunks_exact_mut(batch.length).zip(&group) {
                weights[..self.sequences[item].context - 1].fill(0.0);
            }
            batch
        })
    }

    /// The model's accuracy, from the log-likelihoods of all choices, indexed as the batches' `items`. The dial and the width
    /// are left to the caller.
    ///
    /// # Errors
    /// Not one value for each choice.
    pub fn score(&self, log_likelihoods: &[f64]) -> Result<ChoicesPoint> {
        let expected = self.sequences.len();
        let found = log_likelihoods.len();
        ensure!(found == expected, "expected {expected} log-likelihoods, one per choice, found {found}");
        let mut point = ChoicesPoint { name: self.name.clone(), ..ChoicesPoint::default() };
        let (mut rest, mut sequences) = (log_likelihoods, self.sequences.as_slice());
        for question in &self.questions {
            let own;
            (own, rest) = rest.split_at(question.choices);
            let lengths;
            (lengths, sequences) = sequences.split_at(question.choices);
            let by_bytes: Vec<f64> =
                own.iter().zip(lengths).map(|(sum, sequence)| sum / sequence.bytes.max(1) as f64).collect();
            point.right.push(likeliest(own) == question.answer);
            point.right_norm.push(likeliest(&by_bytes) == question.answer);
            point.log_likelihoods.push(own.to_vec());
        }
        let count = self.questions.len() as f64;
        let share = |right: &[bool]| right.iter().filter(|right| **right).count() as f64 / count;
        let stderr = |share: f64| (share * (1.0 - share) / count).sqrt();
        (point.acc, point.acc_norm) = (share(&point.right), share(&point.right_norm));
        (point.acc_stderr, point.acc_norm_stderr) = (stderr(point.acc), stderr(point.acc_norm));
        Ok(point)
    }
}

/// The index of the largest value, the first of equal ones.
fn likeliest(values: &[f64]) -> usize {
    let larger = |best: usize, next: usize| if values[next] > values[best] { next } else { best };
    (0..values.len()).reduce(larger).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::corpus;
    use serde_json::json;

    fn read(lines: &[Value], positions: usize) -> Result<Choices> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("task.jsonl");
        let text: Vec<String> = lines.iter().map(Value::to_string).collect();
        std::fs::write(&path, text.join("\n")).unwrap();
        let tokenizer = corpus::train_tokenizer(&corpus::documents(1, 20), 300).unwrap();
        Choices::read(&path, &tokenizer, positions)
    }

    #[test]
    fn only_the_choices_are_scored() {
        let question =
            json!({"context": "The dog", "choices": ["ran.", "is a cat, and slept."], "answer": 0});
        let choices = read(&[question.clone(), question], 100).unwrap();
        assert_eq!(choices.name(), "task");
        let batches: Vec<PaddedBatch> = choices.batches(1000).collect();
        let batch = &batches[0];
        assert_eq!((batches.len(), batch.batch_size), (1, 4));
        for (row, &item) in batch.items.iter().enumerate() {
            let sequence = &choices.sequences[item];
            let weights = &batch.weights[row * batch.length..(row + 1) * batch.length];
            let scored = weights.iter().filter(|&&weight| weight > 0.0).count();
            assert_eq!(scored, sequence.tokens.len() - sequence.context);
            // the first scored target is the first token of the choice
            let first = weights.iter().position(|&weight| weight > 0.0).unwrap();
            assert_eq!(batch.targets[row * batch.length + first], sequence.tokens[sequence.context]);
        }
    }

    #[test]
    fn the_likeliest_choice_counts_with_and_without_its_length() {
        let question = |answer: usize| json!({"context": "a", "choices": ["bbbb", "b"], "answer": answer});
        let choices = read(&[question(0), question(1)], 100).unwrap();
        // -4 over 4 bytes beats -3 over 1 byte
        let point = choices.score(&[-4.0, -3.0, -4.0, -3.0]).unwrap();
        assert_eq!((point.acc, point.acc_norm, point.right.as_slice()), (0.5, 0.5, [false, true].as_slice()));
        let point = choices.score(&[-4.0, -3.0, -1.0, -3.0]).unwrap();
        assert_eq!((point.acc, point.acc_norm), (0.0, 0.5));
        assert!(choices.score(&[-1.0]).is_err());
    }

    #[test]
    fn a_wrong_line_is_named_with_what_is_wrong() {
        let good = json!({"context": "a", "choices": ["b", "c"], "answer": 0});
        for (line, words) in [
            (json!({"context": "a", "choices": ["b", "c"], "answer": 2}), "from 0 to 1"),
            (json!({"context": "a", "choices": ["b", "c"]}), "\"answer\""),
            (json!({"context": "a", "choices": ["b"], "answer": 0}), "two strings or more"),
            (json!({"context": "a", "choices": "b", "answer": 0}), "\"choices\""),
            (json!({"choices": ["b", "c"], "answer": 0}), "context"),
            (
                json!({"context": "word ".repeat(200), "choices": ["b", "c"], "answer": 0}),
                "the model takes 100",
            ),
        ] {
            let error = format!("{:#}", read(&[good.clone(), line], 100).unwrap_err());
            assert!(error.contains("line 2") && error.contains(words), "{error}");
        }
        assert!(read(&[], 100).is_err());
    }
}
