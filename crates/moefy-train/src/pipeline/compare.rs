//! Recipes × seeds on the same tokens in the same order: which one suits a model?
//!
//! Each variant is trained once with each seed (a cell) and measured along its whole dial. A finished cell is
//! kept under `OUT/cells` by its settings, so that a comparison that was stopped goes on, and one that gets
//! another variant or seed trains only that.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use dynamoe_model::checkpoint::write_atomic;
use dynamoe_model::{Checkpoint, RoutedModel};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::lab::Lab;
use super::lock::OutputLock;
use super::own_text::write_own_text;
use super::recipe::{Publication, Recipe, Start, TrainJob, Training, write_model};
use super::run::model_name;
use super::table::{Cell, Table};
use crate::data::{Batches, OwnText, PaddedBatch, calibration_batches};
use crate::evaluate::curve::oracle_curve;
use crate::report::results::Curve;
use crate::train::TrainModel;

/// Tokens of training text on which a cell's dial is solved.
const SOLVE_TOKENS: usize = 8_192;

/// A named recipe.
#[derive(Debug, Clone)]
pub struct Variant {
    /// Shown in the table.
    pub name: String,
    /// How the model is cut and trained; each seed replaces the recipe's own.
    pub recipe: Recipe,
}

/// What is compared, and how.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// The recipes.
    pub variants: Vec<Variant>,
    /// Seeds of data order, dials, noise and routers.
    pub seeds: Vec<u64>,
    /// Mean widths at which the table compares.
    pub widths: Vec<f64>,
    /// Tokens that curves are measured on at most.
    pub eval_tokens: usize,
    /// The variant whose oracle is searched, with the first seed.
    pub oracle: Option<String>,
    /// Whether trained checkpoints are kept.
    pub keep: bool,
}

/// A variant's overrides of the common recipe, as `--variants` names them.
///
/// # Errors
/// No name, one used twice, an unknown key, a value that does not fit.
pub fn variants(text: &str, common: &Recipe) -> Result<Vec<Variant>> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        variant: Vec<toml::Table>,
    }
    let file: File = toml::from_str(text)?;
    let mut found: Vec<Variant> = Vec::new();
    for (number, mut table) in file.variant.into_iter().enumerate() {
        let name = table.remove("name").and_then(|name| Some(name.as_str()?.trim().to_owned()));
        let name = name.filter(|name| !name.is_empty());
        let name = name.with_context(|| format!("variant {}: needs a name", number + 1))?;
        ensure!(found.iter().all(|variant| variant.name != name), "variant {name:?}: the name is used twice");
        let recipe = overridden(common, table).with_context(|| format!("variant {name:?}"))?;
        found.push(Variant { name, recipe });
    }
    ensure!(!found.is_empty(), "expected at least one [[variant]], found none");
    Ok(found)
}

/// The common recipe with the keys of `table` in place of its own.
fn overridden(common: &Recipe, table: toml::Table) -> Result<Recipe> {
    let mut experts = serde_json::to_value(&common.experts)?;
    let mut tuning = serde_json::to_value(&common.train.tuning)?;
    let mut train = serde_json::to_value(&common.train)?;
    for (key, value) in table {
        let key = key.replace('_', "-");
        ensure!(key != "seed", "seeds are those of the whole comparison: --seed and --seeds");
        let parts = [&mut experts, &mut train, &mut tuning];
        let part = parts.into_iter().find(|part| key != "tuning" && part.get(&key).is_some());
        let Some(part) = part else {
            bail!(
                "unknown key {key:?}; keys are the flags of `moefy-train compare --help` that cut and train, and the \
                 keys of --set"
            )
        };
        part[key] = serde_json::to_value(value)?;
    }
    train["tuning"] = tuning;
    let recipe = Recipe { experts: serde_json::from_value(experts)?, train: serde_json::from_value(train)? };
    recipe.train.validate()?;
    Ok(recipe)
}

