//! Messages and their content.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor, value::SeqAccessDeserializer},
};
use serde_json::{Map, Value};

use super::refused;
use crate::serve::error::ApiResult;

/// The messages of a chat; a string is one message of the user, as mistral.rs has it.
#[derive(Debug)]
pub(in super::super) struct Messages(pub Vec<Message>);

/// One message.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in super::super) struct Message {
    pub role: String,
    pub content: Option<Content>,
    pub name: Option<String>,
    pub tool_calls: Option<Vec<Value>>,
    pub tool_call_id: Option<String>,
    pub reasoning_content: Option<String>,
    /// OpenAI's answers have it, so clients send it back; it says nothing.
    #[serde(rename = "refusal")]
    pub _refusal: Option<Value>,
    #[serde(rename = "annotations")]
    pub _annotations: Option<Value>,
}

/// A text, or the parts of one.
#[derive(Debug)]
pub(in super::super) enum Content {
    Text(String),
    Parts(Vec<PartField>),
}

/// A part of a message's content.
#[derive(Debug, Deserialize)]
pub(in super::super) struct PartField {
    #[serde(rename = "type")]
    kind: Option<String>,
    text: Option<String>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Reads a string or a list, and keeps track of where in the list it is.
struct TextOr<L>(std::marker::PhantomData<L>, &'static str);

enum Read<L> {
    Text(String),
    List(Vec<L>),
}

impl<'de, L: Deserialize<'de>> Visitor<'de> for TextOr<L> {
    type Value = Read<L>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "a string or a list of {}", self.1)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Read::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(list)).map(Read::List)
    }
}

impl<'de> Deserialize<'de> for Messages {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match deserializer.deserialize_any(TextOr(std::marker::PhantomData, "messages"))? {
            Read::List(messages) => Self(messages),
            Read::Text(text) => Self(vec![Message::of_user(text)]),
        })
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match deserializer.deserialize_any(TextOr(std::marker::PhantomData, "parts"))? {
            Read::List(parts) => Self::Parts(parts),
            Read::Text(text) => Self::Text(text),
        })
    }
}

impl Content {
    /// The text; parts are joined with nothing between them. Parts of another kind are refused before anything is
    /// opened or fetched for them.
    fn into_text(self, field: &str) -> ApiResult<String> {
        let parts = match self {
            Self::Text(text) => return Ok(text),
            Self::Parts(parts) => parts,
        };
        let mut all = String::new();
        for (n, part) in parts.into_iter().enumerate() {
            let field = format!("{field}[{n}]");
            let foreign = part.others.keys().next().map(String::as_str);
            let kind = part.kind.as_deref().unwrap_or("none");
            if kind != "text" || foreign.is_some() {
                let found = foreign.unwrap_or(kind);
                return Err(refused(
                    &field,
                    format_args!(
                        "the model reads text only: expected a part of type \"text\", found {found:?}"
                    ),
                ));
            }
            all.push_str(&part.text.ok_or_else(|| refused(&field, "expected a text, found none"))?);
        }
        Ok(all)
    }
}

impl Message {
    fn of_user(text: String) -> Self {
        Self {
            role: "user".into(),
            content: Some(Content::Text(text)),
            name: None,
            tool_calls: None,
            tool_call_id: None,
            reasoning_content: None,
            _refusal: None,
            _annotations: None,
        }
    }

    /// The message for a chat template. `field` names it in errors.
    pub fn into_json(self, field: &str) -> ApiResult<Value> {
        let roles = ["system", "developer", "user", "assistant", "tool"];
        if !roles.contains(&self.role.as_str()) {
            let roles = roles.join(", ");
            return Err(refused(
                &format!("{field}.role"),
                format_args!("expected one of {roles}, found {:?}", self.role),
            ));
        }
        let content_field = format!("{field}.content");
        let content = match self.content {
            Some(content) => content.into_text(&content_field)?,
            // what called a tool may have said nothing
            None if self.role == "assistant" => String::new(),
            None => return Err(refused(&content_field, "expected a text or a list of parts, found none")),
        };
        let mut json = Map::new();
        json.insert("role".into(), self.role.into());
        json.insert("content".into(), content.into());
        let texts = [
            ("name", self.name),
            ("tool_call_id", self.tool_call_id),
            ("reasoning_content", self.reasoning_content),
        ];
        for (name, text) in texts {
            if let Some(text) = text {
                json.insert(name.into(), text.into());
            }
        }
        if let Some(mut calls) = self.tool_calls.filter(|calls| !calls.is_empty()) {
            calls.iter_mut().for_each(read_arguments);
            json.insert("tool_calls".into(), calls.into());
        }
        Ok(json.into())
    }
}

/// OpenAI writes a call's arguments as a string of JSON; templates expect what it says.
fn read_arguments(call: &mut Value) {
    if let Some(arguments) = call.pointer_mut("/function/arguments")
        && let Some(read) = arguments.as_str().and_then(|text| serde_json::from_str::<Map<_, _>>(text).ok())
    {
        *arguments = read.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(message: Value) -> ApiResult<Value> {
        serde_json::from_value::<Message>(message).unwrap().into_json("messages[0]")
    }

    #[test]
    fn parts_are_joined() {
        let parts = json!([{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]);
        assert_eq!(read(json!({"role": "user", "content": parts})).unwrap()["content"], "Say hi.");
        assert_eq!(read(json!({"role": "user", "content": []})).unwrap()["content"], "");
        assert_eq!(read(json!({"role": "user", "content": ""})).unwrap()["content"], "");
        let Messages(messages) = serde_json::from_value(json!("Hi")).unwrap();
        assert_eq!(messages[0].role, "user");
    }

    #[test]
    fn what_is_no_text_is_refused_by_its_place() {
        let message = |content: Value| read(json!({"role": "user", "content": content})).unwrap_err().message;
        for kind in ["image_url", "audio_url", "video_url", "input_audio", "file"] {
            let error =
                message(json!([{"type": "text", "text": "x"}, {"type": kind, kind: {"url": "http://x"}}]));
            assert!(error.contains("messages[0].content[1]") && error.contains(kind), "{error}");
        }
        assert!(message(json!([{"type": "text", "text": "x", "image_url": "y"}])).contains("image_url"));
        assert!(message(json!([{"type": "text"}])).contains("expected a text"));
        assert!(message(Value::Null).contains("messages[0].content"));
        assert!(
            read(json!({"role": "robot", "content": "x"})).unwrap_err().message.contains("messages[0].role")
        );
    }

    #[test]
    fn calls_of_tools_reach_the_template_read() {
        let call =
            json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}});
        let read = read(json!({"role": "assistant", "tool_calls": [call]})).unwrap();
        assert_eq!(read["tool_calls"][0]["function"]["arguments"], json!({"a": 1}));
        assert_eq!(read["content"], "");
    }
}
