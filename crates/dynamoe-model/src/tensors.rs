//! Every tensor of a model, with its name and shape: the one list that readers and writers go by.

use dynamoe::config::RouterKind;
use dynamoe::names;

use crate::config::ModelConfig;

/// The embedding, `(V, D)`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The output matrix, `(V, D)`; absent where config.json ties it to the embedding.
pub const LM_HEAD: &str = "lm_head.weight";

/// Every tensor that a model of this configuration reads, with its shape: the dense model's, then those of
/// [`added_tensors`].
pub fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (d, i) = (config.hidden_size, config.intermediate_size);
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
        add("post_attention_layernorm.weight", &[d]);
        tensors.push((names::mlp(layer, names::GATE_PROJ), vec![i, d]));
        tensors.push((names::mlp(layer, names::UP_PROJ), vec![i, d]));
        tensors.push((names::mlp(layer, names::DOWN_PROJ), vec![d, i]));
    }
    tensors.push(("model.norm.weight".to_owned(), vec![d]));
    if !config.tie_word_embeddings {
        tensors.push((LM_HEAD.to_owned(), vec![config.vocab_size, d]));
    }
    tensors.extend(added_tensors(config));
    tensors
}

/// The tensors that a DynaMoE model has beyond its base's, with their shapes: those of [`router_tensors`] and of
/// narrow experts' own neurons.
pub fn added_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let mut tensors = router_tensors(config);
    let (d, p) = (config.hidden_size, config.dynamoe.as_ref().map_or(0, |section| section.own_width()));
    if p > 0 {
        let shapes = [vec![p, d], vec![p, d], vec![d, p]];
        for layer in 0..config.num_hidden_layers {
            let names = names::OWN_TENSORS.iter().map(|name| names::mlp(layer, name));
            tensors.extend(names.zip(shapes.clone()));
        }
    }
    tensors
}

/// The tensors of all routers, with their shapes; none for a dense model.
pub fn router_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let Some(dynamoe) = &config.dynamoe else { return Vec::new() };
    let (d, r, scores) = (config.hidden_size, dynamoe.router.hidden_size, dynamoe.experts() - 1);
    let mut shapes = Vec::new();
    if dynamoe.router.kind == RouterKind::Mlp {
        shapes.extend([
            (names::ROUTER_FC1_WEIGHT, vec![r, d]),
            (names::ROUTER_FC1_BIAS, vec![r]),
            (names::ROUTER_FC2_WEIGHT, vec![scores, r]),
            (names::ROUTER_FC2_BIAS, vec![scores]),
        ]);
    }
    if dynamoe.router.compensation {
        shapes.push((names::COMPENSATION, vec![scores, d]));
    }
    (0..config.num_hidden_layers)
        .flat_map(|layer| shapes.iter().map(move |(name, shape)| (names::mlp(layer, name), shape.clone())))
        .collect()
}
