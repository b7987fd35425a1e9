//! Output appears whole or not at all.

use std::collections::BTreeMap;
use std::path::Path;

use dynamoe_model::checkpoint::{Checkpoint, StagedFolder, write_atomic};
use moefy_train::prepare::{ConvertOptions, convert};
use safetensors::Dtype;
use tempfile::TempDir;

use crate::support::contents;
use crate::support::disk::SmallDisk;
use crate::tools::{assert_nothing_written, assert_says, options, scratch};

#[test]
fn existing_output_needs_force_and_is_replaced_whole() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    convert(&source, None, &options(), &out).expect("an empty folder is not in the way");
    std::fs::write(out.join("note.txt"), "mine").unwrap();
    let before = contents(&out);
    assert_says(convert(&source, None, &options(), &out), &["exists", "--force"]);
    assert_eq!(contents(&out), before);
    let force = ConvertOptions { force: true, ..options() };
    // a failure keeps the old folder even with force
    let bad = ConvertOptions { expert_widths: vec![8], ..force.clone() };
    assert!(convert(&source, None, &bad, &out).is_err());
    assert_eq!(contents(&out), before);
    convert(&source, None, &force, &out).unwrap();
    assert!(!out.join("note.txt").exists() && Checkpoint::open(&out).is_ok());
    assert_eq!(contents(dir.path()).len(), 2, "only the source and the output remain");

    let files = contents(source.dir());
    assert_says(convert(&source, None, &force, source.dir()), &["overlaps the source"]);
    assert_says(convert(&source, None, &force, dir.path()), &["overlaps the source"]);
    assert_says(convert(&source, None, &force, &source.dir().join("../dense")), &["overlaps the source"]);
    assert_eq!(contents(source.dir()), files);
    let other = dir.path().join("photos");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("cat.jpg"), "cat").unwrap();
    assert_says(convert(&source, None, &force, &other), &["config.json", "choose another --out"]);
    assert!(other.join("cat.jpg").exists());
}

#[test]
fn places_that_cannot_be_written_are_named() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 1);
    let file = dir.path().join("file");
    std::fs::write(&file, "in the way").unwrap();
    let before = contents(dir.path());
    assert_says(convert(&source, None, &options(), &file), &["a file is in the way"]);
    assert_says(convert(&source, None, &options(), &file.join("out")), &["file/out", "cannot be created"]);
    assert_says(
        convert(&source, None, &options(), Path::new("/proc/out")),
        &["/proc/out", "cannot be created"],
    );
    assert_says(convert(&source, None, &options(), Path::new("/")), &["/"]);
    assert_says(write_atomic(&file.join("x"), b"x"), &["file/x", "cannot be written"]);
    assert_nothing_written(dir.path(), &before);
}

#[test]
fn output_folders_appear_on_commit_only() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("a/b/out");
    let staged = StagedFolder::create(&out, false).unwrap();
    std::fs::write(staged.path().join("x"), "1").unwrap();
    assert!(!out.exists());
    drop(staged);
    assert!(contents(out.parent().unwrap()).is_empty());
    let staged = StagedFolder::create(&out, false).unwrap();
    std::fs::create_dir(staged.path().join("sub")).unwrap();
    staged.commit().unwrap();
    assert!(out.join("sub").is_dir());
    assert_eq!(contents(out.parent().unwrap()).len(), 1);

    let file = dir.path().join("f");
    write_atomic(&file, b"one").unwrap();
    write_atomic(&file, b"two").unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), b"two");
    assert_eq!(contents(dir.path()).len(), 2);
}

#[test]
fn leftovers_of_killed_processes_are_removed() {
    let dir = TempDir::new().unwrap();
    let mut dead = std::process::Command::new("true").spawn().unwrap();
    dead.wait().unwrap();
    let (dead, alive) = (dead.id(), std::process::id());
    let leave = |name: &str, process: u32| {
        let path = dir.path().join(format!(".{name}.partial-{process}-0"));
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("weights"), "half").unwrap();
        path
    };
    let (gone, running, other) = (leave("out", dead), leave("out", alive), leave("out2", dead));
    std::fs::write(dir.path().join(format!(".note.partial-{dead}-3")), "half").unwrap();
    // Its process is gone from here, but somebody holds it: on another machine that shares the folder, say.
    let held = dir.path().join(format!(".out.partial-{dead}-1"));
    std::fs::create_dir(&held).unwrap();
    let lock = std::fs::File::open(&held).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();

    StagedFolder::create(&dir.path().join("out"), false).unwrap().commit().unwrap();
    write_atomic(&dir.path().join("note"), b"whole").unwrap();
    assert!(!gone.exists());
    assert!(running.exists() && other.exists() && held.exists());
    assert_eq!(contents(dir.path()).len(), 5, "{:?}", contents(dir.path()).keys());
}

#[test]
fn a_disk_that_runs_full_leaves_nothing() {
    let (dir, source) = scratch("LlamaForCausalLM", Dtype::F32, 3);
    let Some(disk) = SmallDisk::mount(dir.path().join("disk"), "20k") else {
        eprintln!("SKIPPED a_disk_that_runs_full_leaves_nothing: mounting a tmpfs needs root");
        return;
    };
    let model: usize = contents(source.dir()).values().map(Vec::len).sum();
    assert!(model > 20 << 10, "the model must not fit: {model}");
    let files = contents(source.dir());
    let result = convert(&source, None, &options(), &disk.0.join("out"));
    assert_says(result, &["disk/", "No space left on device"]);
    assert!(contents(&disk.0).is_empty(), "{:?}", contents(&disk.0).keys());
    assert_eq!(contents(source.dir()), files);
    std::fs::write(disk.0.join("config.json"), "old").unwrap();
    assert_says(write_atomic(&disk.0.join("config.json"), &[0; 100_000]), &["No space left"]);
    assert_eq!(contents(&disk.0), BTreeMap::from([("config.json".to_owned(), b"old".to_vec())]));
}
