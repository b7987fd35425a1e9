//! What cells say together: means over seeds at the asked widths, regret over dense fine-tuning, and its ratio to
//! static nesting's.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::methods::Method;
use crate::report;
use crate::report::results::{Curve, Point, Report};
use dynamoe_model::checkpoint::write_atomic;

/// One variant trained with one seed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// The variant's name.
    pub variant: String,
    /// The method that trained it.
    pub method: Method,
    /// The seed.
    pub seed: u64,
    /// Training tokens.
    pub tokens: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Time of training on the clock; of the last part only, where it was resumed.
    pub seconds: f64,
    /// Loss along the dial.
    pub curve: Curve,
    /// The oracle's, if it was searched.
    pub oracle: Option<Curve>,
    /// All that decides the result.
    pub settings: Value,
}

/// A mean over seeds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Its standard error over seeds; absent for one seed.
    pub stderr: Option<f64>,
    /// Seeds.
    pub seeds: usize,
}

impl Mean {
    fn of(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        let stderr = (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt());
        (!values.is_empty()).then_some(Self { mean, stderr, seeds: values.len() })
    }
}

/// One variant. Each list has one entry for each asked width; none where the variant's dial does not reach it,
/// or where there is nothing to compare with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The variant's name.
    pub name: String,
    /// Training tokens of each cell.
    pub tokens: u64,
    /// Optimizer steps of each cell.
    pub steps: u64,
    /// Mean time of training on the clock, seconds.
    pub seconds: f64,
    /// Loss, nats per token.
    pub loss: Vec<Option<Mean>>,
    /// Loss above that of dense fine-tuning with the same seed.
    pub regret: Vec<Option<Mean>>,
    /// Regret as a share of static nesting's with the same seed.
    pub ratio: Vec<Option<Mean>>,
}

/// The comparison's result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Mean widths compared.
    pub widths: Vec<f64>,
    /// Seeds.
    pub seeds: Vec<u64>,
    /// The variant that regret is measured from: the first trained dense.
    pub dense: Option<String>,
    /// The variant that ratios are to: the first static one.
    pub reference: Option<String>,
    /// Variants in their order, then an oracle.
    pub rows: Vec<Row>,
    #[serde(skip)]
    curves: Vec<Curve>,
}

impl Table {
    /// Puts cells together.
    pub fn new(cells: &[Cell], widths: &[f64]) -> Self {
        let first = |wanted: Method| cells.iter().find(|c| c.method == wanted).map(|c| c.variant.clone());
        let (mut names, mut seeds) = (Vec::new(), Vec::new());
        for cell in cells {
            if !names.contains(&cell.variant) {
                names.push(cell.variant.clone());
            }
            if !seeds.contains(&cell.seed) {
                seeds.push(cell.seed);
            }
        }
        let mut table = Self {
            widths: widths.to_vec(),
            seeds,
            dense: first(Method::Dense),
            reference: first(Method::Static),
            rows: Vec::new(),
            curves: Vec::new(),
        };
        for name in &names {
            let of: Vec<&Cell> = cells.iter().filter(|cell| &cell.variant == name).collect();
            table.push(name, &of, cells, |cell| Some(&cell.curve));
        }
        let searched: Vec<&Cell> = cells.iter().filter(|cell| cell.oracle.is_some()).collect();
        if let Some(cell) = searched.first() {
            let name = format!("oracle routing of {}", cell.variant);
            table.push(&name, &searched, cells, |cell| cell.oracle.as_ref());
        }
        table
    }

    fn push(&mut self, name: &str, of: &[&Cell], all: &[Cell], curve: impl Fn(&Cell) -> Option<&Curve>) {
        let loss = |cell: &Cell, width: f64| curve(cell)?.at(width, |point| point.loss);
        let other = |name: &Option<String>, seed: u64, width: f64| {
            let cell = all.iter().find(|c| Some(&c.variant) == name.as_ref() && c.seed == seed)?;
            cell.curve.at(width, |point| point.loss)
        };
        let regret = |loss: f64, seed: u64| Some(loss - other(&self.dense, seed, 1.0)?);
        let ratio = |cell: &Cell, width: f64| {
            let reference = regret(other(&self.reference, cell.seed, width)?, cell.seed)?;
            Some(regret(loss(cell, width)?, cell.seed)? / reference).filter(|_| reference > 0.0)
        };
        let over = |value: &dyn Fn(&Cell, f64) -> Option<f64>| -> Vec<Option<Mean>> {
            let mean = |&w: &f64| Mean::of(&of.iter().filter_map(|cell| value(cell, w)).collect::<Vec<_>>());
            self.widths.iter().map(mean).collect()
        };
        let row = Row {
            name: name.to_owned(),
            tokens: of[0].tokens,
            steps: of[0].steps,
            seconds: of.iter().map(|cell| cell.seconds).sum::<f64>() / of.len() as f64,
            loss: over(&|cell, w| loss(cell, w)),
            regret: over(&|cell, w| regret(loss(cell, w)?, cell.seed)),
            ratio: over(&ratio),
        };
        let points = self.widths.iter().zip(&row.loss).filter_map(|(&mean_width, mean)| {
            let Mean { mean, stderr, .. } = (*mean)?;
            let stderr = stderr.unwrap_or(f64::NAN);
            Some(Point {
                mean_width,
                loss: mean,
                stderr,
                perplexity: mean.exp(),
                sensitivity: f64::NAN,
                ..Point::default()
            })
        });
        self.curves.push(Curve {
            name: name.to_owned(),
            description: format!("{} tokens in {} steps, {} seeds.", row.tokens, row.steps, of.len()),
            points: points.collect(),
        });
        self.rows.push(row);
    }

