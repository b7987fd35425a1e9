//! Conversations as text, by the chat template that a model brings, rendered as transformers renders it.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use chrono::{NaiveDate, NaiveDateTime};
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value as Rendered};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter};
use serde_json::{Value, json};

use crate::files::{read_file, read_text};

/// The special tokens that templates write.
const SPECIAL: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

/// A model's chat template and the special tokens that it may write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatTemplate {
    text: String,
    /// In the order of `SPECIAL`; empty where the model has none.
    special: [String; 4],
}

impl ChatTemplate {
    /// The template of the model in `dir`: that of chat_template.jinja, else of chat_template.json, else of
    /// tokenizer_config.json. None if there is none.
    ///
    /// # Errors
    /// A chat_template.jinja that cannot be read.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let json = |name: &str| -> Value {
            let bytes = read_file(&dir.join(name)).unwrap_or_default();
            serde_json::from_slice(&bytes).unwrap_or_default()
        };
        let config = json("tokenizer_config.json");
        let file = dir.join("chat_template.jinja");
        let text = if file.exists() {
            Some(read_text(&file).with_context(|| format!("{}: cannot be read", file.display()))?)
        } else {
            named(&json("chat_template.json")["chat_template"]).or_else(|| named(&config["chat_template"]))
        };
        let special = SPECIAL.map(|name| {
            let token = &config[name];
            token.get("content").unwrap_or(token).as_str().unwrap_or_default().to_owned()
        });
        Ok(text.map(|text| Self { text, special }))
    }

    /// The text of messages, each an object with `role` and `content`, without the BOS that many templates begin with. A
    /// template that asks for the date gets 26 July 2024, so that the same messages always give the same text.
    ///
    /// # Errors
    /// What the template refuses, or cannot be rendered with.
    pub fn render(&self, messages: &[Value]) -> Result<String> {
        self.write(messages, false)
    }

    /// The text of messages as [`ChatTemplate::render`] writes it, and where in it the answers stand, in bytes: what the
    /// assistant's messages from `first` on add to the text before them and to the prompt for an answer. The token that ends
    /// an answer is a part of it, white space after that token is not.
    ///
    /// # Errors
    /// As there; a template that writes the beginning of a conversation differently when more follows.
    pub fn render_answers(&self, messages: &[Value], first: usize) -> Result<(String, Vec<Range<usize>>)> {
        let whole = self.write(messages, false)?;
        let prefix = |count: usize, prompt: bool| -> Result<usize> {
            let text = self.write(&messages[..count], prompt)?;
            ensure!(
                whole.starts_with(&text),
                "the template writes the first {count} of {} messages differently when more follow, so where an answer \
                 begins and ends cannot be told: write the text out yourself, as \"prompt\" and \"completion\"",
                messages.len()
            );
            Ok(text.len())
        };
        let mut answers = Vec::new();
        for (index, message) in messages.iter().enumerate().skip(first) {
            if message["role"] != "assistant" {
                continue;
            }
            let start = prefix(index, true)?;
            let end = if index + 1 < messages.len() { prefix(index + 1, false)? } else { whole.len() };
            let answer = whole.get(start..end).unwrap_or_default();
            let content = message["content"].as_str().unwrap_or_default().trim();
            let trimmed = answer.trim_end();
            // where nothing else follows the content, white space ends the answer
            let bare = !content.is_empty() && trimmed.ends_with(content);
            answers.push(start..if bare { end } else { start + trimmed.len() });
        }
        Ok((whole, answers))
    }

    fn write(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String> {
        let mut context = json!({
            "messages": messages, "tools": null, "add_generation_prompt": add_generation_prompt,
        });
        for (name, token) in SPECIAL.iter().zip(&self.special) {
            context[name] = token.as_str().into();
        }
        let text = render(&self.text, context, still())?;
        let bos = self.special[0].as_str();
        Ok(text.strip_prefix(bos).map(str::to_owned).unwrap_or(text))
    }
}

