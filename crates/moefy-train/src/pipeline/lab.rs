//! What the stages of a recipe share: the model that they start from, the text, the device.

use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::Device;
use dynamoe_model::{Checkpoint, RoutedModel, hub};
use serde_json::{Value, json};

use crate::data::{
    Batches, CALIBRATION_TOKENS, DataSource, OwnText, PaddedBatch, SampleShape, Split, TEXT_FIELD,
    TextOptions, Texts, calibration_batches, subsample,
};
use crate::ranks::Ranks;
use crate::train::{Stop, TrainConfig};
use crate::writing::{self, Plan};

/// The text on which results are measured.
#[derive(Debug, Clone)]
pub enum HeldOut {
    /// None is needed: all text is trained on.
    Nothing,
    /// The end of the training text.
    Tail,
    /// Text of its own.
    Files(Vec<DataSource>),
}

impl HeldOut {
    /// `files`, or without any the end of the training text.
    pub fn files_or_tail(files: &[DataSource]) -> Self {
        if files.is_empty() { Self::Tail } else { Self::Files(files.to_vec()) }
    }

    /// The files, if it is any.
    pub fn files(&self) -> &[DataSource] {
        match self {
            Self::Files(files) => files,
            Self::Nothing | Self::Tail => &[],
        }
    }
}

/// What a command reads, as a user names it.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// The model: a folder, a hub id or a GGUF file.
    pub model: String,
    /// The tokenizer.json of a GGUF file; none for the one that the file describes.
    pub tokenizer: Option<PathBuf>,
    /// Text to train on.
    pub data: Vec<DataSource>,
    /// Text to measure on.
    pub held_out: HeldOut,
    /// How text is read.
    pub text: TextOptions,
}

impl Inputs {
    /// Fetches what lies on the hub. `earlier` are settings of the run that goes on; see [`DataSource::fetch`].
    ///
    /// # Errors
    /// Those of [`DataSource::fetch`].
    pub fn fetch(&mut self, earlier: &[Value]) -> Result<()> {
        let held_out = match &mut self.held_out {
            HeldOut::Files(files) => &mut files[..],
            HeldOut::Nothing | HeldOut::Tail => &mut [],
        };
        self.data.iter_mut().chain(held_out).try_for_each(|source| source.fetch(earlier))
    }

    /// The files that are read: texts, and a model in one file.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        let sources = self.data.iter().chain(self.held_out.files()).filter(|source| source.own.is_none());
        let texts = sources.map(|source| source.path.as_path());
        texts.chain(Some(Path::new(&self.model)).filter(|model| model.is_file()))
    }
}

/// The inputs, opened.
pub struct Lab<'a> {
    /// What was opened.
    pub inputs: Inputs,
    /// The model that all stages start from.
    pub model: Checkpoint,
    /// Reads text for it.
    pub texts: Texts,
    /// Where to compute.
    pub device: &'a Device,
    /// Asks trainings to stop.
    pub stop: &'a Stop,
    /// The processes that work together: only the first one writes.
    pub ranks: &'a dyn Ranks,
    /// Where TensorBoard reads how trainings go; none for nowhere.
    pub tensorboard: Option<PathBuf>,
    /// The text that the model is to write itself; none for no such text.
    pub own_text: Option<Plan>,
}

impl<'a> Lab<'a> {
    /// Opens the model and its tokenizer. What is written from a model that names several tokens for the end of a document
    /// says which one it was.
    ///
    /// # Errors
    /// What is missing or broken.
    pub fn open(inputs: Inputs, device: &'a Device, stop: &'a Stop, ranks: &'a dyn Ranks) -> Result<Self> {
        let tokenizer = inputs.tokenizer.as_deref();
        let dir = ranks.first_then_others(|| hub::resolve_with(&inputs.model, tokenizer))?;
        let mut model = Checkpoint::open(&dir)?;
        let texts = Texts::open(&model, &inputs.text)?;
        let mut named = model.config().eos_token_ids.iter().chain(&model.config().bos_token_id);
        let first = named.next();
        if named.any(|id| Some(id) != first) {
            model.set_closing_token(texts.framing().closing);
        }
        Ok(Self { inputs, model, texts, device, stop, ranks, tensorboard: None, own_text: None })
    }

