//! A server of its own for each test, and a small client.

#![allow(dead_code)] // each test file uses some of it

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
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
        Self::run(&[&["--model", model, "--dtype", "f32", "--cpu"], arguments].concat())
    }

    /// The same with all arguments but the port.
    pub fn run(arguments: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_serve"))
            .args(["--port", "0"])
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

    /// Memory that the process holds, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024
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

/// Opens a connection and sends a streaming request by hand.
pub fn open_stream(server: &Server, tokens: usize) -> TcpStream {
    let body = with(completion("Once upon a time", tokens), "stream", true).to_string();
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length:";
    write!(stream, "{head} {}\r\n\r\n{body}", body.len()).unwrap();
    stream
}

/// Reads on from what was `read` before until `text` has come.
pub fn read_until(stream: &mut TcpStream, mut read: String, text: &str) -> String {
    let mut buffer = [0; 4096];
    while !read.contains(text) {
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0, "the stream ended before {text:?}: {read}");
        read.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    read
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
