//! TOML files as arguments: `--config FILE.toml`.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Command;

/// What became of options that older files may name.
fn removed(key: &str) -> Option<&'static str> {
    Some(match key {
        "router-lr" | "shared-lr" | "backbone-lr" | "warmup" | "final-lr" | "weight-decay" | "clip"
        | "temperature" | "noise" | "focus-power" | "full-share" | "narrowest-share" | "log-every" => {
            "it is a constant now; for research, set = [\"KEY=VALUE\"] changes it"
        }
        "own-lr" => "it is a constant now; for research, set = [\"separate-lr=VALUE\"] changes it",
        "distill-hidden" => {
            "distill is the strength of the whole distillation now; for research, set = [\"distill-hidden=VALUE\"] \
             changes this part"
        }
        "mode" => "it is train = \"all\" or train = \"routers\" now",
        "accumulation" => {
            "batch-size is that of a whole step now, and micro-batch what is computed at a time"
        }
        "widths" => "experts takes a list of widths now, such as experts = \"2048,4096,11008\"",
        "own-shells" => "it is separate-shells now",
        "router-hidden-size" | "compensation" | "default-sensitivity" => {
            "it is a constant now; what is served is set with the server's --sensitivity"
        }
        "no-baselines" => "it is baselines = \"none\" now",
        "no-oracle" => "the oracle is searched only with oracle = true now",
        _ => return None,
    })
}

/// Puts the keys of `--config FILE.toml` in front of the arguments, as flags of the same names; a flag given
/// wins over its key. `cli` knows the flags of each command.
///
/// # Errors
/// A file that cannot be read or is no flat TOML table; a key that is no flag of the command.
pub fn from_toml(mut args: Vec<OsString>, cli: &Command) -> Result<Vec<OsString>> {
    let joined = |arg: &OsString| Some(arg.to_str()?.strip_prefix("--config=")?.to_owned());
    let found = args.iter().enumerate().find_map(|(at, arg)| match joined(arg) {
        Some(path) => Some((at, Some(path.into()), 1)),
        None => (arg == "--config").then(|| (at, args.get(at + 1).cloned(), 2)),
    });
    let Some((at, path, taken)) = found else { return Ok(args) };
    let command = args.get(1).and_then(|name| cli.find_subcommand(name)).filter(|_| at >= 2);
    let (Some(path), Some(command)) = (path, command) else {
        bail!("--config needs a command before it and a TOML file after it")
    };
    let path = PathBuf::from(path);
    args.drain(at..at + taken);
    let text = fs::read_to_string(&path).with_context(|| format!("--config {}", path.display()))?;
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        anyhow!("--config {}: line {line}: {}", path.display(), error.message())
    })?;
    let mut flags = Vec::new();
    for (key, value) in table {
        let name = key.replace('_', "-");
        if let Some(now) = removed(&name) {
            bail!("--config {}: key {key:?} is no option any more: {now}", path.display());
        }
        ensure!(
            name != "config" && command.get_arguments().any(|arg| arg.get_long() == Some(name.as_str())),
            "--config {}: unknown key {key:?}; keys are the flags of `moefy-train {} --help`",
            path.display(),
            command.get_name()
        );
        let flag = format!("--{name}");
        let given = |arg: &OsString| {
            arg.to_str().is_some_and(|arg| arg == flag || arg.starts_with(&format!("{flag}=")))
        };
        if args.iter().any(given) {
            continue;
        }
        let values = match value {
            toml::Value::Array(values) => values,
            value => vec![value],
        };
        for value in values {
            flags.extend(flag_of(&flag, &value).with_context(|| format!("--config {}", path.display()))?);
        }
    }
    args.splice(2..2, flags);
    Ok(args)
}

/// One key's value as arguments; a true boolean is the bare flag.
fn flag_of(flag: &str, value: &toml::Value) -> Result<Option<OsString>> {
    Ok(match value {
        toml::Value::String(text) => Some(format!("{flag}={text}").into()),
        toml::Value::Integer(number) => Some(format!("{flag}={number}").into()),
        toml::Value::Float(number) => Some(format!("{flag}={number}").into()),
        toml::Value::Boolean(true) => Some(flag.into()),
        toml::Value::Boolean(false) => None,
        other => bail!("{flag}: expected a string, a number, a boolean or a list of them, found {other}"),
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn toml_keys_are_flags_and_flags_win() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "tokens = 5\nlr = 0.1\ndata = ['a.txt', 'b.txt:2']\nforce = true\n").unwrap();
        let args = ["moefy-train", "run", "--lr", "0.2", "--config", file.path().to_str().unwrap()];
        let found = from_toml(args.iter().map(OsString::from).collect(), &Cli::command()).unwrap();
        let found: Vec<_> = found.iter().map(|arg| arg.to_str().unwrap()).collect();
        let expected =
            ["moefy-train", "run", "--data=a.txt", "--data=b.txt:2", "--force", "--tokens=5", "--lr", "0.2"];
        let (mut found, mut expected) = (found.to_vec(), expected.to_vec());
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
    }

    #[test]
    fn broken_config_files_are_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let joined = format!("--config={path}");
        let error = |args: &[&str]| {
            let args = args.iter().map(OsString::from).collect();
            format!("{:#}", from_toml(args, &Cli::command()).unwrap_err())
        };
        for (line, now) in [
            ("warmup = 0.1", "set ="),
            ("own_shells = 2", "separate-shells"),
            ("compensation = false", "constant"),
            ("no-baselines = true", "baselines = \"none\""),
        ] {
            fs::write(file.path(), line).unwrap();
            let told = error(&["moefy-train", "run", "--config", path]);
            assert!(told.contains("no option any more") && told.contains(now), "{line}: {told}");
        }
        fs::write(file.path(), "[lr]\na = 1\n").unwrap();
        assert!(error(&["moefy-train", "run", "--config", path]).contains("--lr: expected a string"));
        fs::write(file.path(), "lerning-rate = 1\n").unwrap();
        for args in [&["moefy-train", "run", "--config", path][..], &["moefy-train", "run", &joined]] {
            assert!(error(args).contains(&format!("{path}: unknown key \"lerning-rate\"")));
        }
        assert!(error(&["moefy-train", "run", "--config", "/no/such"]).contains("/no/such"));
        assert!(error(&["moefy-train", "run", "--config"]).contains("needs a command"));
        assert!(error(&["moefy-train", "--config", path, "run"]).contains("needs a command"));
    }
}