/// The settings of the cells that are finished in `out`.
pub fn earlier(out: &Path) -> Vec<Value> {
    let entries = fs::read_dir(out.join("cells")).into_iter().flatten().flatten();
    let cell = |path: PathBuf| serde_json::from_slice::<Cell>(&fs::read(path).ok()?).ok();
    entries.filter_map(|entry| cell(entry.path())).map(|cell| cell.settings).collect()
}

/// What all cells share.
struct Bench<'a> {
    lab: &'a Lab<'a>,
    comparison: &'a Comparison,
    held_out: Vec<PaddedBatch>,
    out: &'a Path,
}

/// Says what the variant that needs most will need in memory, and refuses what the machine does not have.
fn check_memory(lab: &Lab<'_>, variants: &[Variant]) -> Result<()> {
    let start = Start::of(lab);
    let mut largest: Option<(u64, &Variant)> = None;
    for variant in variants {
        let peak = variant.recipe.peak(&start)?;
        if largest.is_none_or(|(most, _)| peak > most) {
            largest = Some((peak, variant));
        }
    }
    let Some((_, variant)) = largest else { return Ok(()) };
    variant.recipe.check_memory(&start).with_context(|| format!("variant {:?}", variant.name))
}

/// Trains and measures what is not there yet, seed by seed, writing the table and the picture after each cell.
/// None where it was asked to stop.
///
/// # Errors
/// Those of the stages; settings that do not fit the model, before anything is trained.
pub fn compare(lab: &mut Lab<'_>, comparison: &Comparison, out: &Path) -> Result<Option<Table>> {
    check(lab, comparison)?;
    let mut lock = None;
    if let Some(plan) = &lab.own_text {
        let settings = json!({ "plan": plan, "model": lab.model.fingerprint()? });
        let name = key(OwnText::NAME, plan.seed, &settings);
        lock = prepare(out, lab)?;
        write_own_text(lab, None, &out.join(name + ".jsonl"))?;
    }
    let longest = comparison.variants.iter().map(|v| v.recipe.train.sequence_length).max();
    let held_out = lab.held_out(longest.unwrap_or(256), comparison.eval_tokens)?;
    let _lock = if lab.own_text.is_some() { lock } else { prepare(out, lab)? };
    let bench = Bench { lab, comparison, held_out, out };
    let (mut cells, mut table) = (Vec::new(), None);
    for &seed in &comparison.seeds {
        for variant in &comparison.variants {
            let Some(cell) = bench.cell(variant, seed)? else { return Ok(None) };
            cells.push(cell);
            let new = Table::new(&cells, &comparison.widths);
            bench.lab.ranks.first(|| new.write(out, &model_name(&bench.lab.inputs.model)))?;
            table = Some(new);
        }
    }
    table.context("nothing to compare: expected at least one variant and one seed").map(Some)
}

/// Makes the output folder and locks it; only the first rank takes the lock.
fn prepare(out: &Path, lab: &Lab<'_>) -> Result<Option<OutputLock>> {
    let mut lock = None;
    lab.ranks.first(|| {
        fs::create_dir_all(out)
            .with_context(|| format!("{}: the output folder cannot be created there", out.display()))?;
        lock = Some(OutputLock::take(out, out)?);
        Ok(())
    })?;
    Ok(lock)
}

/// Refuses settings that do not fit the model.
fn check(lab: &Lab<'_>, comparison: &Comparison) -> Result<()> {
    let config = lab.model.config();
    ensure!(config.dynamoe.is_none(), "{}: a DynaMoE checkpoint; give a dense one", lab.inputs.model);
    for variant in &comparison.variants {
        variant.recipe.validate(config).with_context(|| format!("variant {:?}", variant.name))?;
    }
    check_memory(lab, &comparison.variants)?;
    if let Some(name) = &comparison.oracle {
        let routed = |v: &&Variant| &v.name == name && v.recipe.train.method.has_router();
        let known = comparison.variants.iter().any(|variant| routed(&variant));
        ensure!(known, "--oracle {name:?}: expected the name of a variant with a router");
    }
    Ok(())
}

