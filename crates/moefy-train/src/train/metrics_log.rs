//! The log of a training: metrics.jsonl, one [`TrainMetrics`] a line, and event files of the same numbers.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dynamoe_model::checkpoint::write_atomic;

use super::events::Events;
use crate::report::results::TrainMetrics;

/// The log on disk, if it is kept, and in memory.
pub(super) struct MetricsLog {
    file: Option<(File, PathBuf)>,
    events: Option<Events>,
    pub(super) metrics: Vec<TrainMetrics>,
}

impl MetricsLog {
    /// Opens the log, dropping lines after step `start`: a resumed run writes them again. `events` is a folder of TensorBoard's.
    pub(super) fn open(dir: Option<&Path>, events: Option<&Path>, start: u64) -> Result<Self> {
        let events = events.map(|dir| Events::create(dir, start)).transpose()?;
        let Some(dir) = dir else { return Ok(Self { file: None, events, metrics: Vec::new() }) };
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        let path = dir.join("metrics.jsonl");
        let (mut metrics, mut text): (Vec<TrainMetrics>, _) = (Vec::new(), String::new());
        if let Ok(file) = File::open(&path) {
            let lines = BufReader::new(file).lines().map_while(|line| line.ok());
            // a line cut short by a crash is one that the resumed run writes again
            metrics.extend(lines.map_while(|line| serde_json::from_str::<TrainMetrics>(&line).ok()));
            metrics.retain(|m| m.step <= start);
        }
        for line in &metrics {
            text.push_str(&serde_json::to_string(line)?);
            text.push('\n');
        }
        write_atomic(&path, text.as_bytes())?; // a kill here must not lose the lines that are kept
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.with_context(|| format!("{}: cannot be written", path.display()))?;
        Ok(Self { file: Some((file, path)), events, metrics })
    }

    pub(super) fn push(&mut self, metrics: TrainMetrics) -> Result<()> {
        if let Some((file, path)) = &mut self.file {
            writeln!(file, "{}", serde_json::to_string(&metrics)?)
                .with_context(|| format!("writing {}", path.display()))?;
        }
        if let Some(events) = &mut self.events {
            events.push(&metrics)?;
        }
        self.metrics.push(metrics);
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<()> {
        if let Some((file, path)) = &self.file {
            file.sync_all().with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }
}
