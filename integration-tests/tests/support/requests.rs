//! Requests to the engine by hand, with a channel of their own.

#![allow(dead_code)] // each test file uses some of it

use std::collections::HashMap;

use mistralrs::{NormalRequest, Request, Response, SamplingParams, core::RequestMessage};
use tokio::sync::mpsc::{Receiver, channel};

use crate::engine::Engine;

/// The end-of-text token of the fixtures.
const EOS: u32 = 257;

/// A greedy completion of exactly `tokens` tokens, and where its answers come, at most `room` unread ones.
pub fn completion(prompt: &str, tokens: usize, room: usize) -> (NormalRequest, Receiver<Response>) {
    let (sender, answers) = channel(room);
    let messages = RequestMessage::Completion { text: prompt.into(), echo_prompt: false, best_of: None };
    let sampling = SamplingParams {
        max_len: Some(tokens),
        logits_bias: Some(HashMap::from([(EOS, -1000.0)])),
        ..SamplingParams::deterministic()
    };
    (NormalRequest::new_simple(messages, sampling, sender, 0, None, None), answers)
}

/// The same as a stream.
pub fn stream(prompt: &str, tokens: usize, room: usize) -> (NormalRequest, Receiver<Response>) {
    let (mut request, answers) = completion(prompt, tokens, room);
    request.is_streaming = true;
    (request, answers)
}

pub async fn send(engine: &Engine, request: NormalRequest) {
    let engine = engine.model.inner().get_sender(None).unwrap();
    assert!(engine.send(Request::Normal(Box::new(request))).await.is_ok(), "the engine has ended");
}

/// The whole text of an answer with one choice, streamed or not, and its finish reason; the message of an error.
pub async fn text(answers: &mut Receiver<Response>) -> Result<(String, String), String> {
    let mut text = String::new();
    loop {
        match answers.recv().await.ok_or("the answer was cut short")? {
            Response::CompletionDone(answer) => {
                let choice = &answer.choices[0];
                return Ok((choice.text.clone(), choice.finish_reason.clone()));
            }
            Response::CompletionChunk(chunk) => {
                text.push_str(&chunk.choices[0].text);
                if let Some(reason) = &chunk.choices[0].finish_reason {
                    return Ok((text, reason.clone()));
                }
            }
            Response::CompletionModelError(message, _) => return Err(message),
            Response::InternalError(error) | Response::ValidationError(error) => {
                return Err(error.to_string());
            }
            _ => return Err("not an answer to a completion".into()),
        }
    }
}

/// Sends a request and waits for its text.
pub async fn ask(
    engine: &Engine,
    (request, mut answers): (NormalRequest, Receiver<Response>),
) -> Result<(String, String), String> {
    send(engine, request).await;
    text(&mut answers).await
}
