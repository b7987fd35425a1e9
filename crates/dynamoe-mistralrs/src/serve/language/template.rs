//! Chat templates, as transformers renders them.

use anyhow::{Context, Result};
use dynamoe_model::chat;
use either::Either;
use mistralrs_core::ChatTemplate;
use serde_json::{Map, Value, json};

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
    pub messages: Vec<Value>,
    /// OpenAI's descriptions of tools.
    pub tools: Vec<Value>,
    /// Further variables.
    pub variables: Map<String, Value>,
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
        let Conversation { messages, tools, variables } = conversation;
        // templates ask whether tools are given by asking whether they are none
        let tools = if tools.is_empty() { Value::Null } else { tools.into() };
        let token = |token: &Option<String>| token.clone().unwrap_or_default();
        let mut context = json!({
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": true,
            "bos_token": token(&self.bos),
            "eos_token": token(&self.eos),
            "unk_token": token(&self.unk),
        });
        for (name, value) in variables {
            context[name] = value;
        }
        chat::render(text, context, chrono::Local::now().naive_local())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
