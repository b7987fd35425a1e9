//! Checkpoints of a run in progress: f32 weights, moments, the objective's state, the step. Written whole or not at all.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::config::TrainConfig;
use super::moments::{self, MomentsFile};
use super::optimizer::AdamW;
use super::tuning::Tuning;
use crate::methods::Objective;
use crate::ranks::Ranks;
use dynamoe_model::Params;

const PARAMS: &str = "params.safetensors";
const MOMENTS: &str = "moments.safetensors";
const STATE: &str = "state.json";
const PREFIX: &str = "step-";
/// In front of the name of a checkpoint that is being removed.
const LEAVING: &str = ".leaving-";

#[derive(Debug, Serialize, Deserialize)]
struct State {
    step: u64,
    config: TrainConfig,
    /// Of the model that training started from.
    fingerprint: String,
    /// What the objective has learnt.
    #[serde(default)]
    objective: Vec<f32>,
    /// SHA-256 of the other files, by name.
    #[serde(default)]
    checksums: BTreeMap<String, String>,
}

/// What a checkpoint holds, besides the settings.
pub struct Saved<'a> {
    /// The weights that are trained.
    pub params: &'a Params,
    /// Their moments.
    pub optimizer: &'a mut AdamW,
    /// How tokens are routed, with what it has learnt.
    pub objective: &'a mut dyn Objective,
}

/// Where a training keeps its checkpoints, and what they are compared with.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// The folder.
    pub dir: &'a Path,
    /// Settings.
    pub config: &'a TrainConfig,
    /// Of the model that training started from.
    pub fingerprint: &'a str,
    /// Who trains: the first rank writes.
    pub ranks: &'a dyn Ranks,
}

/// Saves step `optimizer.step` and removes all but the newest two checkpoints. All ranks take part.
///
/// # Errors
/// The file system's; nothing half-written is left in place of a checkpoint.
pub fn save(place: Place<'_>, saved: &Saved<'_>) -> Result<()> {
    let Saved { params, optimizer, objective } = saved;
    let Place { dir, ranks, .. } = place;
    let step = optimizer.step;
    let target = dir.join(format!("{PREFIX}{step:08}"));
    let partial = dir.join(format!(".{PREFIX}{step:08}.partial"));
    if !ranks.is_first() {
        return moments::write(&partial.join(MOMENTS), params, optimizer, ranks);
    }
    let write = || -> Result<()> {
        fs::create_dir_all(dir)?;
        remove(&partial)?;
        fs::create_dir(&partial)?;
        let weights: HashMap<_, _> =
            params.iter().map(|(name, var)| (name.to_owned(), var.as_detached_tensor())).collect();
        candle_core::safetensors::save(&weights, partial.join(PARAMS))?;
        moments::write(&partial.join(MOMENTS), params, optimizer, ranks)?;
        let state = State {
            step,
            config: place.config.clone(),
            fingerprint: place.fingerprint.to_owned(),
            objective: objective.state(),
            checksums: [PARAMS, MOMENTS]
                .into_iter()
                .map(|name| Ok((name.to_owned(), checksum(&partial.join(name))?)))
                .collect::<Result<_>>()?,
        };
        fs::write(partial.join(STATE), serde_json::to_vec_pretty(&state)?)?;
        for name in [PARAMS, MOMENTS, STATE] {
            File::open(partial.join(name))?.sync_all()?;
        }
        File::open(&partial)?.sync_all()?;
        remove(&target)?;
        fs::rename(&partial, &target)?;
        File::open(dir)?.sync_all()?;
        Ok(())
    };
    if let Err(error) = write() {
        let _ = remove(&partial); // the first error is the one to tell
        return Err(error).with_context(|| format!("writing the training checkpoint {}", target.display()));
    }
    let steps = list(dir)?;
    for (_, old) in steps.iter().rev().skip(2) {
        // renamed first: a kill must not leave half a checkpoint under a whole one's name
        let leaving = dir.join(format!("{LEAVING}{}", old.file_name().unwrap_or_default().display()));
        fs::rename(old, &leaving).with_context(|| format!("removing {}", old.display()))?;
    }
    remove_leftovers(dir)
}

