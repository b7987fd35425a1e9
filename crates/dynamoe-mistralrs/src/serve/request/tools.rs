//! The tools of a chat.

use serde_json::{Value, json};

use super::{
    Body,
    limits::{PATTERN_BYTES, TOOLS, at_most},
    refused,
};
use crate::serve::error::ApiResult;

/// Which tools a model may call.
#[derive(Debug, Default, Clone, PartialEq)]
pub(in super::super) struct ToolUse {
    /// Descriptions for the template.
    pub tools: Vec<Value>,
    /// Whether an answer is searched for calls.
    pub calls: bool,
    /// The schema of the one call that the answer has to be, if it has to be one.
    pub forced: Option<Value>,
    /// Whether an answer may hold several calls.
    pub parallel: bool,
}

/// Reads `tools` and `tool_choice`.
///
/// # Errors
/// 400: a tool that has no name, a choice of one that is not there.
pub(in super::super) fn tool_use(body: &mut Body) -> ApiResult<ToolUse> {
    let tools = body.tools.take().unwrap_or_default();
    at_most("tools", tools.len() as u64, TOOLS as u64, " entries")?;
    let bytes = tools.iter().map(|tool| tool.to_string().len() as u64).sum();
    at_most("tools", bytes, PATTERN_BYTES as u64, " bytes of text")?;
    for (n, tool) in tools.iter().enumerate() {
        let name = tool.pointer("/function/name").and_then(Value::as_str).unwrap_or_default();
        if tool["type"] != "function" || name.is_empty() {
            return Err(refused(
                &format!("tools[{n}]"),
                "expected {\"type\": \"function\", \"function\": {\"name\": …}}",
            ));
        }
    }
    let parallel = body.parallel_tool_calls.unwrap_or(true);
    let choice = body.tool_choice.take().unwrap_or_else(|| "auto".into());
    let wanted = match (choice.as_str(), choice.pointer("/function/name").and_then(Value::as_str)) {
        (Some("none"), _) => return Ok(ToolUse::default()),
        (Some("auto"), _) => return Ok(ToolUse { calls: !tools.is_empty(), tools, forced: None, parallel }),
        (Some("required"), _) => None,
        (None, Some(name)) if choice["type"] == "function" => Some(name),
        _ => {
            return Err(refused(
                "tool_choice",
                format_args!("expected none, auto, required or a function by its name, found {choice}"),
            ));
        }
    };
    let named = |tool: &&Value| wanted.is_none_or(|name| tool["function"]["name"] == name);
    let forms: Vec<Value> = tools.iter().filter(named).map(form).collect();
    match (forms.is_empty(), wanted) {
        (false, _) => {
            Ok(ToolUse { calls: true, tools, forced: Some(json!({"anyOf": forms})), parallel: false })
        }
        (true, Some(name)) => Err(refused("tool_choice", format_args!("tools have no function {name:?}"))),
        (true, None) => Err(refused("tool_choice", "required, but tools are none")),
    }
}

/// The form of a call of `tool`.
fn form(tool: &Value) -> Value {
    let function = &tool["function"];
    let arguments = match &function["parameters"] {
        Value::Null => json!({"type": "object"}),
        schema => schema.clone(),
    };
    json!({
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(tools: Value, choice: Value) -> ApiResult<ToolUse> {
        tool_use(&mut serde_json::from_value(json!({"tools": tools, "tool_choice": choice})).unwrap())
    }

    fn two() -> Value {
        let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
        json!([tool("f"), tool("g")])
    }

    #[test]
    fn a_choice_bounds_the_answer() {
        let auto = read(two(), Value::Null).unwrap();
        assert!(auto.calls && auto.forced.is_none() && auto.tools.len() == 2);
        let none = read(two(), json!("none")).unwrap();
        assert!(!none.calls && none.tools.is_empty());
        let forms = |choice| read(two(), choice).unwrap().forced.unwrap()["anyOf"].as_array().unwrap().len();
        assert_eq!(forms(json!("required")), 2);
        assert_eq!(forms(json!({"type": "function", "function": {"name": "g"}})), 1);
        assert!(!read(Value::Null, Value::Null).unwrap().calls);
    }

    #[test]
    fn a_choice_that_cannot_be_is_refused_by_name() {
        for (tools, choice, word) in [
            (two(), json!("always"), "tool_choice"),
            (two(), json!({"type": "function", "function": {"name": "h"}}), "\"h\""),
            (json!([]), json!("required"), "tool_choice"),
            (json!([{"type": "function"}]), Value::Null, "tools[0]"),
            (json!(vec![json!({}); 129]), Value::Null, "tools: expected at most 128 entries"),
        ] {
            let message = read(tools, choice).unwrap_err().message;
            assert!(message.contains(word), "{message}");
        }
    }
}
