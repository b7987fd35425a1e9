//! A server of its own for each test, and a small client.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::Duration,
};

use reqwest::blocking::{Client, Response};
use serde_json::{Value, json};

/// A running server; dropping it kills it.
pub struct Server {
    process: Child,
    pub url: String,
    pub client: Client,
}

impl Server {
    /// Starts a server over `model` at a free port and waits until it listens.
    pub fn start(model: &str, arguments: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_serve"))
            .args(["--model", model, "--port", "0", "--dtype", "f32", "--cpu"])
            .args(arguments)
            .env("RUST_LOG", "warn")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
        let line = lines.find(|line| line.contains("listens at")).expect("the server did not start");
        // whatever it prints later must not find a closed pipe
        std::thread::spawn(move || lines.for_each(drop));
        let url = line.split(' ').next_back().unwrap().to_owned();
        let client = Client::builder().timeout(Duration::from_secs(120)).build().unwrap();
        Self { process, url, client }
    }

    pub fn post(&self, route: &str, body: &Value) -> Response {
        self.client.post(format!("{}{route}", self.url)).json(body).send().unwrap()
    }

    pub fn get(&self, route: &str) -> Response {
        self.client.get(format!("{}{route}", self.url)).send().unwrap()
    }

    /// The answer to a request that must succeed.
    pub fn json(&self, route: &str, body: &Value) -> Value {
        let response = self.post(route, body);
        let (status, text) = (response.status(), response.text().unwrap());
        assert!(status.is_success(), "{route} {body}: {status} {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// The events of a streamed answer, without the closing `[DONE]`, which must come.
    pub fn stream(&self, route: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let text = self.post(route, &body).text().unwrap();
        let mut events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{text}");
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        let status = Command::new("kill").args(["-TERM", &self.process.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for the end of the process, ten seconds at most, and returns whether it ended well.
    pub fn ended_well(&mut self) -> bool {
        for _ in 0..100 {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("the server still runs");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A greedy completion of `tokens` tokens.
pub fn completion(prompt: &str, tokens: usize) -> Value {
    json!({"model": "default", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0})
}

/// A greedy chat completion of `tokens` tokens.
pub fn chat(prompt: &str, tokens: usize) -> Value {
    json!({
        "model": "default", "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens,
        "temperature": 0.0
    })
}

/// `value` with a field set.
pub fn with(mut value: Value, field: &str, content: impl Into<Value>) -> Value {
    value[field] = content.into();
    value
}
