//! The program as a user runs it: its commands on tiny models, interruptions, and input that is wrong.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::contents;
use dynamoe_model::checkpoint::Checkpoint;
use moefy_train::data::corpus::{BOUNDARY, documents, train_tokenizer};
use rand::Rng;
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Batches of 4 sequences of 32 tokens: 128 tokens a step.
const SHAPE: [&str; 4] = ["--batch-size", "4", "--sequence-length", "32"];
const STEP: usize = 128;

/// A folder with a tiny dense model in `dense`, `train.txt` and `valid.txt`.
struct Lab(TempDir);

impl Lab {
    fn new() -> Self {
        Self::with("LlamaForCausalLM", Dtype::F32)
    }

    fn with(architecture: &str, dtype: Dtype) -> Self {
        Self::of(common::config(architecture), dtype)
    }

    /// Around a dense model of this config.json; its tokens and its FFN's width are set here.
    fn of(mut config: Value, dtype: Dtype) -> Self {
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
        common::write(&lab.path("dense"), &config, dtype, 1);
        tokenizer.save(lab.path("dense/tokenizer.json"), false).unwrap();
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The program with these arguments, in the lab's folder, away from the user's caches and the network.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moefy-train"));
        command.args(args).current_dir(self.0.path());
        command.env("XDG_CACHE_HOME", self.path("cache")).env("HF_HOME", self.path("hub"));
        command.env("HF_ENDPOINT", "http://127.0.0.1:9").env("RUST_BACKTRACE", "1").env_remove("RUST_LOG");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs what must succeed; its standard output.
    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        finished(self.output(args), args)
    }

    /// Runs what must fail with one message that has all of `words` in it.
    #[track_caller]
    fn fails(&self, args: &[&str], words: &[&str]) -> String {
        refused(self.output(args), args, words)
    }

    /// `evaluate --json` on valid.txt, document by document.
    #[track_caller]
    fn evaluate(&self, model: &str, more: &[&str]) -> Value {
        let args = ["evaluate", "--model", model, "--data", "valid.txt", "--documents", "--json"];
        serde_json::from_str(&self.ok(&[&args[..], more].concat())).expect("one JSON object and nothing else")
    }

    #[track_caller]
    fn loss(&self, model: &str) -> f64 {
        self.evaluate(model, &["--sensitivity", "1"])["results"][0]["loss"].as_f64().unwrap()
    }

    fn convert(&self) {
        self.ok(&["calibrate", "--model", "dense", "--data", "train.txt", "--sequence-length", "32"]);
        let calibration = ["--calibration", "calibration.safetensors"];
        self.ok(&[&["convert", "--model", "dense", "--out", "converted"], &calibration[..]].concat());
    }

    fn tensors(&self, model: &str) -> BTreeMap<String, Vec<u8>> {
        let checkpoint = Checkpoint::open(&self.path(model)).unwrap();
        let read = |name: &str| (name.to_owned(), checkpoint.read_bytes(name).unwrap());
        checkpoint.names().map(read).collect()
    }

    fn json(&self, file: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(file)).unwrap()).unwrap()
    }
}

#[track_caller]
fn finished(output: Output, args: &[&str]) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {}\n{stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn refused(output: Output, args: &[&str], words: &[&str]) -> String {
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
fn run_args<'a>(out: &'a str, tokens: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["run", "--model", "dense", "--data", "train.txt", "--valid", "valid.txt", "--out", out];
    [&args[..], &["--tokens", tokens], &SHAPE, more].concat()
}

/// A quick `finetune` of `converted` into `out`, with more arguments.
fn finetune_args<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["finetune", "--model", "converted", "--data", "train.txt", "--out", out, "--tokens", "640"];
    [&args[..], &SHAPE, more].concat()
}

/// (step, loss, objective, width) of every line of a training log.
fn log(path: &Path) -> Vec<(u64, f64, f64, f64)> {
    let text = fs::read_to_string(path).unwrap();
    let line = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        let number = |key: &str| line[key].as_f64().unwrap();
        (line["step"].as_u64().unwrap(), number("loss"), number("objective"), number("mean_width"))
    };
    text.lines().map(line).collect()
}

#[test]
fn the_whole_way() {
    let lab = Lab::new();
    let dense = contents(&lab.path("dense"));
    let stdout = lab.ok(&run_args("out", "2560", &["--baselines", "static", "--oracle"]));
    assert!(stdout.contains("out/report.html") && stdout.contains("dynamoe-serve --model out"), "{stdout}");
    assert_eq!(contents(&lab.path("dense")), dense);

    let config = lab.json("out/config.json");
    assert_eq!(config["architectures"], json!(["DynaMoeForCausalLM"]));
    assert!(!config["dynamoe"]["budgets"].as_array().unwrap().is_empty());
    Checkpoint::open(&lab.path("out")).unwrap();
    assert!(fs::read_to_string(lab.path("out/report.html")).unwrap().contains("static nested"));
    let curves = lab.json("out/report.json")["curves"].clone();
    let names: Vec<&str> = curves.as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["DynaMoE", "oracle routing", "static nested"]);

    let found = lab.evaluate("out", &["--sensitivity", "0.5,1"]);
    let points = found["results"].as_array().unwrap();
    assert_eq!(points.len(), 2);
    for (point, sensitivity) in points.iter().zip([0.5, 1.0]) {
        assert_eq!(point["sensitivity"], sensitivity);
        assert!(point["budget"].is_null());
        let number = |key: &str| point[key].as_f64().unwrap_or_else(|| panic!("{key} in {point}"));
        assert!((number("perplexity") / number("loss").exp() - 1.0).abs() < 1e-9);
        assert!(number("stderr") > 0.0 && number("tokens") > 100.0);
        let layers: Vec<f64> = serde_json::from_value(point["width_per_layer"].clone()).unwrap();
        assert_eq!(layers.len(), common::LAYERS);
        assert!((layers.iter().sum::<f64>() / layers.len() as f64 - number("mean_width")).abs() < 1e-9);
        assert!((0.25..=1.0).contains(&number("mean_width")));
    }
    assert_eq!(points[1]["mean_width"], 1.0);
    let shuffled = lab.evaluate("out", &["--sensitivity", "0.5,1", "--shuffled"])["results"].clone();
    assert_eq!(shuffled[0]["tokens"], points[0]["tokens"]);
    assert_eq!(shuffled[1]["loss"], points[1]["loss"]);
    let found = lab.evaluate("out", &["--budget", "0.5,0.75"]);
    assert_eq!(found["results"][0]["budget"], 0.5);
    assert_eq!(found["results"][1]["budget"], 0.75);
    let table = lab.ok(&["evaluate", "--model", "out", "--data", "valid.txt", "--sequence-length", "32"]);
    assert_eq!(table.lines().filter(|line| line.contains("width per layer")).count(), 11, "{table}");

    lab.ok(&["export", "--model", "out", "--dense", "--out", "exported"]);
    assert_eq!(lab.json("exported/config.json")["architectures"], json!(["LlamaForCausalLM"]));
    assert!((lab.loss("exported") - lab.loss("out")).abs() < 1e-6);
    assert_eq!(lab.evaluate("exported", &[])["results"].as_array().unwrap().len(), 1);
    assert!(lab.ok(&["inspect", "out"]).contains("active parameters"));
    let inspected: Value = serde_json::from_str(&lab.ok(&["inspect", "out", "--json"])).unwrap();
    let widths: Vec<_> =
        inspected["dynamoe"]["experts"].as_array().unwrap().iter().map(|e| e["width"].clone()).collect();
    assert_eq!(widths, [8, 16, 24, 32]);
    fs::remove_file(lab.path("out/report.html")).unwrap();
    lab.ok(&["report", "--run", "out"]);
    assert!(lab.path("out/report.html").is_file());
}

