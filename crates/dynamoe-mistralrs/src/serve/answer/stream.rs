//! An answer piece by piece, as server-sent events.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::response::{
    IntoResponse, Response,
    sse::{Event, KeepAlive, Sse},
};
use futures::future::try_join_all;
use serde_json::{Value, json};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::{
    Asked, Form,
    chat::{self, Delta, Speaker},
    source::Choice,
    text,
    transcript::Piece,
    usage::usage,
};
use crate::{
    RequestDial,
    serve::error::{ApiError, ApiResult},
};

const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// What goes wrong on the way.
enum Stopped {
    /// The client has left.
    Left,
    Failed(ApiError),
}

impl From<ApiError> for Stopped {
    fn from(error: ApiError) -> Self {
        Self::Failed(error)
    }
}

/// What a choice took, and its last chunk.
struct Ended {
    tokens: usize,
    dial: Option<Arc<RequestDial>>,
}

type Events = Sender<Result<Event, ApiError>>;

/// Streams an answer.
///
/// # Errors
/// What the engine says instead of a first token.
pub(in super::super) async fn stream(asked: Asked) -> ApiResult<Response> {
    let (events, mut told) = channel(16);
    tokio::spawn(async move {
        let sender = events.clone();
        let all = async {
            match tell(&asked, &sender).await {
                Ok(()) | Err(Stopped::Left) => {}
                Err(Stopped::Failed(error)) => {
                    asked.watch.failed(error.status.as_u16());
                    let _ = sender.send(Err(error)).await;
                }
            }
        };
        tokio::select! {
            () = all => {}
            () = events.closed() => {}
        }
    });
    // an error before the first token has a status of its own; a client is not left without headers for long
    let first = match tokio::time::timeout(KEEP_ALIVE, told.recv()).await {
        Ok(Some(Ok(event))) => Some(event),
        Ok(Some(Err(error))) => return Err(error),
        Ok(None) => return Err(ApiError::internal("the answer ended before it began")),
        Err(_) => None,
    };
    let stream = futures::stream::unfold((first, told), |(first, mut told): (_, Receiver<_>)| async move {
        let event = match first {
            Some(event) => event,
            None => match told.recv().await? {
                Ok(event) => event,
                Err(error) => Event::default().data(ApiError::body(&error).to_string()),
            },
        };
        Some((Ok::<_, Infallible>(event), (None, told)))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response())
}

async fn tell(asked: &Asked, events: &Events) -> Result<(), Stopped> {
    let is_chat = matches!(asked.form, Form::Chat { .. });
    let last = tokio::sync::Mutex::new(Last { left: asked.jobs.len(), tokens: 0, scored: Vec::new() });
    let choices = (0..asked.jobs.len()).map(|index| {
        let told = Told { asked, events, index, last: &last };
        async move { if is_chat { told.chat().await } else { told.text().await } }
    });
    try_join_all(choices).await?;
    if asked.include_usage {
        let last = last.into_inner();
        let mut chunk = head(asked);
        chunk["choices"] = json!([]);
        chunk["usage"] = usage(asked, last.tokens, &last.scored);
        send(events, chunk.to_string()).await?;
    }
    send(events, "[DONE]".into()).await
}

/// What choices took that have ended.
struct Last {
    left: usize,
    tokens: usize,
    scored: Vec<Arc<RequestDial>>,
}

async fn send(events: &Events, data: String) -> Result<(), Stopped> {
    events.send(Ok(Event::default().data(data))).await.map_err(|_| Stopped::Left)
}

fn head(asked: &Asked) -> Value {
    let is_chat = matches!(asked.form, Form::Chat { .. });
    json!({
        "id": asked.head.id,
        "object": if is_chat { "chat.completion.chunk" } else { "text_completion" },
        "created": asked.head.created,
        "model": asked.head.model,
        "system_fingerprint": "local",
    })
}

/// Adds the mean width, or number of experts, of the tokens of `pieces` to a choice of a chunk. Clients that do not know the field ignore it.
fn with_width(mut choice: Value, asked: &Asked, pieces: &[Piece]) -> Value {
    let neurons: Vec<f64> = pieces.iter().flat_map(|piece| piece.neurons.iter().copied()).collect();
    if let Some(model) = asked.model.as_ref().filter(|_| !neurons.is_empty()) {
        let mean = neurons.iter().sum::<f64>() / neurons.len() as f64;
        let (name, value) = model.tell(mean);
        choice[name] = value.into();
    }
    choice
}

/// One choice of a stream.
struct Told<'a> {
    asked: &'a Asked,
    events: &'a Events,
    index: usize,
    last: &'a tokio::sync::Mutex<Last>,
}

