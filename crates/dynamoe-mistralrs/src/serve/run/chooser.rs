//! Chooses the tokens of one sequence, within the engine.
//!
//! The engine's own sampler knows neither seeds nor biases, and its log probabilities are those of its sampling, to
//! base 10. A logits processor sees the model's scores first: it chooses, and leaves the engine one score to take.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use candle_core::{DType, Device, Result, Tensor};
use mistralrs_core::{Constraint, CustomLogitsProcessor, row_data::RowData};
use rand::{SeedableRng, rngs::OsRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc::UnboundedSender;

use super::{Job, Pass, TokenLogprob, pick::Counts};
use crate::{
    Phase, RequestDial,
    locks::lock,
    serve::{language::SharedLanguage, request::Rules},
};

/// A token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(in super::super) struct Chosen {
    pub token: u32,
    /// How likely it was, if that was asked for.
    pub logprob: Option<TokenLogprob>,
    /// Neurons that were used to find it, of a DynaMoE model: the mean over layers, for the first token of an answer
    /// over its prompt too.
    pub neurons: Option<f64>,
    /// When the engine had it.
    pub at: Instant,
}

/// What a [`Chooser`] tells.
#[derive(Debug)]
pub(super) enum Event {
    Token(Chosen),
    /// The model gives no numbers.
    NoNumbers,
}

/// Chooses the tokens of one sequence.
pub(super) struct Chooser {
    rules: Arc<Rules>,
    language: SharedLanguage,
    dial: Option<Arc<RequestDial>>,
    /// Tokens of the prompt.
    prompt: usize,
    /// Nobody waits for the answer any more.
    left: Arc<AtomicBool>,
    pass: Pass,
    state: Mutex<State>,
}

struct State {
    random: ChaCha8Rng,
    counts: Counts,
    /// Tokens that are known to be taken.
    taken: usize,
    thinking: bool,
    /// The choice after [`Self::taken`] tokens. With a grammar the engine may ask again, without what it does not allow.
    choice: Option<Choice>,
    /// What the dial had counted before the choice.
    used: (u64, u64),
    neurons: Option<f64>,
    events: UnboundedSender<Event>,
}

struct Choice {
    chosen: Chosen,
    /// The model's scores.
    scores: Vec<f32>,
    told: bool,
}

impl Chooser {
    pub fn new(
        job: &Job,
        language: &SharedLanguage,
        events: UnboundedSender<Event>,
        left: Arc<AtomicBool>,
        pass: Pass,
    ) -> Self {
        let random = match job.rules.seed {
            Some(seed) => ChaCha8Rng::seed_from_u64(seed.wrapping_add(job.number)),
            None => {
                ChaCha8Rng::try_from_rng(&mut OsRng).unwrap_or_else(|_| ChaCha8Rng::seed_from_u64(job.number))
            }
        };
        let mut counts = Counts::default();
        if job.rules.has_penalties() {
            job.prompt.iter().for_each(|&token| *counts.prompt.entry(token).or_default() += 1);
        }
        let thinking = language.think_tags().is_some_and(|tags| tags.ends_in_thoughts(&job.prompt));
        let taken = job.prompt.len();
        Self {
            rules: Arc::clone(&job.rules),
            language: Arc::clone(language),
            dial: job.dial.clone(),
            prompt: taken,
            left,
            pass,
            state: Mutex::new(State {
                random,
                counts,
                taken,
                thinking,
                choice: None,
                used: (0, 0),
                neurons: None,
                events,
            }),
        }
    }

