//! Requests and answers as OpenAI documents them.

#[path = "support/http.rs"]
mod http;
mod support;

use std::collections::HashSet;

use http::{Server, chat, completion, with};
use serde_json::{Value, json};
use support::{SMALL, checkpoints, edit_json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// The message of a refusal.
fn refused(server: &Server, route: &str, body: &Value) -> String {
    let answer = server.post(route, body);
    let status = answer.status().as_u16();
    let json: Value = answer.json().unwrap();
    assert_eq!(status, 400, "{body}: {json}");
    assert_eq!(json["error"]["type"], "invalid_request_error");
    json["error"]["message"].as_str().unwrap().to_owned()
}

/// One server for all of a test file's cheap questions.
#[test]
fn bodies_are_read_as_openai_documents_them() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 41);
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    content_is_text_or_parts(&server);
    what_is_not_honoured_is_refused_by_name(&server);
    tokens_are_chosen_as_asked(&server);
    answers_have_the_form_that_was_asked_for(&server);
    limits_of_tokens_have_two_names(&server);
    streams_have_openais_shape(&server);
    whole_answers_have_openais_shape(&server);
    routes_answer_in_json(&server);
}

fn content_is_text_or_parts(server: &Server) {
    let ask = |content: Value| {
        let body = json!({"model": "default", "max_tokens": 4, "temperature": 0,
                          "messages": [{"role": "user", "content": content}]});
        server.json(CHAT, &body)
    };
    let whole = ask(json!("Say hi."));
    // <s>, seven letters, a newline: the template's own special token is the only one
    assert_eq!(whole["usage"]["prompt_tokens"], 9);
    let parts = ask(json!([{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]));
    assert_eq!(whole["choices"], parts["choices"]);
    assert_eq!(ask(json!(""))["usage"]["prompt_tokens"], 2);
    for (messages, word) in [
        (json!([]), "messages: expected at least one message"),
        (json!([{"role": "user"}]), "messages[0].content"),
        (json!([{"role": "user", "content": null}]), "messages[0].content"),
        (json!([{"role": "king", "content": "x"}]), "messages[0].role"),
        (
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]),
            "image_url",
        ),
    ] {
        let message = refused(server, CHAT, &json!({"model": "default", "messages": messages}));
        assert!(message.contains(word), "{message}");
    }
}

fn what_is_not_honoured_is_refused_by_name(server: &Server) {
    for (route, field, value) in [
        (TEXT, "no_such_field", json!(1)),
        (TEXT, "suffix", json!("x")),
        (TEXT, "messages", json!([{"role": "user", "content": "x"}])),
        (TEXT, "temperature", json!(-1)),
        (TEXT, "top_p", json!(1.5)),
        (TEXT, "n", json!(0)),
        (TEXT, "stop", json!("")),
        (TEXT, "logit_bias", json!({"the": 1})),
        (TEXT, "best_of", json!(9)),
        (TEXT, "stream_options", json!({"include_usage": true})),
        (CHAT, "prompt", json!("x")),
        (CHAT, "top_logprobs", json!(3)),
        (CHAT, "functions", json!([])),
        (CHAT, "store", json!(true)),
        (CHAT, "web_search_options", json!({})),
        (CHAT, "tool_choice", json!("required")),
        (CHAT, "response_format", json!({"type": "xml"})),
    ] {
        let body = if route == TEXT { completion("x", 1) } else { chat("x", 1) };
        let message = refused(server, route, &with(body, field, value));
        assert!(message.contains(field), "{field}: {message}");
    }
    let message =
        refused(server, TEXT, &with(completion("x", 1), "grammar", json!({"type": "regex", "value": "("})));
    assert!(message.contains("grammar"), "{message}");
}

