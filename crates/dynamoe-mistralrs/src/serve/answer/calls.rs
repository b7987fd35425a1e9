//! Calls of tools in the text of an answer.

use serde_json::{Map, Value, json};

use crate::serve::{language::beginning_of, request::ToolUse};

/// What a call begins with, by the models that write it so.
const MARKS: [&str; 3] = ["<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"];

/// Holds back what may be a call of a tool.
#[derive(Debug)]
pub(super) struct Calls {
    wanted: ToolUse,
    /// Whether all that came is white space.
    blank: bool,
    /// A call has begun: nothing of it is told before its end.
    begun: bool,
    held: String,
}

impl Calls {
    pub fn new(wanted: ToolUse) -> Self {
        Self { wanted, blank: true, begun: false, held: String::new() }
    }

    /// Takes text and gives what is part of no call.
    pub fn push(&mut self, text: &str) -> String {
        if !self.wanted.calls {
            return text.to_owned();
        }
        self.held.push_str(text);
        if self.begun {
            return String::new();
        }
        let mark = MARKS.iter().filter_map(|mark| self.held.find(mark)).min();
        let object = (self.blank && self.held.trim_start().starts_with(['{', '['])).then_some(0);
        let sure = match object.or(mark) {
            Some(at) => {
                self.begun = true;
                at
            }
            // white space before an answer may be before a call
            None if self.blank && self.held.trim().is_empty() => 0,
            None => self.held.len() - beginning_of(&self.held, MARKS),
        };
        let rest = self.held.split_off(sure);
        let said = std::mem::replace(&mut self.held, rest);
        self.blank &= said.trim().is_empty();
        said
    }

    /// The rest: calls, or text that turned out to be none.
    pub fn finish(self) -> (String, Vec<Value>) {
        let mut calls = if self.begun { read(&self.held) } else { Vec::new() };
        if calls.is_empty() {
            return (self.held, Vec::new());
        }
        if !self.wanted.parallel {
            calls.truncate(1);
        }
        let told = calls.into_iter().enumerate().map(|(index, call)| tell(index, &call)).collect();
        (String::new(), told)
    }
}

/// A call as OpenAI tells it.
fn tell(index: usize, call: &Map<String, Value>) -> Value {
    let arguments = call.get("arguments").or(call.get("parameters"));
    let arguments = match arguments {
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
        None => "{}".into(),
    };
    json!({
        "index": index,
        "id": format!("call_{:016x}", rand::random::<u64>()),
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    })
}

/// The objects with a name in a text that begins with one, a list of them, or a mark before either.
fn read(text: &str) -> Vec<Map<String, Value>> {
    let between = MARKS.into_iter().chain(["</tool_call>", ";"]);
    let mut rest = text;
    let mut calls = Vec::new();
    loop {
        rest = rest.trim_start();
        while let Some(after) = between.clone().find_map(|word| rest.strip_prefix(word)) {
            rest = after.trim_start();
        }
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        let Some(Ok(value)) = values.next() else { return calls };
        rest = &rest[values.byte_offset()..];
        let values = if let Value::Array(values) = value { values } else { vec![value] };
        for value in values {
            match value {
                Value::Object(call) if call.get("name").is_some_and(Value::is_string) => calls.push(call),
                _ => return calls,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(pieces: &[&str]) -> (String, Vec<(String, String)>) {
        let wanted = ToolUse { calls: true, parallel: true, ..ToolUse::default() };
        let mut calls = Calls::new(wanted);
        let mut said: String = pieces.iter().map(|piece| calls.push(piece)).collect();
        let (rest, calls) = calls.finish();
        said += &rest;
        let of = |call: &Value| {
            let function = &call["function"];
            (
                function["name"].as_str().unwrap().to_owned(),
                function["arguments"].as_str().unwrap().to_owned(),
            )
        };
        (said, calls.iter().map(of).collect())
    }

    #[test]
    fn calls_are_found_as_models_write_them() {
        let f = ("f".to_owned(), "{\"a\":1}".to_owned());
        let two = vec![f.clone(), ("g".into(), "{}".into())];
        for text in [
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n<tool_call>{\"name\": \"g\"}</tool_call>",
            "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": 1}}, {\"name\": \"g\", \"arguments\": {}}]",
            "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"a\": 1}}; {\"name\": \"g\", \"parameters\": {}}",
        ] {
            assert_eq!(told(&[text]), (String::new(), two.clone()));
            let letters: Vec<String> = text.chars().map(String::from).collect();
            assert_eq!(told(&letters.iter().map(String::as_str).collect::<Vec<_>>()).1, two);
        }
        let (said, calls) =
            told(&["Let me see. <tool", "_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\":1}\"}"]);
        assert_eq!((said.as_str(), calls), ("Let me see. ", vec![f]));
    }

    #[test]
    fn what_is_no_call_is_told() {
        for text in ["Hello", " {\"a\": 1}", "{ unfinished", "<tool_call> none", "1 < 2 <tool", "  "] {
            assert_eq!(told(&[text]), (text.to_owned(), vec![]));
        }
        let mut off = Calls::new(ToolUse::default());
        assert_eq!(off.push("{\"name\": \"f\"}"), "{\"name\": \"f\"}");
    }
}