/// Every phase says how far it is, how fast, and how long it took.
#[test]
fn every_phase_shows_its_progress() {
    let lab = Lab::new();
    let args = run_args("out", "1280", &["--baselines", "static"]);
    let output = lab.output(&args);
    let lines = String::from_utf8(output.stderr.clone()).unwrap();
    finished(output, &args);
    for (phase, unit) in [
        ("reading activations", "tokens"),
        ("ordering neurons", "layers"),
        ("converting", "layers"),
        ("measuring the dense model", "tokens"),
        ("DynaMoE", "tokens"),
        ("solving the dial", "budgets"),
        ("writing the checkpoint", "bytes"),
        ("measuring the curve", "tokens"),
        ("static nested", "tokens"),
    ] {
        let found = lines.lines().filter_map(|line| line.strip_prefix(phase)).next_back();
        let found = found.unwrap_or_else(|| panic!("{phase} is silent: {lines}"));
        let (done, rest) = found.trim().split_once('/').unwrap();
        let (total, rest) = rest.split_once(' ').unwrap();
        assert_eq!(done, total, "{phase}: {found}");
        assert!(rest.starts_with(unit) && rest.contains(&format!(" {unit}/s, in ")), "{phase}: {found}");
    }
    let evaluate = ["evaluate", "--model", "out", "--data", "valid.txt", "--documents", "--budget", "0.5"];
    let output = lab.output(&evaluate);
    assert!(String::from_utf8_lossy(&output.stderr).contains("evaluating "));
}

#[test]
fn conversion_keeps_the_loss_for_every_architecture() {
    for architecture in common::ARCHITECTURES {
        let lab = Lab::with(architecture, Dtype::F32);
        lab.convert();
        let (dense, converted) = (lab.loss("dense"), lab.loss("converted"));
        assert!((dense - converted).abs() < 1e-5, "{architecture}: {dense} {converted}");
    }
}

#[test]
fn what_could_not_be_served_is_said_before_training() {
    let mut config = common::config("Qwen2ForCausalLM");
    config["head_dim"] = json!(8);
    let lab = Lab::of(config, Dtype::F32);
    lab.convert();
    let short = ["--baselines", "none", "--eval-tokens", "100"];
    for args in [
        vec!["convert", "--model", "dense", "--out", "again"],
        run_args("run", "256", &short),
        finetune_args("tuned", &[]),
        compare_args("compared", &["--seeds", "1", "--baselines", "none"]),
    ] {
        let output = lab.output(&args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        finished(output, &args);
        let said = stderr.find("dynamoe-serve will refuse the result: config.json: \"head_dim\" 8");
        let trained = stderr.find("loss").unwrap_or(stderr.len());
        assert!(said.is_some_and(|said| said < trained), "{args:?}: {stderr}");
    }
}

#[test]
fn missing_budgets_are_solved_and_kept() {
    let lab = Lab::new();
    lab.convert();
    let found = lab.evaluate("converted", &["--budget", "0.5"]);
    assert_eq!(found["results"][0]["budget"], 0.5);
    let rows = lab.json("converted/config.json")["dynamoe"]["budgets"].clone();
    assert_eq!(rows.as_array().unwrap().len(), 1);
    assert_eq!(lab.evaluate("converted", &["--budget", "0.5"]), found);
    assert_eq!(lab.json("converted/config.json")["dynamoe"]["budgets"], rows);
}

#[test]
fn a_seed_decides_every_bit() {
    let lab = Lab::new();
    for (out, seed, threads) in [("a", "5", "1"), ("b", "5", "3"), ("c", "6", "3")] {
        let args = run_args(out, "640", &["--baselines", "none", "--seed", seed]);
        finished(lab.command(&args).env("RAYON_NUM_THREADS", threads).output().unwrap(), &args);
    }
    let model = |out: &str| fs::read(lab.path(out).join("model.safetensors")).unwrap();
    assert!(model("a") == model("b"));
    assert!(model("a") != model("c"));
    assert_eq!(lab.json("a/report.json")["curves"], lab.json("b/report.json")["curves"]);
}

#[test]
fn a_config_file_stands_for_flags() {
    let lab = Lab::new();
    let text = "model = 'dense'\ndata = ['train.txt']\nvalid = 'valid.txt'\ntokens = 640\nbatch_size = 4\n\
                sequence-length = 32\nbaselines = 'static,dense'\nlr = 2e-3\nset = ['clip=0.5']\noracle = true\n";
    fs::write(lab.path("run.toml"), text).unwrap();
    lab.ok(&["run", "--config", "run.toml", "--out", "out", "--lr", "0.004"]);
    let settings = lab.json("out/training/job.json")["recipe"]["train"].clone();
    let found = ["lr", "tokens", "batch-size"].map(|key| settings[key].clone());
    assert_eq!(found, [json!(0.004), json!(640), json!(4)]);
    assert_eq!(settings["tuning"]["clip"], 0.5);
    assert_eq!(lab.json("out/report.json")["curves"].as_array().unwrap().len(), 4);

    fs::write(lab.path("run.toml"), format!("{text}lerning-rate = 1\n")).unwrap();
    for config in [&["--config", "run.toml"][..], &["--config=run.toml"]] {
        let words = ["run.toml: unknown key \"lerning-rate\"", "run --help"];
        lab.fails(&[&["run"][..], config, &["--out", "other"]].concat(), &words);
    }
    fs::write(lab.path("run.toml"), "lr = 1\ntokens = \n").unwrap();
    lab.fails(&["run", "--config", "run.toml"], &["run.toml: line 2: "]);
    lab.fails(&["run", "--config", "no.toml"], &["no.toml", "No such file"]);
}

/// A quick `compare` into `out`, with more arguments.
fn compare_args<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["compare", "--model", "dense", "--data", "train.txt", "--valid", "valid.txt", "--out", out];
    [&args[..], &["--tokens", "640"], &SHAPE, more].concat()
}

