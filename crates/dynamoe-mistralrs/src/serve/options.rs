//! The command line of `dynamoe-serve`.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use anyhow::{Result, anyhow, ensure};
use candle_core::utils::{cuda_is_available, metal_is_available};
use clap::{ArgGroup, Parser, builder::RangedU64ValueParser};
use dynamoe::dial::check_dial;
use dynamoe_model::hub;
use mistralrs_core::{AutoDeviceMapParams, ModelDType, ModelSelected};

use super::adaptive::{Adaptive, Range};
use crate::Dial;

/// Serves a DynaMoE, MoE or dense model over an OpenAI-compatible API.
#[derive(Debug, Clone, Parser)]
#[command(name = "dynamoe-serve", version)]
#[command(group(ArgGroup::new("source").required(true).args(["model", "config"])))]
pub struct Options {
    /// The model: a folder, a .gguf file, or an id on the Hugging Face hub (HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE and
    /// HF_HUB_OFFLINE are honoured)
    #[arg(long, value_name = "DIR|HUB_ID")]
    pub model: Option<String>,
    /// A TOML file that selects the model as mistral.rs documents it (with arch = "dynamoe", or none)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["from_uqff", "write_uqff", "dtype", "max_seq_len"])]
    pub config: Option<PathBuf>,

    /// The dial of requests that bring none, from 0 (smallest expert) to 1 (dense FFN) [default: the checkpoint's]
    #[arg(long, value_parser = dial_value, conflicts_with = "budget")]
    pub sensitivity: Option<f64>,
    /// The same by mean FFN width, as a share of the dense width, through the checkpoint's table of budgets
    #[arg(long, value_parser = dial_value)]
    pub budget: Option<f64>,

    /// Table of budgets of an MoE model, as dynamoe-budgets wrote it [default: dynamoe_budgets.json in the model's folder]
    #[arg(long, value_name = "FILE")]
    pub budgets: Option<PathBuf>,

    /// Let the default budget follow the load, within this range: it falls where tokens come slower than
    /// --target-itl-ms, and rises where there is room
    #[arg(long, value_name = "MIN..MAX", requires = "target_itl_ms", conflicts_with_all = ["sensitivity", "budget"])]
    pub adaptive: Option<Range>,
    /// Time between two tokens of an answer that --adaptive aims at, as the 95th percentile, in milliseconds
    #[arg(long, value_name = "MS", requires = "adaptive", value_parser = RangedU64ValueParser::<u64>::new().range(1..))]
    pub target_itl_ms: Option<u64>,

    /// Quantize while loading: q4k, q8_0, hqq4, …, or a number of bits
    #[arg(long, value_name = "TYPE")]
    pub isq: Option<String>,
    /// Load quantized weights from this UQFF file instead of quantizing
    #[arg(long, value_name = "FILE")]
    pub from_uqff: Option<String>,
    /// Write the quantized weights to this UQFF file after loading
    #[arg(long, value_name = "FILE")]
    pub write_uqff: Option<PathBuf>,
    /// Type of the unquantized weights: auto, bf16, f16 or f32; auto is f32 on a CPU, else bf16 or f16
    #[arg(long, default_value = "auto", value_parser = dtype)]
    pub dtype: ModelDType,
    /// Jinja chat template, if the model's own is missing or to be replaced
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<String>,

    /// Address to listen at; anything but loopback opens the server to the network
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen at; 0 takes a free one
    #[arg(long, default_value_t = 8080)]
    pub port: u16,
    /// Bearer token that PUT /v1/dynamoe asks for; without one, only this machine may set the default dial
    /// [default: the environment's DYNAMOE_TOKEN]
    #[arg(long)]
    pub token: Option<String>,

    /// Key that every request has to present as a bearer token, but for the page and /health
    /// [default: the environment's DYNAMOE_API_KEY, else none is asked for]
    #[arg(long)]
    pub api_key: Option<String>,

    /// Name that the server answers to in the Host header, besides localhost and IP addresses; may be repeated, * is any
    #[arg(long = "allowed-host", value_name = "NAME")]
    pub allowed_hosts: Vec<String>,
    /// Site whose pages may ask this server (CORS), such as `https://chat.example`; may be repeated, * is any
    #[arg(long = "cors-origin", value_name = "ORIGIN")]
    pub cors_origins: Vec<String>,
    /// Answers that one request may ask for (n, best_of)
    #[arg(long, value_name = "COUNT", default_value_t = 8)]
    pub max_choices: u64,
    /// Likeliest tokens that a request may ask for at each position (top_logprobs)
    #[arg(long, value_name = "COUNT", default_value_t = 20)]
    pub max_top_logprobs: u64,
    /// Longest prompt, or all messages of a chat together, in KiB of text
    #[arg(long, value_name = "KIB", default_value_t = 1024)]
    pub max_prompt_kib: usize,