fn tokens_are_chosen_as_asked(server: &Server) {
    let text = |body: &Value| server.json(TEXT, body)["choices"][0]["text"].as_str().unwrap().to_owned();
    let biased = with(completion("Once", 6), "logit_bias", json!({"97": 100}));
    assert_eq!(text(&biased), "aaaaaa");
    let warm = |seed: Option<i64>| {
        let body = with(completion("Once", 24), "temperature", 1.5);
        text(&seed.map_or(body.clone(), |seed| with(body, "seed", seed)))
    };
    assert_eq!(warm(Some(7)), warm(Some(7)));
    let different: HashSet<String> = (0..4).map(|seed| warm(Some(seed))).collect();
    assert_eq!(different.len(), 4);
    assert_ne!(warm(None), warm(None));
    // several choices of one seed differ, and are the same every time
    let several = |n: u64| {
        let body = with(with(with(completion("Once", 12), "temperature", 1.5), "seed", 3), "n", n);
        let answer = server.json(TEXT, &body);
        answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].clone()).collect::<Vec<_>>()
    };
    let three = several(3);
    assert!(three[0] != three[1] && three[1] != three[2] && three == several(3));
    assert_eq!(three[0], several(1)[0]);
    // a greedy answer repeats itself less with a penalty
    let plain = text(&completion("aaaa", 40));
    let penalized = text(&with(completion("aaaa", 40), "frequency_penalty", 2));
    let kinds = |text: &str| text.chars().collect::<HashSet<_>>().len();
    assert!(kinds(&penalized) >= kinds(&plain), "{plain:?}, {penalized:?}");
}

fn answers_have_the_form_that_was_asked_for(server: &Server) {
    let grammar = json!({"type": "regex", "value": "(yes|no)!"});
    let answer = server.json(TEXT, &with(completion("Well?", 20), "grammar", grammar.clone()));
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert!(["yes!", "no!"].contains(&text) && answer["choices"][0]["finish_reason"] == "stop", "{answer}");
    let streamed = server.stream(TEXT, &with(completion("Well?", 20), "grammar", grammar));
    let pieces: String = streamed.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(pieces, text);
    let schema = json!({"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                        "additionalProperties": false});
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}});
    // a random model likes white space more than an end
    let body = with(
        with(chat("Well?", 200), "response_format", format),
        "logit_bias",
        json!({"32": -100, "10": -100, "9": -100, "13": -100}),
    );
    let answer = server.json(CHAT, &body);
    let content: Value =
        serde_json::from_str(answer["choices"][0]["message"]["content"].as_str().unwrap()).unwrap();
    assert!(content["a"] == 1 || content["a"] == 2, "{answer}");
    let object =
        server.json(CHAT, &with(chat("Well?", 4), "response_format", json!({"type": "json_object"})));
    assert!(
        object["choices"][0]["message"]["content"].as_str().unwrap().trim_start().starts_with('{'),
        "{object}"
    );
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {}, "additionalProperties": false}}}]);
    let called = with(with(chat("Well?", 200), "tools", tools), "tool_choice", "required");
    let called = with(called, "logit_bias", json!({"32": -100, "10": -100, "9": -100, "13": -100}));
    let answer = server.json(CHAT, &called);
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    assert_eq!(choice["message"]["tool_calls"][0]["function"], json!({"name": "f", "arguments": "{}"}));
    let events = server.stream(CHAT, &called);
    let calls =
        events.iter().find_map(|event| event["choices"][0]["delta"]["tool_calls"].as_array()).unwrap();
    assert_eq!((&calls[0]["index"], &calls[0]["function"]["name"]), (&json!(0), &json!("f")));
}

