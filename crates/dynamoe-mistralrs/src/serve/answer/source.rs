//! One choice of an answer.

use std::{sync::Arc, time::Instant};

use super::{
    Asked, Form,
    transcript::{Piece, Transcript},
};
use crate::serve::{
    error::ApiResult,
    metrics::Watch,
    run::{Chosen, End, Running},
};

/// One choice of an answer, on its way.
pub(super) struct Choice {
    source: Source,
    transcript: Transcript,
    /// Tokens that end an answer.
    ends: Vec<u32>,
    watch: Arc<Watch>,
    last: Option<Instant>,
    /// Tokens that the model wrote, one that ends the answer among them.
    pub tokens: usize,
    /// Sum of their log probabilities, if those are asked for.
    pub logprob: f64,
}

enum Source {
    Engine(Running),
    /// One token that is known already, or none.
    Known(Option<Chosen>),
}

impl Choice {
    /// Has the engine write the choice of this index.
    pub async fn start(asked: &Asked, index: usize) -> ApiResult<Self> {
        let job = &asked.jobs[index];
        let source = match job.max_tokens {
            0 => Source::Known(None),
            _ => Source::Engine(Running::start(&asked.place, job).await?),
        };
        Ok(Self::of(asked, index, source))
    }

    /// The choice of this index, whose one token is known.
    pub fn known(asked: &Asked, index: usize, token: Option<Chosen>) -> Self {
        Self::of(asked, index, Source::Known(token))
    }

    fn of(asked: &Asked, index: usize, source: Source) -> Self {
        let rules = &asked.jobs[index].rules;
        let is_text = matches!(asked.form, Form::Text { .. });
        let transcript = Transcript::new(Arc::clone(&asked.place.language), rules.stop.clone(), is_text);
        let watch = Arc::clone(&asked.watch);
        let ends = asked.place.language.ends.clone();
        Self { source, transcript, ends, watch, last: None, tokens: 0, logprob: 0.0 }
    }

    /// The next piece that holds something; none after the last.
    ///
    /// # Errors
    /// What the engine says instead.
    pub async fn next(&mut self) -> ApiResult<Option<Piece>> {
        while self.transcript.finish().is_none() {
            let (chosen, end) = match &mut self.source {
                Source::Engine(running) => match running.next().await? {
                    Some(chosen) => (chosen, running.end()),
                    None => return Ok(None),
                },
                Source::Known(token) => match token.take() {
                    Some(chosen) if self.ends.contains(&chosen.token) => (chosen, Some(End::Token)),
                    Some(chosen) => (chosen, Some(End::Length)),
                    None => return Ok(None),
                },
            };
            self.count(&chosen);
            let piece = self.transcript.push(chosen, end);
            if piece != Piece::default() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    fn count(&mut self, chosen: &Chosen) {
        self.watch.token(self.last.replace(chosen.at), chosen.at);
        self.tokens += 1;
        self.logprob += chosen.logprob.as_ref().map_or(0.0, |told| f64::from(told.logprob));
    }

    /// OpenAI's word for why the answer ended.
    pub fn finish(&self) -> &'static str {
        self.transcript.finish().unwrap_or("length")
    }
}
