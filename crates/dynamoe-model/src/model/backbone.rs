//! A decoder of any of the architectures, without its FFNs.
//!
//! Each layer: `x += attention(norm(x))`, then `x += ffn(norm(x))`; at the end a norm and the output matrix. In some models
//! what is added passes another norm or is scaled, and embeddings and logits are scaled or capped.

use anyhow::{Context, Result, bail};
use candle_core::{DType, Result as CandleResult, Tensor};

use crate::config::ModelConfig;
use crate::ops::{
    AttentionShape, Norm, Projection, Rotary, SelfAttention, embedding, linear, linear_cross_entropy,
    rms_norm, softcap,
};
use crate::tensors::norms_of_layer;

/// A decoder layer without its FFN.
#[derive(Debug, Clone)]
struct Layer {
    attention: SelfAttention,
    /// Of what attention puts out, `(D)`.
    attention_output_norm: Option<Tensor>,
    /// Of the FFN's input, `(D)`.
    ffn_norm: Tensor,
    /// Of what the FFN puts out, `(D)`.
    ffn_output_norm: Option<Tensor>,
}

/// A decoder-only language model without its FFNs. It computes in f32; weights of another type are converted where they
/// are used, and take less memory in between.
#[derive(Debug, Clone)]
pub struct Backbone {
    config: ModelConfig,
    embed_tokens: Tensor, // (V, D)
    layers: Vec<Layer>,
    norm: Tensor,
    lm_head: Option<Tensor>, // (V, D), none where tied
}

/// Where the rows of a batch stand.
#[derive(Debug, Clone)]
pub struct Places {
    sequences: usize,
    positions: usize,
    rotary: Rotary,
    /// Of layers with a window, if it is another one.
    local: Option<Rotary>,
}

/// Supplies a tensor by its Hugging Face name and shape.
type Source<'a> = dyn FnMut(&str, &[usize]) -> Result<Tensor> + 'a;