fn limits_of_tokens_have_two_names(server: &Server) {
    let tokens = |body: &Value| server.json(CHAT, body)["usage"]["completion_tokens"].as_u64().unwrap();
    let mut body = with(chat("x", 3), "max_completion_tokens", 3);
    assert_eq!(tokens(&body), 3);
    body.as_object_mut().unwrap().remove("max_tokens");
    assert_eq!(tokens(&body), 3);
    let message = refused(server, CHAT, &with(chat("x", 3), "max_completion_tokens", 4));
    assert!(message.contains("max_completion_tokens"), "{message}");
    let none = server.json(TEXT, &completion("x", 0));
    assert_eq!(
        (&none["choices"][0]["text"], &none["choices"][0]["finish_reason"]),
        (&json!(""), &json!("length"))
    );
    assert_eq!(none["usage"]["completion_tokens"], 0);
    // as many as the context leaves
    let endless = with(completion("x", 100_000), "logit_bias", json!({"257": -100}));
    let all = server.json(TEXT, &endless);
    assert_eq!(all["choices"][0]["finish_reason"], "length");
    assert_eq!(all["usage"]["total_tokens"], 512);
    let message = refused(server, TEXT, &completion(&"x".repeat(600), 1));
    assert!(message.contains("has 600 tokens, may have 511"), "{message}");
    let message = refused(server, CHAT, &chat(&"x".repeat(600), 1));
    assert!(message.contains("has 602 tokens, may have 511"), "{message}");
}

fn streams_have_openais_shape(server: &Server) {
    for (route, body) in [(CHAT, chat("Once", 5)), (TEXT, completion("Once", 5))] {
        let body = with(body, "logit_bias", json!({"257": -100}));
        let body = with(with(body, "n", 2), "stream_options", json!({"include_usage": true}));
        let events = server.stream(route, &body);
        let (last, chunks) = events.split_last().unwrap();
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"]["completion_tokens"], 10);
        assert!(last["usage"]["mean_ffn_width"].is_number());
        let usage = &last["usage"];
        let sum = usage["prompt_tokens"].as_u64().unwrap() + 10;
        assert_eq!(usage["total_tokens"], sum);
        assert!(chunks.iter().all(|chunk| chunk["usage"].is_null()));
        for field in ["id", "created", "object", "model"] {
            assert!(events.iter().all(|event| event[field] == last[field]), "{field}");
        }
        for index in 0..2 {
            let own: Vec<&Value> = chunks
                .iter()
                .map(|chunk| &chunk["choices"][0])
                .filter(|choice| choice["index"] == index)
                .collect();
            if route == CHAT {
                assert_eq!(own[0]["delta"]["role"], "assistant");
                assert!(own[1..].iter().all(|choice| choice["delta"]["role"].is_null()));
            }
            let finished = own.iter().filter(|choice| !choice["finish_reason"].is_null());
            assert_eq!(finished.count(), 1);
            assert_eq!(own.last().unwrap()["finish_reason"], "length");
        }
    }
    // without that option the last chunk tells the whole usage
    let events = server.stream(TEXT, &completion("Once", 3));
    let usage = &events.last().unwrap()["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(4), &json!(3)));
    let told = with(with(chat("Once", 3), "logprobs", true), "top_logprobs", 2);
    let events = server.stream(CHAT, &told);
    let content: Vec<&Value> = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .collect();
    let whole = server.json(CHAT, &told);
    assert_eq!(content.len(), 3);
    assert_eq!(json!(content), whole["choices"][0]["logprobs"]["content"]);
    assert!(content[0]["token"].is_string() && content[0]["bytes"].is_array());
    // a stream that ends within its first letter
    let cut = with(completion("Once", 2), "grammar", json!({"type": "regex", "value": "😀ok"}));
    let events = server.stream(TEXT, &cut);
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    let pieces: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(pieces, server.json(TEXT, &cut)["choices"][0]["text"]);
    // a stop string is never shown, whether it comes in one piece or in several
    let endless = with(completion("Once upon a time", 40), "logit_bias", json!({"257": -100}));
    let whole = server.json(TEXT, &endless);
    let text = whole["choices"][0]["text"].as_str().unwrap();
    let stop: String = text.chars().skip(6).take(3).collect();
    let before = &text[..text.find(&stop).unwrap()];
    let body = with(endless, "stop", stop.as_str());
    let whole = server.json(TEXT, &body);
    assert_eq!(
        (&whole["choices"][0]["text"], &whole["choices"][0]["finish_reason"]),
        (&json!(before), &json!("stop"))
    );
    let pieces: String =
        server.stream(TEXT, &body).iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(pieces, before);
}

fn whole_answers_have_openais_shape(server: &Server) {
    let answer = server.json(CHAT, &with(chat("Once", 5), "model", "default"));
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!("default")));
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["index"], &choice["logprobs"], &choice["message"]["role"]),
        (&json!(0), &Value::Null, &json!("assistant"))
    );
    let answer = server.json(TEXT, &with(with(completion("Once", 5), "n", 2), "best_of", 3));
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    assert_eq!(
        (&answer["choices"][1]["index"], &answer["choices"][1]["logprobs"]),
        (&json!(1), &Value::Null)
    );
    assert_eq!(answer["usage"]["prompt_tokens"], 4);
    let echo = server.json(TEXT, &with(completion("Once", 5), "echo", true));
    assert!(echo["choices"][0]["text"].as_str().unwrap().starts_with("Once"));
}

