//! A hub on this machine, for tests.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};

use super::Settings;

pub const SHA: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

/// A hub: `answer` makes body and further headers of a path. What it is asked comes through the receiver, request line and
/// headers.
pub fn hub(answer: fn(&str) -> Option<(String, String)>) -> (String, Receiver<String>) {
    hub_that(move |path| match answer(path) {
        Some((body, headers)) => ("200 OK", body, headers),
        None => ("404 Not Found", String::new(), String::new()),
    })
}

/// A hub: `answer` makes status, body and further headers of a path. A header with a `Content-Length` takes the place of the
/// body's.
pub fn hub_that(
    answer: impl Fn(&str) -> (&'static str, String, String) + Send + 'static,
) -> (String, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (asked, questions) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
            let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
            let (code, body, mut headers) = answer(head[0].split(' ').nth(1).unwrap());
            let _ = asked.send(head.join("\n"));
            if !headers.contains("Content-Length") {
                headers += &format!("Content-Length: {}\r\n", body.len());
            }
            write!(stream, "HTTP/1.1 {code}\r\nConnection: close\r\n{headers}\r\n{body}").unwrap();
        }
    });
    (address, questions)
}

pub fn settings(endpoint: &str, cache: &Path) -> Settings {
    Settings {
        endpoint: endpoint.to_owned(),
        token: Some("hf_secret".to_owned()),
        cache: cache.to_owned(),
        offline: false,
    }
}

pub fn listing(sha: &str, files: &[&str]) -> String {
    let siblings: Vec<_> = files.iter().map(|file| serde_json::json!({"rfilename": file})).collect();
    serde_json::json!({"sha": sha, "siblings": siblings}).to_string()
}

/// All files below a folder.
pub fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        match entry.path() {
            path if path.is_dir() => found.extend(files(&path)),
            path => found.push(path.display().to_string()),
        }
    }
    found.sort();
    found
}
