//! Output folders: nothing is replaced without being asked.

use std::fs;

use crate::lab::{Lab, finetune_args, run_args};
use crate::support::contents;

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
