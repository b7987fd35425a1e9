//! Completions with a dial: mistral.rs's own, whose body may hold `sensitivity` or `budget` and whose `usage` tells
//! the mean FFN width.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Bytes,
    extract::State,
    http::StatusCode,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use mistralrs_core::{NormalRequest, Request, Response as Answer};
use mistralrs_server_core::{chat_completion, completions, handler_core::create_response_channel};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::sync::mpsc::{Receiver, Sender};

use super::{
    App,
    error::{ApiError, ApiResult, in_words},
    limits::Limits,
    models,
};
use crate::{Dial, LoadedModel, RequestDial};

const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// `POST /v1/chat/completions`.
pub(super) async fn chat(State(app): State<App>, body: Bytes) -> Response {
    let answer = async {
        let (dial, request) = parse_body(&body, &app.limits)?;
        let (sender, answers) = create_response_channel(None);
        let parsed = chat_completion::parse_request(request, Arc::clone(&app.engine), sender).await;
        complete(&app, dial, parsed, answers).await
    };
    app.requests.count("/v1/chat/completions", answer.await.into_response())
}

/// `POST /v1/completions`.
pub(super) async fn text(State(app): State<App>, body: Bytes) -> Response {
    let answer = async {
        let (dial, request) = parse_body(&body, &app.limits)?;
        let (sender, answers) = create_response_channel(None);
        let parsed = completions::parse_request(request, Arc::clone(&app.engine), sender);
        complete(&app, dial, parsed, answers).await
    };
    app.requests.count("/v1/completions", answer.await.into_response())
}

/// Splits a body into the dial and mistral.rs's own request.
fn parse_body<T: DeserializeOwned>(body: &[u8], limits: &Limits) -> ApiResult<(Option<Dial>, T)> {
    let mut json: Value = serde_json::from_slice(body)
        .map_err(|error| ApiError::bad_request(format!("the body is not JSON: {error}")))?;
    let dial = take_dial(&mut json)?;
    limits.check(&json)?;
    let request = serde_json::from_value(json)
        .map_err(|error| ApiError::bad_request(format!("the body is not a request: {error}")))?;
    Ok((dial, request))
}

/// Takes `sensitivity` or `budget` out of a body; null counts as absent.
pub(super) fn take_dial(body: &mut Value) -> ApiResult<Option<Dial>> {
    let fields =
        body.as_object_mut().ok_or_else(|| ApiError::bad_request("the body must be a JSON object"))?;
    let mut number = |name: &'static str| match fields.remove(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(ApiError::bad_request(format!("{name} must be a number from 0 to 1, found {value}"))),
        },
    };
    match (number("sensitivity")?, number("budget")?) {
        (Some(_), Some(_)) => Err(ApiError::bad_request("give sensitivity or budget, not both")),
        (sensitivity, budget) => Ok(sensitivity.map(Dial::Sensitivity).or(budget.map(Dial::Budget))),
    }
}

/// What a request on its way needs to know of its model: how to tell the width it used.
struct Usage {
    model: Arc<LoadedModel>,
    dial: Arc<RequestDial>,
}

impl Usage {
    /// Puts the dial into the request.
    fn attach(app: &App, dial: Option<Dial>, request: &mut NormalRequest) -> ApiResult<Option<Self>> {
        let Some(model) = app.model.clone() else {
            return match dial {
                None => Ok(None),
                Some(_) => {
                    Err(ApiError::bad_request("the model is dense: it takes neither sensitivity nor budget"))
                }
            };
        };
        let dial = match dial {
            Some(dial) => model.request(dial).map_err(ApiError::bad_request)?,
            None => model.default_request(),
        };
        request.logits_processors.get_or_insert_default().push(dial.processor());
        Ok(Some(Self { model, dial }))
    }

    /// The answer as JSON, with the mean width in `usage`, and with the model's name where the engine puts its path.
    fn tell(usage: Option<&Self>, answer: impl Serialize) -> ApiResult<Value> {
        let mut answer = serde_json::to_value(answer).map_err(ApiError::internal)?;
        if let Some(id) = answer["model"].as_str() {
            answer["model"] = models::name(id).into();
        }
        if let Some(Self { model, dial }) = usage {
            let width = dial.mean_width(model.config().intermediate_size());
            if !answer["usage"].is_object() {
                answer["usage"] = json!({});
            }
            answer["usage"]["mean_ffn_width"] = width.into();
        }
        Ok(answer)
    }
}