    /// Tokens that all answers to one request may have together
    #[arg(long, value_name = "COUNT", default_value_t = 65536)]
    pub max_answer_tokens: usize,
    /// Largest logits of a prompt whose log probabilities are asked for (echo with logprobs), in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    pub max_logits_mib: usize,

    /// Answers that may wait for others; beyond it a request is told to come again (429)
    #[arg(long, value_name = "COUNT", default_value_t = 256)]
    pub max_waiting: usize,
    /// Connections at the same time
    #[arg(long, value_name = "COUNT", default_value_t = 1024)]
    pub max_connections: usize,
    /// How long the head of a request may take to come
    #[arg(long, value_name = "SECONDS", default_value_t = 15)]
    pub header_timeout: u64,
    /// How long the body of a request may take to come
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub body_timeout: u64,
    /// How long a client may read nothing of its answer before its connection is closed
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub write_timeout: u64,

    /// Answers that are computed at the same time; more wait
    #[arg(long, default_value_t = 16, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub max_seqs: usize,
    /// Longest prompt to plan memory for
    #[arg(long, default_value_t = AutoDeviceMapParams::DEFAULT_MAX_SEQ_LEN)]
    pub max_seq_len: usize,
    /// Prompts to keep keys and values of, for requests that begin alike; 0 turns it off
    #[arg(long, default_value_t = 16)]
    pub prefix_cache: usize,
    /// Paged attention: true or false [default: true on CUDA]
    #[arg(long)]
    pub paged_attn: Option<bool>,
    /// Run on the CPU even where there is an accelerator
    #[arg(long)]
    pub cpu: bool,
    /// Largest request body, in MiB
    #[arg(long, default_value_t = 16)]
    pub max_body_mib: usize,
    /// How long requests in flight may take to finish after SIGTERM or SIGINT
    #[arg(long, default_value_t = 30)]
    pub drain_seconds: u64,
}

/// The folder of a model; one on the hub is fetched, with the files of quantized weights that are named.
///
/// # Errors
/// Neither a folder nor on the hub.
pub(super) fn folder(model: &str, from_uqff: Option<&str>) -> Result<PathBuf> {
    match from_uqff {
        Some(files) => hub::resolve_uqff(model, files),
        None => hub::resolve(model),
    }
}

/// A secret that was given as `option` or in the environment as `variable`.
fn secret(given: Option<&str>, option: &str, variable: &str) -> Result<Option<String>> {
    let secret = given.map(str::to_owned).or_else(|| std::env::var(variable).ok());
    ensure!(secret.as_deref() != Some(""), "{option} is empty: give it or {variable} a value, or neither");
    Ok(secret)
}

fn dial_value(text: &str) -> Result<f64> {
    let value = text.parse().map_err(|_| anyhow!("expected a number from 0 to 1"))?;
    check_dial("the dial", value)?;
    Ok(value)
}

fn dtype(text: &str) -> Result<ModelDType> {
    text.parse().map_err(|error: String| anyhow!(error))
}

impl Options {
    /// The default dial, if one was given.
    pub fn dial(&self) -> Option<Dial> {
        self.sensitivity.map(Dial::Sensitivity).or(self.budget.map(Dial::Budget))
    }

    /// What the default budget follows, if it does.
    pub(super) fn adaptive(&self) -> Option<Adaptive> {
        let (range, target) = self.adaptive.zip(self.target_itl_ms)?;
        Some(Adaptive { range, target: Duration::from_millis(target) })
    }

    /// The token, from the command line or the environment.
    ///
    /// # Errors
    /// An empty one: it would be none, and who set it meant to set one.
    pub(super) fn token(&self) -> Result<Option<String>> {
        secret(self.token.as_deref(), "--token", "DYNAMOE_TOKEN")
    }

    /// The API key, from the command line or the environment.
    ///
    /// # Errors
    /// An empty one.
    pub(super) fn api_key(&self) -> Result<Option<String>> {
        secret(self.api_key.as_deref(), "--api-key", "DYNAMOE_API_KEY")
    }

    fn on_cpu(&self) -> bool {
        self.cpu || !(cuda_is_available() || metal_is_available())
    }

