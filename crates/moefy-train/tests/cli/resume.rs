//! Runs that are killed, stopped or out of disk, and how they go on.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::Command;
use std::time::{Duration, Instant};

use moefy_train::data::corpus::BOUNDARY;
use rand::Rng;

use crate::lab::{Lab, SHAPE, STEP, finetune_args, finished, kill_after, kill_when, log, run_args, wait_for};
use crate::support::contents;
use crate::support::disk::SmallDisk;
use crate::support::random::rng;

#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    let lab = Lab::new();
    let more = ["--save-every", "3", "--set", "log-every=2", "--baselines", "static"];
    let tokens = (30 * STEP).to_string();
    let started = Instant::now();
    lab.ok(&run_args("whole", &tokens, &more));
    let took = started.elapsed();
    let args = run_args("killed", &tokens, &[&more[..], &["--resume"]].concat());
    // once in the middle of the training for certain, then at random
    kill_when(&lab, &args, &lab.path("killed/training/state/step-00000006"));
    let mut rng = rng();
    let mut killed = Vec::new();
    for _ in 0..4 {
        let wait = took.mul_f64(rng.random::<f64>() * 0.6);
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
    std::thread::sleep(Duration::from_millis(rng().random_range(0..100)));
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
