//! Sequences in the engine: one for each answer to each prompt.

mod chooser;
mod logprobs;
mod pick;
mod score;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use axum::http::StatusCode;
use mistralrs_core::{
    Constraint, MistralRs, NormalRequest, Request, RequestMessage, Response, SamplingParams,
};
use tokio::sync::{
    OwnedRwLockReadGuard, RwLock,
    mpsc::{Receiver, Sender, UnboundedReceiver, channel, unbounded_channel},
    oneshot,
};

use super::{
    error::{ApiError, ApiResult, in_words},
    language::SharedLanguage,
    request::Rules,
};
use crate::{RequestDial, locks::lock};

pub(super) use chooser::Chosen;
use chooser::{Chooser, Event};
pub(super) use logprobs::TokenLogprob;
pub(super) use score::{Scored, score};

/// Keeps prompts whose logits are asked for apart from all others: the engine cannot compute both in one step. Others
/// hold it for reading until their prompt is computed.
pub(super) type Gate = Arc<RwLock<()>>;

/// What a sequence runs in.
#[derive(Clone)]
pub(super) struct Place {
    pub engine: Arc<MistralRs>,
    /// To the engine that was loaded: `engine` itself would start another one over what a dead one has left.
    pub requests: Sender<Request>,
    pub language: SharedLanguage,
    pub gate: Gate,
    /// Prompts may be computed anew in the middle of an answer.
    pub paged: bool,
}

/// What to write on from, and how.
#[derive(Clone)]
pub(super) struct Job {
    pub prompt: Arc<[u32]>,
    pub rules: Arc<Rules>,
    pub dial: Option<Arc<RequestDial>>,
    pub max_tokens: usize,
    /// Tells answers to the same prompt apart where a seed is given.
    pub number: u64,
}

/// Why there are no more tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The model said so.
    Token,
    /// It wrote as many tokens as it may.
    Length,
}

/// A sequence in the engine. Dropping it ends it there.
pub(super) struct Running {
    language: SharedLanguage,
    tokens: UnboundedReceiver<Event>,
    failed: oneshot::Receiver<ApiError>,
    left: Arc<AtomicBool>,
    max_tokens: usize,
    told: usize,
    end: Option<End>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.left.store(true, Relaxed);
    }
}

impl Running {
    /// Hands a job to the engine.
    ///
    /// # Errors
    /// 503: the engine has ended.
    pub async fn start(place: &Place, job: &Job) -> ApiResult<Self> {
        let (events, tokens) = unbounded_channel();
        let (answers, received) = channel(64);
        let (failing, failed) = oneshot::channel();
        let left = Arc::new(AtomicBool::new(false));
        let pass = Arc::clone(&place.gate).read_owned().await;
        let constrained = !matches!(job.rules.constraint, Constraint::None);
        let chooser =
            Chooser::new(job, &place.language, events, Arc::clone(&left), Pass::new(pass, place.paged));
        let mut request = request(place, &job.prompt, answers);
        request.sampling_params.max_len = Some(job.max_tokens);
        request.is_streaming = true;
        request.constraint = job.rules.constraint.clone();
        request.logits_processors = Some(vec![Arc::new(chooser)]);
        send(place, request).await?;
        let can_end = !constrained && !place.language.ends.is_empty();
        tokio::spawn(watch(received, failing, Arc::clone(&left), can_end));
        let (language, max_tokens) = (Arc::clone(&place.language), job.max_tokens);
        Ok(Self { language, tokens, failed, left, max_tokens, told: 0, end: None })
    }

    /// The next token; none after the last one.
    ///
    /// # Errors
    /// What the engine says instead.
    pub async fn next(&mut self) -> ApiResult<Option<Chosen>> {
        if self.end.is_some() {
            return Ok(None);
        }
        match self.tokens.recv().await {
            Some(Event::Token(chosen)) => {
                self.told += 1;
                if self.language.ends.contains(&chosen.token) {
                    self.end = Some(End::Token);
                } else if self.told >= self.max_tokens {
                    self.end = Some(End::Length);
                }
                Ok(Some(chosen))
            }
            Some(Event::NoNumbers) => Err(ApiError::internal(
                "the model's scores are not numbers: its weights hold NaN, or its type is too narrow for them",
            )),
            None => Err(match (&mut self.failed).await {
                Ok(error) => error,
                Err(_) => cut_short(),
            }),
        }
    }

    /// Why there are no more tokens; none before that.
    pub fn end(&self) -> Option<End> {
        self.end
    }
}

/// A request that says how nothing but tokens are computed: the choice is made by a logits processor.
fn request(place: &Place, prompt: &[u32], answers: Sender<Response>) -> NormalRequest {
    let sampling = SamplingParams { temperature: Some(0.0), ..SamplingParams::neutral() };
    let messages = RequestMessage::CompletionTokens(prompt.to_vec());
    NormalRequest::new_simple(messages, sampling, answers, place.engine.next_request_id(), None, None)
}

async fn send(place: &Place, request: NormalRequest) -> ApiResult<()> {
    place.requests.send(Request::Normal(Box::new(request))).await.map_err(|_| cut_short())
}

/// The engine ends every answer by itself: one without an end is one that the engine did not live to give.
fn cut_short() -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the engine has ended before it gave the whole answer")
}

/// Takes whatever the engine sends, so that it never waits for a client; keeps what went wrong. Where the client has
/// left, the sequence ends by a token of its own if it `can_end` so, or because nobody listens any more.
async fn watch(
    mut answers: Receiver<Response>,
    failing: oneshot::Sender<ApiError>,
    left: Arc<AtomicBool>,
    can_end: bool,
) {
    while let Some(answer) = answers.recv().await {
        let error = match answer {
            Response::ValidationError(error) => ApiError::bad_request(in_words(error.as_ref())),
            Response::InternalError(error) => ApiError::internal(in_words(error.as_ref())),
            Response::ModelError(message, _) | Response::CompletionModelError(message, _) => {
                ApiError::internal(message)
            }
            _ if left.load(Relaxed) && !can_end => return,
            _ => continue,
        };
        let _ = failing.send(error);
        // nothing that the engine still has to say may find nobody
        while answers.recv().await.is_some() {}
        return;
    }
}

/// The right to have a prompt computed beside others.
pub(super) struct Pass {
    guard: std::sync::Mutex<Option<OwnedRwLockReadGuard<()>>>,
    /// For as long as the sequence lives, not for its prompt only.
    whole: bool,
}

impl Pass {
    fn new(guard: OwnedRwLockReadGuard<()>, whole: bool) -> Self {
        Self { guard: std::sync::Mutex::new(Some(guard)), whole }
    }

    /// The prompt is computed.
    fn prompt_is_done(&self) {
        if !self.whole {
            lock(&self.guard).take();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The likeliest token, and how likely it is.
    pub(super) fn greedy() -> Rules {
        Rules {
            temperature: 0.0,
            top_p: 1.0,
            top_k: None,
            min_p: 0.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repetition_penalty: 1.0,
            bias: Vec::new(),
            seed: None,
            logprobs: Some(1),
            stop: Vec::new(),
            constraint: Constraint::None,
        }
    }

    /// A greedy job.
    pub(super) fn job(prompt: &[u32]) -> Job {
        let rules = greedy();
        Job { prompt: prompt.into(), rules: Arc::new(rules), dial: None, max_tokens: 1, number: 0 }
    }
}
