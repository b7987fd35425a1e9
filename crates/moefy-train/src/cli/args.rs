//! Arguments that commands share, and TOML files as arguments.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::Device;
use clap::{Args, Command, ValueEnum};
use dynamoe::{RouterConfig, RouterKind, config};
use serde::{Deserialize, Serialize};

use crate::convert::ConvertOptions;
use crate::data::DataSource;
use crate::texts::TextArgs;
use crate::train::TrainConfig;
use dynamoe_model::checkpoint::Checkpoint;
use dynamoe_model::config::ModelConfig;

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    /// The processor
    Cpu,
    /// The first NVIDIA GPU; needs a build with `--features cuda`
    Cuda,
}

impl DeviceArg {
    /// Opens the device.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda => Device::new_cuda(0).context(
                "--device cuda: no GPU can be used; this needs an NVIDIA GPU and a build with `--features cuda`",
            ),
        }
    }
}

/// The dense model and the texts of commands that train and measure.
#[derive(Debug, Args)]
pub struct InputArgs {
    /// Dense model: a folder or a hub id
    #[arg(long)]
    pub model: String,
    /// Text to train on: PATH[:WEIGHT], .txt or .jsonl; may be repeated
    #[arg(long, required = true)]
    pub data: Vec<DataSource>,
    /// Text to evaluate on [default: a held-out part of --data]
    #[arg(long)]
    pub valid: Vec<DataSource>,
}

/// How and where a command trains.
#[derive(Debug, Args)]
pub struct TrainingArgs {
    #[command(flatten)]
    pub train: TrainConfig,
    #[command(flatten)]
    pub text: TextArgs,
    /// Where to compute
    #[arg(long, value_enum, default_value = "cpu")]
    pub device: DeviceArg,
}

/// How a dense model is cut into experts.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ExpertArgs {
    /// Nested experts: widths are e/N of the FFN's, in blocks that quantization likes
    #[arg(long, default_value_t = 4)]
    pub experts: usize,
    /// Widths of the experts instead, ascending, ending at the FFN's width
    #[arg(long, value_delimiter = ',')]
    pub widths: Vec<usize>,
    /// How many of the first shells narrow experts have of their own, trained apart from full width; each costs its
    /// share of the FFN in memory, and no time [default: half of the shells]
    #[arg(long)]
    pub own_shells: Option<usize>,
    /// Width of a router's hidden layer [default: half the hidden size, 16 to 64]
    #[arg(long)]
    pub router_hidden_size: Option<usize>,
    /// Whether narrow experts add the mean of what they leave out
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub compensation: bool,
    /// The dial's default in the checkpoint
    #[arg(long, default_value_t = 0.5)]
    pub default_sensitivity: f64,
}

impl ExpertArgs {
    /// The options for a model.
    pub fn options(&self, config: &ModelConfig, seed: u64, force: bool) -> Result<ConvertOptions> {
        let expert_widths = match self.widths.as_slice() {
            [] => config::even_widths(config.intermediate_size, self.experts)?,
            widths => widths.to_vec(),
        };
        config::check_widths(&expert_widths, config.intermediate_size)?;
        ensure!(
            expert_widths.len() > 1,
            "--experts or --widths must make two experts or more, found one: that is the dense model"
        );
        let own_shells = self.own_shells.unwrap_or(expert_widths.len() / 2);
        config::check_own_shells(own_shells, expert_widths.len()).context("--own-shells")?;
        config::check_dial("sensitivity", self.default_sensitivity)?;
        let hidden_size = self.router_hidden_size.unwrap_or((config.hidden_size / 2).clamp(16, 64));
        ensure!(hidden_size > 0, "--router-hidden-size must be 1 or more, found 0");
        Ok(ConvertOptions {
            expert_widths,
            own_shells,
            router: RouterConfig { kind: RouterKind::Mlp, hidden_size, compensation: self.compensation },
            seed,
            sensitivity: self.default_sensitivity,
            force,
            max_shard_bytes: None,
        })
    }
}

/// Opens a model by folder or hub id.
pub fn open_model(model: &str) -> Result<Checkpoint> {
    Checkpoint::open(&dynamoe_model::hub::resolve(model)?)
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

/// One key's value as arguments; a true boolean is the bare flag, except where the flag takes a value.
fn flag_of(flag: &str, value: &toml::Value) -> Result<Option<OsString>> {
    Ok(match value {
        toml::Value::String(text) => Some(format!("{flag}={text}").into()),
        toml::Value::Integer(number) => Some(format!("{flag}={number}").into()),
        toml::Value::Float(number) => Some(format!("{flag}={number}").into()),
        toml::Value::Boolean(value) if flag == "--compensation" => Some(format!("{flag}={value}").into()),
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