impl Bench<'_> {
    /// A finished cell, or one trained and measured now; none if asked to stop.
    fn cell(&self, variant: &Variant, seed: u64) -> Result<Option<Cell>> {
        let mut recipe = variant.recipe.clone();
        recipe.train.seed = seed;
        let settings = self.settings(variant, &recipe)?;
        let key = key(&variant.name, seed, &settings);
        let (dir, done) = (self.out.join("cells").join(&key), self.out.join("cells").join(key + ".json"));
        if self.lab.ranks.as_first(done.is_file()) {
            let bytes = fs::read(&done).with_context(|| format!("reading {}", done.display()))?;
            return serde_json::from_slice(&bytes)
                .map(Some)
                .with_context(|| format!("{}: not a cell; remove it to train it again", done.display()));
        }
        tracing::info!("{}, seed {seed}", variant.name);
        let started = Instant::now();
        recipe.train.set_precision(self.lab.device)?;
        let batches = self.lab.batches(&recipe.train)?;
        let Some(trained) = self.train(&recipe, &batches, &dir)? else { return Ok(None) };
        let seconds = started.elapsed().as_secs_f64();
        let (curve, oracle) = self.measure(variant, &recipe, &trained, &batches)?;
        let cell = Cell {
            variant: variant.name.clone(),
            method: recipe.train.method,
            seed,
            tokens: recipe.train.steps() * recipe.train.tokens_per_step(),
            steps: recipe.train.steps(),
            seconds,
            curve,
            oracle,
            settings,
        };
        self.lab.ranks.first(|| {
            write_atomic(&done, &serde_json::to_vec_pretty(&cell)?)?;
            fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))
        })?;
        Ok(Some(cell))
    }

    /// All that decides a cell's result.
    fn settings(&self, variant: &Variant, recipe: &Recipe) -> Result<Value> {
        let mut settings = self.lab.settings()?;
        settings["recipe"] = recipe.settings()?;
        settings["eval-tokens"] = self.comparison.eval_tokens.into();
        settings["widths"] = serde_json::to_value(&self.comparison.widths)?;
        settings["oracle"] = self.searches_oracle(variant, recipe.train.seed).into();
        Ok(settings)
    }

    fn searches_oracle(&self, variant: &Variant, seed: u64) -> bool {
        let comparison = self.comparison;
        comparison.oracle.as_ref() == Some(&variant.name) && Some(&seed) == comparison.seeds.first()
    }

    /// Converts and trains in `dir`; none if asked to stop.
    fn train(&self, recipe: &Recipe, batches: &Batches, dir: &Path) -> Result<Option<Trained>> {
        let create = || fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()));
        self.lab.ranks.first(create)?;
        let calibration = Lab::calibration(batches);
        let source = recipe.convert(self.lab, &calibration, &dir.join("converted"))?;
        let teacher = recipe.train.needs_other_teacher().then(|| self.lab.teacher()).transpose()?;
        let job = TrainJob {
            source: &source,
            teacher: teacher.as_ref(),
            batches,
            state_dir: &dir.join("state"),
            label: recipe.train.method.label(),
            name: &dir.file_name().unwrap_or_default().to_string_lossy(),
        };
        Ok(match recipe.train(self.lab, &job)? {
            Training::Finished(model, _) => Some(Trained { source, model: *model, dir: dir.to_owned() }),
            Training::Stopped(_) => None,
        })
    }

    /// The curve of a trained cell and, where it is asked for, the oracle's.
    fn measure(
        &self,
        variant: &Variant,
        recipe: &Recipe,
        trained: &Trained,
        batches: &Batches,
    ) -> Result<(Curve, Option<Curve>)> {
        let Trained { source, model, dir } = trained;
        let calibration = calibration_batches(batches, SOLVE_TOKENS);
        let (method, ranks) = (recipe.train.method, self.lab.ranks);
        let publication = Publication { source, model, method, calibration: &calibration, ranks };
        let config = publication.with_budgets(&self.comparison.widths)?;
        if self.comparison.keep {
            let name = dir.file_name().unwrap_or_default();
            let path = self.out.join("checkpoints").join(name);
            ranks.first(|| write_model(source, model, &config, &path))?;
        }
        let routed: RoutedModel = publication.routed(&config)?;
        let mut curve = recipe.measure(&routed, &self.held_out, &self.comparison.widths, ranks)?;
        curve.name.clone_from(&variant.name);
        let oracle = self.searches_oracle(variant, recipe.train.seed);
        let mut found = None;
        if oracle {
            // only the first rank writes it down
            ranks.first(|| {
                found = Some(oracle_curve(&model.routed()?, &model.detached_ffns()?, &self.held_out)?);
                Ok(())
            })?;
        }
        Ok((curve, found))
    }
}