    /// What the model is loaded from, for messages.
    pub(super) fn source(&self) -> String {
        match (&self.model, &self.config) {
            (Some(model), _) => model.clone(),
            (None, Some(file)) => file.display().to_string(),
            (None, None) => "nothing".into(),
        }
    }

    /// The folder that the model is in; none if a TOML file says where it is.
    pub(crate) fn folder(&self) -> Option<PathBuf> {
        folder(self.model.as_deref()?, self.from_uqff.as_deref()).ok()
    }

    /// The engine's way to say which model `--model` is. A model on the hub is fetched.
    ///
    /// # Errors
    /// No model; one that is neither a folder nor on the hub.
    pub(super) fn model_selected(&self) -> Result<ModelSelected> {
        let model = self.model.as_deref().ok_or_else(|| anyhow!("--model or --config is needed"))?;
        let quantized = self.isq.is_some() || self.from_uqff.is_some();
        ensure!(
            self.dtype != ModelDType::BF16 || quantized || !self.on_cpu() || cfg!(feature = "accelerate"),
            "--dtype bf16 does not run on a CPU, which does not multiply it: use f32, or f16 with half the memory"
        );
        Ok(ModelSelected::Run {
            model_id: folder(model, self.from_uqff.as_deref())?.display().to_string(),
            tokenizer_json: None,
            dtype: self.dtype,
            topology: None,
            organization: None,
            write_uqff: self.write_uqff.clone(),
            from_uqff: self.from_uqff.clone(),
            imatrix: None,
            calibration_file: None,
            max_edge: None,
            max_seq_len: self.max_seq_len,
            max_batch_size: self.max_seqs,
            max_num_images: None,
            max_image_length: None,
            hf_cache_path: None,
            matformer_config_path: None,
            matformer_slice_name: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Options, String> {
        let words = std::iter::once("dynamoe-serve").chain(line.split_whitespace());
        Options::try_parse_from(words).map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_line_is_sound() {
        Options::command().debug_assert();
    }

    #[test]
    fn the_dial_is_one_number_from_0_to_1() {
        assert_eq!(parse("--model m").unwrap().dial(), None);
        assert_eq!(parse("--model m --sensitivity 0.9").unwrap().dial(), Some(Dial::Sensitivity(0.9)));
        assert_eq!(parse("--model m --budget 0.5").unwrap().dial(), Some(Dial::Budget(0.5)));
        for wrong in ["--sensitivity 1.1", "--sensitivity=-0.1", "--budget NaN", "--budget half"] {
            assert!(parse(&format!("--model m {wrong}")).unwrap_err().contains("from 0 to 1"), "{wrong}");
        }
        assert!(parse("--model m --budget 0.5 --sensitivity 0.5").is_err());
    }

    #[test]
    fn an_adaptive_dial_needs_a_range_and_a_target() {
        let adaptive = parse("--model m --adaptive 0.4..1 --target-itl-ms 30").unwrap().adaptive().unwrap();
        assert_eq!((adaptive.range.min, adaptive.range.max), (0.4, 1.0));
        assert_eq!(adaptive.target, Duration::from_millis(30));
        assert_eq!(parse("--model m").unwrap().adaptive(), None);
        for wrong in [
            "--adaptive 0.4..1",
            "--target-itl-ms 30",
            "--adaptive 1..0.4 --target-itl-ms 30",
            "--adaptive 0.4..1 --target-itl-ms 0",
            "--adaptive 0.4..1 --target-itl-ms 30 --budget 0.5",
        ] {
            assert!(parse(&format!("--model m {wrong}")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_model_or_a_toml_file_is_needed_and_loopback_is_the_default() {
        assert!(parse("").is_err() && parse("--model m --config c.toml").is_err());
        let error = parse("--model ./nowhere").unwrap().model_selected().unwrap_err().to_string();
        assert!(error.contains("./nowhere: no such folder"), "{error}");
        assert!(parse("--model m").unwrap().host.is_loopback());
        assert!(parse("--model m --max-seqs 0").is_err());
    }

    #[test]
    #[cfg(not(feature = "accelerate"))]
    fn bf16_is_refused_on_a_cpu_that_does_not_multiply_it() {
        let error = parse("--model . --cpu --dtype bf16").unwrap().model_selected().unwrap_err().to_string();
        assert!(error.contains("use f32"), "{error}");
        for fine in ["--dtype f16", "--dtype f32", "--dtype auto", "--dtype bf16 --isq q4k"] {
            assert!(parse(&format!("--model . --cpu {fine}")).unwrap().model_selected().is_ok(), "{fine}");
        }
    }
}