/// Restores the newest checkpoint; returns its step, none where there is no checkpoint. Each rank reads for itself.
///
/// # Errors
/// A checkpoint of another model or of other options; a broken file.
pub fn restore(place: Place<'_>, saved: Saved<'_>) -> Result<Option<u64>> {
    let Saved { params, optimizer, objective } = saved;
    let Place { dir, config, fingerprint, .. } = place;
    let Some((step, folder)) = list(dir)?.pop() else { return Ok(None) };
    let mut read = || -> Result<()> {
        let state = fs::read(folder.join(STATE)).context(STATE)?;
        let state: State = serde_json::from_slice(&state).context(STATE)?;
        ensure!(state.step == step, "its state is of step {}, its folder of step {step}", state.step);
        ensure!(state.fingerprint == fingerprint, "it was started from another model");
        // how often to save and log may change between runs, all else decides the result
        let tuning = Tuning { log_every: config.tuning.log_every, ..state.config.tuning };
        let same = TrainConfig { save_every: config.save_every, tuning, ..state.config };
        let other = differences(&serde_json::to_value(same)?, &serde_json::to_value(config)?);
        ensure!(other.is_empty(), "it was started with other options: {}", other.join(", "));
        for (name, expected) in &state.checksums {
            let found = checksum(&folder.join(name))?;
            ensure!(&found == expected, "{name} is damaged: its SHA-256 is not the one in {STATE}");
        }
        let weights = candle_core::safetensors::load(folder.join(PARAMS), &Device::Cpu).context(PARAMS)?;
        for (name, var) in params.iter() {
            let found = weights.get(name).with_context(|| format!("no tensor {name}"))?;
            var.set(&found.to_device(var.device())?)?;
        }
        let device = params.iter().next().map_or(Device::Cpu, |(_, var)| var.device().clone());
        let moments = MomentsFile::open(&folder.join(MOMENTS)).context(MOMENTS)?;
        for (name, var) in params.iter() {
            let shapes = ["m", "v"].map(|suffix| moments.shape(&format!("{name}.{suffix}")));
            ensure!(shapes == [Some(var.dims()); 2], "{MOMENTS}: no moments of {name}, or of another shape");
        }
        optimizer.restore(step, |name, range| moments.read(name, range, &device))?;
        objective.restore(&state.objective)
    };
    read().with_context(|| {
        format!(
            "{}: cannot resume from this checkpoint; remove it to continue from an earlier one, or use another \
             --out to start anew",
            folder.display()
        )
    })?;
    Ok(Some(step))
}

/// Where two JSON objects differ, as `key.key: was 1, now 2`.
pub fn differences(was: &Value, now: &Value) -> Vec<String> {
    let (Some(old), Some(new)) = (was.as_object(), now.as_object()) else {
        return if was == now { Vec::new() } else { vec![format!(": was {was}, now {now}")] };
    };
    let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let below = |key: &String| {
        let found = differences(old.get(key).unwrap_or(&Value::Null), new.get(key).unwrap_or(&Value::Null));
        let dot = |rest: &String| if rest.starts_with(':') { "" } else { "." };
        found.into_iter().map(|rest| format!("{key}{}{rest}", dot(&rest))).collect::<Vec<_>>()
    };
    keys.into_iter().flat_map(below).collect()
}

/// Removes checkpoints that are on their way out, also those that a killed process left there.
fn remove_leftovers(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(LEAVING.as_bytes()) {
            remove(&entry.path()).with_context(|| format!("removing {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Checkpoints under `dir`, oldest first.
fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(dir) else { return Ok(found) };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some(step) = name.strip_prefix(PREFIX).and_then(|step| step.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// SHA-256 of a file, in hexadecimal.
fn checksum(path: &Path) -> Result<String> {
    let reading = || format!("reading {}", path.display());
    let mut digest = Sha256::new();
    std::io::copy(&mut File::open(path).with_context(reading)?, &mut digest).with_context(reading)?;
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn remove(folder: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn differences_name_the_keys_that_lead_to_them() {
        let was = json!({"lr": 1, "same": [1], "deep": {"a": 1, "b": {"c": "x"}}, "gone": true});
        let now = json!({"lr": 2, "same": [1], "deep": {"a": 1, "b": {"c": "y"}}, "new": {"d": 1}});
        let expected = [
            "deep.b.c: was \"x\", now \"y\"",
            "gone: was true, now null",
            "lr: was 1, now 2",
            "new: was null, now {\"d\":1}",
        ];
        assert_eq!(differences(&was, &now), expected);
    }
}
