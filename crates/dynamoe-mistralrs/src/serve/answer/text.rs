//! The shape of a text completion's answers.

use std::sync::Arc;

use serde_json::Value;

use super::{Asked, Form, logprobs::OfText, source::Choice, transcript::Piece};
use crate::{
    RequestDial,
    serve::{
        error::{ApiError, ApiResult},
        run::{self, Scored},
    },
};

/// One choice of a text completion and what comes before it.
pub(super) struct Begun {
    pub choice: Choice,
    /// The prompt, if it is to be told.
    pub echo: String,
    pub logprobs: Option<OfText>,
    /// The dial of a prompt whose tokens were scored.
    pub dial: Option<Arc<RequestDial>>,
}

/// Starts the choice of an index; the tokens of its prompt are scored where both the prompt and log probabilities are
/// asked for.
pub(super) async fn begin(asked: &Asked, index: usize) -> ApiResult<Begun> {
    let job = &asked.jobs[index];
    let mut logprobs = job.rules.logprobs.map(|_| OfText::default());
    let Form::Text { echo: Some(echo) } = &asked.form else {
        return Ok(Begun {
            choice: Choice::start(asked, index).await?,
            echo: String::new(),
            logprobs,
            dial: None,
        });
    };
    let echo = echo[asked.prompt_of(index)].clone();
    let (Some(told), Some(top)) = (&mut logprobs, job.rules.logprobs) else {
        return Ok(Begun { choice: Choice::start(asked, index).await?, echo, logprobs, dial: None });
    };
    let language = &asked.place.language;
    let bytes = job.prompt.len().saturating_mul(language.vocabulary()).saturating_mul(4);
    if bytes > asked.logits_bytes {
        let mib = asked.logits_bytes >> 20;
        return Err(ApiError::bad_request(format!(
            "echo: log probabilities of a prompt of {} tokens take {} MiB of logits, may take {mib} (--max-logits-mib)",
            job.prompt.len(),
            bytes >> 20,
        )));
    }
    let Scored { tokens, next, dial } = run::score(&asked.place, job, top).await?;
    told.first(language, job.prompt[0]);
    tokens.iter().for_each(|token| told.push(language, token));
    let constrained = !matches!(job.rules.constraint, mistralrs_core::Constraint::None);
    let choice = match job.max_tokens {
        0 => Choice::known(asked, index, None),
        1 if asked.choices == 1 && !constrained => Choice::known(asked, index, Some(next)),
        _ => Choice::start(asked, index).await?,
    };
    Ok(Begun { choice, echo, logprobs, dial })
}

impl Begun {
    /// The `logprobs` of what `pieces` tell and of an echo that is not told yet; null if not asked for.
    pub fn logprobs_of(&mut self, asked: &Asked, pieces: &[Piece]) -> Value {
        let Some(told) = &mut self.logprobs else { return Value::Null };
        let language = &asked.place.language;
        pieces.iter().flat_map(|piece| &piece.logprobs).for_each(|token| told.push(language, token));
        told.take()
    }
}
