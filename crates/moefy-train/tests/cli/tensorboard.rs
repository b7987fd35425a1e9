//! `--tensorboard`: the numbers of trainings in event files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::lab::{Lab, compare_args, kill_when, run_args};

/// The event files of a folder in the order in which TensorBoard reads them.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut number, mut shift) = (0, 0);
    loop {
        let (first, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        number |= u64::from(first & 0x7f) << shift;
        shift += 7;
        if first & 0x80 == 0 {
            return number;
        }
    }
}

/// The fields of a message: number and content.
fn fields(mut bytes: &[u8]) -> Vec<(u64, &[u8])> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let before = bytes;
        let len = match tag & 7 {
            0 => {
                varint(&mut bytes);
                before.len() - bytes.len()
            }
            1 => 8,
            5 => 4,
            _ => varint(&mut bytes) as usize,
        };
        let start = if tag & 7 == 0 { before } else { bytes };
        found.push((tag >> 3, &start[..len]));
        bytes = &start[len..];
    }
    found
}

/// The numbers of each step, as TensorBoard shows them: a training that starts again at a step replaces what there was from
/// that step on.
fn steps(dir: &Path) -> BTreeMap<u64, BTreeMap<String, f32>> {
    let mut steps = BTreeMap::new();
    for file in files(dir) {
        let bytes = fs::read(file).unwrap();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let len = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let event = fields(&rest[12..12 + len]);
            let field =
                |number: u64| event.iter().find(|(found, _)| *found == number).map(|(_, bytes)| *bytes);
            let step = varint(&mut field(2).unwrap());
            if field(7) == Some(&[8, 1]) {
                steps.split_off(&step);
            }
            if let Some(summary) = field(5) {
                let value = |(_, value): (u64, &[u8])| {
                    let [(1, name), (2, number)] = fields(value)[..] else { panic!("{value:?}") };
                    let name = String::from_utf8(name.to_vec()).unwrap();
                    (name, f32::from_le_bytes(number.try_into().unwrap()))
                };
                let told = steps.insert(step, fields(summary).into_iter().map(value).collect());
                assert!(told.is_none(), "step {step} comes twice");
            }
            rest = &rest[16 + len..];
        }
    }
    steps
}

/// The same from metrics.jsonl.
fn logged(path: &Path) -> BTreeMap<u64, BTreeMap<String, f32>> {
    let text = fs::read_to_string(path).unwrap();
    let line = |line: &str| {
        let line: BTreeMap<String, Value> = serde_json::from_str(line).unwrap();
        let numbers = line.iter().filter(|(name, _)| *name != "step");
        let numbers = numbers.map(|(name, number)| (name.clone(), number.as_f64().unwrap() as f32));
        (line["step"].as_u64().unwrap(), numbers.collect())
    };
    text.lines().map(line).collect()
}

#[test]
fn events_are_the_lines_of_the_log_also_after_a_kill() {
    let lab = Lab::new();
    let more =
        ["--baselines", "none", "--save-every", "3", "--set", "log-every=1", "--tensorboard", "events"];
    let args = run_args("out", "6400", &more);
    kill_when(&lab, &args, &lab.path("out/training/state/step-00000006"));
    lab.ok(&[&args[..], &["--resume"]].concat());
    let events = lab.path("events/priced");
    assert_eq!(files(&events).len(), 2);
    let found = steps(&events);
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), (1..=50).collect::<Vec<_>>());
    assert_eq!(found, logged(&lab.path("out/training/state/metrics.jsonl")));
}

#[test]
fn every_training_has_events_of_its_own() {
    let lab = Lab::new();
    lab.ok(&run_args("out", "1280", &["--baselines", "dense", "--tensorboard", "events"]));
    for method in ["priced", "dense"] {
        assert_eq!(steps(&lab.path("events").join(method)).into_keys().collect::<Vec<_>>(), [10], "{method}");
    }
    lab.ok(&compare_args("table", &["--baselines", "static", "--seeds", "2", "--tensorboard", "cells"]));
    assert_eq!(files(&lab.path("cells")).len(), 4);
    let pretrain =
        ["pretrain", "--out", "base", "--tokens", "2560", "--data", "train.txt", "--vocab-size", "300"];
    let small = [
        "--hidden-size",
        "8",
        "--intermediate-size",
        "8",
        "--layers",
        "1",
        "--heads",
        "2",
        "--kv-heads",
        "1",
    ];
    lab.ok(&[
        &pretrain[..],
        &small,
        &["--batch-size", "4", "--sequence-length", "32", "--tensorboard", "base-events"],
    ]
    .concat());
    assert_eq!(steps(&lab.path("base-events/pretraining")).into_keys().collect::<Vec<_>>(), [10, 20]);
}
