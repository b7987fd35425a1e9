//! A folder with a tiny model and texts, and the program in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use dynamoe_model::checkpoint::Checkpoint;
use moefy_train::data::corpus::{BOUNDARY, documents, train_tokenizer};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support;

/// Batches of 4 sequences of 32 tokens: 128 tokens a step.
pub const SHAPE: [&str; 4] = ["--batch-size", "4", "--sequence-length", "32"];
pub const STEP: usize = 128;

/// A folder with a tiny dense model in `dense`, `train.txt` and `valid.txt`.
pub struct Lab(TempDir);

impl Lab {
    pub fn new() -> Self {
        Self::with("LlamaForCausalLM", Dtype::F32)
    }

    pub fn with(architecture: &str, dtype: Dtype) -> Self {
        Self::of(support::config(architecture), dtype)
    }

    /// Around a dense model of this config.json; its tokens and its FFN's width are set here.
    pub fn of(mut config: Value, dtype: Dtype) -> Self {
        let lab = Self(tempfile::tempdir().unwrap());
        let texts = [("train.txt", documents(1, 10)), ("valid.txt", documents(2, 3))];
        for (name, documents) in &texts {
            fs::write(lab.path(name), documents.join(&format!("\n{BOUNDARY}\n"))).unwrap();
        }
        let tokenizer = train_tokenizer(&texts[0].1, 300).unwrap();
        config["intermediate_size"] = json!(32);
        config["vocab_size"] = json!(tokenizer.get_vocab_size(true));
        config["bos_token_id"] = json!(0);
        config["eos_token_id"] = json!(0);
        support::write(&lab.path("dense"), &config, dtype, 1);
        tokenizer.save(lab.path("dense/tokenizer.json"), false).unwrap();
        lab
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The program with these arguments, in the lab's folder, away from the user's caches and the network.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moefy-train"));
        command.args(args).current_dir(self.0.path());
        command.env("XDG_CACHE_HOME", self.path("cache")).env("HF_HOME", self.path("hub"));
        command.env("HF_ENDPOINT", "http://127.0.0.1:9").env("RUST_BACKTRACE", "1").env_remove("RUST_LOG");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs what must succeed; its standard output.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        finished(self.output(args), args)
    }

    /// Runs what must fail with one message that has all of `words` in it.
    #[track_caller]
    pub fn fails(&self, args: &[&str], words: &[&str]) -> String {
        refused(self.output(args), args, words)
    }

    /// `evaluate --json` on valid.txt, document by document.
    #[track_caller]
    pub fn evaluate(&self, model: &str, more: &[&str]) -> Value {
        let args = ["evaluate", "--model", model, "--data", "valid.txt", "--documents", "--json"];
        serde_json::from_str(&self.ok(&[&args[..], more].concat())).expect("one JSON object and nothing else")
    }

    #[track_caller]
    pub fn loss(&self, model: &str) -> f64 {
        self.evaluate(model, &["--sensitivity", "1"])["results"][0]["loss"].as_f64().unwrap()
    }

    pub fn convert(&self) {
        self.ok(&["calibrate", "--model", "dense", "--data", "train.txt", "--sequence-length", "32"]);
        let calibration = ["--calibration", "calibration.safetensors"];
        self.ok(&[&["convert", "--model", "dense", "--out", "converted"], &calibration[..]].concat());
    }

    pub fn tensors(&self, model: &str) -> BTreeMap<String, Vec<u8>> {
        let checkpoint = Checkpoint::open(&self.path(model)).unwrap();
        let read = |name: &str| (name.to_owned(), checkpoint.read_bytes(name).unwrap());
        checkpoint.names().map(read).collect()
    }

    /// The largest difference between two models' numbers, which are f32.
    pub fn largest_difference(&self, one: &str, other: &str) -> f32 {
        let (one, other) = (self.tensors(one), self.tensors(other));
        let mut largest = 0f32;
        for (name, bytes) in &one {
            let value = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
            for (a, b) in bytes.chunks_exact(4).zip(other[name].chunks_exact(4)) {
                largest = largest.max((value(a) - value(b)).abs());
            }
        }
        largest
    }

    pub fn json(&self, file: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(file)).unwrap()).unwrap()
    }
}

#[track_caller]
pub fn finished(output: Output, args: &[&str]) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {}\n{stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
pub fn refused(output: Output, args: &[&str], words: &[&str]) -> String {
    let stderr = String::from_utf8(output.stderr).unwrap();
    let told = format!("{args:?}: {}\n{stderr}", output.status);
    assert!(matches!(output.status.code(), Some(1 | 2)), "{told}");
    assert_eq!(stderr.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{told}");
    assert!(!stderr.contains("panicked") && !stderr.contains("stack backtrace"), "{told}");
    if output.status.code() == Some(1) {
        // two is clap's, whose message is followed by the usage
        let last = stderr.lines().last().unwrap();
        assert!(last.starts_with("error: "), "{told}");
    }
    words.iter().for_each(|word| assert!(stderr.contains(word), "expected {word:?} in {told}"));
    stderr
}

/// A quick `run` into `out`, with more arguments.
pub fn run_args<'a>(out: &'a str, tokens: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["run", "--model", "dense", "--data", "train.txt", "--valid", "valid.txt", "--out", out];
    [&args[..], &["--tokens", tokens], &SHAPE, more].concat()
}

/// A quick `finetune` of `converted` into `out`, with more arguments.
pub fn finetune_args<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["finetune", "--model", "converted", "--data", "train.txt", "--out", out, "--tokens", "640"];
    [&args[..], &SHAPE, more].concat()
}

/// A quick `compare` into `out`, with more arguments.
pub fn compare_args<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["compare", "--model", "dense", "--data", "train.txt", "--valid", "valid.txt", "--out", out];
    [&args[..], &["--tokens", "640"], &SHAPE, more].concat()
}

/// (step, loss, objective, width) of every line of a training log.
pub fn log(path: &Path) -> Vec<(u64, f64, f64, f64)> {
    let text = fs::read_to_string(path).unwrap();
    let line = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        let number = |key: &str| line[key].as_f64().unwrap();
        (line["step"].as_u64().unwrap(), number("loss"), number("objective"), number("mean_width"))
    };
    text.lines().map(line).collect()
}

/// Starts a command and kills it with no warning once `path` is there.
pub fn kill_when(lab: &Lab, args: &[&str], path: &Path) {
    let mut child = lab.command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for(path, &mut child);
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
}

/// Starts a command and kills it with no warning after a while; whether it was still running.
pub fn kill_after(lab: &Lab, args: &[&str], wait: Duration) -> bool {
    let mut child = lab.command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while started.elapsed() < wait {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    true
}

pub fn wait_for(path: &Path, child: &mut Child) {
    let started = Instant::now();
    while !path.exists() {
        assert!(started.elapsed() < Duration::from_secs(60), "no {}", path.display());
        assert!(child.try_wait().unwrap().is_none(), "ended before {} was there", path.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}
