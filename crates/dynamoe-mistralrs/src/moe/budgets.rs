//! The table of budgets of an MoE model, in a file beside it.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use dynamoe::Budget;
use dynamoe_model::{checkpoint::write_atomic, files::read_file};
use serde::{Deserialize, Serialize};

/// The file's name in the model's folder.
pub const FILE: &str = "dynamoe_budgets.json";

const VERSION: u64 = 1;

/// A table of budgets, and what it belongs to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Version of the file's form.
    version: u64,
    /// `architectures[0]` of the model.
    pub architecture: String,
    /// `K` of the model.
    pub experts_per_token: usize,
    /// Tokens that the table was solved on.
    pub tokens: usize,
    /// Its rows, ascending: `width` is the mean share of the `K` experts.
    pub budgets: Vec<Budget>,
}

impl Table {
    /// A table that was solved on `tokens` tokens.
    pub fn new(experts: &super::MoeExperts, tokens: usize, budgets: Vec<Budget>) -> Self {
        Self {
            version: VERSION,
            architecture: experts.architecture.clone(),
            experts_per_token: experts.experts_per_token,
            tokens,
            budgets,
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// A file that cannot be read, is of another form, or holds rows that are no table.
    pub fn read(file: &Path) -> Result<Self> {
        let text = read_file(file).with_context(|| format!("cannot read {}", file.display()))?;
        let table: Self = serde_json::from_slice(&text)
            .with_context(|| format!("{} is no table of budgets of an MoE model", file.display()))?;
        table.check().with_context(|| file.display().to_string())?;
        Ok(table)
    }

    fn check(&self) -> Result<()> {
        ensure!(self.version == VERSION, "version must be {VERSION}, found {}", self.version);
        for budget in &self.budgets {
            ensure!(
                (0.0..=1.0).contains(&budget.width),
                "a width must be from 0 to 1, found {}",
                budget.width
            );
            budget.sensitivity.validate(1)?;
        }
        let ascending = self.budgets.windows(2).all(|pair| pair[0].width < pair[1].width);
        ensure!(ascending, "widths must be ascending");
        Ok(())
    }

    /// Writes a file, whole or not at all.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        write_atomic(file, text.as_bytes())
    }
}