    /// Chooses the token after `context`.
    fn choose(&self, mut scores: Vec<f32>, context: &[u32]) -> u32 {
        let mut state = lock(&self.state);
        let state = &mut *state;
        state.take(&context[self.prompt.min(context.len())..], context.len(), &self.language, &self.rules);
        let free = matches!(self.rules.constraint, Constraint::None);
        // a grammar may not allow the end here
        if let (true, true, Some(&end)) = (free, self.left.load(Relaxed), self.language.ends.first()) {
            return end;
        }
        if scores.iter().any(|score| score.is_nan()) {
            // who asked is told; the engine goes on for all others
            let _ = state.events.send(Event::NoNumbers);
            return self.language.ends.first().copied().unwrap_or_default();
        }
        // asked again: the scores lack what the grammar does not allow, but the probabilities are the model's
        let model = match state.choice.take() {
            Some(choice) => choice.scores,
            None if self.rules.logprobs.is_some() => scores.clone(),
            None => Vec::new(),
        };
        self.rules.adjust(&mut scores, &state.counts);
        let token = self.rules.pick(&scores, &mut state.random);
        let logprob = self.rules.logprobs.map(|top| TokenLogprob::of(&model, token, top));
        if let Some(dial) = &self.dial {
            state.count(dial.used());
        }
        let chosen = Chosen { token, logprob, neurons: state.neurons, at: Instant::now() };
        state.choice = Some(Choice { chosen, scores: model, told: false });
        if free {
            state.tell();
        }
        self.set_phase(state.thinking, context, token);
        token
    }

    /// The phase of the token that was chosen after `context`, which the next forward computes.
    fn set_phase(&self, thinking: bool, context: &[u32], token: u32) {
        let Some(dial) = &self.dial else { return };
        let thinking = self.language.think_tags().is_some_and(|tags| {
            let recent = context.len().saturating_sub(16);
            tags.thinking_after(&[&context[recent..], &[token]].concat(), thinking)
        });
        dial.set_phase(if thinking { Phase::Thinking } else { Phase::Answer });
    }
}

impl State {
    /// Learns which token was taken.
    fn take(&mut self, answer: &[u32], length: usize, language: &SharedLanguage, rules: &Rules) {
        if length == self.taken {
            return;
        }
        self.tell();
        self.choice = None;
        self.taken = length;
        if let Some(&token) = answer.last()
            && rules.has_penalties()
        {
            *self.counts.answer.entry(token).or_default() += 1;
        }
        if let Some(tags) = language.think_tags() {
            self.thinking = tags.thinking_after(answer, self.thinking);
        }
    }

    /// Learns what was computed up to the choice. Asked again for the same choice, nothing was.
    fn count(&mut self, used: (u64, u64)) {
        let (tokens, neurons) = (used.0 - self.used.0, used.1 - self.used.1);
        if tokens > 0 {
            self.neurons = Some(neurons as f64 / tokens as f64);
            self.used = used;
        }
    }

    /// Tells the choice, unless it is told.
    fn tell(&mut self) {
        if let Some(choice) = self.choice.as_mut().filter(|choice| !choice.told) {
            choice.told = true;
            let _ = self.events.send(Event::Token(choice.chosen.clone()));
        }
    }
}

impl Drop for Chooser {
    /// The engine is done: the last choice was taken.
    fn drop(&mut self) {
        lock(&self.state).tell();
    }
}

impl CustomLogitsProcessor for Chooser {
    fn apply(&self, logits: &Tensor, context: &[u32]) -> Result<Tensor> {
        self.pass.prompt_is_done();
        let scores: Vec<f32> = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let mut only = vec![f32::NEG_INFINITY; scores.len()];
        let token = self.choose(scores, context);
        if let Some(score) = only.get_mut(token as usize) {
            *score = 0.0;
        }
        Tensor::from_vec(only, logits.dims(), &Device::Cpu)
    }

