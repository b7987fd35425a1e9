//! From the command line to a model in an engine.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use mistralrs_core::{
    DefaultSchedulerMethod, DeviceMapSetting, LoaderBuilder, MemoryGpuConfig, MistralRs, MistralRsBuilder,
    ModelSelected, PagedAttentionConfig, PagedCacheType, Pipeline, SchedulerConfig, TokenSource,
    get_auto_device_map_params, get_model_dtype, paged_attn_supported, parse_isq_value,
};

use super::{Options, language::Language, source::Selected};
use crate::{
    LoadedModel, ModelKind, loaded,
    moe::budgets::{self, Table},
};

/// A model that is loaded and can be served.
#[derive(Clone)]
pub struct Served {
    /// The engine that runs it.
    pub engine: Arc<MistralRs>,
    /// Its dial and its counters; none if it is dense.
    pub model: Option<Arc<LoadedModel>>,
    /// Its tokenizer and its chat template.
    pub language: Arc<Language>,
    /// Whether prompts may be computed anew in the middle of an answer.
    pub(super) paged: bool,
}

type Loaded = Arc<tokio::sync::Mutex<dyn Pipeline>>;

/// Loads the model that `options` names.
///
/// # Errors
/// Whatever keeps mistral.rs from loading it; a dial that the model does not have.
pub async fn load(options: &Options) -> Result<Served> {
    let before = loaded();
    let selected = Selected::of(options)?;
    let own = options.clone();
    let read = tokio::task::spawn_blocking(move || read(selected.model(), &own));
    let (pipeline, paged) = read
        .await
        .context("the loader ended")
        .flatten()
        .with_context(|| format!("cannot load {}", options.source()))?;
    let model = loaded().into_iter().find(|model| !before.iter().any(|other| Arc::ptr_eq(model, other)));
    read_budgets(model.as_deref(), options)?;
    if let Some(adaptive) = options.adaptive() {
        adaptive.begin(model.as_deref())?;
    }
    match (&model, options.dial()) {
        (Some(model), Some(dial)) => model.set_dial(dial)?,
        (None, Some(_)) => {
            bail!(
                "--sensitivity and --budget set the dial of a DynaMoE or MoE model, but the model that was loaded is dense"
            )
        }
        (_, None) => {}
    }
    let (language, scheduler) = {
        let pipeline = pipeline.lock().await;
        let language =
            Language::of(&*pipeline).with_context(|| format!("cannot serve {}", options.source()))?;
        (Arc::new(language), scheduler(&*pipeline, paged, options.max_seqs)?)
    };
    let engine = MistralRsBuilder::new(pipeline, scheduler, true, None)
        .with_prefix_cache_n(options.prefix_cache)
        .build()
        .await;
    if let Some(model) = &model {
        // the engine's dummy run is no request
        model.counters().reset();
    }
    Ok(Served { engine, model, language, paged })
}

/// Reads the table of budgets of an MoE model: the file that was given, or the one in its folder if there is one.
fn read_budgets(model: Option<&LoadedModel>, options: &Options) -> Result<()> {
    let Some(ModelKind::Moe(moe)) = model.map(LoadedModel::kind) else {
        ensure!(
            options.budgets.is_none(),
            "--budgets is the table of an MoE model, but the model that was loaded is none: a DynaMoE checkpoint has its \
             own"
        );
        return Ok(());
    };
    let beside = || Some(options.folder()?.join(budgets::FILE)).filter(|file| file.exists());
    let Some(file) = options.budgets.clone().or_else(beside) else { return Ok(()) };
    moe.set_budgets(Table::read(&file)?).with_context(|| file.display().to_string())
}

/// Reads the model into memory. Says whether it has paged attention.
fn read(selected: ModelSelected, options: &Options) -> Result<(Loaded, bool)> {
    let device = device(options.cpu)?;
    let paged = options.paged_attn.unwrap_or(device.is_cuda()) && !device.is_cpu() && paged_attn_supported();
    let dtype = get_model_dtype(&selected)?;
    let mapper = DeviceMapSetting::Auto(get_auto_device_map_params(&selected)?);
    let memory = MemoryGpuConfig::Utilization(0.9);
    let cache = paged.then(|| PagedAttentionConfig::new(None, memory, PagedCacheType::Auto)).transpose()?;
    let isq = options.isq.as_deref().map(|isq| parse_isq_value(isq, Some(&device))).transpose();
    let isq = isq.map_err(|error| anyhow::anyhow!("--isq: {error}"))?;
    let loader = LoaderBuilder::new(selected).with_chat_template(options.chat_template.clone()).build()?;
    let pipeline = loader.load_model_from_hf(
        None,
        TokenSource::CacheToken,
        &dtype,
        &device,
        false,
        mapper,
        isq,
        cache,
    )?;
    Ok((pipeline, paged))
}

fn device(cpu: bool) -> Result<Device> {
    if cpu {
        return Ok(Device::Cpu);
    }
    Ok(if cfg!(feature = "metal") { Device::new_metal(0)? } else { Device::cuda_if_available(0)? })
}

fn scheduler(pipeline: &dyn Pipeline, paged: bool, sequences: usize) -> Result<SchedulerConfig> {
    match pipeline.get_metadata().cache_config.clone().filter(|_| paged) {
        Some(config) => Ok(SchedulerConfig::PagedAttentionMeta { max_num_seqs: sequences, config }),
        None => Ok(SchedulerConfig::DefaultScheduler {
            method: DefaultSchedulerMethod::Fixed(sequences.try_into().context("--max-seqs is 0")?),
        }),
    }
}
