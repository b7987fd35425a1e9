//! What clients are told.

mod calls;
mod chat;
mod logprobs;
mod source;
mod stream;
mod text;
mod transcript;
mod usage;
mod whole;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    metrics::Watch,
    request::ToolUse,
    run::{Job, Place},
};
use crate::{LoadedModel, serve::admission::Seat};

pub(super) use stream::stream;
pub(super) use whole::whole;

/// A request that was found right, on its way.
pub(super) struct Asked {
    pub head: Head,
    pub place: Place,
    /// One for each choice: all of the first prompt, then all of the second, …
    pub jobs: Vec<Job>,
    /// Answers computed for each prompt, the `told` best of which are told.
    pub choices: usize,
    pub told: usize,
    pub form: Form,
    pub include_usage: bool,
    /// Log probabilities are not only for choosing the best of several.
    pub tells_logprobs: bool,
    /// Limit of the bytes of a prompt's logits.
    pub logits_bytes: usize,
    pub model: Option<Arc<LoadedModel>>,
    pub watch: Arc<Watch>,
    /// Kept until the answer is told.
    pub _seat: Seat,
}

/// Which of the two routes was asked.
pub(super) enum Form {
    Chat {
        tools: ToolUse,
        /// The model has think tags; true if the prompt ends between them.
        thinking: Option<bool>,
    },
    Text {
        /// The text of each prompt, if it is to be told too.
        echo: Option<Vec<String>>,
    },
}

/// What all parts of an answer have in common.
#[derive(Clone)]
pub(super) struct Head {
    pub id: String,
    pub created: u64,
    pub model: String,
}

impl Head {
    /// A new one, for the name of the model that the client gave.
    pub fn new(kind: &str, model: String) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let id = format!("{kind}-{:x}-{:x}", now.as_nanos() as u64, COUNT.fetch_add(1, Relaxed));
        Self { id, created: now.as_secs(), model }
    }
}

impl Asked {
    /// The job of a choice, by its index in the answer.
    fn prompt_of(&self, index: usize) -> usize {
        index / self.choices
    }

    /// Tokens of all prompts.
    fn prompt_tokens(&self) -> usize {
        self.jobs.iter().step_by(self.choices).map(|job| job.prompt.len()).sum()
    }
}
