//! An answer in one piece.

use futures::future::try_join_all;
use serde_json::{Value, json};

use super::{
    Asked, Form,
    chat::{self, Delta, Speaker},
    source::Choice,
    text,
    usage::usage,
};
use crate::serve::error::ApiResult;

/// A choice of a whole answer.
struct Told {
    json: Value,
    tokens: usize,
    /// Mean log probability of a token.
    likely: f64,
    dial: Option<std::sync::Arc<crate::RequestDial>>,
}

/// Computes a whole answer.
///
/// # Errors
/// What the engine says instead.
pub(in super::super) async fn whole(asked: Asked) -> ApiResult<Value> {
    let is_chat = matches!(asked.form, Form::Chat { .. });
    let asked_ref = &asked;
    let choices = (0..asked.jobs.len()).map(|index| async move {
        if is_chat { of_chat(asked_ref, index).await } else { of_text(asked_ref, index).await }
    });
    let mut told = try_join_all(choices).await?;
    let tokens = told.iter().map(|choice| choice.tokens).sum();
    let scored: Vec<_> = told.iter_mut().filter_map(|choice| choice.dial.take()).collect();
    let usage = usage(&asked, tokens, &scored);
    let mut choices = Vec::new();
    for of_prompt in told.chunks_mut(asked.choices) {
        if asked.told < asked.choices {
            of_prompt.sort_by(|a, b| b.likely.total_cmp(&a.likely));
        }
        for choice in &mut of_prompt[..asked.told] {
            choice.json["index"] = choices.len().into();
            choices.push(choice.json.take());
        }
    }
    Ok(json!({
        "id": asked.head.id,
        "object": if is_chat { "chat.completion" } else { "text_completion" },
        "created": asked.head.created,
        "model": asked.head.model,
        "system_fingerprint": "local",
        "choices": choices,
        "usage": usage,
    }))
}

async fn of_chat(asked: &Asked, index: usize) -> ApiResult<Told> {
    let mut choice = Choice::start(asked, index).await?;
    let mut speaker = Speaker::new(asked);
    let (mut all, mut pieces) = (Delta::default(), Vec::new());
    while let Some(piece) = choice.next().await? {
        all.add(speaker.push(&piece.text));
        pieces.push(piece);
    }
    all.add(speaker.finish());
    let finish = if all.calls.is_empty() { choice.finish() } else { "tool_calls" };
    // OpenAI numbers calls in streams only
    all.calls.iter_mut().filter_map(Value::as_object_mut).for_each(|call| drop(call.shift_remove("index")));
    let json = json!({
        "index": index,
        "message": all.into_message(),
        "logprobs": chat::logprobs_of(asked, index, &pieces),
        "finish_reason": finish,
    });
    Ok(Told { json, tokens: choice.tokens, likely: likely(&choice), dial: None })
}

async fn of_text(asked: &Asked, index: usize) -> ApiResult<Told> {
    let mut begun = text::begin(asked, index).await?;
    let mut pieces = Vec::new();
    while let Some(piece) = begun.choice.next().await? {
        pieces.push(piece);
    }
    let logprobs = if asked.tells_logprobs { begun.logprobs_of(asked, &pieces) } else { Value::Null };
    let text: String =
        std::iter::once(begun.echo.as_str()).chain(pieces.iter().map(|piece| &*piece.text)).collect();
    let json =
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": begun.choice.finish()});
    Ok(Told { json, tokens: begun.choice.tokens, likely: likely(&begun.choice), dial: begun.dial })
}

fn likely(choice: &Choice) -> f64 {
    choice.logprob / choice.tokens.max(1) as f64
}
