//! The shape of a chat's answers.

use serde_json::{Map, Value, json};

use super::{Asked, Form, calls::Calls, logprobs, transcript::Piece};
use crate::serve::language::{Part, Thinking};

/// Tells thoughts, calls of tools and the rest of an answer apart.
pub(super) struct Speaker {
    thinking: Option<Thinking>,
    calls: Calls,
}

/// What is new in an answer.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Delta {
    pub content: String,
    pub reasoning: String,
    pub calls: Vec<Value>,
}

impl Speaker {
    /// For an answer to `asked`, which must be a chat.
    pub fn new(asked: &Asked) -> Self {
        let (tools, thinking) = match &asked.form {
            Form::Chat { tools, thinking } => (tools.clone(), *thinking),
            Form::Text { .. } => Default::default(),
        };
        Self { thinking: thinking.map(Thinking::new), calls: Calls::new(tools) }
    }

    pub fn push(&mut self, text: &str) -> Delta {
        match &mut self.thinking {
            Some(thinking) => {
                let parts = thinking.push(text);
                self.sort(parts)
            }
            None => Delta { content: self.calls.push(text), ..Delta::default() },
        }
    }

    pub fn finish(mut self) -> Delta {
        let parts = self.thinking.as_mut().map(Thinking::finish).unwrap_or_default();
        let mut delta = self.sort(parts);
        let (rest, calls) = self.calls.finish();
        delta.content.push_str(&rest);
        delta.calls = calls;
        delta
    }

    fn sort(&mut self, parts: Vec<Part>) -> Delta {
        let mut delta = Delta::default();
        for part in parts {
            match part {
                Part::Thought(text) => delta.reasoning.push_str(&text),
                Part::Said(text) => delta.content.push_str(&self.calls.push(&text)),
            }
        }
        delta
    }
}

impl Delta {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub fn add(&mut self, other: Self) {
        self.content.push_str(&other.content);
        self.reasoning.push_str(&other.reasoning);
        self.calls.extend(other.calls);
    }

    /// As the `delta` of a chunk.
    pub fn into_delta(self) -> Value {
        let mut delta = Map::new();
        if !self.content.is_empty() {
            delta.insert("content".into(), self.content.into());
        }
        if !self.reasoning.is_empty() {
            delta.insert("reasoning_content".into(), self.reasoning.into());
        }
        if !self.calls.is_empty() {
            delta.insert("tool_calls".into(), self.calls.into());
        }
        delta.into()
    }

    /// As the `message` of a whole answer.
    pub fn into_message(self) -> Value {
        let called = !self.calls.is_empty();
        let content =
            if called && self.content.trim().is_empty() { Value::Null } else { self.content.into() };
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if !self.reasoning.is_empty() {
            message["reasoning_content"] = self.reasoning.into();
        }
        if called {
            message["tool_calls"] = self.calls.into();
        }
        message
    }
}

/// The `logprobs` of a choice, null if they are not asked for.
pub(super) fn logprobs_of(asked: &Asked, index: usize, pieces: &[Piece]) -> Value {
    if asked.jobs[index].rules.logprobs.is_none() {
        return Value::Null;
    }
    let tokens: Vec<_> = pieces.iter().flat_map(|piece| piece.logprobs.clone()).collect();
    logprobs::of_chat(&asked.place.language, &tokens)
}