async fn complete(
    app: &App,
    dial: Option<Dial>,
    parsed: anyhow::Result<(Request, bool)>,
    mut answers: Receiver<Answer>,
) -> ApiResult<Response> {
    let (mut request, streaming) = parsed.map_err(|error| ApiError::bad_request(in_words(error.as_ref())))?;
    let mut usage = None;
    if let Request::Normal(request) = &mut request {
        usage = Usage::attach(app, dial, request)?;
    }
    app.to_engine.send(request).await.map_err(|_| cut_short())?;
    if !streaming {
        let answer = answers.recv().await.ok_or_else(cut_short)?;
        let (answer, _) = answer_json(answer, usage.as_ref())?;
        return Ok(axum::Json(answer).into_response());
    }
    let (events, stream) = tokio::sync::mpsc::channel(1);
    tokio::spawn(forward(answers, usage, events));
    let stream = futures::stream::unfold(stream, |mut stream| async move {
        let event = stream.recv().await?;
        Some((Ok::<_, std::convert::Infallible>(event), stream))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response())
}

/// Passes the engine's answers on as events until the last one or until the client is gone, which drops
/// `answers`, and thereby ends the request in the engine.
async fn forward(mut answers: Receiver<Answer>, usage: Option<Usage>, events: Sender<Event>) {
    loop {
        let answer = tokio::select! {
            answer = answers.recv() => answer,
            () = events.closed() => return,
        };
        let told = match answer {
            Some(answer) => answer_json(answer, usage.as_ref()),
            None => Err(cut_short()),
        };
        let (json, last) = told.unwrap_or_else(|error| (error.body(), true));
        if events.send(Event::default().data(json.to_string())).await.is_err() {
            return;
        }
        if last {
            let _ = events.send(Event::default().data("[DONE]")).await;
            return;
        }
    }
}

/// The engine ends every answer by itself, so an answer without an end is one that the engine did not live to give.
fn cut_short() -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the engine has ended before it gave the whole answer")
}

/// One of the engine's answers as JSON, and whether it is the last one.
fn answer_json(answer: Answer, usage: Option<&Usage>) -> ApiResult<(Value, bool)> {
    // only the end of an answer knows its width
    let chunk = |json: Value, finished: bool| {
        let json = if finished { Usage::tell(usage, json)? } else { json };
        Ok((json, finished))
    };
    match answer {
        Answer::Done(answer) => Ok((Usage::tell(usage, answer)?, true)),
        Answer::CompletionDone(answer) => Ok((Usage::tell(usage, answer)?, true)),
        Answer::Chunk(answer) => {
            let finished = answer.choices.iter().all(|choice| choice.finish_reason.is_some());
            chunk(serde_json::to_value(answer).map_err(ApiError::internal)?, finished)
        }
        Answer::CompletionChunk(answer) => {
            let finished = answer.choices.iter().all(|choice| choice.finish_reason.is_some());
            chunk(serde_json::to_value(answer).map_err(ApiError::internal)?, finished)
        }
        Answer::ValidationError(error) => Err(ApiError::bad_request(in_words(error.as_ref()))),
        Answer::InternalError(error) => Err(ApiError::internal(in_words(error.as_ref()))),
        Answer::ModelError(message, _) | Answer::CompletionModelError(message, _) => {
            Err(ApiError::internal(message))
        }
        _ => Err(ApiError::internal("the engine answered with something that is not a completion")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dial_is_taken_out_of_the_body() {
        let mut body = json!({"prompt": "x", "budget": 0.5, "sensitivity": null});
        assert_eq!(take_dial(&mut body).unwrap(), Some(Dial::Budget(0.5)));
        assert_eq!(body, json!({"prompt": "x"}));
        assert_eq!(take_dial(&mut json!({"sensitivity": 1})).unwrap(), Some(Dial::Sensitivity(1.0)));
        assert_eq!(take_dial(&mut json!({})).unwrap(), None);
    }

    #[test]
    fn a_dial_that_is_none_is_the_clients_mistake() {
        for (body, word) in [
            (json!({"sensitivity": "high"}), "sensitivity must be a number"),
            (json!({"budget": [0.5]}), "budget must be a number"),
            (json!({"budget": 0.5, "sensitivity": 0.5}), "not both"),
            (json!([1]), "object"),
        ] {
            let error = take_dial(&mut body.clone()).unwrap_err();
            assert!(error.status.is_client_error() && error.message.contains(word), "{body}: {error:?}");
        }
    }
}
