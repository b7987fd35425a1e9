//! Log probabilities in the two forms that OpenAI's routes have.

use serde_json::{Map, Value, json};

use crate::serve::{language::Language, run::TokenLogprob};

/// A token's name for people: its text, or its bytes where they are no text.
fn name(language: &Language, token: u32) -> String {
    match std::str::from_utf8(language.name(token)) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let hex: String = language.name(token).iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("bytes:{hex}")
        }
    }
}

/// Tokens as a chat tells them.
pub(super) fn of_chat(language: &Language, tokens: &[TokenLogprob]) -> Value {
    let entry = |token: u32, logprob: f32| {
        let mut entry = Map::new();
        entry.insert("token".into(), name(language, token).into());
        entry.insert("logprob".into(), number(logprob));
        entry.insert("bytes".into(), language.name(token).into());
        entry
    };
    let told = |told: &TokenLogprob| {
        let mut token = entry(told.token, told.logprob);
        let top: Vec<Value> = told.top.iter().map(|&(id, logprob)| entry(id, logprob).into()).collect();
        token.insert("top_logprobs".into(), top.into());
        Value::from(token)
    };
    json!({"content": tokens.iter().map(told).collect::<Vec<_>>(), "refusal": null})
}

/// As short as it is exact.
fn number(logprob: f32) -> Value {
    // through text: 0.1f32 is not to become 0.10000000149011612
    serde_json::from_str(&logprob.to_string()).unwrap_or(Value::Null)
}

/// Tokens as a text completion tells them.
#[derive(Debug, Default)]
pub(super) struct OfText {
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<Value>,
    /// Letters before the next token.
    offset: usize,
}

impl OfText {
    /// A token that nothing predicts: the first of a prompt.
    pub fn first(&mut self, language: &Language, token: u32) {
        self.name(language, token);
        self.token_logprobs.push(Value::Null);
        self.top_logprobs.push(Value::Null);
    }

    pub fn push(&mut self, language: &Language, told: &TokenLogprob) {
        self.name(language, told.token);
        self.token_logprobs.push(number(told.logprob));
        let mut top = Map::new();
        // of tokens that look alike the likeliest is told; the token itself always is
        for &(token, logprob) in [(told.token, told.logprob)].iter().chain(&told.top) {
            let name = name(language, token);
            let likelier =
                top.get(&name).and_then(Value::as_f64).is_none_or(|other| f64::from(logprob) > other);
            if likelier {
                top.insert(name, number(logprob));
            }
        }
        self.top_logprobs.push(top.into());
    }

    fn name(&mut self, language: &Language, token: u32) {
        self.tokens.push(name(language, token).into());
        self.text_offset.push(self.offset.into());
        let begins = |byte: &&u8| **byte & 0xc0 != 0x80;
        self.offset += language.text(token).iter().filter(begins).count();
    }

    /// What was pushed since the last time.
    pub fn take(&mut self) -> Value {
        let take = |values: &mut Vec<Value>| std::mem::take(values);
        json!({
            "tokens": take(&mut self.tokens),
            "token_logprobs": take(&mut self.token_logprobs),
            "top_logprobs": take(&mut self.top_logprobs),
            "text_offset": take(&mut self.text_offset),
        })
    }
}