#[test]
fn comparisons_keep_what_is_finished() {
    let lab = Lab::new();
    let variants = "[[variant]]\nname = 'plain'\nmethod = 'dense'\n[[variant]]\nname = 'one width'\n\
                    method = 'static'\n[[variant]]\nname = 'fine'\nexperts = 8\n";
    fs::write(lab.path("variants.toml"), variants).unwrap();
    let more = ["--variants", "variants.toml", "--seeds", "2", "--at", "0.25,0.5,0.7,1", "--oracle", "fine"];
    let stdout = lab.ok(&compare_args("out", &more));
    assert!(stdout.contains("Regret: loss above plain") && stdout.contains("that of one width"), "{stdout}");
    assert_eq!(
        fs::read_to_string(lab.path("out/comparison.md")).unwrap(),
        stdout.split("out/").next().unwrap().trim_end().to_owned() + "\n\n"
    );
    let table = lab.json("out/comparison.json");
    let rows = table["rows"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["plain", "one width", "fine", "oracle routing of fine"]);
    assert!(rows[0]["loss"][2].is_null() && rows[0]["loss"][3]["seeds"] == 2);
    assert_eq!(rows[0]["regret"][3]["mean"], 0.0);
    assert!(rows[1]["loss"][2]["mean"].as_f64().unwrap() > 0.0, "between two widths");
    assert!((rows[1]["ratio"][0]["mean"].as_f64().unwrap() - 1.0).abs() < 1e-12);
    for row in &rows[..3] {
        assert_eq!((&row["tokens"], &row["steps"]), (&json!(640), &json!(5)), "{row}");
    }
    let page = fs::read_to_string(lab.path("out/report.html")).unwrap();
    assert!(page.contains("one width") && page.contains("Regret: nats above dense"));

    // nothing is trained twice; a new variant, or one told something else, is trained alone
    let cells = || {
        let entries = fs::read_dir(lab.path("out/cells")).unwrap().map(|e| e.unwrap());
        let read = |e: fs::DirEntry| {
            (e.file_name().into_string().unwrap(), e.metadata().unwrap().modified().unwrap())
        };
        entries.map(read).collect::<BTreeMap<_, _>>()
    };
    let before = cells();
    assert_eq!(before.len(), 6, "{before:?}");
    assert!(before.keys().all(|name| name.ends_with(".json")), "{before:?}");
    lab.ok(&compare_args("out", &more));
    assert_eq!(cells(), before);
    fs::write(lab.path("variants.toml"), variants.replace("experts = 8", "experts = 8\nlr = 3e-3")).unwrap();
    lab.ok(&compare_args("out", &more));
    let after = cells();
    assert_eq!(after.len(), 8);
    assert!(before.iter().all(|(name, modified)| after.get(name) == Some(modified)));
}

#[test]
fn a_killed_comparison_goes_on() {
    let lab = Lab::new();
    let more = ["--baselines", "dense,static", "--seeds", "1", "--save-every", "2", "--at", "0.5,1"];
    let started = Instant::now();
    lab.ok(&compare_args("whole", &more));
    let took = started.elapsed();
    for share in [0.3, 0.5, 0.7] {
        kill_after(&lab, &compare_args("killed", &more), took.mul_f64(share));
    }
    lab.ok(&compare_args("killed", &more));
    let rows = |out: &str| -> Vec<Value> {
        let table = lab.json(&format!("{out}/comparison.json"));
        table["rows"].as_array().unwrap().iter().map(|row| row["loss"].clone()).collect()
    };
    assert_eq!(rows("whole"), rows("killed"));
}

#[test]
fn comparisons_that_cannot_be_are_refused() {
    let lab = Lab::new();
    fs::write(lab.path("variants.toml"), "[[variant]]\nname = 'a'\nlerning-rate = 1\n").unwrap();
    let words = ["variants.toml", "variant \"a\"", "unknown key \"lerning-rate\""];
    lab.fails(&compare_args("out", &["--variants", "variants.toml"]), &words);
    lab.fails(&compare_args("out", &["--at", "0.5,0.25"]), &["ascending"]);
    lab.fails(&compare_args("out", &["--oracle", "static nested"]), &["--oracle", "with a router"]);
    lab.fails(&compare_args("out", &["--seeds", "0"]), &["--seeds"]);
    lab.fails(&compare_args("out", &["--experts", "8,16"]), &["variant"]);
    assert!(!lab.path("out").exists());
}

/// Starts a command and kills it with no warning after a while; whether it was still running.
fn kill_after(lab: &Lab, args: &[&str], wait: Duration) -> bool {
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

#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    let lab = Lab::new();
    let more = ["--save-every", "3", "--set", "log-every=2", "--baselines", "static"];
    let tokens = (30 * STEP).to_string();
    let started = Instant::now();
    lab.ok(&run_args("whole", &tokens, &more));
    let took = started.elapsed();
    let args = run_args("killed", &tokens, &[&more[..], &["--resume"]].concat());
    let mut rng = rand::rng();
    let mut killed = Vec::new();
    for _ in 0..5 {
        let wait = took.mul_f64(rng.random::<f64>() * 0.8);
        if !kill_after(&lab, &args, wait) {
            break;
        }
        killed.push(wait);
    }
    lab.ok(&args);
    let model = |out: &str| fs::read(lab.path(out).join("model.safetensors")).unwrap();
    assert!(model("whole") == model("killed"), "killed after {killed:?}");
    assert_eq!(lab.json("whole/config.json"), lab.json("killed/config.json"), "killed after {killed:?}");
    let metrics = |out: &str| log(&lab.path(out).join("training/state/metrics.jsonl"));
    assert_eq!(metrics("whole"), metrics("killed"), "killed after {killed:?}");
    let steps: Vec<u64> = metrics("whole").iter().map(|line| line.0).collect();
    assert_eq!(steps, (1..=15).map(|n| 2 * n).collect::<Vec<_>>());
    assert_eq!(lab.json("whole/report.json")["curves"], lab.json("killed/report.json")["curves"]);
}

