//! What a token costs at a mean width: parameters used and floating point operations.

use dynamoe::tensors;
use dynamoe_model::ModelConfig;

/// Parameters of the parts of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Embedding, norms, biases: no matrix products.
    other: f64,
    /// Attention's matrices and the output matrix.
    fixed: f64,
    /// The output matrix where it is the embedding again: computed with, but not stored twice.
    tied: f64,
    /// FFN matrices at full width.
    ffn: f64,
    /// Routers.
    router: f64,
}

impl Cost {
    /// Counts the parameters that `config` describes.
    pub fn of(config: &ModelConfig) -> Self {
        let (d, layers) = (config.hidden_size, config.num_hidden_layers);
        let (q, kv) =
            (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        let embedding = config.vocab_size * d;
        let router = config.dynamoe.as_ref().and_then(|section| tensors::router(section, d));
        let router: usize = router.iter().flatten().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        let biases = usize::from(config.qkv_bias) * (q + 2 * kv) + usize::from(config.o_bias) * d;
        let norms = 2 * d + usize::from(config.qk_norm) * 2 * config.head_dim;
        let untied = if config.tie_word_embeddings { 0 } else { embedding };
        Self {
            other: (embedding + d + layers * (biases + norms)) as f64,
            fixed: (layers * (2 * d * q + 2 * d * kv) + untied) as f64,
            tied: (embedding - untied) as f64,
            ffn: (layers * 3 * d * config.intermediate_size) as f64,
            router: (layers * router) as f64,
        }
    }

    /// Parameters of the dense model.
    pub fn dense_parameters(&self) -> f64 {
        self.other + self.fixed + self.ffn
    }

    /// The router runs unless every token is at full width.
    fn router(&self, mean_width: f64) -> f64 {
        if mean_width < 1.0 { self.router } else { 0.0 }
    }

    /// Parameters that a token uses on average, as a share of the dense model's.
    pub fn active_parameters(&self, mean_width: f64) -> f64 {
        (self.other + self.fixed + self.ffn * mean_width + self.router(mean_width)) / self.dense_parameters()
    }

    /// Operations of matrix products with weights, as a share of the dense model's.
    pub fn flops(&self, mean_width: f64) -> f64 {
        let fixed = self.fixed + self.tied;
        (fixed + self.ffn * mean_width + self.router(mean_width)) / (fixed + self.ffn)
    }
}