    /// Plans the text that the model is to write itself, if the inputs name such text, for a training with these settings.
    ///
    /// # Errors
    /// Two such texts; a model that cannot be trained; those of [`writing::plan`].
    pub fn plan_own_text(&mut self, train: &TrainConfig) -> Result<()> {
        let Some(own) = DataSource::own_among(&self.inputs.data)? else { return Ok(()) };
        let config = self.model.config();
        // before hours are spent on its text
        config.refuse_biases("training")?;
        let answers_only = self.inputs.text.format.mask_prompt;
        let plan = writing::plan(own, train, answers_only, &self.texts, config)?;
        if let HeldOut::Tail = self.inputs.held_out {
            tracing::warn!(
                "without --valid, results are measured on the model's own text too: they say how near the result is to the \
                 dense model, not how good it is on text of yours"
            );
        }
        self.own_text = Some(plan);
        Ok(())
    }

    /// The training batches of a recipe.
    ///
    /// # Errors
    /// Text that is unreadable or too short; sequences longer than the model's positions; ranks that cannot divide a step.
    pub fn batches(&self, train: &TrainConfig) -> Result<Batches> {
        train.check_ranks(self.ranks.size(), self.device)?;
        let split = match self.inputs.held_out {
            HeldOut::Tail => Split::Train,
            HeldOut::Nothing | HeldOut::Files(_) => Split::All,
        };
        let shape = SampleShape { batch_size: train.micro_batch(), sequence_length: train.sequence_length };
        self.ranks.first_then_others(|| self.texts.training(&self.inputs.data, split, shape, train.seed))
    }

    /// The first training batches, to calibrate on.
    pub fn calibration(batches: &Batches) -> Vec<PaddedBatch> {
        calibration_batches(batches, CALIBRATION_TOKENS)
    }

    /// Text to measure on, about `tokens` of it at most.
    ///
    /// # Errors
    /// Text that is unreadable or too short.
    pub fn held_out(&self, sequence_length: usize, tokens: usize) -> Result<Vec<PaddedBatch>> {
        let files = self.inputs.held_out.files();
        let read = || self.texts.held_out(&self.inputs.data, files, sequence_length);
        Ok(subsample(&self.ranks.first_then_others(read)?, tokens))
    }

    /// The model as a teacher.
    ///
    /// # Errors
    /// Tensors that do not fit.
    pub fn teacher(&self) -> Result<RoutedModel> {
        RoutedModel::load(&self.model, self.device)
    }

    /// All of the inputs that decides a result.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn settings(&self) -> Result<Value> {
        let mut settings = json!({
            "model": self.model.fingerprint()?,
            "data": describe_sources(&self.inputs.data)?,
            "valid": describe_sources(self.inputs.held_out.files())?,
            "marker": self.inputs.text.format.marker,
            "field": self.inputs.text.format.field.as_deref().unwrap_or(TEXT_FIELD),
            "mask-prompt": self.inputs.text.format.mask_prompt,
            "closing-token": self.texts.framing().closing,
        });
        if let Some(plan) = &self.own_text {
            settings[OwnText::NAME] = serde_json::to_value(plan)?;
        }
        Ok(settings)
    }
}

/// All of some sources that decides a result.
///
/// # Errors
/// A file that cannot be read.
pub fn describe_sources(sources: &[DataSource]) -> Result<Value> {
    let describe = |source: &DataSource| -> Result<Value> {
        if source.own.is_some() {
            return Ok(json!({ "path": OwnText::NAME, "weight": source.weight }));
        }
        let path = source.path.display().to_string();
        let commit = source.commit.as_deref();
        Ok(json!({ "path": path, "weight": source.weight, "bytes": source.bytes()?, "commit": commit }))
    };
    sources.iter().map(describe).collect::<Result<Vec<_>>>().map(Value::from)
}