/// A cell's weights, and the folder of its intermediate results.
struct Trained {
    source: Checkpoint,
    model: TrainModel,
    dir: PathBuf,
}

/// A file name for a cell: readable, and different where the settings differ.
fn key(name: &str, seed: u64, settings: &Value) -> String {
    let letter = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let plain: String = name.chars().map(letter).take(40).collect();
    let hash = Sha256::digest(settings.to_string().as_bytes());
    let hash: String = hash.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("{plain}-{seed}-{hash}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::Method;
    use crate::prepare::Experts;
    use crate::train::TrainConfig;

    fn parse(text: &str) -> Result<Vec<Variant>> {
        let train = TrainConfig { tokens: 77, ..TrainConfig::default() };
        variants(text, &Recipe { train, ..Recipe::default() })
    }

    #[test]
    fn variants_override_the_common_options() {
        let found = parse(
            "[[variant]]\nname = 'a'\nexperts = 8\nbatch_size = 3\n[[variant]]\nname = 'b'\nmethod = 'static'\nlr = 1\nclip = 0.5\n",
        )
        .unwrap();
        assert_eq!(
            (
                &found[0].recipe.experts.experts,
                found[0].recipe.train.batch_size,
                found[0].recipe.train.tokens
            ),
            (&Experts::Count(8), 3, 77)
        );
        assert_eq!((found[1].name.as_str(), found[1].recipe.train.lr), ("b", 1.0));
        assert_eq!(found[1].recipe.train.method, Method::Static);
        assert_eq!(found[1].recipe.experts.experts, Experts::Count(4));
        assert_eq!(found[1].recipe.train.tuning.clip, 0.5);
    }

    #[test]
    fn broken_variants_are_named() {
        for (text, word) in [
            ("", "variant"),
            ("[[variant]]\nlr = 1\n", "variant 1: needs a name"),
            ("[[variant]]\nname = 'a'\n[[variant]]\nname = 'a'\n", "used twice"),
            ("[[variant]]\nname = 'a'\nlerning = 1\n", "unknown key \"lerning\""),
            ("[[variant]]\nname = 'a'\nlr = -1\n", "--lr must be"),
            ("[[variant]]\nname = 'a'\nlr = 'x'\n", "variant \"a\""),
            ("[[variant]]\nname = 'a'\nseed = 1\n", "--seeds"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(word), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_cell_is_known_by_its_settings() {
        let settings = |lr: f64| serde_json::json!({ "lr": lr });
        assert_eq!(key("Static, E=8", 3, &settings(0.1)), key("Static, E=8", 3, &settings(0.1)));
        assert_ne!(key("a", 3, &settings(0.1)), key("a", 3, &settings(0.2)));
        assert!(key("Static/E=8", 3, &settings(0.1)).starts_with("static-e-8-3-"));
    }
}