impl Backbone {
    /// Takes every tensor but those of the FFNs from `get`, which is called with the Hugging Face name (such as
    /// `model.layers.0.self_attn.q_proj.weight`) and the shape that the configuration asks for. Where `get`
    /// returns a variable's tensor, gradients reach the variable.
    ///
    /// # Errors
    /// A configuration that contradicts itself, those of `get`, a tensor of another shape.
    pub fn from_tensors(config: &ModelConfig, get: &mut Source<'_>) -> Result<Self> {
        check(config)?;
        let (d, v) = (config.hidden_size, config.vocab_size);
        let get = &mut |name: &str, shape: &[usize]| {
            let tensor = get(name, shape).with_context(|| format!("tensor {name}"))?;
            if tensor.dims() != shape {
                bail!("{name}: expected shape {shape:?}, found {:?}", tensor.dims());
            }
            Ok(tensor)
        };
        Ok(Self {
            embed_tokens: get("model.embed_tokens.weight", &[v, d])?,
            layers: (0..config.num_hidden_layers)
                .map(|layer| Layer::from_tensors(config, layer, get))
                .collect::<Result<_>>()?,
            norm: get("model.norm.weight", &[d])?,
            lm_head: if config.tie_word_embeddings { None } else { Some(get("lm_head.weight", &[v, d])?) },
            config: config.clone(),
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The output matrix, `(V, D)`: the embedding where the two are tied.
    pub fn output_matrix(&self) -> &Tensor {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// Runs the layers on `tokens (B, T)`, u32, from position 0. `ffn(layer, x)` is each layer's FFN: it takes
    /// the normed hidden states `(B·T, D)` and returns what is added to the residual stream, of the same shape.
    ///
    /// Returns the hidden states after the final norm, `(B·T, D)`, row `b·T + t`.
    ///
    /// # Errors
    /// A token outside the vocabulary, and those of `ffn`.
    pub fn forward(
        &self,
        tokens: &Tensor,
        ffn: &mut dyn FnMut(usize, &Tensor) -> CandleResult<Tensor>,
    ) -> CandleResult<Tensor> {
        let places = self.places(tokens)?;
        let mut x = self.embed(tokens)?; // (N, D)
        for layer in 0..self.layers.len() {
            x = self.layer(layer, &x, &places, &mut |normed| ffn(layer, normed))?;
        }
        self.norm(&x)
    }

    /// The first layer's input, `(B·T, D)`, for `tokens (B, T)`, u32.
    ///
    /// # Errors
    /// A token outside the vocabulary.
    pub fn embed(&self, tokens: &Tensor) -> CandleResult<Tensor> {
        let x = embedding(&self.embed_tokens, &tokens.flatten_all()?)?.to_dtype(DType::F32)?;
        scaled(x, self.config.scales.embedding)
    }

    /// What layers need to know of `tokens (B, T)` besides their rows.
    ///
    /// # Errors
    /// The device's.
    pub fn places(&self, tokens: &Tensor) -> CandleResult<Places> {
        let (sequences, positions) = tokens.dims2()?;
        let rotary = Rotary::new(&self.config, positions, tokens.device())?;
        let local = Rotary::local(&self.config, positions, tokens.device())?;
        Ok(Places { sequences, positions, rotary, local })
    }

    /// Runs one layer on `x (B·T, D)`. `ffn` is as for [`Backbone::forward`].
    ///
    /// # Errors
    /// As there.
    pub fn layer(
        &self,
        layer: usize,
        x: &Tensor,
        places: &Places,
        ffn: &mut dyn FnMut(&Tensor) -> CandleResult<Tensor>,
    ) -> CandleResult<Tensor> {
        let shape = self.attention_shape(layer, places.sequences, places.positions);
        let rotary = self.rotary(layer, &places.rotary, places.local.as_ref());
        self.layer_around(layer, x, &mut |attention, x| attention.forward(x, rotary, shape), ffn)
    }

    /// The attention of a layer over this many sequences and positions.
    pub(super) fn attention_shape(&self, layer: usize, sequences: usize, positions: usize) -> AttentionShape {
        AttentionShape {
            sequences,
            positions,
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
            window: self.config.sliding_window[layer],
            scale: self.config.scales.attention as f32,
            cap: self.config.scales.attention_cap.map(|cap| cap as f32),
        }
    }

    /// Which of the tables a layer turns by: those of layers with a window are `local`, if they are others. None for a
    /// layer that turns nothing.
    pub(super) fn rotary<'t>(
        &self,
        layer: usize,
        all: &'t Rotary,
        local: Option<&'t Rotary>,
    ) -> Option<&'t Rotary> {
        let local = local.filter(|_| self.config.sliding_window[layer].is_some());
        Some(local.unwrap_or(all)).filter(|_| self.config.rotary_layers[layer])
    }

    /// Runs one layer on rows `x (N, D)`. `attend` is its attention sublayer, as [`SelfAttention::forward`] computes it for
    /// whole sequences, and `ffn` as for [`Backbone::forward`].
    pub(super) fn layer_around(
        &self,
        layer: usize,
        x: &Tensor,
        attend: &mut dyn FnMut(&SelfAttention, &Tensor) -> CandleResult<Tensor>,
        ffn: &mut dyn FnMut(&Tensor) -> CandleResult<Tensor>,
    ) -> CandleResult<Tensor> {
        let Layer { attention, attention_output_norm, ffn_norm, ffn_output_norm } =
            &self.layers[layer].in_f32()?;
        let y = attend(attention, x)?;
        let x = match attention.residual {
            true => y,
            false => self.add(x, y, attention_output_norm.as_ref())?,
        };
        let y = ffn(&rms_norm(&x, ffn_norm, norm_of(&self.config))?)?;
        self.add(&x, y, ffn_output_norm.as_ref())
    }

    /// Adds to the residual stream `x` what a sublayer puts out, `y`, normed with these weights if there are any.
    fn add(&self, x: &Tensor, y: Tensor, weights: Option<&Tensor>) -> CandleResult<Tensor> {
        let y = match weights {
            Some(weights) => rms_norm(&y, weights, norm_of(&self.config))?,
            None => y,
        };
        x + scaled(y, self.config.scales.residual)?
    }

    /// The norm after the last layer: `(N, D)` → `(N, D)`.
    ///
    /// # Errors
    /// Another width than `D`.
    pub fn norm(&self, x: &Tensor) -> CandleResult<Tensor> {
        rms_norm(x, &self.norm.to_dtype(DType::F32)?, norm_of(&self.config))
    }

    /// `hidden (N, D)` → `(N, V)`.
    ///
    /// # Errors
    /// Another width than `D`.
    pub fn logits(&self, hidden: &Tensor) -> CandleResult<Tensor> {
        let hidden = scaled(hidden.clone(), self.config.scales.logits)?;
        softcap(linear(&hidden, &self.output_matrix().to_dtype(DType::F32)?)?, self.logit_cap())
    }

    /// `weights · cross_entropy(logits(hidden), targets)` of each token, `(N)`, in nats, for `hidden (N, D)`,
    /// `targets (N)` u32 and `weights (N)`; saves the logits' time and memory where they are large.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit, a target outside the vocabulary.
    pub fn losses(&self, hidden: &Tensor, targets: &Tensor, weights: &Tensor) -> CandleResult<Tensor> {
        let hidden = scaled(hidden.clone(), self.config.scales.logits)?;
        let matrix = self.output_matrix().to_dtype(DType::F32)?;
        linear_cross_entropy(&hidden, &matrix, targets, weights, self.logit_cap())
    }

    fn logit_cap(&self) -> Option<f32> {
        self.config.scales.logit_cap.map(|cap| cap as f32)
    }
}

impl Layer {
    fn from_tensors(config: &ModelConfig, layer: usize, get: &mut Source<'_>) -> Result<Self> {
        let (d, head_dim) = (config.hidden_size, config.head_dim);
        let (q, kv) = (config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim);
        let mut get = |name: &str, shape: &[usize]| get(&format!("model.layers.{layer}.{name}"), shape);
        let mut projection = |name: &str, out: usize, from: usize, bias: bool| -> Result<Projection> {
            Ok(Projection {
                weight: get(&format!("self_attn.{name}.weight"), &[out, from])?,
                bias: bias.then(|| get(&format!("self_attn.{name}.bias"), &[out])).transpose()?,
            })
        };
        let attention = SelfAttention {
            q: projection("q_proj", q, d, config.qkv_bias)?,
            k: projection("k_proj", kv, d, config.qkv_bias)?,
            v: projection("v_proj", kv, d, config.qkv_bias)?,
            o: projection("o_proj", d, q, config.o_bias)?,
            q_norm: config.qk_norm.then(|| get("self_attn.q_norm.weight", &[head_dim])).transpose()?,
            k_norm: config.qk_norm.then(|| get("self_attn.k_norm.weight", &[head_dim])).transpose()?,
            norm: get("input_layernorm.weight", &[d])?,
            norms: norm_of(config),
            residual: !config.output_norms && config.scales.residual == 1.0,
        };
        let names = norms_of_layer(config);
        let mut norm = |name: &str| get(&format!("{name}.weight"), &[d]);
        Ok(Self {
            attention,
            attention_output_norm: names.attention_output.map(&mut norm).transpose()?,
            ffn_norm: norm(names.ffn_input)?,
            ffn_output_norm: names.ffn_output.map(&mut norm).transpose()?,
        })
    }

    /// The layer with f32 weights; those that are f32 are shared.
    fn in_f32(&self) -> CandleResult<Self> {
        let f32 = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let optional = |tensor: &Option<Tensor>| tensor.as_ref().map(f32).transpose();
        let projection = |projection: &Projection| -> CandleResult<Projection> {
            Ok(Projection { weight: f32(&projection.weight)?, bias: optional(&projection.bias)? })
        };
        let attention = &self.attention;
        let attention = SelfAttention {
            norm: f32(&attention.norm)?,
            q: projection(&attention.q)?,
            k: projection(&attention.k)?,
            v: projection(&attention.v)?,
            o: projection(&attention.o)?,
            q_norm: optional(&attention.q_norm)?,
            k_norm: optional(&attention.k_norm)?,
            norms: attention.norms,
            residual: attention.residual,
        };
        Ok(Self {
            attention,
            attention_output_norm: optional(&self.attention_output_norm)?,
            ffn_norm: f32(&self.ffn_norm)?,
            ffn_output_norm: optional(&self.ffn_output_norm)?,
        })
    }
}

/// What the norms of a model have besides weights.
fn norm_of(config: &ModelConfig) -> Norm {
    Norm { eps: config.rms_norm_eps, offset: config.norm_offset }
}

/// `factor · x`.
fn scaled(x: Tensor, factor: f64) -> CandleResult<Tensor> {
    if factor == 1.0 { Ok(x) } else { x * factor }
}

/// Rejects what would fail or mislead later.
fn check(config: &ModelConfig) -> Result<()> {
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        bail!("num_attention_heads must be a multiple of num_key_value_heads, found {heads} and {kv_heads}");
    }
    if config.head_dim == 0 || !config.head_dim.is_multiple_of(2) {
        bail!("head_dim must be even for rotary embeddings, found {}", config.head_dim);
    }
    let (layers, lists) =
        (config.num_hidden_layers, [config.sliding_window.len(), config.rotary_layers.len()]);
    if lists != [layers; 2] {
        bail!("expected windows and rotary embeddings (or none) of each of {layers} layers, found {lists:?}");
    }
    if config.sliding_window.contains(&Some(0)) {
        bail!("a sliding window must hold 1 position or more, found 0");
    }
    Ok(())
}
