//! The program on several processes: `cargo test -p moefy-train --features mpi --test mpi`. Needs `mpirun` of Open MPI.
#![cfg(feature = "mpi")]

#[allow(dead_code)] // the tests of the command line use all of it
#[path = "cli/lab.rs"]
mod lab;
mod support;

use std::fs;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use lab::{Lab, STEP, finished, log, refused, run_args, wait_for};
use rand::Rng;
use support::random::rng;

/// Four batches in a step, for up to four processes.
const MICRO: [&str; 2] = ["--micro-batch", "1"];

/// How long the others may take to end when one has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// The program on `ranks` processes.
fn command(lab: &Lab, ranks: usize, args: &[&str]) -> Command {
    let alone = lab.command(args);
    let mut command = Command::new("mpirun");
    command.arg("-n").arg(ranks.to_string()).arg(alone.get_program()).args(args);
    command.current_dir(alone.get_current_dir().unwrap());
    for (name, value) in alone.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    // what Open MPI asks of root, and of machines with fewer processors
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1").env("OMPI_MCA_mpi_yield_when_idle", "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn output(lab: &Lab, ranks: usize, args: &[&str]) -> Output {
    command(lab, ranks, args).output().expect("mpirun of Open MPI")
}

/// The processes of the program that this `mpirun` has started.
fn processes(mpirun: &Child) -> Vec<u32> {
    let parent = |pid: u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    all.filter(|&pid| parent(pid) == Some(mpirun.id())).collect()
}

/// Whether a process is there and has not ended, waiting for its parent to notice.
fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn signal(signal: &str, pid: u32) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

/// Waits for the end; how the process ended.
fn end(child: &mut Child, patience: Duration) -> std::process::ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(started.elapsed() < patience, "still running after {patience:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for an `mpirun` whose processes have ended. That of Open MPI 4.1.4 was seen to wait for itself then, twice in
/// 172 times.
fn reap(mpirun: &mut Child) -> std::process::ExitStatus {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        if let Some(status) = mpirun.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("mpirun itself does not end");
    mpirun.kill().unwrap();
    mpirun.wait().unwrap()
}

/// Checks that two runs left the same results.
fn assert_same(lab: &Lab, one: &str, other: &str) {
    assert!(lab.tensors(one) == lab.tensors(other), "{one}, {other}");
    assert_eq!(lab.json(&format!("{one}/config.json")), lab.json(&format!("{other}/config.json")));
    let metrics = |out: &str| log(&lab.path(out).join("training/state/metrics.jsonl"));
    assert_eq!(metrics(one), metrics(other));
}

#[test]
fn several_processes_make_what_one_makes() {
    let lab = Lab::new();
    let tokens = (6 * STEP).to_string();
    let more = [&MICRO[..], &["--baselines", "static", "--set", "log-every=1"]].concat();
    lab.ok(&run_args("one", &tokens, &more));
    for ranks in [2, 3] {
        let out = format!("on-{ranks}");
        let args = run_args(&out, &tokens, &more);
        let told = finished(output(&lab, ranks, &args), &args);
        assert_eq!(told.matches("checkpoint  ").count(), 1, "{told}");
        assert_same(&lab, "one", &out);
        for key in ["curves", "dense_loss", "dense_finetuned_loss", "samples"] {
            assert_eq!(
                lab.json("one/report.json")[key],
                lab.json(&format!("{out}/report.json"))[key],
                "{key}"
            );
        }
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_processes() {
    let lab = Lab::new();
    lab.convert();
    let tokens = (3000 * STEP).to_string();
    let more =
        [&MICRO[..], &["--tokens", &tokens, "--save-every", "100000", "--set", "log-every=1"]].concat();
    let whole = [
        &["finetune", "--model", "converted", "--data", "train.txt", "--out", "whole"],
        &lab::SHAPE[..],
        &more,
    ]
    .concat();
    lab.ok(&whole);
    let args: Vec<&str> = whole.iter().map(|&arg| if arg == "whole" { "parts" } else { arg }).collect();
    let resume = [&args[..], &["--resume"]].concat();
    let metrics = lab.path("parts/training/state/metrics.jsonl");
    for (ranks, args) in [(2, &args), (1, &resume), (3, &resume)] {
        let before = fs::read_to_string(&metrics).map_or(0, |text| text.lines().count());
        let mut command = if ranks == 1 { lab.command(args) } else { command(&lab, ranks, args) };
        let mut child = command.spawn().unwrap();
        wait_for(&metrics, &mut child);
        while fs::read_to_string(&metrics).unwrap().lines().count() < before + 20 {
            assert!(child.try_wait().unwrap().is_none(), "{ranks} processes ended early");
            std::thread::sleep(Duration::from_millis(2));
        }
        // mpirun passes SIGUSR1 on; after SIGTERM it waits before it tells the processes, and kills them soon after
        signal(if ranks == 3 { "-USR1" } else { "-TERM" }, child.id());
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        assert_eq!(told.matches("--resume continues").count(), 1, "{ranks}: {output:?}");
    }
    assert!(!lab.path("parts/config.json").exists());
    finished(output(&lab, 2, &resume), &resume);
    assert_same(&lab, "whole", "parts");
}

#[test]
fn a_process_that_dies_ends_all_and_the_run_resumes_to_the_same_bits() {
    let lab = Lab::new();
    let tokens = (40 * STEP).to_string();
    let more = [&MICRO[..], &["--baselines", "none", "--save-every", "3"]].concat();
    let started = Instant::now();
    let args = run_args("whole", &tokens, &more);
    finished(output(&lab, 3, &args), &args);
    let took = started.elapsed();
    let args = run_args("killed", &tokens, &[&more[..], &["--resume"]].concat());
    let mut rng = rng();
    let times = std::env::var("KILLS").map_or(20, |times| times.parse().expect("KILLS is a number"));
    for time in 0..times {
        let mut command = command(&lab, 3, &args);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let wait = took.mul_f64(rng.random_range(0.1..0.7));
        std::thread::sleep(wait);
        let ranks = processes(&child);
        let started = Instant::now();
        if let Some(&victim) = ranks.get(rng.random_range(0..3)) {
            // unless it has just ended
            let _ = Command::new("kill").args(["-KILL", &victim.to_string()]).status().unwrap();
        }
        while ranks.iter().any(|&pid| is_running(pid)) {
            assert!(started.elapsed() < PATIENCE, "{ranks:?} are still there");
            std::thread::sleep(Duration::from_millis(5));
        }
        let (took, status) = (started.elapsed(), reap(&mut child));
        println!("{time}: killed one of {ranks:?} after {wait:?}, all ended in {took:?}: {status}");
        for entry in fs::read_dir(lab.path("killed/training/state")).into_iter().flatten().flatten() {
            let whole = entry.path().join("state.json").exists();
            assert!(whole || !entry.file_name().to_str().unwrap().starts_with("step-"), "{entry:?}");
        }
        if status.success() {
            fs::remove_dir_all(lab.path("killed")).unwrap(); // all was done before: once more
        }
    }
    finished(output(&lab, 3, &args), &args);
    assert_same(&lab, "whole", "killed");
    assert_eq!(lab.json("whole/report.json")["curves"], lab.json("killed/report.json")["curves"]);
}

#[test]
fn processes_fail_together_with_one_message() {
    let lab = Lab::new();
    let few = run_args("out", "640", &["--micro-batch", "2", "--baselines", "none"]);
    for (args, words) in [
        (run_args("out", "640", &["--lr=-1"]), &["--lr must be"][..]),
        (vec!["evaluate", "--model", "absent", "--data", "valid.txt"], &["absent"]),
        (few, &["3 processes", "give --micro-batch 1"]),
        (run_args("out", "640", &[&MICRO[..], &["--device", "cuda"]].concat()), &["--device cuda"]),
    ] {
        let started = Instant::now();
        let output = output(&lab, 3, &args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success());
        assert_eq!(
            stderr.lines().filter(|line| line.starts_with("error: ")).count(),
            1,
            "{args:?}: {stderr}"
        );
        words.iter().for_each(|word| assert!(stderr.contains(word), "{word}: {stderr}"));
        assert!(started.elapsed() < PATIENCE);
        let _ = fs::remove_dir_all(lab.path("out"));
    }
    let usage = output(&lab, 2, &["run", "--unknown"]);
    let stderr = String::from_utf8_lossy(&usage.stderr);
    assert!(!usage.status.success() && stderr.matches("unexpected argument").count() == 1, "{stderr}");
}

#[test]
fn an_evaluation_is_divided() {
    let lab = Lab::new();
    lab.convert();
    let args = ["evaluate", "--model", "converted", "--data", "train.txt", "--documents", "--json"];
    let budgets = [&args[..], &["--budget", "0.4,0.8", "--sensitivity", "0.5,1", "--shuffled"]].concat();
    for args in [&args[..], &budgets] {
        let one = lab.ok(args);
        for ranks in [2, 3] {
            assert_eq!(finished(output(&lab, ranks, args), args), one);
        }
    }
}

#[test]
fn one_processs_work_is_done_once() {
    let lab = Lab::new();
    let args = ["calibrate", "--model", "dense", "--data", "train.txt", "--sequence-length", "32"];
    finished(output(&lab, 2, &args), &args);
    // the order of metadata in the header is not fixed
    let numbers = || {
        let bytes = fs::read(lab.path("calibration.safetensors")).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8 + header..].to_vec()
    };
    let first = numbers();
    lab.convert();
    assert!(first == numbers());
    // a folder is held by the first process of each
    let more = [&MICRO[..], &["--baselines", "none", "--save-every", "1"]].concat();
    let args = run_args("out", "1280000", &more);
    let mut holder = command(&lab, 2, &args).spawn().unwrap();
    wait_for(&lab.path("out/training/state/step-00000001"), &mut holder);
    let again = [&args[..], &["--resume"]].concat();
    refused(lab.output(&again), &again, &["another process"]);
    let stderr = String::from_utf8_lossy(&output(&lab, 2, &again).stderr).into_owned();
    assert_eq!(stderr.matches("another process").count(), 1, "{stderr}");
    signal("-KILL", processes(&holder)[0]);
    assert!(!end(&mut holder, PATIENCE).success());
}