fn wait_for(path: &Path, child: &mut Child) {
    let started = Instant::now();
    while !path.exists() {
        assert!(started.elapsed() < Duration::from_secs(60), "no {}", path.display());
        assert!(child.try_wait().unwrap().is_none(), "ended before {} was there", path.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn ctrl_c_saves_and_tells_how_to_continue() {
    let lab = Lab::new();
    lab.convert();
    let tokens = (400 * STEP).to_string();
    let more = ["--tokens", &tokens, "--save-every", "100000", "--set", "log-every=1"];
    let call = |out: &'static str| {
        let base = ["finetune", "--model", "converted", "--data", "train.txt", "--out", out];
        [&base[..], &SHAPE, &more].concat()
    };
    lab.ok(&call("whole"));

    let stopped = call("stopped");
    let mut child = lab.command(&stopped).spawn().unwrap();
    wait_for(&lab.path("stopped/training/state/metrics.jsonl"), &mut child);
    std::thread::sleep(Duration::from_millis(rand::rng().random_range(0..100)));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("stopping after this step"));
    assert!(finished(output, &stopped).contains("--resume continues"));
    assert!(!lab.path("stopped/config.json").exists());

    lab.fails(&stopped, &["not empty", "--resume", "--force"]);
    let resumed = [&stopped[..], &["--resume"]].concat();
    lab.fails(&[&resumed[..], &["--lr", "0.5"]].concat(), &["lr: was 0.002, now 0.5", "another --out"]);
    lab.fails(&[&resumed[..], &["--data", "valid.txt"]].concat(), &["data: was", "valid.txt"]);
    lab.ok(&resumed);
    assert!(lab.tensors("whole") == lab.tensors("stopped"));
    let metrics = |out: &str| log(&lab.path(out).join("training/state/metrics.jsonl"));
    assert_eq!(metrics("whole"), metrics("stopped"));
    assert_eq!(metrics("whole").len(), 400);
}

#[test]
fn ctrl_c_between_trainings_stops_at_once() {
    let lab = Lab::new();
    // enough held-out text to be measured for a while
    let text = fs::read_to_string(lab.path("valid.txt")).unwrap();
    fs::write(lab.path("valid.txt"), vec![text; 200].join(&format!("\n{BOUNDARY}\n"))).unwrap();
    let tokens = (2 * STEP).to_string();
    let args = run_args("out", &tokens, &["--eval-tokens", "10000000"]);
    let mut child = lab.command(&args).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(log.any(|line| line.unwrap().contains("measuring the curve")), "the run ended early");
    let started = Instant::now();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert!(log.any(|line| line.unwrap().contains("--resume continues")));
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(started.elapsed() < Duration::from_secs(5), "took {:?}", started.elapsed());
    assert!(!lab.path("out/report.html").exists());
    lab.ok(&run_args("out", &tokens, &["--resume", "--eval-tokens", "10000000"]));
    assert!(lab.path("out/report.html").exists());
}

#[test]
fn what_a_crash_leaves_behind_is_no_obstacle() {
    let lab = Lab::new();
    lab.convert();
    let args = finetune_args("out", &["--save-every", "2"]);
    lab.ok(&args);
    let resume = [&args[..], &["--resume"]].concat();
    let model = fs::read(lab.path("out/model.safetensors")).unwrap();
    // half a checkpoint, half a line, half a result
    let state = lab.path("out/training/state");
    fs::remove_dir_all(state.join("step-00000005")).unwrap();
    fs::create_dir(state.join(".step-00000005.partial")).unwrap();
    fs::write(state.join(".step-00000005.partial/params.safetensors"), "half").unwrap();
    fs::create_dir(lab.path("out/training/final")).unwrap();
    let mut metrics = fs::OpenOptions::new().append(true).open(state.join("metrics.jsonl")).unwrap();
    metrics.write_all(b"{\"step\":6,\"tok").unwrap();
    fs::remove_file(lab.path("out/config.json")).unwrap();
    lab.ok(&resume);
    assert!(fs::read(lab.path("out/model.safetensors")).unwrap() == model);
    assert_eq!(log(&state.join("metrics.jsonl")).len(), 1);
    assert!(!state.join(".step-00000005.partial").exists());

    // a checkpoint that was damaged is named; without it an earlier one serves
    for (file, content) in [("state.json", "{\"step\": 5"), ("params.safetensors", "\u{8}\0")] {
        fs::write(state.join("step-00000005").join(file), content).unwrap();
        lab.fails(&resume, &["step-00000005: cannot resume", "remove it", file]);
        fs::remove_dir_all(state.join("step-00000005")).unwrap();
        lab.ok(&resume);
        assert!(fs::read(lab.path("out/model.safetensors")).unwrap() == model);
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let lab = Lab::new();
    lab.convert();
    let wild = ["--lr", "1e30", "--set", "clip=1e30", "--set", "warmup=0", "--save-every", "1"];
    let words = ["of step 2 is", "train.txt, tokens", "last good checkpoint: that of step 1", "smaller --lr"];
    lab.fails(&finetune_args("out", &wild), &words);
    assert!(!lab.path("out/config.json").exists());
    lab.fails(&["evaluate", "--model", "out", "--data", "valid.txt"], &["config.json"]);
    let rarely = ["--lr", "1e30", "--set", "clip=1e30", "--set", "warmup=0"];
    lab.fails(&finetune_args("rarely", &rarely), &["of step 2 is", "none was written yet"]);
}

#[test]
fn routers_are_trained_alone() {
    let lab = Lab::with("Qwen3ForCausalLM", Dtype::BF16);
    lab.convert();
    let before = lab.tensors("converted");
    for method in ["similarity", "priced"] {
        lab.ok(&finetune_args(method, &["--train", "routers", "--method", method]));
        let after = lab.tensors(method);
        assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
        let changed: Vec<&String> = before.keys().filter(|name| before[*name] != after[*name]).collect();
        assert!(changed.iter().any(|name| name.contains(".mlp.router.fc1")), "{changed:?}");
        assert!(changed.iter().all(|name| name.contains(".mlp.router.")), "{changed:?}");
    }
    let words = ["--train routers", "priced or similarity", "static"];
    lab.fails(&finetune_args("out", &["--train", "routers", "--method", "static"]), &words);
    assert!(!lab.path("out").exists());
}

#[test]
fn sequences_come_out_as_wide_as_they_are_meant_to_be() {
    let lab = Lab::new();
    lab.convert();
    for focus in ["0.4", "0.8"] {
        // all sequences are meant to be near the focus, whatever width is worth to this model
        let near =
            ["focus-power=20", "full-share=0", "narrowest-share=0"].map(|constant| ["--set", constant]);
        let draws = [&["--focus", focus][..], &near.concat()].concat();
        let args = ["finetune", "--model", "converted", "--data", "train.txt", "--out", focus];
        let size =
            ["--tokens", "32000", "--batch-size", "4", "--sequence-length", "16", "--set", "log-every=1"];
        lab.ok(&[&args[..], &size, &draws].concat());
        let log = log(&lab.path(focus).join("training/state/metrics.jsonl"));
        let half = &log[log.len() / 2..];
        let width = half.iter().map(|line| line.3).sum::<f64>() / half.len() as f64;
        assert!((width - focus.parse::<f64>().unwrap()).abs() < 0.1, "{focus}: {width}");
    }
}

#[test]
fn what_is_not_trained_stays_bit_for_bit() {
    let lab = Lab::new();
    lab.convert();
    let converted = lab.tensors("converted");
    let group = |name: &str| match name {
        _ if [".router.", ".own."].iter().any(|part| name.contains(part)) => "added",
        _ if name.ends_with(".order") => "order",
        _ if name.contains(".mlp.") => "dense FFN",
        _ => "backbone",
    };
    for (out, args, kept) in [
        ("added", ["--train", "added"], &["dense FFN", "backbone"][..]),
        ("attention", ["--set", "backbone-lr=0"], &["backbone"]),
        ("shared", ["--set", "shared-lr=0"], &["dense FFN"]),
    ] {
        let frozen = |name: &str| kept.contains(&group(name));
        lab.ok(&finetune_args(out, &args));
        let trained = lab.tensors(out);
        assert_eq!(trained.len(), converted.len(), "{out}");
        for (name, bytes) in &trained {
            let same = bytes == &converted[name];
            if group(name) == "order" {
                assert!(same, "{out}: {name} was changed");
                continue;
            }
            assert!(same || !frozen(name), "{out}: {name} was changed");
            // what is trained moves, but for biases that see no gradient
            assert!(!same || frozen(name) || name.ends_with("bias"), "{out}: {name} was not trained");
        }
    }
    let words = ["--train added", "--method dense"];
    lab.fails(&finetune_args("out", &["--train", "added", "--method", "dense"]), &words);
}

#[test]
fn a_run_that_only_adds_is_the_dense_model_at_full_width() {
    let lab = Lab::new();
    lab.ok(&run_args("out", "1280", &["--train", "added"]));
    let report = lab.json("out/report.json");
    let full = report["curves"][0]["points"].as_array().unwrap().last().unwrap().clone();
    assert_eq!(full["mean_width"], 1.0);
    // neurons stand in another order, so sums are rounded otherwise
    let difference = full["loss"].as_f64().unwrap() - report["dense_loss"].as_f64().unwrap();
    assert!(difference.abs() < 1e-5, "{difference}");
    let names: Vec<_> = report["curves"].as_array().unwrap().iter().map(|c| c["name"].clone()).collect();
    assert_eq!(names, ["DynaMoE", "dense fine-tuned", "static nested", "random routing"]);
    lab.ok(&["export", "--model", "out", "--dense", "--out", "back"]);
    assert_eq!(lab.tensors("back"), lab.tensors("dense"), "the original tensors, in their order");
}

/// The number of bytes that a text such as "1.5 GB to train" begins with.
fn bytes(text: &str) -> f64 {
    let mut words = text.split(' ');
    let number: f64 = words.next().unwrap().parse().unwrap();
    number * if words.next().unwrap().starts_with("GB") { 1e9 } else { 1e6 }
}

#[test]
fn memory_is_what_was_said_before() {
    let lab = Lab::with("LlamaForCausalLM", Dtype::BF16);
    let mut config = common::config("LlamaForCausalLM");
    for (key, size) in [
        ("hidden_size", 128),
        ("intermediate_size", 512),
        ("num_hidden_layers", 4),
        ("vocab_size", 8000),
        ("max_position_embeddings", 256),
    ] {
        config[key] = json!(size);
    }
    let tokenizer = fs::read(lab.path("dense/tokenizer.json")).unwrap();
    common::write(&lab.path("large"), &config, Dtype::BF16, 1);
    fs::write(lab.path("large/tokenizer.json"), tokenizer).unwrap();
    fs::write(lab.path("long.txt"), documents(3, 80).join(&format!("\n{BOUNDARY}\n"))).unwrap();
    let args =
        ["run", "--model", "large", "--data", "long.txt", "--valid", "long.txt", "--baselines", "none"];
    let size =
        ["--tokens", "8192", "--batch-size", "16", "--sequence-length", "256", "--eval-tokens", "1000"];
    for (out, options) in [
        ("all", &[][..]),
        ("added", &["--train", "added"]),
        ("small", &["--train", "added", "--recompute", "--micro-batch", "4"]),
    ] {
        let args = [&args[..], &size, &["--out", out], options].concat();
        let output = lab.output(&args);
        let lines = String::from_utf8(output.stderr.clone()).unwrap();
        finished(output, &args);
        let told: Vec<&str> =
            lines.lines().filter_map(|line| line.split_once("memory: ")).map(|(_, told)| told).collect();
        let [estimate, peak] = told[..] else { panic!("{lines}") };
        let phases = estimate.strip_prefix("about ").unwrap().split(&[';', '('][..]).next().into_iter();
        let rest = estimate.split_once("), ").unwrap().1.split("; ").next().unwrap().split(", ");
        let estimate = phases.chain(rest).map(bytes).fold(0.0, f64::max);
        let share = bytes(peak) / estimate;
        println!("{out}: {estimate:.3e}, {peak}: {share:.2}");
        assert!((0.85..=1.15).contains(&share), "{out}: {share} of what was said: {told:?}");
    }
}

#[test]
fn a_training_that_does_not_fit_does_not_start() {
    let lab = Lab::new();
    let huge = ["--batch-size", "8000000"];
    let args = run_args("out", "1", &[]);
    let args: Vec<&str> = args.into_iter().filter(|arg| !SHAPE.contains(arg)).collect();
    let words = ["of memory are needed", "available", "--recompute --train added --micro-batch", "needs"];
    lab.fails(&[&args[..], &huge, &["--sequence-length", "32"]].concat(), &words);
    assert!(!lab.path("out").exists() && !lab.path("cache").exists(), "nothing is done before");
    lab.convert();
    let args = ["finetune", "--model", "converted", "--data", "train.txt", "--out", "out", "--tokens", "1"];
    lab.fails(
        &[&args[..], &huge, &["--sequence-length", "32", "--train", "added"]].concat(),
        &["--recompute"],
    );
}

#[test]
fn an_add_on_and_its_base_are_the_model() {
    let lab = Lab::with("LlamaForCausalLM", Dtype::BF16);
    lab.ok(&run_args("out", "1280", &["--train", "added", "--baselines", "none"]));
    let export = ["export", "--model", "out", "--add-on", "--base", "dense", "--out", "extra"];
    lab.ok(&export);
    assert_eq!(contents(&lab.path("extra")).len(), 2, "no tokenizer, no dense weights");
    let dials = ["--sensitivity", "0.3,1", "--budget", "0.5"];
    let mut whole = lab.evaluate("out", &dials);
    let mut joined = lab.evaluate("dense", &[&dials[..], &["--add-on", "extra"]].concat());
    [&mut whole, &mut joined].into_iter().for_each(|found| found["model"] = Value::Null);
    assert_eq!(joined, whole);
    let together = ["--model", "dense", "--add-on", "extra", "--out"];
    lab.ok(&[&["export"], &together[..], &["joined"]].concat());
    assert_eq!(lab.tensors("joined"), lab.tensors("out"));
    assert_eq!(lab.json("joined/config.json"), lab.json("out/config.json"));
    lab.ok(&[&["export", "--dense"], &together[..], &["back"]].concat());
    assert_eq!(lab.tensors("back"), lab.tensors("dense"));
    let told = lab.ok(&["inspect", "dense", "--add-on", "extra"]);
    assert!(told.contains("extra") && told.contains("DynaMoE") && !told.contains("unused"), "{told}");
    // new budgets go into the add-on, the base stays as it is
    let dense = contents(&lab.path("dense"));
    let solve = ["--budget", "0.6", "--calibration-data", "train.txt", "--add-on", "extra"];
    lab.evaluate("dense", &solve);
    let rows = lab.json("extra/add_on.json")["dynamoe"]["budgets"].clone();
    let solved = |row: &Value| (row["width"].as_f64().unwrap() - 0.6).abs() < 0.01;
    assert!(rows.as_array().unwrap().iter().any(solved), "{rows}");
    assert_eq!(contents(&lab.path("dense")), dense);

    let other = ["--model", "back", "--add-on", "extra", "--data", "valid.txt", "--documents"];
    lab.ok(&[&["evaluate", "--sensitivity", "1"], &other[..]].concat());
    lab.ok(&run_args("tuned", "1280", &["--baselines", "none"]));
    lab.fails(
        &["export", "--model", "tuned", "--add-on", "--base", "dense", "--out", "no"],
        &["--train added"],
    );
    lab.ok(&["export", "--model", "tuned", "--dense", "--out", "other"]);
    lab.fails(
        &["evaluate", "--model", "other", "--add-on", "extra", "--data", "valid.txt"],
        &["extra", "belongs to dense", "other is another model"],
    );
    lab.fails(&["export", "--model", "out", "--add-on", "--out", "no"], &["--base"]);
    lab.fails(&export, &["exists", "--force"]);
    lab.ok(&[&export[..], &["--force"]].concat());
    assert!(!lab.path("no").exists());
}

#[test]
fn a_folder_is_one_processs_at_a_time() {
    let lab = Lab::new();
    let tokens = (4000 * STEP).to_string();
    let args = run_args("out", &tokens, &["--baselines", "none", "--save-every", "1"]);
    let mut first = lab.command(&args).spawn().unwrap();
    wait_for(&lab.path("out/training/state/step-00000001"), &mut first);
    let process = format!("another process ({})", first.id());
    for more in ["--resume", "--force"] {
        lab.fails(&[&args[..], &[more]].concat(), &["out: ", &process]);
    }
    assert!(first.try_wait().unwrap().is_none(), "the first one goes on");
    first.kill().unwrap();
    first.wait().unwrap();
    // a process that was killed holds nothing
    let resumed = run_args("out", &tokens, &["--baselines", "none", "--save-every", "1", "--resume"]);
    let mut second = lab.command(&resumed).spawn().unwrap();
    wait_for(&lab.path("out/training/state/step-00000004"), &mut second);
    second.kill().unwrap();
    second.wait().unwrap();
}

#[test]
fn a_damaged_state_is_noticed() {
    let lab = Lab::new();
    lab.convert();
    let args = finetune_args("out", &["--save-every", "1"]);
    lab.ok(&args);
    let path = lab.path("out/training/state/step-00000005/moments.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&path, bytes).unwrap();
    lab.fails(&[&args[..], &["--resume"]].concat(), &["moments.safetensors is damaged", "remove it"]);
    fs::remove_dir_all(path.parent().unwrap()).unwrap();
    lab.ok(&[&args[..], &["--resume"]].concat());
}

#[test]
fn standard_error_may_be_closed() {
    let lab = Lab::new();
    let args = run_args("out", "640", &["--baselines", "none"]);
    let mut child = lab.command(&args).spawn().unwrap();
    drop(child.stderr.take());
    assert!(child.wait().unwrap().success());
    assert!(lab.path("out/report.html").is_file());
}

#[test]
fn every_method_trains() {
    let lab = Lab::new();
    lab.convert();
    let alone = ["--distill", "0", "--method"];
    for method in ["dense", "static", "random", "similarity", "priced"] {
        let out = format!("{method}-trained");
        lab.ok(&finetune_args(&out, &[&alone[..], &[method]].concat()));
        assert!(lab.loss(&out) < lab.loss("converted"), "{method}");
        let routers = lab.tensors(&out).keys().any(|name| name.contains(".mlp.router.fc1"));
        assert_eq!(routers, ["similarity", "priced"].contains(&method), "{method}");
    }
    // a converted model is its own teacher
    let distill = ["--distill", "0.6"];
    lab.ok(&finetune_args("own", &distill));
    lab.ok(&finetune_args("distilled", &[&distill[..], &["--teacher", "dense"]].concat()));
    let (own, distilled) = (lab.loss("own"), lab.loss("distilled"));
    assert!((own - distilled).abs() < 1e-3, "{own} {distilled}");
    assert!(lab.tensors("distilled") != lab.tensors("priced-trained"));
    lab.ok(&finetune_args("plain", &["--method", "dense", "--distill", "0.5"]));
    assert!(lab.tensors("plain") == lab.tensors("dense-trained"));
    lab.ok(&run_args("run", "640", &["--baselines", "none", "--distill", "0.5"]));
}

#[test]
fn accumulated_batches_make_the_same_step() {
    let lab = Lab::new();
    lab.convert();
    let args = ["finetune", "--model", "converted", "--data", "train.txt", "--tokens", "640"];
    let rest = ["--sequence-length", "32", "--method", "dense"];
    for (out, shape) in [
        ("one", ["--batch-size", "4", "--micro-batch", "4"]),
        ("two", ["--batch-size", "4", "--micro-batch", "2"]),
    ] {
        lab.ok(&[&args[..], &rest, &shape, &["--out", out]].concat());
    }
    let (one, two) = (lab.tensors("one"), lab.tensors("two"));
    let mut largest = 0f32;
    for (name, bytes) in &one {
        let value = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
        for (a, b) in bytes.chunks_exact(4).zip(two[name].chunks_exact(4)) {
            largest = largest.max((value(a) - value(b)).abs());
        }
    }
    // Adam divides small gradients by small numbers: rounding shows, but far below the step of 1e-3
    assert!(largest < 1e-4, "{largest}");
    assert!(one != lab.tensors("converted"));
}

#[test]
fn wrong_models_are_refused() {
    let lab = Lab::new();
    let no_model = |args: &[&str], words: &[&str]| {
        let before = contents(&lab.path("dense"));
        lab.fails(args, words);
        assert_eq!(contents(&lab.path("dense")), before);
        assert!(!lab.path("out").exists(), "{args:?} left {:?}", contents(&lab.path("out")));
    };
    let run = run_args("out", "640", &[]);
    let with_model = |model: &'static str| {
        let mut args = run.clone();
        args[2] = model;
        args
    };
    no_model(&with_model("nothing"), &["nothing: no such folder"]);
    no_model(&with_model("train.txt"), &["is a file", "folder"]);
    let started = Instant::now();
    no_model(&with_model("org/name"), &["org/name", "without a network", "local folder"]);
    assert!(started.elapsed() < Duration::from_secs(20));

    let edit = |file: &str, change: &dyn Fn(&mut Value), words: &[&str]| {
        let path = lab.path(file);
        let good = fs::read(&path).unwrap();
        let mut json: Value = serde_json::from_slice(&good).unwrap();
        change(&mut json);
        fs::write(&path, json.to_string()).unwrap();
        no_model(&run, words);
        fs::write(&path, good).unwrap();
    };
    let config = "dense/config.json";
    edit(config, &|c| c["architectures"] = json!(["BertModel"]), &["BertModel", "LlamaForCausalLM", "Qwen3"]);
    edit(config, &|c| c["hidden_size"] = json!("wide"), &["hidden_size"]);
    edit(config, &|c| c["intermediate_size"] = json!(48), &["mlp", "[48, 16]", "[32, 16]"]);
    let extra = |tokenizer: &mut Value| {
        let token = json!({ "id": 5000, "content": "<x>", "single_word": false, "lstrip": false,
                            "rstrip": false, "normalized": false, "special": true });
        tokenizer["model"]["vocab"]["<x>"] = json!(5000);
        tokenizer["added_tokens"].as_array_mut().unwrap().push(token);
    };
    edit("dense/tokenizer.json", &extra, &["tokenizer does not fit the embedding", "5000"]);
    edit("dense/tokenizer.json", &|t| *t = json!({}), &["tokenizer.json", "not a tokenizer"]);

    let weights = lab.path("dense/model.safetensors");
    let good = fs::read(&weights).unwrap();
    let mut bytes = good.clone();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, &bytes).unwrap();
    no_model(&run, &["NaN"]);
    no_model(&["convert", "--model", "dense", "--out", "out"], &["NaN"]);
    fs::write(&weights, &good[..end - 100]).unwrap();
    no_model(&run, &["model.safetensors"]);
    fs::write(&weights, &good).unwrap();

    lab.convert();
    no_model(&with_model("converted"), &["DynaMoE checkpoint already", "finetune"]);
    let convert = ["convert", "--model", "converted", "--out", "out"];
    no_model(&convert, &["DynaMoE checkpoint already"]);
    no_model(&["export", "--model", "dense", "--dense", "--out", "out"], &["dense model already"]);
    let finetune = ["finetune", "--model", "dense", "--data", "train.txt", "--out", "out"];
    no_model(&[&finetune[..], &SHAPE].concat(), &["a dense model", "convert"]);
    let section = |change: &dyn Fn(&mut Value), words: &[&str]| {
        let path = lab.path("converted/config.json");
        let good = fs::read(&path).unwrap();
        let mut json: Value = serde_json::from_slice(&good).unwrap();
        change(&mut json["dynamoe"]);
        fs::write(&path, json.to_string()).unwrap();
        no_model(&["evaluate", "--model", "converted", "--data", "valid.txt"], words);
        no_model(&["inspect", "converted"], words);
        fs::write(&path, good).unwrap();
    };
    section(&|s| s["version"] = json!(99), &["version 99", "update"]);
    section(&|s| s["colour"] = json!("red"), &["unknown field", "colour"]);
    section(&|s| s["expert_widths"] = json!([8, 8, 24, 32]), &["expert_widths", "increasing"]);
}

#[test]
fn a_weight_that_is_not_finite_is_named_by_every_command() {
    let lab = Lab::new();
    let weights = lab.path("dense/model.safetensors");
    let checkpoint = Checkpoint::open(&lab.path("dense")).unwrap();
    let name = "model.layers.1.self_attn.k_proj.weight";
    let info = checkpoint.info(name).unwrap();
    let place = info.offset as usize + 4 * (info.shape[1] + 3);
    let mut bytes = fs::read(&weights).unwrap();
    bytes[place..place + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    let words = [name, "[1, 3]", "NaN or infinite"];
    lab.fails(&["evaluate", "--model", "dense", "--data", "valid.txt"], &words);
    lab.fails(&["calibrate", "--model", "dense", "--data", "train.txt", "--sequence-length", "32"], &words);
    lab.fails(&["convert", "--model", "dense", "--out", "out"], &words);
    lab.fails(&run_args("out", "640", &[]), &words);
}

#[test]
fn a_token_beyond_the_embedding_is_refused_only_where_text_uses_it() {
    let lab = Lab::new();
    let mut tokenizer = lab.json("dense/tokenizer.json");
    let id = lab.json("dense/config.json")["vocab_size"].as_u64().unwrap();
    tokenizer["added_tokens"].as_array_mut().unwrap().push(json!({
        "id": id, "content": "<pad>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true
    }));
    fs::write(lab.path("dense/tokenizer.json"), tokenizer.to_string()).unwrap();
    assert!(lab.loss("dense").is_finite());
    fs::write(lab.path("valid.txt"), "a<pad>b").unwrap();
    let words = ["valid.txt", "\"<pad>\"", &id.to_string()];
    lab.fails(&["evaluate", "--model", "dense", "--data", "valid.txt", "--documents"], &words);
}

#[test]
fn the_ends_of_texts_may_be_named_by_the_tokenizer() {
    let lab = Lab::new();
    let expected = lab.loss("dense");
    let mut config = lab.json("dense/config.json");
    (config["bos_token_id"], config["eos_token_id"]) = (json!(-1), Value::Null);
    fs::write(lab.path("dense/config.json"), config.to_string()).unwrap();
    let evaluate = ["evaluate", "--model", "dense", "--data", "valid.txt"];
    lab.fails(&evaluate, &["neither bos_token_id nor eos_token_id", "tokenizer_config.json"]);
    let named = json!({ "bos_token": { "content": BOUNDARY } });
    fs::write(lab.path("dense/tokenizer_config.json"), named.to_string()).unwrap();
    assert_eq!(lab.loss("dense"), expected);
}

#[test]
fn wrong_texts_are_refused() {
    let lab = Lab::new();
    let file = |name: &str, bytes: &[u8]| fs::write(lab.path(name), bytes).unwrap();
    file("empty.txt", b"");
    file("blank.txt", b" \n \n");
    file("tiny.txt", b"a word");
    file("latin.txt", b"good text \xe9 bad text");
    file("text.csv", b"a,b");
    file("lines.jsonl", b"{\"text\": \"one\"}\n{\"text\": \n");
    file("fields.jsonl", b"{\"body\": \"one\"}\n");
    file("pairs.jsonl", b"{\"good\": \"one\"}\n");
    let cases: [(&str, &[&str]); 10] = [
        ("nothing.txt", &["nothing.txt", "No such file"]),
        ("empty.txt", &["empty.txt", "empty"]),
        ("blank.txt", &["blank.txt", "document"]),
        ("tiny.txt", &["tiny.txt", "tokens"]),
        ("latin.txt", &["latin.txt", "invalid UTF-8 at byte 10"]),
        ("text.csv", &["text.csv", ".txt", ".jsonl"]),
        ("lines.jsonl", &["lines.jsonl", "line 2"]),
        ("fields.jsonl", &["fields.jsonl", "line 1", "\"text\""]),
        ("train.txt:x", &["train.txt:x", "not a number"]),
        ("train.txt:1e12", &["train.txt", "at most"]),
    ];
    for (data, words) in cases {
        let mut args = run_args("out", "640", &[]);
        args[4] = data;
        lab.fails(&args, words);
        assert!(!lab.path("out").exists(), "{data} left an output folder");
        if !["tiny.txt", "train.txt:1e12"].contains(&data) {
            lab.fails(&["evaluate", "--model", "dense", "--documents", "--data", data], words);
        }
    }
    lab.fails(&run_args("out", "640", &["--pairs", "pairs.jsonl"]), &["pairs.jsonl", "line 1", "bad"]);
    let long: Vec<&str> =
        run_args("out", "640", &[]).iter().map(|&a| if a == "32" { "65" } else { a }).collect();
    lab.fails(&long, &["--sequence-length", "64 positions"]);
    assert!(!lab.path("out").exists());
    lab.fails(&["evaluate", "--model", "dense"], &["--data", "--pairs"]);
}

#[test]
fn wrong_numbers_are_refused() {
    let lab = Lab::new();
    lab.convert();
    let evaluate = ["evaluate", "--model", "converted", "--data", "valid.txt"];
    for (flag, value, word) in [
        ("--sensitivity", "1.5", "sensitivity"),
        ("--sensitivity", "-0.1", "sensitivity"),
        ("--sensitivity", "NaN", "sensitivity"),
        ("--sensitivity", "much", "much"),
        ("--budget", "1.5", "budget"),
        ("--budget", "NaN", "budget"),
        ("--sequence-length", "0", "sequence length"),
    ] {
        let flag = format!("{flag}={value}");
        lab.fails(&[&evaluate[..], &[&flag]].concat(), &[word]);
        assert!(lab.json("converted/config.json")["dynamoe"]["budgets"].as_array().is_none_or(Vec::is_empty));
    }
    let dense = ["evaluate", "--model", "dense", "--data", "valid.txt", "--documents", "--budget", "0.5"];
    lab.fails(&dense, &["dense model", "one width"]);
    for (flag, value, words) in [
        ("--experts", "8,8,32", &["increasing"][..]),
        ("--experts", "8,16", &["32"]),
        ("--experts", "8,64", &["64", "32"]),
        ("--experts", "0,32", &["0"]),
        ("--experts", "four", &["a count, or widths"]),
        ("--separate-shells", "4", &["--separate-shells"]),
        ("--experts", "0", &["experts"]),
        ("--experts", "1", &["two experts"]),
    ] {
        let args = ["convert", "--model", "dense", "--out", "out", flag, value];
        lab.fails(&args, words);
        lab.fails(&run_args("out", "640", &[flag, value]), words);
        assert!(!lab.path("out").exists(), "{flag} {value} left an output folder");
    }
    for (flag, value) in [
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--micro-batch", "0"),
        ("--micro-batch", "3"),
        ("--batch-size", "18446744073709551615"),
        ("--distill", "2"),
        ("--focus", "1.5"),
        ("--set", "full-share=1"),
        ("--set", "log-every=0"),
        ("--set", "clop=1"),
        ("--baselines", "dense,wide"),
    ] {
        lab.fails(&run_args("out", "640", &[flag, value]), &[flag]);
        assert!(!lab.path("out").exists(), "{flag} {value} left an output folder");
    }
}

#[test]
fn output_folders_are_guarded() {
    let lab = Lab::new();
    lab.convert();
    let commands: [Vec<&str>; 4] = [
        run_args("taken", "640", &["--baselines", "none"]),
        finetune_args("taken", &[]),
        vec!["convert", "--model", "dense", "--out", "taken"],
        vec!["export", "--model", "converted", "--dense", "--out", "taken"],
    ];
    let at = |args: &[&'static str], out: &'static str| -> Vec<&'static str> {
        args.iter().map(|&arg| if arg == "taken" { out } else { arg }).collect()
    };
    fs::create_dir_all(lab.path("taken/training")).unwrap();
    fs::write(lab.path("taken/training/thesis.txt"), "mine").unwrap();
    fs::write(lab.path("file"), "mine").unwrap();
    for args in &commands {
        lab.fails(args, &["taken: ", "--force"]);
        lab.fails(&[&args[..], &["--force"]].concat(), &["taken: ", "choose another --out"]);
        assert_eq!(fs::read_to_string(lab.path("taken/training/thesis.txt")).unwrap(), "mine");
        lab.fails(&at(args, "file/below"), &["file/below"]);
        lab.fails(&at(args, "file"), &["file: "]);
        assert_eq!(fs::read_to_string(lab.path("file")).unwrap(), "mine");
        // the source is not replaced by its own offspring
        let source = args[2];
        let before = contents(&lab.path(source));
        let mut onto = at(args, if source == "dense" { "dense" } else { "converted" });
        onto.push("--force");
        lab.fails(&onto, &["overlaps"]);
        assert_eq!(contents(&lab.path(source)), before);
    }
    lab.fails(&finetune_args("taken", &["--resume"]), &["holds no run to --resume"]);

    // a failed --force keeps what was there, a good one replaces it
    lab.ok(&finetune_args("out", &[]));
    let before = contents(&lab.path("out"));
    fs::write(lab.path("empty.txt"), "").unwrap();
    fs::copy(lab.path("train.txt"), lab.path("out/mine.txt")).unwrap();
    let force = |data| {
        let mut args = finetune_args("out", &["--force", "--seed", "1"]);
        args[4] = data;
        args
    };
    lab.fails(&force("empty.txt"), &["empty.txt"]);
    lab.fails(&force("out/mine.txt"), &["overlaps", "out/mine.txt"]);
    fs::remove_file(lab.path("out/mine.txt")).unwrap();
    assert_eq!(contents(&lab.path("out")), before);
    lab.ok(&force("train.txt"));
    assert_ne!(contents(&lab.path("out")), before);
}

/// A small filesystem of its own, gone at the end.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, size: &str) -> Option<Self> {
        fs::create_dir(&at).unwrap();
        let size = format!("size={size}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&at).output();
        mount.is_ok_and(|output| output.status.success()).then_some(Self(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_stops_the_run_and_the_run_resumes() {
    let lab = Lab::new();
    let Some(disk) = SmallDisk::mount(lab.path("disk"), "300k") else {
        eprintln!("SKIPPED a_full_disk_stops_the_run_and_the_run_resumes: mounting a tmpfs needs root");
        return;
    };
    let args = run_args("disk/out", "640", &["--baselines", "none", "--save-every", "2"]);
    lab.fails(&args, &["No space left on device", "training checkpoint"]);
    assert!(!disk.0.join("out/config.json").exists());
    let state = contents(&disk.0.join("out/training/state"));
    assert!(state.keys().all(|name| !name.contains("partial")), "{:?}", state.keys());
    let larger = Command::new("mount").args(["-o", "remount,size=4m"]).arg(&disk.0).status().unwrap();
    assert!(larger.success());
    lab.ok(&[&args[..], &["--resume"]].concat());
    lab.ok(&run_args("out", "640", &["--baselines", "none", "--save-every", "2"]));
    assert!(lab.tensors("out") == lab.tensors("disk/out"));

    let full = SmallDisk::mount(lab.path("full"), "8k").unwrap();
    lab.fails(
        &run_args("full/out", "640", &["--baselines", "none"]),
        &["full/out", "No space left on device"],
    );
    assert!(contents(&full.0).is_empty(), "{:?}", contents(&full.0).keys());
}

#[test]
fn a_reader_that_leaves_is_no_crash() {
    let lab = Lab::new();
    for args in [
        &["inspect", "dense", "--json"][..],
        &["evaluate", "--model", "dense", "--data", "valid.txt", "--sequence-length", "32"],
    ] {
        let mut child = lab.command(args).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{args:?}");
    }
}