/// Renders a chat template as transformers does. `context` is an object with the template's variables (`messages`, `tools`,
/// the special tokens, …), and `now` the time that the template finds if it asks.
///
/// # Errors
/// What the template refuses, or cannot be rendered with.
pub fn render(template: &str, mut context: Value, now: NaiveDateTime) -> Result<String> {
    let text = without_generation_tags(template);
    let mut environment = Environment::new();
    environment.set_lstrip_blocks(true);
    environment.set_trim_blocks(true);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: String| written(now, &format));
    environment.add_filter("tojson", to_json);
    environment.add_template("chat", &text).map_err(in_words)?;
    if context.get("date_string").is_none() {
        context["date_string"] = written(now, "%d %b %Y").into();
    }
    let template = environment.get_template("chat").map_err(in_words)?;
    template.render(Rendered::from_serialize(&context)).map_err(in_words)
}

/// A template that stands alone, or that is the default of several.
fn named(template: &Value) -> Option<String> {
    let text = match template.as_array() {
        None => template,
        Some(list) => list
            .iter()
            .find(|entry| entry["name"] == "default")
            .or_else(|| list.first())
            .map(|entry| &entry["template"])?,
    };
    text.as_str().map(str::to_owned)
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

/// The time that a training text is written at, so that it is always the same text.
fn still() -> NaiveDateTime {
    NaiveDate::from_ymd_opt(2024, 7, 26).and_then(|day| day.and_hms_opt(12, 0, 0)).unwrap_or_default()
}

fn written(now: NaiveDateTime, format: &str) -> String {
    let mut text = String::new();
    // an unknown letter in the format is an error only when written
    match std::fmt::Write::write_fmt(&mut text, format_args!("{}", now.format(format))) {
        Ok(()) => text,
        Err(_) => format.to_owned(),
    }
}

fn raise_exception(message: String) -> Result<Rendered, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// What went wrong, without the place in the template.
fn in_words(error: Error) -> anyhow::Error {
    anyhow!("{}", error.detail().map_or_else(|| error.kind().to_string(), str::to_owned))
}

/// Python's `json.dumps`: a space after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { to.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { to.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, to: &mut W) -> std::io::Result<()> {
        to.write_all(b": ")
    }
}

