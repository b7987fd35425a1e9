//! `card`: README.md in a checkpoint's folder.

use std::fs;

use serde_json::json;
use yaml_rust2::YamlLoader;

use crate::lab::{Lab, run_args};
use crate::support::contents;

#[test]
fn a_card_tells_what_the_dial_costs() {
    let lab = Lab::new();
    lab.ok(&run_args("out", "1280", &["--baselines", "none"]));
    assert!(lab.ok(&["card", "out"]).contains("out/README.md"));
    let readme = fs::read_to_string(lab.path("out/README.md")).unwrap();
    let (_, rest) = readme.split_once("---\n").expect("metadata first");
    let (metadata, text) = rest.split_once("---\n").unwrap();
    for line in ["library_name: transformers", "pipeline_tag: text-generation", "- dynamoe", "- llama"] {
        assert!(metadata.lines().any(|found| found == line), "{line} in {metadata}");
    }
    assert!(metadata.lines().all(|line| !line.is_empty() && !line.starts_with("base_model:")), "{metadata}");
    let report = lab.json("out/report.json");
    let points = report["curves"][0]["points"].as_array().unwrap();
    // as the Hub reads it
    let yaml = YamlLoader::load_from_str(metadata).unwrap().remove(0);
    assert_eq!(yaml["pipeline_tag"].as_str(), Some("text-generation"));
    let model = &yaml["model-index"][0];
    assert_eq!(model["name"].as_str(), Some("out"));
    let result = &model["results"][0];
    assert_eq!(result["task"]["type"].as_str(), Some("text-generation"));
    assert!(result["dataset"]["name"].as_str().is_some() && result["dataset"]["type"].as_str().is_some());
    let metrics = result["metrics"].as_vec().unwrap();
    assert_eq!(metrics.len(), points.len());
    for (metric, point) in metrics.iter().zip(points) {
        assert_eq!(metric["type"].as_str(), Some("loss"));
        let difference = metric["value"].as_f64().unwrap() - point["loss"].as_f64().unwrap();
        assert!(difference.abs() <= 0.0005, "{metric:?}, {point}");
        let budget = point["budget"].as_f64().map(|budget| format!(" at budget {budget}, mean width "));
        let name = metric["name"].as_str().unwrap();
        assert!(name.contains(budget.as_deref().unwrap_or(" at mean width ")), "{name}, {point}");
    }
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| ") && line.contains('%')).collect();
    assert_eq!(rows.len(), points.len());
    for (row, point) in rows.iter().zip(points) {
        let cells: Vec<&str> = row.split(" | ").collect();
        assert_eq!(cells[1], format!("{:.1}%", point["mean_width"].as_f64().unwrap() * 100.0), "{row}");
        assert!(cells[4].starts_with(&format!("{:.3}", point["loss"].as_f64().unwrap())), "{row}");
    }
    assert!(rows.last().unwrap().ends_with("| 0.000 |"), "{rows:?}");
    assert!(text.contains("](curve.svg)") && lab.path("out/curve.svg").exists());
    for part in
        ["set_budget(0.5)", "trust_remote_code=True", "dynamoe-serve --model", "--dense --width 0.5", "# out"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!readme.contains("{{") && !readme.contains("{%") && !readme.contains("NaN"));
    // a card of this program is written anew, and says the same
    let before = contents(&lab.path("out"));
    lab.ok(&["card", "out"]);
    assert_eq!(contents(&lab.path("out")), before);
    lab.ok(&["card", "out", "--base-model", "org/base-1.5"]);
    assert!(fs::read_to_string(lab.path("out/README.md")).unwrap().contains("\nbase_model: org/base-1.5\n"));
}

#[test]
fn a_card_replaces_nobody_elses_and_says_what_is_missing() {
    let lab = Lab::new();
    lab.convert();
    let readme = lab.path("converted/README.md");
    fs::write(&readme, "mine").unwrap();
    lab.fails(&["card", "converted"], &["README.md", "exists", "--force"]);
    assert_eq!(fs::read_to_string(&readme).unwrap(), "mine");
    lab.ok(&["card", "converted", "--force"]);
    let text = fs::read_to_string(&readme).unwrap();
    assert!(!text.contains("model-index"), "{text}");
    assert!(text.contains("Nothing was measured") && text.contains("no table of budgets"), "{text}");
    assert!(!text.contains("set_budget") && !lab.path("converted/curve.svg").exists());

    let curves = json!({"title": "t", "curves": [{"name": "a", "points": [[0.5, 2.5], [1.0, 2.0]]}]});
    fs::write(lab.path("curves.json"), curves.to_string()).unwrap();
    lab.ok(&["card", "converted", "--report", "curves.json"]);
    let text = fs::read_to_string(&readme).unwrap();
    assert!(text.contains("| – | 50.0% | 0 | – | 2.500 | 0.500 |"), "{text}");
    assert!(lab.path("converted/curve.svg").exists());

    fs::remove_file(&readme).unwrap();
    lab.fails(&["card", "converted", "--report", "curves.json"], &["curve.svg", "exists", "--force"]);
    lab.fails(&["card", "converted", "--report", "none.json"], &["none.json"]);
    fs::write(lab.path("bad.json"), "[]").unwrap();
    lab.fails(&["card", "converted", "--report", "bad.json"], &["bad.json", "expected a report.json"]);
    lab.fails(&["card", "converted", "--base-model", "a: b"], &["--base-model", "ORG/NAME"]);
    lab.fails(&["card", "dense"], &["dense", "a dense model"]);
    lab.fails(&["card", "nowhere"], &["nowhere", "not a folder"]);
    assert!(!readme.exists() && !lab.path("dense/README.md").exists());
}
