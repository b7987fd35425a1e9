//! `compare`: many trainings and their table.

use std::collections::BTreeMap;
use std::fs;

use serde_json::{Value, json};

use crate::lab::{Lab, compare_args, kill_when};

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
    lab.ok(&compare_args("whole", &more));
    let args = compare_args("killed", &more);
    let cells = fs::read_dir(lab.path("whole/cells")).unwrap().map(|entry| entry.unwrap().file_name());
    let first = cells.map(|name| name.into_string().unwrap()).find(|name| name.starts_with("dense")).unwrap();
    let first = lab.path("killed/cells").join(first);
    // while the first cell is trained, and as soon as it is finished
    kill_when(&lab, &args, &first.with_extension("").join("state"));
    assert!(!first.exists());
    kill_when(&lab, &args, &first);
    lab.ok(&args);
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
