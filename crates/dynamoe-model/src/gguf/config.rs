//! config.json of the model in a GGUF file.

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::GgmlDType;
use serde_json::{Value, json};

use super::header::Gguf;
use super::weights::{self, OUTPUT, ROPE_FACTORS, TOKEN_EMBEDDING};
use crate::config::{Architecture, Llama3Rope, ModelConfig, RopeScaling};

/// `general.architecture`, and whose configuration it stands for. A Mistral says that it is a Llama.
const ARCHITECTURES: [(&str, Architecture); 3] =
    [("llama", Architecture::Llama), ("qwen2", Architecture::Qwen2), ("qwen3", Architecture::Qwen3)];

/// Keys of other models of the same name that change the computation, with the values that do not.
const NEUTRAL: [(&str, [f64; 2]); 8] = [
    ("expert_count", [0.0, 0.0]),
    ("logit_scale", [0.0, 1.0]),
    ("embedding_scale", [0.0, 1.0]),
    ("residual_scale", [0.0, 1.0]),
    ("attention.scale", [0.0, 0.0]),
    ("attention.clamp_kqv", [0.0, 0.0]),
    ("attention.max_alibi_bias", [0.0, 0.0]),
    ("final_logit_softcapping", [0.0, 0.0]),
];

/// The keys of `rope.scaling` that are understood.
const SCALING: [&str; 7] = [
    "type",
    "factor",
    "original_context_length",
    "finetuned",
    "attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
];

/// What Llama 3's models have in common, where the file has only the factors that follow from it. A file may name other
/// original positions.
const LLAMA3: Llama3Rope = Llama3Rope {
    factor: 1.0,
    low_freq_factor: 1.0,
    high_freq_factor: 4.0,
    original_max_position_embeddings: 8192,
};

/// The metadata of one architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'static str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn whole(&self, key: &str) -> Result<Option<u64>> {
        self.gguf.whole(&self.name(key))
    }

    fn size(&self, key: &str) -> Result<u64> {
        let found = self.whole(key)?.filter(|&size| size > 0);
        found.with_context(|| format!("{}: {} is missing", self.gguf.path.display(), self.name(key)))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.gguf.number(&self.name(key))
    }
}

/// Whether the rows of q and k are stored as the pairs that are rotated together.
pub(super) fn interleaved(config: &ModelConfig) -> bool {
    matches!(config.architecture, Architecture::Llama | Architecture::Mistral)
}

/// The file's config.json.
///
/// # Errors
/// Another architecture; a key that is missing, or that asks for what is not supported.
pub(super) fn config(gguf: &Gguf) -> Result<Value> {
    let named = gguf.text("general.architecture")?.unwrap_or_default();
    let Some(&(name, mut architecture)) = ARCHITECTURES.iter().find(|(known, _)| *known == named) else {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|(known, _)| *known).collect();
        bail!(
            "{}: architecture {named:?} is not supported in GGUF; supported there: {} (a Mistral is a llama); give \
             other models in safetensors",
            gguf.path.display(),
            known.join(", ")
        )
    };
    let keys = Keys { gguf, architecture: name };
    refuse_unsupported(&keys)?;
    let (hidden, heads) = (keys.size("embedding_length")?, keys.size("attention.head_count")?);
    let head_dim = keys.whole("attention.key_length")?.unwrap_or(hidden / heads);
    for key in ["attention.value_length", "rope.dimension_count"] {
        let found = keys.whole(key)?.unwrap_or(head_dim);
        ensure!(
            found == head_dim,
            "{}: {}: expected {head_dim}, the size of a head, found {found}: it is not supported",
            gguf.path.display(),
            keys.name(key)
        );
    }
    let window = keys.whole("attention.sliding_window")?.filter(|&window| window > 0);
    let theta = keys.number("rope.freq_base")?.unwrap_or(10_000.0);
    let rope_scaling = rope_scaling(&keys, theta, head_dim as usize)?;
    // what mistral.rs computes for a Mistral only
    let special = window.is_some() || head_dim * heads != hidden || rope_scaling["rope_type"] == "yarn";
    if architecture == Architecture::Llama && special {
        architecture = Architecture::Mistral;
    }
    let has = |name: &str| gguf.tensors.contains_key(name);
    let embedding = gguf
        .tensors
        .get(TOKEN_EMBEDDING)
        .with_context(|| format!("{}: tensor {TOKEN_EMBEDDING} is missing", gguf.path.display()))?;
    let id = |key: &str| gguf.whole(&format!("tokenizer.ggml.{key}_token_id"));
    let mut eos: Vec<u64> = id("eos")?.into_iter().chain(id("eot")?).collect();
    eos.dedup();
    Ok(json!({
        "architectures": [architecture.name()],
        "model_type": architecture.model_type(),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length")?,
        "num_hidden_layers": keys.size("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": keys.size("context_length")?,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon")?,
        "rope_theta": theta,
        "rope_scaling": rope_scaling,
        "attention_bias": architecture != Architecture::Qwen2 && has("blk.0.attn_q.bias"),
        "mlp_bias": has("blk.0.ffn_down.bias"),
        "sliding_window": window,
        "tie_word_embeddings": !has(OUTPUT),
        "bos_token_id": id("bos")?,
        "eos_token_id": eos,
        "pad_token_id": id("padding")?,
        "torch_dtype": match embedding.kind {
            GgmlDType::F32 => "float32",
            GgmlDType::F16 => "float16",
            _ => "bfloat16",
        },
    }))
}