fn routes_answer_in_json(server: &Server) {
    for route in ["/v1/models", "/health", "/metrics"] {
        let head = server.client.head(format!("{}{route}", server.url)).send().unwrap();
        assert_eq!(head.status(), 200, "{route}");
        assert_eq!(head.bytes().unwrap().len(), 0);
    }
    for (method, route, status) in
        [("GET", "/v1/nothing", 404), ("DELETE", "/v1/models", 405), ("GET", TEXT, 405)]
    {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let answer = server.client.request(method, format!("{}{route}", server.url)).send().unwrap();
        assert_eq!(answer.status(), status, "{route}");
        assert!(answer.json::<Value>().unwrap()["error"]["message"].is_string());
    }
}

/// A folder whose tokenizer adds, cuts and pads, and whose template writes what the tokenizer adds.
fn tampered() -> support::Checkpoints {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 42);
    for folder in [checkpoints.dense(), checkpoints.dynamoe()] {
        edit_json(&folder, "tokenizer.json", |json| {
            json["truncation"] =
                json!({"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0});
            json["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": null,
                                     "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
            json["post_processor"] = json!({
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
            });
        });
        edit_json(&folder, "tokenizer_config.json", |json| {
            json["chat_template"] = "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ m.content }}{% endfor %}".into();
        });
    }
    checkpoints
}

#[test]
fn a_prompt_is_what_the_template_and_the_tokenizer_make_of_it() {
    let checkpoints = tampered();
    let server = Server::start(&checkpoints.dense(), &[]);
    let prompt = "Once upon a time";
    let tokens = |answer: Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(tokens(server.json(TEXT, &completion(prompt, 1))), 17);
    assert_eq!(tokens(server.json(CHAT, &chat(prompt, 1))), 17);
    let message = refused(&server, CHAT, &json!({"messages": [{"role": "system", "content": "x"}]}));
    assert!(message.contains("no system here"), "{message}");
}

#[test]
fn pages_of_allowed_sites_may_ask() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 43);
    let ours = "https://chat.example";
    let server =
        Server::start(&checkpoints.dynamoe(), &["--cors-origin", ours, "--cors-origin", "http://b.example"]);
    let allowed = |method: reqwest::Method, route: &str, origin: &str| {
        let request =
            server.client.request(method.clone(), format!("{}{route}", server.url)).header("origin", origin);
        let request = match method {
            reqwest::Method::OPTIONS => request
                .header("access-control-request-method", "POST")
                .header("access-control-request-headers", "content-type,authorization"),
            _ => request,
        };
        let answer = request.send().unwrap();
        answer.headers().get("access-control-allow-origin").map(|value| value.to_str().unwrap().to_owned())
    };
    for route in [CHAT, TEXT, "/v1/models", "/v1/dynamoe", "/health", "/metrics", "/nothing"] {
        for method in [reqwest::Method::OPTIONS, reqwest::Method::GET] {
            assert_eq!(allowed(method.clone(), route, ours).as_deref(), Some(ours), "{route}");
            assert_eq!(
                allowed(method.clone(), route, "http://b.example").as_deref(),
                Some("http://b.example")
            );
            assert_eq!(allowed(method, route, "https://evil.example"), None);
        }
    }
}