    fn row_data(&self) -> Option<Arc<dyn RowData>> {
        self.dial.clone().map(|dial| dial as Arc<dyn RowData>)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::{language::tests::of_bytes, run::tests::job};
    use tokio::sync::{
        RwLock,
        mpsc::{UnboundedReceiver, unbounded_channel},
    };

    struct Tried {
        chooser: Chooser,
        events: UnboundedReceiver<Event>,
        left: Arc<AtomicBool>,
        gate: Arc<RwLock<()>>,
    }

    fn tried(rules: impl FnOnce(&mut Rules)) -> Tried {
        let mut job = job(&[1, 2]);
        rules(Arc::get_mut(&mut job.rules).unwrap());
        let (sender, events) = unbounded_channel();
        let gate = Arc::new(RwLock::new(()));
        let left = Arc::new(AtomicBool::new(false));
        let pass = Pass::new(Arc::clone(&gate).try_read_owned().unwrap(), false);
        let chooser = Chooser::new(&job, &of_bytes(), sender, Arc::clone(&left), pass);
        Tried { chooser, events, left, gate }
    }

    /// Scores of 257 tokens, 0 but for these.
    fn scores(high: &[(usize, f32)]) -> Tensor {
        let mut scores = vec![0.0; 257];
        high.iter().for_each(|&(token, score)| scores[token] = score);
        Tensor::new(scores, &Device::Cpu).unwrap()
    }

    impl Tried {
        /// The token that the engine would take.
        fn choose(&self, scores: &Tensor, context: &[u32]) -> u32 {
            self.chooser.apply(scores, context).unwrap().argmax(0).unwrap().to_scalar().unwrap()
        }

        fn told(&mut self) -> Vec<u32> {
            std::iter::from_fn(|| self.events.try_recv().ok())
                .map(|event| match event {
                    Event::Token(chosen) => chosen.token,
                    Event::NoNumbers => u32::MAX,
                })
                .collect()
        }
    }

    #[test]
    fn a_choice_is_told_at_once() {
        let mut tried = tried(|_| ());
        assert!(Arc::clone(&tried.gate).try_write_owned().is_err());
        assert_eq!(tried.choose(&scores(&[(7, 1.0)]), &[1, 2]), 7);
        // the prompt is computed: others may have theirs
        assert!(Arc::clone(&tried.gate).try_write_owned().is_ok());
        assert_eq!(tried.choose(&scores(&[(8, 1.0)]), &[1, 2, 7]), 8);
        assert_eq!(tried.told(), [7, 8]);
    }

    #[test]
    fn with_a_grammar_only_what_was_taken_is_told() {
        let mut tried = tried(|rules| rules.constraint = Constraint::Regex("b".into()));
        tried.choose(&scores(&[(7, 1.0)]), &[1, 2]);
        // asked again, without 7
        assert_eq!(tried.choose(&scores(&[(7, f32::NEG_INFINITY), (8, 0.5)]), &[1, 2]), 8);
        assert!(tried.told().is_empty());
        tried.choose(&scores(&[(9, 1.0)]), &[1, 2, 8]);
        assert_eq!(tried.told(), [8]);
        drop(tried.chooser);
        let last = tried.events.try_recv().unwrap();
        let Event::Token(Chosen { token: 9, logprob: Some(told), .. }) = last else { panic!("{last:?}") };
        assert_eq!(told.top[0].0, 9);
    }

    #[test]
    fn probabilities_are_the_models_whatever_is_allowed() {
        let mut tried = tried(|rules| {
            rules.constraint = Constraint::Regex("b".into());
            rules.bias = vec![(8, 50.0)];
        });
        let first = scores(&[(7, 5.0), (8, 4.0)]);
        tried.choose(&first, &[1, 2]);
        tried.choose(&scores(&[(7, f32::NEG_INFINITY), (8, 4.0)]), &[1, 2]);
        drop(tried.chooser);
        let Ok(Event::Token(Chosen { token: 8, logprob: Some(told), .. })) = tried.events.try_recv() else {
            panic!()
        };
        let scores: Vec<f32> = first.to_vec1().unwrap();
        assert_eq!(told, TokenLogprob::of(&scores, 8, 1));
        assert_eq!(told.top[0].0, 7);
    }

    #[test]
    fn an_answer_that_nobody_waits_for_ends() {
        let tried = tried(|_| ());
        tried.left.store(true, Relaxed);
        assert_eq!(tried.choose(&scores(&[(7, 1.0)]), &[1, 2]), 256);
    }

    #[test]
    fn what_is_no_number_is_told_as_such() {
        let mut tried = tried(|_| ());
        assert_eq!(tried.choose(&scores(&[(7, f32::NAN)]), &[1, 2]), 256);
        assert_eq!(tried.told(), [u32::MAX]);
    }

    #[test]
    fn penalties_count_the_answer() {
        let mut tried = tried(|rules| rules.frequency_penalty = 2.0);
        let scores = scores(&[(1, 2.5), (7, 3.0)]);
        let mut context = vec![1, 2];
        for expected in [7, 1, 7] {
            assert_eq!(tried.choose(&scores, &context), expected);
            context.push(expected);
        }
        assert_eq!(tried.told(), [7, 1, 7]);
    }
}
