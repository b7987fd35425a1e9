//! What examples/serve shows, as it stands there.

#[path = "support/http.rs"]
mod http;
mod support;

use std::{
    path::Path,
    process::{Command, Output},
};

use http::Server;
use serde_json::Value;
use support::{Checkpoints, SMALL, checkpoints};

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/serve");

fn llama() -> Checkpoints {
    checkpoints("LlamaForCausalLM", SMALL, 51)
}

fn text(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_toml_file_loads_a_model() {
    let checkpoints = llama();
    let toml = std::fs::read_to_string(Path::new(EXAMPLES).join("model.toml")).unwrap();
    let placeholder = "path/to/a/dynamoe/checkpoint";
    assert!(toml.contains(placeholder));
    let file = checkpoints.folder().join("model.toml");
    std::fs::write(&file, toml.replace(placeholder, &checkpoints.dynamoe())).unwrap();
    let server = Server::run(&["--config", file.to_str().unwrap(), "--cpu", "--budget", "0.5"]);
    let shown: Value = server.get("/v1/dynamoe").json().unwrap();
    assert_eq!(shown["budget"], 0.5);
}

#[test]
#[ignore = "needs curl"]
fn the_curl_session_runs() {
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    let session = Command::new("bash").arg(Path::new(EXAMPLES).join("session.sh")).arg(&server.url).output();
    let shown = text(&session.unwrap());
    println!("{shown}");
    for word in ["\"expert_widths\"", "\"mean_ffn_width\"", "[DONE]", "dynamoe_ffn_tokens_total"] {
        assert!(shown.contains(word), "no {word} in {shown}");
    }
}

/// `DYNAMOE_PYTHON` names a Python with the openai package.
#[test]
#[ignore = "needs a Python with the openai package in DYNAMOE_PYTHON"]
fn the_openai_client_runs() {
    let python = std::env::var("DYNAMOE_PYTHON").expect("DYNAMOE_PYTHON is not set");
    let checkpoints = llama();
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    let client = Command::new(python).arg(Path::new(EXAMPLES).join("client.py")).arg(&server.url).output();
    let shown = text(&client.unwrap());
    println!("{shown}");
    for word in
        ["sensitivity 0.0: mean FFN width 0.250", "sensitivity 1.0: mean FFN width 1.000", "refused: "]
    {
        assert!(shown.contains(word), "no {word:?} in {shown}");
    }
}