impl Told<'_> {
    async fn chat(&self) -> Result<(), Stopped> {
        let (asked, index) = (self.asked, self.index);
        let mut choice = Choice::start(asked, index).await?;
        let mut speaker = Speaker::new(asked);
        let mut called = false;
        let mut first = true;
        // tokens whose text is held back
        let mut waiting = Vec::new();
        loop {
            let piece = choice.next().await?;
            if std::mem::take(&mut first) {
                let role = json!({"role": "assistant", "content": ""});
                self.chunk(json!({"index": index, "delta": role, "logprobs": null, "finish_reason": null}))
                    .await?;
            }
            let Some(piece) = piece else { break };
            let delta = speaker.push(&piece.text);
            waiting.push(piece);
            if !delta.is_empty() {
                self.delta(delta, &std::mem::take(&mut waiting)).await?;
            }
        }
        let rest = speaker.finish();
        called |= !rest.calls.is_empty();
        if !rest.is_empty() || !waiting.is_empty() {
            self.delta(rest, &waiting).await?;
        }
        let finish = if called { "tool_calls" } else { choice.finish() };
        let ended = json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": finish});
        self.end(ended, Ended { tokens: choice.tokens, dial: None }).await
    }

    async fn delta(&self, delta: Delta, pieces: &[Piece]) -> Result<(), Stopped> {
        let logprobs = chat::logprobs_of(self.asked, self.index, pieces);
        let delta = delta.into_delta();
        let choice =
            json!({"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": null});
        self.chunk(with_width(choice, self.asked, pieces)).await
    }

    async fn text(&self) -> Result<(), Stopped> {
        let (asked, index) = (self.asked, self.index);
        let mut begun = text::begin(asked, index).await?;
        let mut echo = std::mem::take(&mut begun.echo);
        if !echo.is_empty() {
            let logprobs = begun.logprobs_of(asked, &[]);
            let text = std::mem::take(&mut echo);
            self.chunk(json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": null}))
                .await?;
        }
        while let Some(piece) = begun.choice.next().await? {
            let logprobs = begun.logprobs_of(asked, std::slice::from_ref(&piece));
            let choice =
                json!({"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": null});
            self.chunk(with_width(choice, asked, std::slice::from_ref(&piece))).await?;
        }
        let ended =
            json!({"index": index, "text": "", "logprobs": null, "finish_reason": begun.choice.finish()});
        self.end(ended, Ended { tokens: begun.choice.tokens, dial: begun.dial }).await
    }

    /// Sends a chunk of this choice.
    async fn chunk(&self, choice: Value) -> Result<(), Stopped> {
        let mut chunk = head(self.asked);
        chunk["choices"] = json!([choice]);
        if self.asked.include_usage {
            chunk["usage"] = Value::Null;
        }
        send(self.events, chunk.to_string()).await
    }

    /// Sends the last chunk of this choice. The last one of all tells the usage, unless a chunk of its own will.
    async fn end(&self, choice: Value, ended: Ended) -> Result<(), Stopped> {
        let mut last = self.last.lock().await;
        last.left -= 1;
        last.tokens += ended.tokens;
        last.scored.extend(ended.dial);
        if last.left > 0 || self.asked.include_usage {
            return self.chunk(choice).await;
        }
        let mut chunk = head(self.asked);
        chunk["choices"] = json!([choice]);
        chunk["usage"] = usage(self.asked, last.tokens, &last.scored);
        send(self.events, chunk.to_string()).await
    }
}
