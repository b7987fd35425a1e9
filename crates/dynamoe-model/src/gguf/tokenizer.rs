//! The files of a tokenizer, made of a GGUF file's metadata.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use super::header::{self, Gguf};
use super::vocabulary::{GIVE_ONE, Vocabulary};
use super::{byte_level, sentencepiece};

/// The files of the tokenizer by their names: tokenizer.json, unless `given` is one, tokenizer_config.json, and the chat
/// template.
///
/// # Errors
/// A tokenizer that cannot be made exactly; the message asks for one.
pub(super) fn files(gguf: &Gguf, given: Option<&[u8]>) -> Result<BTreeMap<&'static str, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let json = match given {
        Some(bytes) => bytes.to_vec(),
        None => serde_json::to_vec(&tokenizer(gguf)?)?,
    };
    files.insert("tokenizer.json", json);
    files.insert("tokenizer_config.json", serde_json::to_vec_pretty(&settings(gguf)?)?);
    if let Some(template) = gguf.text("tokenizer.chat_template")? {
        files.insert("chat_template.jinja", template.as_bytes().to_vec());
    }
    Ok(files)
}

/// tokenizer_config.json.
fn settings(gguf: &Gguf) -> Result<Value> {
    let mut settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
    });
    for (name, key) in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")] {
        if let Some((token, _)) = special(gguf, key)? {
            settings[format!("{name}_token")] = token.into();
        }
    }
    Ok(settings)
}

/// A special token and its id, if the file names it and has it.
fn special<'a>(gguf: &'a Gguf, key: &str) -> Result<Option<(&'a str, u64)>> {
    let Some(id) = gguf.whole(&format!("tokenizer.ggml.{key}_token_id"))? else { return Ok(None) };
    let Some(header::Value::List(tokens)) = gguf.metadata.get("tokenizer.ggml.tokens") else {
        return Ok(None);
    };
    Ok(match tokens.get(id as usize) {
        Some(header::Value::Text(token)) => Some((token, id)),
        _ => None,
    })
}

/// tokenizer.json.
fn tokenizer(gguf: &Gguf) -> Result<Value> {
    let vocabulary = Vocabulary::read(gguf)?;
    let (mut tokenizer, bos) = match gguf.text("tokenizer.ggml.model")? {
        Some("gpt2") => byte_level::tokenizer(gguf, &vocabulary)?,
        Some("llama") => (sentencepiece::tokenizer(gguf, &vocabulary)?, true),
        found => bail!(
            "{}: tokenizer.ggml.model: a tokenizer is made of \"gpt2\" and \"llama\" only, found {found:?}: {GIVE_ONE}",
            gguf.path.display()
        ),
    };
    tokenizer["version"] = "1.0".into();
    tokenizer["added_tokens"] = vocabulary.added().into();
    let ends = [("bos", bos), ("eos", false)].map(|(name, default)| -> Result<_> {
        let on = gguf.flag(&format!("tokenizer.ggml.add_{name}_token"))?.unwrap_or(default);
        if on { special(gguf, name) } else { Ok(None) }
    });
    let [bos, eos] = ends;
    tokenizer["post_processor"] = template(bos?, eos?);
    Ok(tokenizer)
}

/// The post processor that puts these tokens before and behind a text.
fn template(bos: Option<(&str, u64)>, eos: Option<(&str, u64)>) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let around = |sequence: &str, kind: u32| -> Vec<Value> {
        let token = |(token, _): (&str, u64)| json!({ "SpecialToken": { "id": token, "type_id": kind } });
        let text = json!({ "Sequence": { "id": sequence, "type_id": kind } });
        bos.map(token).into_iter().chain([text]).chain(eos.map(token)).collect()
    };
    let tokens = [bos, eos].into_iter().flatten();
    let tokens =
        tokens.map(|(token, id)| (token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] })));
    json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": Value::from([around("A", 0), around("B", 1)].concat()),
        "special_tokens": tokens.collect::<Map<_, _>>(),
    })
}
