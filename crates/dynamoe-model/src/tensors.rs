//! Every tensor of a model, with its name and shape: the one list that readers and writers go by.

use anyhow::Result;
use candle_core::Tensor;
use dynamoe::tensors::{NamedShape, compensation, dense, full_name, router, separate};

use crate::config::ModelConfig;

/// The embedding, `(V, D)`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The output matrix, `(V, D)`; absent where config.json ties it to the embedding.
pub const LM_HEAD: &str = "lm_head.weight";

/// Every tensor that a model of this configuration reads, with its shape: the dense model's, then those of
/// [`added_tensors`].
pub fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let d = config.hidden_size;
    let q = config.num_attention_heads * config.head_dim;
    let kv = config.num_key_value_heads * config.head_dim;
    let mut tensors = vec![(EMBEDDING.to_owned(), vec![config.vocab_size, d])];
    for layer in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        };
        add("input_layernorm.weight", &[d]);
        for (name, rows) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
            add(&format!("self_attn.{name}.weight"), &[rows, d]);
            if config.qkv_bias {
                add(&format!("self_attn.{name}.bias"), &[rows]);
            }
        }
        add("self_attn.o_proj.weight", &[d, q]);
        if config.o_bias {
            add("self_attn.o_proj.bias", &[d]);
        }
        if config.qk_norm {
            add("self_attn.q_norm.weight", &[config.head_dim]);
            add("self_attn.k_norm.weight", &[config.head_dim]);
        }
        for name in norms_of_layer(config).into_array().into_iter().flatten() {
            add(&format!("{name}.weight"), &[d]);
        }
        tensors.extend(of_layer(layer, dense(config.intermediate_size, d).into_array()));
        tensors.extend(of_layer(layer, ffn_biases(config).into_iter().flatten()));
    }
    tensors.push(("model.norm.weight".to_owned(), vec![d]));
    if !config.tie_word_embeddings {
        tensors.push((LM_HEAD.to_owned(), vec![config.vocab_size, d]));
    }
    tensors.extend(added_tensors(config));
    tensors
}

/// The names of a layer's norms, but for that of attention's input, which is `input_layernorm`.
pub(crate) struct NormsOfLayer {
    /// Of what attention puts out, if that is normed.
    pub attention_output: Option<&'static str>,
    /// Of the FFN's input.
    pub ffn_input: &'static str,
    /// Of what the FFN puts out, if that is normed.
    pub ffn_output: Option<&'static str>,
}

impl NormsOfLayer {
    fn into_array(self) -> [Option<&'static str>; 3] {
        [self.attention_output, Some(self.ffn_input), self.ffn_output]
    }
}

/// The norms of each layer of a model: the second one's name means another place where outputs are normed.
pub(crate) fn norms_of_layer(config: &ModelConfig) -> NormsOfLayer {
    let second = "post_attention_layernorm";
    if config.output_norms {
        let [input, output] = ["pre_feedforward_layernorm", "post_feedforward_layernorm"];
        return NormsOfLayer { attention_output: Some(second), ffn_input: input, ffn_output: Some(output) };
    }
    NormsOfLayer { attention_output: None, ffn_input: second, ffn_output: None }
}

/// Names below `mlp.` of the biases of gate, up and down.
pub const FFN_BIASES: [&str; 3] = ["gate_proj.bias", "up_proj.bias", "down_proj.bias"];

/// The biases of an FFN, `(I)`, `(I)` and `(D)`, if the model has any.
pub fn ffn_biases(config: &ModelConfig) -> Option<[NamedShape; 3]> {
    let (i, d) = (config.intermediate_size, config.hidden_size);
    let [gate, up, down] = FFN_BIASES;
    config.mlp_bias.then(|| [(gate, vec![i]), (up, vec![i]), (down, vec![d])])
}

/// The tensors that a DynaMoE model has beyond its base's, with their shapes: those of [`router_tensors`] and the
/// smaller experts' separate weights.
pub fn added_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let mut tensors = router_tensors(config);
    if let Some(table) = config.dynamoe.as_ref().and_then(|section| separate(section, config.hidden_size)) {
        let all = 0..config.num_hidden_layers;
        tensors.extend(all.flat_map(|layer| of_layer(layer, table.clone().into_array())));
    }
    tensors
}

/// The tensors of all routers, with their shapes; none for a dense model.
pub fn router_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let Some(section) = &config.dynamoe else { return Vec::new() };
    let mut table: Vec<NamedShape> = router(section, config.hidden_size).into_iter().flatten().collect();
    table.extend(compensation(section, config.hidden_size));
    (0..config.num_hidden_layers).flat_map(|layer| of_layer(layer, table.clone())).collect()
}

/// Hands out the tensors of one layer's FFN by their names below `mlp.`, out of `get`, which knows full names.
pub fn below_mlp(
    layer: usize,
    get: &mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
) -> impl FnMut(&str, &[usize]) -> dynamoe::Result<Tensor> {
    move |name, shape| {
        get(&full_name(layer, name), shape).map_err(|error| dynamoe::Error::Tensor(format!("{error:#}")))
    }
}

fn of_layer(
    layer: usize,
    table: impl IntoIterator<Item = NamedShape>,
) -> impl Iterator<Item = (String, Vec<usize>)> {
    table.into_iter().map(move |(name, shape)| (full_name(layer, name), shape))
}
