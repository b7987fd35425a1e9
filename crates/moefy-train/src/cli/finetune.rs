//! `finetune`: trains a converted model.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use dynamoe_model::checkpoint::refuse_overlap;
use dynamoe_model::{Checkpoint, RoutedModel, hub};

use super::options::{ExistingArgs, TextArgs, TokenizerArg, TrainingArgs, heading, warn_unless_served};
use super::{print, stopped};
use moefy_train::data::DataSource;
use moefy_train::pipeline::{
    HeldOut, Inputs, Lab, OWN_TEXT, Publication, Recipe, RunFolder, Start, TrainJob, Training, write_own_text,
};
use moefy_train::ranks::Ranks;
use moefy_train::train::Stop;

#[derive(Debug, Args)]
pub struct FinetuneArgs {
    /// Converted model
    #[arg(long, help_heading = heading::INPUT)]
    model: String,
    /// Dense model to distill from: a folder, a hub id or a .gguf file [default: the model itself, at full width, as it is now]
    #[arg(long, help_heading = heading::INPUT)]
    teacher: Option<String>,
    #[command(flatten)]
    tokenizer: TokenizerArg,
    /// Text: PATH[:WEIGHT], a file (.txt, .jsonl, also .gz or .zst, or .parquet), a folder, a pattern of files,
    /// or hf://datasets/ORG/NAME[@REVISION][/PATTERN]; or self[:TOKENS], which the dense model (--teacher, or else the
    /// model at full width) writes itself, by default a quarter of --tokens; may be repeated
    #[arg(long, required = true, value_name = "PATH[:WEIGHT]|self[:TOKENS]", help_heading = heading::INPUT)]
    data: Vec<DataSource>,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    training: TrainingArgs,
    /// Folder of the trained checkpoint
    #[arg(long, value_name = "DIR", help_heading = heading::OUTPUT)]
    out: PathBuf,
    #[command(flatten)]
    existing: ExistingArgs,
}

pub fn finetune(args: &FinetuneArgs, stop: &Stop, ranks: &dyn Ranks) -> Result<()> {
    let recipe = Recipe { train: args.training.config()?, ..Recipe::default() };
    recipe.train.validate()?;
    // a teacher's, unless the model itself is a GGUF file
    let own_tokenizer =
        args.tokenizer.path().filter(|_| args.teacher.is_none() || Path::new(&args.model).is_file());
    let mut inputs = Inputs {
        model: args.model.clone(),
        tokenizer: own_tokenizer.map(Path::to_owned),
        data: args.data.clone(),
        held_out: HeldOut::Nothing,
        text: args.text.options(),
    };
    let files: Vec<PathBuf> = inputs.paths().map(Path::to_owned).collect();
    let read: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let existing = args.existing.existing();
    RunFolder::check(&args.out, existing, &read)?;
    let device = args.training.steps.device.open()?;
    recipe.train.set_precision(&device)?;
    let earlier = RunFolder::earlier(&args.out, existing)?;
    ranks.first_then_others(|| inputs.fetch(earlier.as_slice()))?;
    let tensorboard = args.training.steps.tensorboard.clone();
    let mut lab = Lab { tensorboard, ..Lab::open(inputs, &device, stop, ranks)? };
    warn_unless_served(lab.model.config());
    lab.plan_own_text(&recipe.train)?;
    recipe.check_memory(&Start::of(&lab))?;
    refuse_overlap(lab.model.dir(), &args.out)?;
    let mut settings = lab.settings()?;
    settings["train"] = recipe.settings()?["train"].clone();
    settings["teacher"] = args.teacher.as_deref().into();
    let tokenizer = args.tokenizer.path().filter(|_| own_tokenizer.is_none());
    let teacher = |lab: &Lab<'_>| teacher(args.teacher.as_deref(), tokenizer, &recipe, lab);
    let prepare = || RunFolder::prepare(&args.out, existing, &read, &settings, ranks);
    let (batches, teacher, folder) = if lab.own_text.is_some() {
        recipe.check_source(&lab.model)?;
        let (teacher, folder) = (teacher(&lab)?, prepare()?);
        write_own_text(&mut lab, teacher.as_ref(), &folder.training(OWN_TEXT))?;
        (lab.batches(&recipe.train)?, teacher, folder)
    } else {
        // text that is wrong leaves no folder, nor takes the place of an earlier one
        (lab.batches(&recipe.train)?, teacher(&lab)?, prepare()?)
    };
    let job = TrainJob {
        source: &lab.model,
        teacher: teacher.as_ref(),
        batches: &batches,
        state_dir: &folder.training("state"),
        label: recipe.train.method.label(),
        name: recipe.train.method.name(),
    };
    let model = match recipe.train(&lab, &job)? {
        Training::Stopped(step) => return stopped(step),
        Training::Finished(model, _) => model,
    };
    let calibration = Lab::calibration(&batches);
    let method = recipe.train.method;
    Publication { source: &lab.model, model: &model, method, calibration: &calibration, ranks }
        .publish(&folder)?;
    let tokens = recipe.train.steps() * recipe.train.tokens_per_step();
    print(&format_args!("{}: trained on {tokens} tokens", args.out.display()))
}

/// The model to distill from, if it is another one than the one in training: `given`, with this tokenizer.
fn teacher(
    given: Option<&str>,
    tokenizer: Option<&Path>,
    recipe: &Recipe,
    lab: &Lab<'_>,
) -> Result<Option<RoutedModel>> {
    match given {
        Some(teacher) if recipe.train.has_teacher() => {
            let dir = lab.ranks.first_then_others(|| hub::resolve_with(teacher, tokenizer))?;
            let teacher = Checkpoint::open(&dir)?;
            teacher.config().refuse_biases("distillation").context("--teacher")?;
            RoutedModel::load(&teacher, lab.device).map(Some)
        }
        None if recipe.train.needs_other_teacher() => lab.teacher().map(Some),
        _ => Ok(None),
    }
}
