//! What one request does to the others in the engine: nothing, whether its client leaves, does not read, or errs.

#[path = "support/engine.rs"]
mod engine;
#[path = "support/requests.rs"]
mod requests;
mod support;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use candle_core::Tensor;
use clap::Parser;
use dynamoe_mistralrs::serve;
use engine::{Engine, build, plain};
use mistralrs::{NormalRequest, Response, core::CustomLogitsProcessor, core::RequestMessage};
use requests::{ask, completion, send, stream, text};
use support::{Checkpoints, SMALL, Shape, checkpoints};
use tokio::sync::mpsc::Receiver;

const PROMPT: &str = "Once upon a time";

async fn llama() -> (Checkpoints, Engine) {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 21);
    let engine = build(plain(&checkpoints.dynamoe()).with_max_num_seqs(8)).await;
    (checkpoints, engine)
}

/// Forward passes' tokens so far, in the first layer.
fn tokens(engine: &Engine) -> u64 {
    engine.handle().counters().layers()[0].tokens.iter().sum()
}

/// The tokens computed until the engine has nothing to do.
async fn tokens_at_rest(engine: &Engine) -> u64 {
    let mut before = tokens(engine);
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = tokens(engine);
        if now == before {
            return now;
        }
        before = now;
    }
}

fn with_processor(
    (mut request, answers): (NormalRequest, Receiver<Response>),
    processor: impl Fn(&Tensor, &[u32]) -> candle_core::Result<Tensor> + Send + Sync + 'static,
) -> (NormalRequest, Receiver<Response>) {
    let processor: Arc<dyn CustomLogitsProcessor> = Arc::new(processor);
    request.logits_processors = Some(vec![processor]);
    (request, answers)
}

/// Slow enough to be left in the middle.
fn slow(request: (NormalRequest, Receiver<Response>)) -> (NormalRequest, Receiver<Response>) {
    with_processor(request, |logits, _| {
        std::thread::sleep(Duration::from_millis(2));
        Ok(logits.clone())
    })
}

#[tokio::test]
async fn a_client_that_does_not_read_makes_nobody_wait_and_loses_nothing() {
    let (_checkpoints, engine) = llama().await;
    let expected = ask(&engine, completion(PROMPT, 200, 1)).await.unwrap();
    let (request, mut unread) = stream(PROMPT, 200, 1);
    send(&engine, request).await;
    for _ in 0..3 {
        ask(&engine, completion("Another one", 100, 1)).await.unwrap();
    }
    assert_eq!(text(&mut unread).await.unwrap(), expected);
    assert_eq!(expected.1, "length");
}

#[tokio::test]
async fn who_leaves_is_cancelled_and_fails_nobody() {
    let (_checkpoints, engine) = llama().await;
    let expected = ask(&engine, completion(PROMPT, 100, 1)).await.unwrap();
    let before = tokens(&engine);
    let (stays, mut answers) = slow(completion(PROMPT, 100, 1));
    send(&engine, stays).await;
    for round in 0..6 {
        for (choices, is_streaming) in [(1, false), (1, true), (3, false), (3, true)] {
            let (mut request, answers) = slow(completion("It was dark", 400, 1));
            request.sampling_params.n_choices = choices;
            request.is_streaming = is_streaming;
            send(&engine, request).await;
            tokio::time::sleep(Duration::from_millis(round)).await;
            drop(answers);
        }
    }
    assert_eq!(text(&mut answers).await.unwrap(), expected);
    let computed = tokens_at_rest(&engine).await - before;
    assert!(computed < 4000, "24 requests of up to 1200 tokens were left, and {computed} tokens computed");
    assert_eq!(ask(&engine, completion(PROMPT, 100, 1)).await.unwrap(), expected);
}

#[tokio::test]
async fn a_prompt_that_is_cut_keeps_a_token() {
    let (_checkpoints, engine) = llama().await;
    for tokens in [1, 511, 512, 10_000] {
        let (mut request, answers) = completion(&"x".repeat(600), tokens, 1);
        request.truncate_sequence = true;
        assert_eq!(ask(&engine, (request, answers)).await.unwrap().1, "length", "{tokens}");
    }
    let refused = ask(&engine, completion(&"x".repeat(600), 1, 1)).await.unwrap_err();
    assert!(refused.contains("600 tokens") && refused.contains("512"), "{refused}");
}
