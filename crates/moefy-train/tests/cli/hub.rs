//! Data sets on the hub, which is a server on this machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::Output;
use std::sync::{Arc, Mutex};

use moefy_train::data::corpus::documents;
use serde_json::{Value, json};

use crate::lab::{Lab, SHAPE, STEP, finished, refused};

/// Answers by the path that is asked for.
type Answers = Arc<Mutex<BTreeMap<String, String>>>;

struct Hub {
    endpoint: String,
    answers: Answers,
}

impl Hub {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let answers = Answers::default();
        let known = Arc::clone(&answers);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
                let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                let answer = known.lock().unwrap().get(head[0].split(' ').nth(1).unwrap()).cloned();
                let (code, body) = answer.map_or(("404 Not Found", String::new()), |body| ("200 OK", body));
                let length = body.len();
                let head = format!("HTTP/1.1 {code}\r\nConnection: close\r\nContent-Length: {length}\r\n");
                write!(stream, "{head}\r\n{body}").unwrap();
            }
        });
        Self { endpoint, answers }
    }

    /// Moves `main` of `org/stories` on to a commit with these files.
    fn publish(&self, commit: &str, files: &[(&str, String)]) {
        let names: Vec<Value> = files.iter().map(|(name, _)| json!({ "rfilename": name })).collect();
        let listing = json!({ "sha": commit, "siblings": names }).to_string();
        let mut answers = self.answers.lock().unwrap();
        for revision in ["main", commit] {
            answers.insert(format!("/api/datasets/org/stories/revision/{revision}"), listing.clone());
        }
        for (name, text) in files {
            answers.insert(format!("/datasets/org/stories/resolve/{commit}/{name}"), text.clone());
        }
    }

    fn output(&self, lab: &Lab, args: &[&str]) -> Output {
        lab.command(args).env("HF_ENDPOINT", &self.endpoint).env_remove("HF_HUB_CACHE").output().unwrap()
    }
}

fn text(seed: u64, count: usize) -> String {
    let lines = documents(seed, count).into_iter().map(|text| json!({ "text": text }).to_string());
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn a_run_reads_the_commit_that_it_began_with() {
    let (lab, hub) = (Lab::new(), Hub::new());
    let (old, new) = ("a".repeat(40), "b".repeat(40));
    hub.publish(
        &old,
        &[("train/1.jsonl", text(1, 8)), ("test.jsonl", text(2, 3)), ("README.md", "#".into())],
    );
    let (train, valid) =
        ("hf://datasets/org/stories/train/*.jsonl:2", "hf://datasets/org/stories/test.jsonl");
    let args = |out: &'static str, tokens: &'static str| {
        let base = ["run", "--model", "dense", "--data", train, "--valid", valid, "--out", out];
        [&base[..], &["--tokens", tokens, "--baselines", "none"], &SHAPE].concat()
    };
    let tokens: &'static str = (6 * STEP).to_string().leak();
    let first = args("out", tokens);
    let output = hub.output(&lab, &first);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    finished(output, &first);
    assert!(told.contains(&format!("1 files of commit {old}")), "{told}");
    let job = lab.json("out/training/job.json");
    assert_eq!((&job["data"][0]["commit"], &job["valid"][0]["commit"]), (&json!(old), &json!(old)));
    assert_eq!(job["data"][0]["weight"], 2.0);
    let facts = lab.json("out/report.json")["facts"].to_string();
    assert!(facts.contains(&format!("hf://datasets/org/stories@{old}/train/*.jsonl")), "{facts}");

    // the data set moves on, the run does not; nor does it need the hub
    hub.publish(&new, &[("train/1.jsonl", text(3, 8)), ("test.jsonl", text(4, 3))]);
    lab.ok(&[&first[..], &["--resume"]].concat());
    assert_eq!(lab.json("out/training/job.json"), job);
    let second = args("new", tokens);
    finished(hub.output(&lab, &second), &second);
    assert_eq!(lab.json("new/training/job.json")["data"][0]["commit"], json!(new));

    let evaluate = ["evaluate", "--model", "out", "--data", valid, "--json", "--documents", "--budget", "1"];
    let found: Value = serde_json::from_str(&finished(hub.output(&lab, &evaluate), &evaluate)).unwrap();
    assert_eq!(found["data"], json!([format!("hf://datasets/org/stories@{new}/test.jsonl")]));
}

#[test]
fn what_a_data_set_does_not_hold_is_named() {
    let (lab, hub) = (Lab::new(), Hub::new());
    hub.publish(&"a".repeat(40), &[("train/1.jsonl", text(1, 8)), ("README.md", "#".into())]);
    let fails = |data: &str, words: &[&str]| {
        let args = ["evaluate", "--model", "dense", "--documents", "--data", data];
        refused(hub.output(&lab, &args), &args, words);
    };
    fails("hf://datasets/org/nothing", &["hf://datasets/org/nothing@main", "there is no such data set"]);
    fails("hf://datasets/org/stories/*.parquet", &["no file of commit aaa", "README.md, train/1.jsonl"]);
    fails("hf://datasets/org/stories/README.md", &["README.md: expected a name that ends in .txt"]);
    fails("hf://datasets/stories", &["expected hf://datasets/ORG/NAME[@REVISION][/PATTERN]"]);
    fails("hf://datasets/org/stories:x", &["the weight \"x\" is not a number"]);
    let args = ["evaluate", "--model", "dense", "--data", "hf://datasets/org/other"];
    let offline = lab.command(&args).env("HF_HUB_OFFLINE", "1").output().unwrap();
    refused(offline, &args, &["HF_HUB_OFFLINE is set", "revision main of the data set"]);
    lab.fails(&args, &["hf://datasets/org/other", "the hub cannot be reached"]);
}