    /// The table as Markdown.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        let seeds: Vec<String> = self.seeds.iter().map(u64::to_string).collect();
        let _ = writeln!(text, "Mean ± standard error over seeds {}.\n", seeds.join(", "));
        self.part(&mut text, "Loss, nats per token", 3, |row| &row.loss);
        if let Some(dense) = &self.dense {
            self.part(&mut text, &format!("Regret: loss above {dense} with the same seed"), 3, |row| {
                &row.regret
            });
        }
        if let (Some(reference), Some(_)) = (&self.reference, &self.dense) {
            let title = format!("Regret as a share of that of {reference}");
            self.part(&mut text, &title, 2, |row| &row.ratio);
        }
        text
    }

    fn part(&self, text: &mut String, title: &str, digits: usize, of: impl Fn(&Row) -> &Vec<Option<Mean>>) {
        let heads: Vec<String> = self.widths.iter().map(|w| format!("{w}")).collect();
        let _ = writeln!(text, "| {title} | {} |", heads.join(" | "));
        let _ = writeln!(text, "| --- |{}", " --- |".repeat(self.widths.len()));
        for row in self.rows.iter().filter(|row| of(row).iter().any(Option::is_some)) {
            let show = |mean: &Option<Mean>| match mean {
                None => String::new(),
                Some(Mean { mean, stderr: None, .. }) => format!("{mean:.digits$}"),
                Some(Mean { mean, stderr: Some(e), .. }) => format!("{mean:.digits$} ± {e:.digits$}"),
            };
            let values: Vec<String> = of(row).iter().map(show).collect();
            let _ = writeln!(text, "| {} | {} |", row.name.replace('|', "\\|"), values.join(" | "));
        }
        let _ = writeln!(text);
    }

    /// Writes comparison.md, comparison.json and the report's page into `out`; `model` is the base's name.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, out: &Path, model: &str) -> Result<()> {
        let dense = self.rows.iter().find(|row| Some(&row.name) == self.dense.as_ref());
        let dense_loss = dense.and_then(|row| row.loss.iter().flatten().next_back()).map(|mean| mean.mean);
        let not_dense = |curve: &&Curve| Some(&curve.name) != self.dense.as_ref();
        let page = Report {
            title: format!("Comparison on {model}"),
            facts: vec![(
                "Seeds".into(),
                self.seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", "),
            )],
            curves: self.curves.iter().filter(not_dense).cloned().collect(),
            dense_finetuned_loss: dense_loss,
            ..Report::default()
        };
        report::write(&page, out)?;
        write_atomic(&out.join("comparison.json"), &serde_json::to_vec_pretty(self)?)?;
        write_atomic(&out.join("comparison.md"), self.markdown().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(points: &[(f64, f64)]) -> Curve {
        let point = |&(mean_width, loss): &(f64, f64)| Point { mean_width, loss, ..Point::default() };
        Curve { points: points.iter().map(point).collect(), ..Curve::default() }
    }

    fn cell(name: &str, method: Method, seed: u64, points: &[(f64, f64)]) -> Cell {
        Cell {
            variant: name.into(),
            method,
            seed,
            tokens: 10,
            steps: 1,
            seconds: 1.0,
            curve: curve(points),
            oracle: None,
            settings: Value::Null,
        }
    }

    #[test]
    fn regret_and_ratio_compare_within_a_seed() {
        let cells = [
            cell("d", Method::Dense, 0, &[(1.0, 1.0)]),
            cell("s", Method::Static, 0, &[(0.5, 2.0), (1.0, 1.2)]),
            cell("p", Method::Priced, 0, &[(0.5, 1.5), (1.0, 1.1)]),
            cell("d", Method::Dense, 1, &[(1.0, 1.1)]),
            cell("s", Method::Static, 1, &[(0.5, 2.1), (1.0, 1.3)]),
            cell("p", Method::Priced, 1, &[(0.5, 1.4), (1.0, 1.2)]),
        ];
        let table = Table::new(&cells, &[0.5, 1.0]);
        assert_eq!((table.dense.as_deref(), table.reference.as_deref()), (Some("d"), Some("s")));
        let priced = &table.rows[2];
        let near = |found: Option<Mean>, mean: f64, stderr: f64| {
            let found = found.unwrap();
            assert!(
                (found.mean - mean).abs() < 1e-9 && (found.stderr.unwrap() - stderr).abs() < 1e-9,
                "{found:?}"
            );
        };
        near(priced.loss[0], 1.45, 0.05);
        near(priced.regret[0], 0.4, 0.1);
        near(priced.ratio[0], 0.4, 0.1);
        near(priced.ratio[1], 0.5, 0.0);
        let text = table.markdown();
        assert!(text.contains("| p | 0.40 ± 0.10 | 0.50 ± 0.00 |"), "{text}");
        assert_eq!(table.rows[0].loss[0], None);
    }

    #[test]
    fn one_seed_has_no_error_and_no_dense_variant_no_regret() {
        let table = Table::new(&[cell("s", Method::Static, 0, &[(0.5, 2.0), (1.0, 1.5)])], &[0.5]);
        assert_eq!(table.rows[0].loss[0], Some(Mean { mean: 2.0, stderr: None, seeds: 1 }));
        assert_eq!(table.rows[0].regret[0], None);
        assert!(!table.markdown().contains("Regret"));
    }
}
