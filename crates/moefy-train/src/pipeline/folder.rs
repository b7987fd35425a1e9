//! The output folder of a run: guarded, and never left behind empty.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::lock::{LOCK, OutputLock};
use crate::ranks::Ranks;
use crate::train::state::differences;
use dynamoe_model::ModelConfig;
use dynamoe_model::checkpoint::{refuse_overlap, write_atomic};

/// Folder of intermediate results within the output.
pub const TRAINING: &str = "training";

/// The settings of the run, within [`TRAINING`]: a run is resumed only as it was started.
const JOB: &str = "job.json";

/// What becomes of an output folder that is not empty; by default it is refused.
#[derive(Debug, Clone, Copy, Default)]
pub struct Existing {
    /// Replace it.
    pub force: bool,
    /// Continue the interrupted run in it.
    pub resume: bool,
}

/// The output folder of a run. Dropped before anything was written to it, it is removed again.
pub struct RunFolder<'a> {
    out: PathBuf,
    created: bool,
    /// Of the folder of intermediate results; only the first rank takes it.
    _lock: Option<OutputLock>,
    ranks: &'a dyn Ranks,
}

impl<'a> RunFolder<'a> {
    /// Whether `out` can be prepared; touches nothing. `inputs` are what the run reads.
    ///
    /// # Errors
    /// A folder that is not empty, with neither `force` nor `resume`; a folder that is not this program's; one
    /// that holds an input which `force` would remove.
    pub fn check(out: &Path, existing: Existing, inputs: &[&Path]) -> Result<()> {
        let Existing { force, resume } = existing;
        let occupied = match fs::read_dir(out) {
            Ok(mut entries) => entries.next().is_some(),
            Err(error) if error.kind() == ErrorKind::NotFound => false,
            Err(error) => {
                return Err(error).with_context(|| {
                    format!("{}: the output folder cannot be read; choose another --out", out.display())
                });
            }
        };
        if !occupied || unused(out) {
            return Ok(());
        }
        ensure!(
            force || resume,
            "{}: the output folder exists and is not empty: choose another, or --resume to continue that run, \
             or --force to replace it",
            out.display()
        );
        let ours = out.join(TRAINING).join(JOB).is_file();
        ensure!(!resume || ours, "{}: holds no run to --resume; choose another --out", out.display());
        ensure!(
            ours || (out.join("config.json").is_file() && ModelConfig::read(out).is_ok()),
            "{}: not a folder that this program wrote; choose another --out, or remove it yourself",
            out.display()
        );
        if force {
            inputs.iter().try_for_each(|input| refuse_overlap(input, out))?;
        }
        Ok(())
    }

    /// The settings of the run in `out`, if it is to be continued.
    ///
    /// # Errors
    /// Settings that cannot be read.
    pub fn earlier(out: &Path, existing: Existing) -> Result<Option<Value>> {
        let path = out.join(TRAINING).join(JOB);
        if !existing.resume || !path.is_file() {
            return Ok(None);
        }
        let was = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_slice(&was).with_context(|| format!("{}: not JSON", path.display()))
    }

    /// Prepares `out` for a run of these ranks with these `settings`. `resume` takes up an interrupted run; `force` removes an
    /// earlier one.
    ///
    /// # Errors
    /// Those of [`RunFolder::check`]; a resumed run with other settings; a place that cannot be written.
    pub fn prepare(
        out: &Path,
        existing: Existing,
        inputs: &[&Path],
        settings: &Value,
        ranks: &'a dyn Ranks,
    ) -> Result<Self> {
        let mut folder = Self { out: out.to_owned(), created: false, _lock: None, ranks };
        ranks.first(|| folder.take(existing, inputs, settings))?;
        Ok(folder)
    }

    /// Prepares the folder, for all ranks.
    fn take(&mut self, existing: Existing, inputs: &[&Path], settings: &Value) -> Result<()> {
        let out = &self.out;
        Self::check(out, existing, inputs)?;
        let Existing { force, resume } = existing;
        let training = out.join(TRAINING);
        let lock = OutputLock::of_existing(&training, out)?;
        let path = training.join(JOB);
        if let Some(was) = Self::earlier(out, existing)? {
            let other = differences(&was, settings);
            ensure!(
                other.is_empty(),
                "{}: cannot resume a run that was started differently: {}; give the same options, or another --out",
                out.display(),
                other.join(", ")
            );
        }
        if (force || (!resume && unused(out))) && out.exists() {
            fs::remove_dir_all(out).with_context(|| format!("removing {}", out.display()))?;
        }
        self.created = !out.exists();
        fs::create_dir_all(&training)
            .with_context(|| format!("{}: the output folder cannot be created there", out.display()))?;
        self._lock = match lock {
            Some(lock) if !self.created => Some(lock),
            _ => Some(OutputLock::take(&training, out)?),
        };
        if !path.is_file() {
            write_atomic(&path, &serde_json::to_vec_pretty(settings)?)?;
        }
        Ok(())
    }

    /// The processes that work in it.
    pub fn ranks(&self) -> &'a dyn Ranks {
        self.ranks
    }

    /// The folder of the finished checkpoint.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// A path among the intermediate results.
    pub fn training(&self, name: &str) -> PathBuf {
        self.out.join(TRAINING).join(name)
    }

    /// Moves a finished checkpoint's files into place, config.json last: until then no loader takes the folder
    /// for a model.
    pub fn publish(&self, staged: &Path) -> Result<()> {
        let mut names: Vec<_> = fs::read_dir(staged)?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<std::io::Result<_>>()
            .with_context(|| format!("reading {}", staged.display()))?;
        names.sort_by_key(|name| name == "config.json");
        for name in names {
            let to = self.out.join(&name);
            fs::rename(staged.join(&name), &to).with_context(|| format!("writing {}", to.display()))?;
        }
        fs::File::open(&self.out)?.sync_all()?;
        fs::remove_dir_all(staged).with_context(|| format!("removing {}", staged.display()))
    }
}

impl Drop for RunFolder<'_> {
    fn drop(&mut self) {
        if self.created && unused(&self.out) {
            let _ = fs::remove_dir_all(&self.out);
        }
    }
}

/// Whether a run folder holds nothing but its lock and [`JOB`], whole or, after a kill, in part.
fn unused(out: &Path) -> bool {
    let all = |dir: &Path, known: &dyn Fn(&str) -> bool| {
        fs::read_dir(dir)
            .is_ok_and(|entries| entries.flatten().all(|entry| entry.file_name().to_str().is_some_and(known)))
    };
    let partial = format!(".{JOB}.partial");
    let training = out.join(TRAINING);
    training.is_dir()
        && all(out, &|name| name == TRAINING)
        && all(&training, &|name| name == JOB || name == LOCK || name.starts_with(&partial))
}
