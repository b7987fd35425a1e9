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
async fn an_error_of_one_request_is_its_own() {
    let (_checkpoints, engine) = llama().await;
    let expected = ask(&engine, completion(PROMPT, 80, 1)).await.unwrap();
    let (beside, mut answers) = slow(stream(PROMPT, 80, 1));
    send(&engine, beside).await;
    // equally long prompts run in one batch
    for after in 0..8 {
        let fails = with_processor(stream("It is not a tree", 80, 100), move |logits, context| {
            if context.len() > 16 + after {
                candle_core::bail!("no more")
            }
            Ok(logits.clone())
        });
        let fine = stream(PROMPT, 80, 1);
        let (failed, told) = tokio::join!(ask(&engine, fails), ask(&engine, fine));
        assert!(failed.unwrap_err().contains("no more"));
        assert_eq!(told.unwrap(), expected);
    }
    assert_eq!(text(&mut answers).await.unwrap(), expected);
}

#[tokio::test]
async fn a_failed_step_is_told_and_the_engine_goes_on() {
    let (_checkpoints, engine) = llama().await;
    let expected = ask(&engine, completion(PROMPT, 80, 1)).await.unwrap();
    let (beside, mut answers) = slow(stream(PROMPT, 80, 1));
    send(&engine, beside).await;
    for _ in 0..6 {
        let (mut request, answers) = completion("", 8, 1);
        request.messages = RequestMessage::CompletionTokens(vec![1, 100_000, 2]); // no such token
        assert!(ask(&engine, (request.clone(), answers)).await.is_err());
        // the error finds nobody
        send(&engine, request).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(text(&mut answers).await.unwrap(), expected);
}

#[tokio::test]
async fn raw_logits_go_beside_other_requests() {
    let (_checkpoints, engine) = llama().await;
    let expected = ask(&engine, completion(PROMPT, 20, 1)).await.unwrap();
    let raw = || async {
        let (mut request, mut answers) = completion(PROMPT, 1, 1);
        request.return_raw_logits = true;
        send(&engine, request).await;
        matches!(answers.recv().await, Some(Response::Raw { .. }))
    };
    let (busy, mut answers) = slow(completion("Waiting", 10, 1));
    send(&engine, busy).await;
    for _ in 0..4 {
        let plain = || ask(&engine, completion(PROMPT, 20, 1));
        let (first, told, second, again) = tokio::join!(raw(), plain(), raw(), plain());
        assert!(first && second);
        assert_eq!(told.unwrap(), expected);
        assert_eq!(again.unwrap(), expected);
    }
    text(&mut answers).await.unwrap();
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

#[tokio::test]
async fn no_more_sequences_run_than_allowed_after_a_pause() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 21);
    let engine = build(plain(&checkpoints.dynamoe()).with_max_num_seqs(1)).await;
    let turns: Arc<Mutex<Vec<usize>>> = Arc::default();
    let request = |id: usize, pause: u64| {
        let turns = Arc::clone(&turns);
        with_processor(completion(PROMPT, 3, 1), move |logits, _| {
            turns.lock().unwrap().push(id);
            std::thread::sleep(Duration::from_millis(pause));
            Ok(logits.clone())
        })
    };
    // the others arrive while the first runs, and all wait when it is done
    let answers = tokio::join!(
        ask(&engine, request(0, 50)),
        ask(&engine, request(1, 0)),
        ask(&engine, request(2, 0)),
        ask(&engine, request(3, 0))
    );
    assert!([answers.0, answers.1, answers.2, answers.3].iter().all(Result::is_ok));
    let turns = turns.lock().unwrap();
    assert!(turns.chunks(3).all(|turns| turns.iter().all(|id| *id == turns[0])), "{turns:?}");
}

#[tokio::test]
async fn min_p_needs_no_top_p() {
    let (_checkpoints, engine) = llama().await;
    let expected = ask(&engine, completion(PROMPT, 40, 1)).await.unwrap();
    let (mut request, answers) = completion(PROMPT, 40, 1);
    request.sampling_params.temperature = Some(1.0);
    request.sampling_params.top_k = None;
    request.sampling_params.min_p = Some(0.9999);
    assert_eq!(ask(&engine, (request, answers)).await.unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_is_tokenized_beside_the_engine() {
    let long = Shape { positions: 4096, ..SMALL };
    let checkpoints = checkpoints("LlamaForCausalLM", long, 21);
    let engine = build(plain(&checkpoints.dynamoe())).await;
    let (request, mut refused) = completion(&"a".repeat(4 << 20), 1, 1);
    send(&engine, request).await;
    ask(&engine, completion(PROMPT, 2, 1)).await.unwrap();
    assert!(refused.try_recv().is_err(), "the long prompt went first");
    let refused = text(&mut refused).await.unwrap_err();
    assert!(refused.contains("4194304 tokens") && refused.contains("4096"), "{refused}");
    // one that fits is answered
    let (text, reason) = ask(&engine, completion(&"a".repeat(4000), 2, 1)).await.unwrap();
    assert!(!text.is_empty() && reason == "length");
}

/// The engine's death is told to its clients and ends the service, so that a supervisor can start it again.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_engine_ends_the_service_with_an_error() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 21);
    let model = checkpoints.dynamoe();
    let options = serve::Options::parse_from(["dynamoe-serve", "--model", &model, "--cpu"]);
    let served = {
        let _one = engine::LOADING.lock().await;
        serve::load(&options).await.unwrap()
    };
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let to_engine = served.engine.get_sender(None).unwrap();
    let service = tokio::spawn({
        let options = options.clone();
        async move { serve::serve(listener, served, &options, std::future::pending()).await }
    });
    let post = |stream: bool| {
        let body = serde_json::json!({"model": "default", "prompt": PROMPT, "max_tokens": 400, "temperature": 0.7,
                                      "stream": stream, "logit_bias": {"257": -100}});
        answer(address, body.to_string())
    };
    let dies = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let (request, _answers) = with_processor(completion(PROMPT, 1, 1), |_, _| panic!("a test's own"));
        let request = mistralrs::Request::Normal(Box::new(request));
        assert!(to_engine.send(request).await.is_ok());
        to_engine.closed().await;
    };
    let (streamed, whole, ()) = tokio::join!(post(true), post(false), dies);
    let error = service.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("engine has ended"), "{error}");
    assert!(streamed.contains("server_error") && !streamed.contains("\"length\""), "{streamed}");
    assert!(whole.starts_with("HTTP/1.1 503"), "{whole}");
}

/// The whole of an answer over HTTP.
async fn answer(address: SocketAddr, body: String) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut connection = tokio::net::TcpStream::connect(address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
                Content-Type: application/json\r\nContent-Length:";
    connection.write_all(format!("{head} {}\r\n\r\n{body}", body.len()).as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    answer
}
