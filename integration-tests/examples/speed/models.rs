//! The two models, and requests to them.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use dynamoe_mistralrs::{Dial, LoadedModel, loaded};
use mistralrs::{
    IsqType, Model, ModelDType, NormalRequest, Request, Response, SamplingParams, TextModelBuilder,
    UqffTextModelBuilder, core::RequestMessage,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc;

use crate::support::{Shape, write_checkpoints};

/// Dense and DynaMoE, over the same weights.
pub struct Models {
    pub shape: Shape,
    pub dense: Model,
    pub routed: Model,
    pub handle: Arc<LoadedModel>,
    /// Bytes of a quantized or unquantized weight.
    pub bytes_per_weight: f64,
}

/// What one request took.
pub struct Took {
    /// Seconds from the request to its whole answer.
    pub seconds: f64,
    /// Mean width over all tokens that were computed.
    pub width: f64,
}

impl Models {
    pub async fn load(folder: &Path, architecture: &str, shape: Shape, precision: &str) -> Result<Self> {
        if !folder.join("dynamoe").join("config.json").exists() {
            std::fs::create_dir_all(folder)?;
            write_checkpoints(folder, architecture, shape, 1);
        }
        let isq = isq(precision)?;
        let dense = load(&folder.join("dense"), isq, precision).await?;
        let routed = load(&folder.join("dynamoe"), isq, precision).await?;
        let handle = loaded().pop().context("the DynaMoE model is not listed")?;
        println!("{} of {} FFNs run on the CPU kernels", handle.on_cpu_kernels(), handle.layers());
        let bytes_per_weight = match isq {
            None => 4.0,
            Some(IsqType::Q8_0) => 34.0 / 32.0,
            Some(IsqType::Q4K) => 144.0 / 256.0,
            Some(IsqType::Q6K) => 210.0 / 256.0,
            Some(other) => bail!("how large a weight is in {other:?} is not known here"),
        };
        Ok(Self { shape, dense, routed, handle, bytes_per_weight })
    }

    /// Weights that a token reads outside of FFNs (attention and output matrix), and in the FFNs at full width.
    pub fn weights(&self) -> (f64, f64) {
        let [heads, kv_heads, head_dim] = self.shape.heads.map(|n| n as f64);
        let (d, layers) = (self.shape.hidden_size as f64, self.shape.layers as f64);
        let attention = layers * d * head_dim * (2.0 * heads + 2.0 * kv_heads);
        let ffn = layers * 3.0 * d * self.shape.expert_widths[3] as f64;
        (attention + self.output_weights(), ffn)
    }

    pub fn output_weights(&self) -> f64 {
        (self.shape.hidden_size * self.shape.vocab_size) as f64
    }

    /// The sensitivity whose mean width on a prompt is nearest to `target`.
    pub async fn sensitivity_for(&self, target: f64) -> Result<f64> {
        if target <= 0.25 {
            return Ok(0.0);
        }
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..10 {
            let middle = f64::midpoint(low, high);
            let took = self.run(&self.routed, Some(middle), &prompt(7, 64), 1).await?;
            if took.width < target { low = middle } else { high = middle }
        }
        Ok(f64::midpoint(low, high))
    }

    /// Runs one request.
    pub async fn run(
        &self,
        model: &Model,
        sensitivity: Option<f64>,
        prompt: &[u32],
        new: usize,
    ) -> Result<Took> {
        run(model, &self.handle, sensitivity, prompt, new).await
    }
}

/// Runs one request; `handle` makes its dial, if it has one.
pub async fn run(
    model: &Model,
    handle: &LoadedModel,
    sensitivity: Option<f64>,
    prompt: &[u32],
    new: usize,
) -> Result<Took> {
    let dial = sensitivity.map(|s| handle.request(Dial::Sensitivity(s))).transpose()?;
    let (sender, mut answers) = mpsc::channel(1);
    let messages = RequestMessage::CompletionTokens(prompt.to_vec());
    let sampling = SamplingParams { max_len: Some(new), ..SamplingParams::deterministic() };
    let mut request = NormalRequest::new_simple(messages, sampling, sender, 0, None, None);
    request.logits_processors = dial.as_ref().map(|dial| vec![dial.processor()]);
    let start = Instant::now();
    model.inner().get_sender(None)?.send(Request::Normal(Box::new(request))).await?;
    let usage = match answers.recv().await {
        Some(Response::CompletionDone(answer)) => answer.usage,
        Some(Response::InternalError(error) | Response::ValidationError(error)) => bail!("{error}"),
        _ => bail!("the engine did not answer"),
    };
    let seconds = start.elapsed().as_secs_f64();
    ensure!(usage.completion_tokens == new, "{} tokens came instead of {new}", usage.completion_tokens);
    let width = dial.and_then(|dial| dial.mean_width(handle.full_size())).unwrap_or(1.0);
    Ok(Took { seconds, width })
}

/// What a precision's name means; none for `f32`.
pub fn isq(precision: &str) -> Result<Option<IsqType>> {
    match precision {
        "f32" => Ok(None),
        other => Ok(Some(mistralrs::parse_isq_value(other, None).map_err(anyhow::Error::msg)?)),
    }
}

/// A prompt of its own for each seed.
pub fn prompt(seed: u64, tokens: usize) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..tokens).map(|_| rng.random_range(0..256)).collect()
}

/// Loads a model; a quantized one from a UQFF file, which is made the first time.
pub async fn load(folder: &Path, isq: Option<IsqType>, precision: &str) -> Result<Model> {
    let set = |builder: TextModelBuilder| {
        builder.with_force_cpu().with_dtype(ModelDType::F32).with_prefix_cache_n(None).with_max_num_seqs(16)
    };
    let plain = TextModelBuilder::new(folder.display());
    let Some(isq) = isq else { return set(plain).build().await };
    let quantized = folder.join(precision);
    if !quantized.join("residual.safetensors").exists() {
        drop(set(plain).with_isq(isq).write_uqff(quantized.join("model.uqff")).build().await?);
    }
    let reader = UqffTextModelBuilder::new(quantized.display(), vec![PathBuf::from("model-0.uqff")]);
    set(reader.into_inner()).build().await
}

/// Median and extremes.
pub struct Spread {
    pub median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    pub fn of(numbers: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = numbers.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        Self { median: sorted[sorted.len() / 2], least: sorted[0], most: sorted[sorted.len() - 1] }
    }

    pub fn show(&self, digits: usize) -> String {
        let Self { median, least, most } = self;
        format!("{median:.digits$} [{least:.digits$}–{most:.digits$}]")
    }
}