fn refuse_unsupported(keys: &Keys<'_>) -> Result<()> {
    let file = keys.gguf.path.display();
    for (key, neutral) in NEUTRAL {
        if let Some(found) = keys.number(key)?.filter(|found| !neutral.contains(found)) {
            bail!("{file}: {} is {found}: the model computes what this program does not", keys.name(key));
        }
    }
    // no program honours it there
    let window = keys.whole("attention.sliding_window")?.unwrap_or(0);
    ensure!(
        window == 0 || keys.architecture == "llama",
        "{file}: {}: windows of this architecture are not supported, found {window}",
        keys.name("attention.sliding_window")
    );
    let scaling = keys.name("rope.scaling.");
    let known = |key: &str| SCALING.contains(&key);
    match keys.gguf.metadata.keys().find(|key| key.strip_prefix(&scaling).is_some_and(|key| !known(key))) {
        Some(key) => bail!("{file}: {key}: it is not supported"),
        None => Ok(()),
    }
}

/// The section `rope_scaling`, null for plain rotary embeddings.
fn rope_scaling(keys: &Keys<'_>, theta: f64, head_dim: usize) -> Result<Value> {
    let file = keys.gguf.path.display();
    if keys.gguf.tensors.contains_key(ROPE_FACTORS) {
        return llama3(keys, theta, head_dim);
    }
    let factor = keys.number("rope.scaling.factor")?.or(keys.number("rope.scale_linear")?);
    let factor = factor.filter(|&factor| factor != 0.0 && factor != 1.0);
    let kind = keys.gguf.text(&keys.name("rope.scaling.type"))?.unwrap_or("linear");
    Ok(match (kind, factor) {
        ("none", _) | ("linear" | "yarn", None) => Value::Null,
        ("linear", Some(factor)) => json!({ "rope_type": "linear", "factor": factor }),
        ("yarn", Some(factor)) => {
            let mut section = json!({ "rope_type": "yarn", "factor": factor });
            for (ours, theirs) in [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")] {
                if let Some(found) = keys.number(&format!("rope.scaling.{theirs}"))? {
                    section[ours] = found.into();
                }
            }
            if let Some(positions) = keys.whole("rope.scaling.original_context_length")? {
                section["original_max_position_embeddings"] = positions.into();
            }
            // llama.cpp multiplies what transformers replaces
            if let Some(found) = keys.number("rope.scaling.attn_factor")?.filter(|&found| found != 1.0) {
                section["attention_factor"] = (found * (0.1 * factor.ln() + 1.0)).into();
            }
            section
        }
        (other, _) => bail!(
            "{file}: {}: {other:?} is not supported; supported: none, linear, yarn",
            keys.name("rope.scaling.type")
        ),
    })
}

/// Llama 3's scaling. The file has the factor of each pair only: they are compared with those that follow from
/// the constants of all its models.
fn llama3(keys: &Keys<'_>, theta: f64, head_dim: usize) -> Result<Value> {
    let found = weights::numbers(keys.gguf, ROPE_FACTORS)?;
    let factor = found.iter().fold(1.0, |most: f64, &factor| most.max(f64::from(factor)));
    let given = keys.whole("rope.scaling.original_context_length")?;
    let original_max_position_embeddings =
        given.map_or(LLAMA3.original_max_position_embeddings, |given| given as usize);
    let rope = Llama3Rope { factor, original_max_position_embeddings, ..LLAMA3 };
    let (plain, _) = RopeScaling::frequencies(theta, head_dim, None);
    let (slowed, _) = RopeScaling::frequencies(theta, head_dim, Some(&RopeScaling::Llama3(rope)));
    let expected: Vec<f64> = plain.iter().zip(&slowed).map(|(plain, slowed)| plain / slowed).collect();
    let fits = |(&found, expected): (&f32, &f64)| (f64::from(found) / expected - 1.0).abs() < 1e-4;
    ensure!(
        found.len() == expected.len() && found.iter().zip(&expected).all(fits),
        "{}: tensor {ROPE_FACTORS}: its factors are not those of Llama 3: the rotary embeddings are not supported",
        keys.gguf.path.display()
    );
    if factor == 1.0 {
        return Ok(Value::Null);
    }
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3.low_freq_factor,
        "high_freq_factor": LLAMA3.high_freq_factor,
        "original_max_position_embeddings": original_max_position_embeddings,
    }))
}
