//! A whole model as it is served: the backbone around dense or DynaMoE FFNs.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Result as CandleResult, Tensor};
use dynamoe::{DynaMoeFfn, PendingRoutes, Router, Routes, tensors};

use super::{Backbone, Experts};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::tensors::{below_mlp, ffn_biases};

/// A model whose FFNs run only the experts that their routers choose. A dense model is one whose FFNs have a
/// single expert.
#[derive(Debug)]
pub struct RoutedModel {
    backbone: Backbone,
    ffns: Vec<DynaMoeFfn<Experts>>,
    /// What each FFN's `down_proj` adds, `(D)`; empty without biases.
    biases: Vec<Tensor>,
}

impl RoutedModel {
    /// Takes every tensor of the model from `get`, called with Hugging Face names and shapes. Tensors are
    /// shared, not copied, except where the smaller experts have separate weights: these are put together with what
    /// they share.
    ///
    /// # Errors
    /// Those of `get`; tensors that do not fit the configuration.
    pub fn from_tensors(
        config: &ModelConfig,
        get: &mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        let backbone = Backbone::from_tensors(config, get)?;
        let ffns =
            (0..config.num_hidden_layers).map(|layer| ffn(config, layer, get)).collect::<Result<_>>()?;
        let biases = match config.mlp_bias {
            true => {
                (0..config.num_hidden_layers).map(|layer| bias(config, layer, get)).collect::<Result<_>>()?
            }
            false => Vec::new(),
        };
        Ok(Self { backbone, ffns, biases })
    }

    /// Loads a checkpoint for inference, in f32.
    ///
    /// # Errors
    /// Tensors that are missing or do not fit.
    pub fn load(checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        Self::from_tensors(checkpoint.config(), &mut |name, shape| {
            checkpoint.tensor(name, shape, DType::F32, device)
        })
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.backbone.output_matrix().device()
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        self.backbone.config()
    }

    /// The model without its FFNs.
    pub fn backbone(&self) -> &Backbone {
        &self.backbone
    }

    /// The FFNs, first layer first.
    pub fn ffns(&self) -> &[DynaMoeFfn<Experts>] {
        &self.ffns
    }

    /// `H_e` of every layer.
    pub fn widths(&self) -> Vec<usize> {
        self.config().expert_widths()
    }

    /// Runs `tokens (B, T)` with one sensitivity for each layer. Returns the hidden states after the final
    /// norm, `(B·T, D)`, and each layer's routes.
    ///
    /// # Errors
    /// A token outside the vocabulary.
    pub fn forward(&self, tokens: &Tensor, sensitivity: &[f64]) -> CandleResult<(Tensor, Vec<Routes>)> {
        let mut routes = Vec::with_capacity(self.ffns.len());
        let hidden = self.forward_ffns(tokens, &mut |layer, x| {
            let (y, chosen) = self.ffns[layer].forward_routed(x, &sensitivity[layer..=layer])?;
            routes.push(chosen);
            Ok(y)
        })?;
        Ok((hidden, routes.into_iter().map(PendingRoutes::wait).collect::<CandleResult<_>>()?))
    }

    /// Runs `tokens (B, T)` with experts that were chosen elsewhere, one list for each layer.
    ///
    /// # Errors
    /// A token outside the vocabulary; routes that do not fit, as for [`DynaMoeFfn::forward_with`].
    pub fn forward_with(&self, tokens: &Tensor, routes: &[Routes]) -> CandleResult<Tensor> {
        self.forward_ffns(tokens, &mut |layer, x| self.ffns[layer].forward_with(x, &routes[layer]))
    }

    /// The FFN of a layer at full width: `x (N, D)` → `(N, D)`.
    pub(super) fn full_ffn(&self, layer: usize, x: &Tensor) -> CandleResult<Tensor> {
        let (y, _) = self.ffns[layer].forward_routed(x, &[1.0])?;
        self.add_bias(layer, y)
    }

    /// Runs `tokens (B, T)` with `ffn(layer, x)` in the place of each layer's FFN: `x (B·T, D)` → `(B·T, D)`. What its
    /// `down_proj` has as a bias is added here.
    ///
    /// # Errors
    /// A token outside the vocabulary, and those of `ffn`.
    pub fn forward_ffns(
        &self,
        tokens: &Tensor,
        ffn: &mut dyn FnMut(usize, &Tensor) -> CandleResult<Tensor>,
    ) -> CandleResult<Tensor> {
        self.backbone.forward(tokens, &mut |layer, x| {
            let y = ffn(layer, x)?;
            self.add_bias(layer, y)
        })
    }

    fn add_bias(&self, layer: usize, y: Tensor) -> CandleResult<Tensor> {
        match self.biases.get(layer) {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    /// `hidden (N, D)` → `(N, V)`.
    ///
    /// # Errors
    /// Another width than `D`.
    pub fn logits(&self, hidden: &Tensor) -> CandleResult<Tensor> {
        self.backbone.logits(hidden)
    }
}

/// The bias of a layer's `down_proj`, `(D)`; those of gate and up have to be zero.
fn bias(
    config: &ModelConfig,
    layer: usize,
    get: &mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
) -> Result<Tensor> {
    let [gate, up, down] = ffn_biases(config).context("a model without biases")?;
    for (name, shape) in [gate, up] {
        let largest = get(&tensors::full_name(layer, name), &shape)?.abs()?.max(0)?.to_scalar::<f32>()?;
        ensure!(
            largest == 0.0,
            "{}: only biases of down_proj are computed: expected zeros, found {largest}",
            tensors::full_name(layer, name)
        );
    }
    let (name, shape) = down;
    get(&tensors::full_name(layer, name), &shape)
}

fn ffn(
    config: &ModelConfig,
    layer: usize,
    get: &mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
) -> Result<DynaMoeFfn<Experts>> {
    let (d, widths) = (config.hidden_size, config.expert_widths());
    let mut get = below_mlp(layer, get);
    let dense = tensors::read_projections(&tensors::dense(config.intermediate_size, d), &mut get)?;
    let mut experts = Experts::new(dense, config.hidden_act, &widths)?;
    let Some(dynamoe) = &config.dynamoe else {
        return Ok(DynaMoeFfn::new(experts, Router::of_widths(&widths), None, 1.0)?);
    };
    if let Some(separate) = tensors::separate(dynamoe, d) {
        experts = experts.with_separate(&tensors::read_projections(&separate, &mut get)?)?;
    }
    let router = Router::load(dynamoe, d, &mut get)?;
    let compensation = tensors::read_compensation(dynamoe, d, &mut get)?;
    Ok(DynaMoeFfn::new(experts, router, compensation, dynamoe.sensitivity)?)
}
