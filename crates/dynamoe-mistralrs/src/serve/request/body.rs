//! The fields of both routes.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    content::{Message, Messages},
    dial::DialField,
    refused,
};
use crate::serve::error::ApiResult;

/// A body of `/v1/chat/completions` or `/v1/completions`. Each route refuses the other's fields.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in super::super) struct Body {
    pub model: Option<String>,

    // what to write on from
    pub messages: Option<Messages>,
    pub prompt: Option<Prompt>,
    pub echo: Option<bool>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<Value>,
    pub parallel_tool_calls: Option<bool>,
    pub reasoning_effort: Option<String>,
    pub enable_thinking: Option<bool>,
    pub chat_template_kwargs: Option<Map<String, Value>>,

    // how much of it
    pub max_tokens: Option<u64>,
    pub max_completion_tokens: Option<u64>,
    pub n: Option<u64>,
    pub best_of: Option<u64>,
    pub stop: Option<Stop>,

    // how to choose tokens
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub logit_bias: Option<HashMap<String, f64>>,
    pub seed: Option<i64>,
    pub response_format: Option<ResponseFormat>,
    pub grammar: Option<Grammar>,
    pub sensitivity: Option<DialField>,
    pub budget: Option<DialField>,

    // how to tell it
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub logprobs: Option<LogprobsField>,
    pub top_logprobs: Option<u64>,

    // what is about the client, not about the answer
    #[serde(rename = "user")]
    pub _user: Option<String>,
    #[serde(rename = "safety_identifier")]
    pub _safety_identifier: Option<String>,
    #[serde(rename = "prompt_cache_key")]
    pub _prompt_cache_key: Option<String>,
    #[serde(rename = "metadata")]
    pub _metadata: Option<Map<String, Value>>,
    pub store: Option<bool>,
    pub service_tier: Option<String>,

    /// mistral.rs's; a prompt is never cut here.
    pub truncate_sequence: Option<bool>,
}

/// What an answer has to be, in OpenAI's words.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(in super::super) enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: NamedSchema },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in super::super) struct NamedSchema {
    #[serde(rename = "name")]
    pub _name: Option<String>,
    #[serde(rename = "description")]
    pub _description: Option<String>,
    #[serde(rename = "strict")]
    pub _strict: Option<bool>,
    pub schema: Value,
}

/// What an answer has to be, in mistral.rs's words.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", content = "value", rename_all = "snake_case")]
pub(in super::super) enum Grammar {
    Regex(String),
    JsonSchema(Value),
    Lark(String),
    Llguidance(mistralrs_core::LlguidanceGrammar),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in super::super) struct StreamOptions {
    pub include_usage: Option<bool>,
    /// Asks for padding against listeners; false is what is done.
    pub include_obfuscation: Option<bool>,
}

/// A flag in chats, a count in text completions.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged, expecting = "expected true, false or a number of tokens")]
pub(in super::super) enum LogprobsField {
    Flag(bool),
    Count(u64),
}

/// One stop string or several.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub(in super::super) enum Stop {
    One(String),
    Many(Vec<String>),
}

impl Stop {
    pub fn into_strings(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// What a text completion writes on from: one text, several, the tokens of one, those of several.
#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, a list of token ids or a list of such lists"
)]
pub(in super::super) enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    ManyTokens(Vec<Vec<u32>>),
}

impl Body {
    /// Refuses what only the other route has.
    pub fn for_chat(&self) -> ApiResult<()> {
        let foreign = [
            ("prompt", self.prompt.is_some()),
            ("echo", self.echo.is_some()),
            ("best_of", self.best_of.is_some()),
        ];
        only(&foreign, "/v1/completions")?;
        self.for_both()
    }

    /// Refuses what only the other route has.
    pub fn for_text(&self) -> ApiResult<()> {
        let foreign = [
            ("messages", self.messages.is_some()),
            ("tools", self.tools.is_some()),
            ("tool_choice", self.tool_choice.is_some()),
            ("parallel_tool_calls", self.parallel_tool_calls.is_some()),
            ("top_logprobs", self.top_logprobs.is_some()),
            ("reasoning_effort", self.reasoning_effort.is_some()),
            ("enable_thinking", self.enable_thinking.is_some()),
            ("chat_template_kwargs", self.chat_template_kwargs.is_some()),
        ];
        only(&foreign, "/v1/chat/completions")?;
        self.for_both()
    }

    fn for_both(&self) -> ApiResult<()> {
        if self.truncate_sequence == Some(true) {
            return Err(refused(
                "truncate_sequence",
                "a prompt is never cut here: shorten it, or leave the field out",
            ));
        }
        if self.store == Some(true) {
            return Err(refused("store", "this server stores no answers"));
        }
        if let Some(tier) = self.service_tier.as_deref().filter(|tier| !["auto", "default"].contains(tier)) {
            return Err(refused("service_tier", format_args!("expected auto or default, found {tier:?}")));
        }
        if let Some(options) = &self.stream_options {
            if self.stream != Some(true) {
                return Err(refused("stream_options", "expected only together with \"stream\": true"));
            }
            if options.include_obfuscation == Some(true) {
                return Err(refused(
                    "stream_options.include_obfuscation",
                    "this server does not pad its streams",
                ));
            }
        }
        Ok(())
    }

    /// Whether a stream ends with a chunk that tells the usage.
    pub fn include_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }

    /// The messages of a chat.
    pub fn take_messages(&mut self) -> ApiResult<Vec<Message>> {
        let messages = self
            .messages
            .take()
            .ok_or_else(|| refused("messages", "expected a list of messages, found none"))?;
        if messages.0.is_empty() {
            return Err(refused("messages", "expected at least one message, found none"));
        }
        Ok(messages.0)
    }
}

fn only(foreign: &[(&str, bool)], route: &str) -> ApiResult<()> {
    match foreign.iter().find(|(_, there)| *there) {
        Some((field, _)) => Err(refused(field, format_args!("only {route} has this field"))),
        None => Ok(()),
    }
}