fn to_json(value: Rendered, options: Kwargs) -> Result<Rendered, Error> {
    let mut bytes = Vec::new();
    let written = match options.get::<Option<usize>>("indent")? {
        Some(indent) => {
            let indent = b" ".repeat(indent.min(16));
            let pretty = PrettyFormatter::with_indent(&indent);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, pretty))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Spaced)),
    };
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Rendered::from_safe_string(String::from_utf8_lossy(&bytes).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% generation %}{{ m['content'].strip() }}{% endgeneration %}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}never{% endif %}";

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    fn read(files: &[(&str, &str)]) -> Option<ChatTemplate> {
        ChatTemplate::read(folder(files).path()).unwrap()
    }

    #[test]
    fn a_conversation_is_written_without_the_bos_and_the_prompt_for_an_answer() {
        let config =
            json!({ "chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": { "content": "</s>" } });
        let template = read(&[("tokenizer_config.json", &config.to_string())]).unwrap();
        let messages =
            [json!({"role": "user", "content": " Hi <b>"}), json!({"role": "assistant", "content": "Ho"})];
        assert_eq!(template.render(&messages).unwrap(), "<user>Hi <b></s>\n<assistant>Ho</s>\n");
    }

    #[test]
    fn the_template_is_found_where_models_keep_it() {
        let list = json!({ "chat_template": [
            { "name": "tool_use", "template": "tools" }, { "name": "default", "template": "list" }
        ] });
        let config = ("tokenizer_config.json", &*list.to_string());
        let render = |files: &[(&str, &str)]| read(files).unwrap().render(&[]).unwrap();
        assert_eq!(render(&[config]), "list");
        let own = ("chat_template.json", "{\"chat_template\": \"own\"}");
        assert_eq!(render(&[config, own]), "own");
        assert_eq!(render(&[config, own, ("chat_template.jinja", "jinja")]), "jinja");
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[("tokenizer_config.json", "{}")]), None);
    }

    #[test]
    fn a_template_may_refuse_and_dates_stand_still() {
        let render =
            |text: &str| read(&[("chat_template.jinja", text)]).unwrap().render(&[json!({"a": [1, "é"]})]);
        assert_eq!(render("{{ raise_exception('no') }}").unwrap_err().to_string(), "no");
        assert!(render("{% if %}").is_err());
        assert_eq!(
            render("{{ strftime_now('%d %B %Y') }} {{ date_string }}").unwrap(),
            "26 July 2024 26 Jul 2024"
        );
        assert_eq!(render("{{ strftime_now('%Q!') }}").unwrap(), "%Q!");
        assert_eq!(render("{{ messages[0] | tojson }}").unwrap(), "{\"a\": [1, \"é\"]}");
        assert_eq!(render("{% if tools is none %}no tools{% endif %}").unwrap(), "no tools");
    }

    /// What a template writes, with its answers in angle quotes.
    fn answers(template: &str, messages: &Value) -> Result<String> {
        let template = read(&[("chat_template.jinja", template)]).unwrap();
        let (mut text, answers) = template.render_answers(messages.as_array().unwrap(), 0)?;
        for answer in answers.iter().rev() {
            text.insert(answer.end, '\u{bb}');
            text.insert(answer.start, '\u{ab}');
        }
        Ok(text)
    }

    const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    const HEADERS: &str = "{% for m in messages %}<|header|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|end|>\n\n{% endif %}";
    const INST: &str = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}";
    const BARE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";

    #[test]
    fn answers_are_what_the_model_has_to_write() {
        let messages = json!([
            {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho\n"},
            {"role": "user", "content": "So?"}, {"role": "assistant", "content": "é!"}
        ]);
        for (template, expected) in [
            (
                CHATML,
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Ho\n<|im_end|>»\n\
                 <|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n«é!<|im_end|>»\n",
            ),
            (
                HEADERS,
                "<|header|>user<|end|>\n\nHi<|eot|><|header|>assistant<|end|>\n\n«Ho<|eot|>»\
                 <|header|>user<|end|>\n\nSo?<|eot|><|header|>assistant<|end|>\n\n«é!<|eot|>»",
            ),
            (INST, "[INST] Hi [/INST]« Ho\n</s>»[INST] So? [/INST]« é!</s>»"),
            // white space is all that ends these answers
            (BARE, "user: Hi\nassistant:« Ho\n\n»user: So?\nassistant:« é!\n»"),
        ] {
            assert_eq!(answers(template, &messages).unwrap(), expected);
        }
        // an answer that a tool asks for, two answers in a row, and a question without an answer
        let messages = json!([
            {"role": "system", "content": "S"}, {"role": "assistant", "content": null, "tool_calls": []},
            {"role": "assistant", "content": "A"}, {"role": "user", "content": "U"}
        ]);
        let template = "{% for m in messages %}<{{ m.role }}>{{ m.content or 'call()' }}<e>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        assert_eq!(
            answers(template, &messages).unwrap(),
            "<system>S<e>\n<assistant>«call()<e>»\n<assistant>«A<e>»\n<user>U<e>\n"
        );
    }

    #[test]
    fn answers_before_a_place_belong_to_the_prompt() {
        let template = read(&[("chat_template.jinja", BARE)]).unwrap();
        let messages =
            [json!({"role": "assistant", "content": "A"}), json!({"role": "assistant", "content": "B"})];
        let (text, answers) = template.render_answers(&messages, 1).unwrap();
        assert_eq!(answers.iter().map(|at| &text[at.clone()]).collect::<Vec<_>>(), [" B\n"]);
    }

    /// Some templates leave out the reasoning of all answers but the last one.
    #[test]
    fn a_template_that_rewrites_what_it_wrote_is_refused() {
        let template = "{% for m in messages %}<{{ m.role }}>{% if loop.last %}<think></think>{% endif %}{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        let one = json!([{"role": "assistant", "content": "Ho"}]);
        assert_eq!(answers(template, &one).unwrap(), "<assistant>«<think></think>Ho<e>»");
        let two = json!([{"role": "assistant", "content": "Ho"}, {"role": "assistant", "content": "Hu"}]);
        let error = answers(template, &two).unwrap_err().to_string();
        assert!(error.contains("the first 1 of 2 messages differently when more follow"), "{error}");
    }
}
