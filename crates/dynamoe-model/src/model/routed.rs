//! A whole model as it is served: the backbone around dense or DynaMoE FFNs.

use anyhow::Result;
use candle_core::{DType, Device, Result as CandleResult, Tensor};
use dynamoe::{DynaMoeFfn, PendingRoutes, Router, Routes, names};

use super::{Backbone, Experts};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;

/// A model whose FFNs run only the experts that their routers choose. A dense model is one whose FFNs have a
/// single expert.
#[derive(Debug)]
pub struct RoutedModel {
    backbone: Backbone,
    ffns: Vec<DynaMoeFfn<Experts>>,
}

impl RoutedModel {
    /// Takes every tensor of the model from `get`, called with Hugging Face names and shapes. Tensors are
    /// shared, not copied, but for narrow experts with neurons of their own, which are put together.
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
        Ok(Self { backbone, ffns })
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
    /// candle's.
    pub fn forward(&self, tokens: &Tensor, sensitivity: &[f64]) -> CandleResult<(Tensor, Vec<Routes>)> {
        let mut routes = Vec::with_capacity(self.ffns.len());
        let hidden = self.backbone.forward(tokens, &mut |layer, x| {
            let (y, chosen) = self.ffns[layer].forward_routed(x, &sensitivity[layer..=layer])?;
            routes.push(chosen);
            Ok(y)
        })?;
        Ok((hidden, routes.into_iter().map(PendingRoutes::wait).collect::<CandleResult<_>>()?))
    }

    /// Runs `tokens (B, T)` with experts that were chosen elsewhere, one list for each layer.
    ///
    /// # Errors
    /// candle's.
    pub fn forward_with(&self, tokens: &Tensor, routes: &[Routes]) -> CandleResult<Tensor> {
        self.backbone.forward(tokens, &mut |layer, x| self.ffns[layer].forward_with(x, &routes[layer]))
    }

    /// `hidden (N, D)` → `(N, V)`.
    ///
    /// # Errors
    /// candle's.
    pub fn logits(&self, hidden: &Tensor) -> CandleResult<Tensor> {
        self.backbone.logits(hidden)
    }
}

fn ffn(
    config: &ModelConfig,
    layer: usize,
    get: &mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
) -> Result<DynaMoeFfn<Experts>> {
    let (d, i) = (config.hidden_size, config.intermediate_size);
    let widths = config.expert_widths();
    let mut get = |name: &str, shape: &[usize]| get(&names::mlp(layer, name), shape);
    let (gate, up) = (get(names::GATE_PROJ, &[i, d])?, get(names::UP_PROJ, &[i, d])?);
    let mut experts = Experts::new(gate, up, get(names::DOWN_PROJ, &[d, i])?, &widths)?;
    let Some(dynamoe) = &config.dynamoe else {
        return Ok(DynaMoeFfn::new(experts, Router::of_widths(&widths), None, 1.0)?);
    };
    let p = dynamoe.own_width();
    if p > 0 {
        let (gate, up) = (get(names::OWN_GATE_PROJ, &[p, d])?, get(names::OWN_UP_PROJ, &[p, d])?);
        experts = experts.with_own([&gate, &up, &get(names::OWN_DOWN_PROJ, &[d, p])?])?;
    }
    let router = Router::load(dynamoe, d, &mut |name, shape| {
        get(name, shape).map_err(|error| dynamoe::Error::Config(format!("{error:#}")))
    })?;
    let compensation = dynamoe
        .router
        .compensation
        .then(|| get(names::COMPENSATION, &[dynamoe.experts() - 1, d]))
        .transpose()?;
    Ok(DynaMoeFfn::new(experts, router, compensation, dynamoe.sensitivity)?)
}
