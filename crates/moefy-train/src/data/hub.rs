//! Data sets on the hub as sources of text: which of their files are meant, and which commit a run began with.

use std::path::Path;

use anyhow::{Context, Result};
use dynamoe_model::hub::{DataSet, is_address};
use glob::{MatchOptions, Pattern};
use serde_json::Value;

use super::kind::Content;

/// The data set that a source names, if it is not one of files here.
pub(super) fn address(path: &Path) -> Option<Result<DataSet>> {
    path.to_str().filter(|path| is_address(path)).map(DataSet::parse)
}

/// Says which files of a data set are meant, by their names: one file, those of a folder or those that match a pattern, or
/// all. Only the first may end otherwise than text files do.
///
/// # Errors
/// A pattern that is none.
pub(super) fn wanted(set: &DataSet) -> Result<impl Fn(&str) -> bool + use<>> {
    let named = set.pattern.clone();
    let pattern = Pattern::new(&named).with_context(|| format!("{set}: not a pattern for files"))?;
    let options = MatchOptions { require_literal_separator: true, ..MatchOptions::new() };
    Ok(move |name: &str| {
        let below =
            || named.is_empty() || name.strip_prefix(&named).is_some_and(|rest| rest.starts_with('/'));
        let is_text = Content::of(Path::new(name)).is_some();
        name == named || (is_text && (below() || pattern.matches_with(name, options)))
    })
}

/// The commit of the source at `path` in the settings of runs.
pub(super) fn commit_in(settings: &[Value], path: &Path) -> Option<String> {
    let sources = settings.iter().flat_map(|settings| [&settings["data"], &settings["valid"]]);
    let mut entries = sources.filter_map(Value::as_array).flatten();
    let found = entries.find(|entry| entry["path"].as_str().is_some_and(|known| Path::new(known) == path))?;
    found["commit"].as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pattern_a_folder_or_nothing_chooses_files() {
        let files = [
            "a.jsonl",
            "b.csv",
            "data/a.jsonl",
            "data/train-1.parquet",
            "data/x/train-2.parquet",
            "datax.txt",
        ];
        let chosen = |pattern: &str| {
            let set = DataSet::parse(&format!("hf://datasets/org/name/{pattern}")).unwrap();
            let wanted = wanted(&set).unwrap();
            files.into_iter().filter(|name| wanted(name)).collect::<Vec<_>>()
        };
        assert_eq!(chosen("").len(), 5);
        assert_eq!(chosen("data"), ["data/a.jsonl", "data/train-1.parquet", "data/x/train-2.parquet"]);
        assert_eq!(chosen("data/train-*"), ["data/train-1.parquet"]);
        assert_eq!(chosen("**/train-*"), ["data/train-1.parquet", "data/x/train-2.parquet"]);
        assert_eq!(chosen("*.jsonl"), ["a.jsonl"]);
        // named itself, so that what is wrong with it can be told
        assert_eq!((chosen("b.csv"), chosen("*.csv")), (vec!["b.csv"], vec![]));
        assert!(wanted(&DataSet::parse("hf://datasets/org/name/[").unwrap()).is_err());
    }

    #[test]
    fn a_run_that_goes_on_knows_its_commit() {
        let entry = |path: &str, commit: Value| json!({ "path": path, "weight": 1.0, "commit": commit });
        let settings = [
            json!({ "data": [entry("a.txt", Value::Null)] }),
            json!({ "data": [entry("hf://x", json!("1"))], "valid": [entry("hf://y", json!("2"))] }),
        ];
        let found = |path: &str| commit_in(&settings, Path::new(path));
        assert_eq!((found("hf://x").as_deref(), found("hf://y").as_deref()), (Some("1"), Some("2")));
        assert_eq!((found("a.txt"), found("hf://z")), (None, None));
    }
}
