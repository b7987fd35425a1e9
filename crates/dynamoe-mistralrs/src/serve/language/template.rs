//! Chat templates, as transformers renders them.

use anyhow::{Context, Result, anyhow};
use either::Either;
use minijinja::{Environment, Error, ErrorKind, Value, value::Kwargs};
use mistralrs_core::ChatTemplate;
use serde::Serialize;
use serde_json::ser::Formatter;

/// A model's chat template and the special tokens that it may write.
#[derive(Debug, Default)]
pub(in super::super) struct Template {
    /// Name and text of each template; most models have one, called `default`.
    named: Vec<(String, String)>,
    bos: Option<String>,
    eos: Option<String>,
    unk: Option<String>,
}

/// What a template makes a prompt of.
#[derive(Debug, Default)]
pub(in super::super) struct Conversation {
    /// OpenAI's messages; their content is text.
    pub messages: Vec<serde_json::Value>,
    /// OpenAI's descriptions of tools.
    pub tools: Vec<serde_json::Value>,
    /// Further variables.
    pub variables: serde_json::Map<String, serde_json::Value>,
}

impl Template {
    /// The template that the engine read beside the model; none if there is none.
    pub fn of(template: &ChatTemplate) -> Option<Self> {
        let named = match &template.chat_template.as_ref()?.0 {
            Either::Left(text) => vec![("default".to_owned(), text.clone())],
            Either::Right(entries) => entries
                .iter()
                .filter_map(|entry| match (entry.get("name"), entry.get("template")) {
                    (Some(name), Some(text)) => Some((name.clone(), text.clone())),
                    _ => entry.iter().next().map(|(name, text)| (name.clone(), text.clone())),
                })
                .collect(),
        };
        let (bos, eos, unk) = (template.bos_tok(), template.eos_tok(), template.unk_tok());
        Some(Self { named, bos, eos, unk })
    }

    /// Whether a template has `text` in it.
    pub fn mentions(&self, text: &str) -> bool {
        self.named.iter().any(|(_, template)| template.contains(text))
    }

    /// The prompt of a conversation, with the special tokens that the template writes.
    ///
    /// # Errors
    /// What the template refuses or cannot be rendered with.
    pub fn render(&self, conversation: Conversation) -> Result<String> {
        let wanted = if conversation.tools.is_empty() { "default" } else { "tool_use" };
        let named = |name: &str| self.named.iter().find(|(found, _)| found == name);
        let (_, text) = named(wanted)
            .or_else(|| named("default"))
            .or_else(|| self.named.first())
            .context("the model has no chat template")?;
        let text = without_generation_tags(text);
        let mut environment = Environment::new();
        environment.set_lstrip_blocks(true);
        environment.set_trim_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: String| now(&format));
        environment.add_filter("tojson", to_json);
        environment.add_template("chat", &text).map_err(in_words)?;
        let Conversation { messages, tools, variables } = conversation;
        let mut context = serde_json::Map::new();
        context.insert("messages".into(), messages.into());
        // templates ask whether tools are given by asking whether they are none
        let tools = if tools.is_empty() { serde_json::Value::Null } else { tools.into() };
        context.insert("tools".into(), tools);
        context.insert("add_generation_prompt".into(), true.into());
        for (name, token) in [("bos_token", &self.bos), ("eos_token", &self.eos), ("unk_token", &self.unk)] {
            context.insert(name.into(), token.clone().unwrap_or_default().into());
        }
        context.insert("date_string".into(), now("%d %b %Y").into());
        context.extend(variables);
        let template = environment.get_template("chat").map_err(in_words)?;
        template.render(Value::from_serialize(&context)).map_err(in_words)
    }
}

/// Without the tags by which transformers finds an answer to train on, which the template engine does not know.
fn without_generation_tags(template: &str) -> String {
    let mut text = template.to_owned();
    for tag in ["generation", "endgeneration"] {
        for (open, close) in [("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")] {
            text = text.replace(&format!("{open} {tag} {close}"), "");
        }
    }
    text
}

fn now(format: &str) -> String {
    let mut text = String::new();
    // an unknown letter in the format is an error only when written
    match std::fmt::Write::write_fmt(&mut text, format_args!("{}", chrono::Local::now().format(format))) {
        Ok(()) => text,
        Err(_) => format.to_owned(),
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// What went wrong, without the place in the template: that is the model's matter.
fn in_words(error: Error) -> anyhow::Error {
    anyhow!("{}", error.detail().map_or_else(|| error.kind().to_string(), str::to_owned))
}

/// Python's `json.dumps`, which prompts were trained on: a space after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let mut bytes = Vec::new();
    let written = match options.get::<Option<usize>>("indent")? {
        Some(indent) => {
            let indent = b" ".repeat(indent.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&indent);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Spaced)),
    };
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&bytes).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(text: &str, conversation: Conversation) -> Result<String> {
        let named = vec![("default".into(), text.into())];
        Template { named, bos: Some("<s>".into()), ..Template::default() }.render(conversation)
    }

    fn says(role: &str, content: &str) -> Conversation {
        Conversation { messages: vec![json!({"role": role, "content": content})], ..Conversation::default() }
    }

    #[test]
    fn a_template_writes_messages_and_special_tokens() {
        let text = "{{ bos_token }}{% for m in messages %}\n[{{ m.role }}] {{ m['content'].strip() }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}";
        assert_eq!(render(text, says("user", " Hi <b> ")).unwrap(), "<s>[user] Hi <b>\n>");
        assert_eq!(
            render("{{ messages[::-1][0].role }}{{ tools is none }}", says("user", "")).unwrap(),
            "userTrue"
        );
    }

    #[test]
    fn a_template_may_refuse() {
        let text = "{% if messages[0].role != 'user' %}{{ raise_exception('the first message must be a user\\'s') }}{% endif %}";
        let refused = render(text, says("assistant", "x")).unwrap_err();
        assert_eq!(refused.to_string(), "the first message must be a user's");
        assert!(render("{% if %}", says("user", "x")).is_err());
        assert!(render("{{ messages[0].content + 1 }}", says("user", "x")).is_err());
    }

    #[test]
    fn tools_are_written_as_python_writes_them() {
        let tools = vec![
            json!({"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2], "b": "<é>"}}}),
        ];
        let conversation = Conversation { tools, ..says("user", "x") };
        let text = "{{ tools[0] | tojson }}";
        let written = render(text, conversation).unwrap();
        assert_eq!(
            written,
            r#"{"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2], "b": "<é>"}}}"#
        );
    }

    #[test]
    fn dates_never_fail() {
        assert_eq!(now("%Y").len(), 4);
        assert_eq!(now("%Q!"), "%Q!");
    }
}
