//! The model while it is trained: its weights, trained and frozen.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Result as CandleResult, Tensor, Var};
use dynamoe::{TrainableFfn, tensors};
use dynamoe_model::model::Backbone;
use dynamoe_model::ops::RouterWeights;
use dynamoe_model::tensors::below_mlp;
use dynamoe_model::{ModelConfig, Params, RoutedModel};

use super::config::{TrainConfig, Trained};
use super::group::Group;
use crate::methods::Method;

/// A model whose weights are trained, all or some.
pub struct TrainModel {
    config: ModelConfig,
    params: Params,
    frozen: BTreeMap<String, Tensor>,
    pub(super) backbone: Backbone,
    pub(super) ffns: Vec<TrainableFfn>,
    pub(super) routers: Vec<Option<RouterWeights>>,
}

impl TrainModel {
    /// Takes every tensor of `config`'s model from `get`; what the settings do not train stays frozen. Weights are f32. But
    /// where layers are computed again, frozen weights of the dense model stay in the type that they come in and are
    /// converted when a layer's turn comes.
    ///
    /// # Errors
    /// Those of `get`; tensors that do not fit.
    pub fn new(
        config: &ModelConfig,
        train: &TrainConfig,
        get: &mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        ensure!(
            config.expert_widths().len() > 1 || !train.method.has_router(),
            "a checkpoint of one expert has nothing to route: --method dense trains it"
        );
        config.refuse_biases("training")?;
        let separate = config.dynamoe.as_ref().is_some_and(|section| section.separate_shells > 0);
        let mut params = Params::new();
        let mut frozen = BTreeMap::new();
        let mut take = |name: &str, shape: &[usize]| -> Result<Tensor> {
            let mut tensor = get(name, shape)?;
            if is_trained(name, train, separate) {
                return Ok(params.insert(name, &tensor)?.as_tensor().clone());
            }
            let dense = matches!(Group::of(name), Group::DenseFfn | Group::Backbone);
            if !(dense && train.recompute) {
                tensor = tensor.to_dtype(DType::F32)?;
            }
            frozen.insert(name.to_owned(), tensor.clone());
            Ok(tensor)
        };
        let backbone = Backbone::from_tensors(config, &mut take)?;
        let (mut ffns, mut routers) = (Vec::new(), Vec::new());
        for layer in 0..config.num_hidden_layers {
            let (ffn, router) = layer_weights(config, layer, &mut take)?;
            ffns.push(ffn);
            routers.push(router);
        }
        Ok(Self { config: config.clone(), params, frozen, backbone, ffns, routers })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.backbone.output_matrix().device()
    }

    /// What is trained.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The present value of a tensor of the model, trained or frozen, outside any graph.
    ///
    /// # Errors
    /// A name that the model does not have.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let trained = self.params.get(name).map(Var::as_detached_tensor);
        trained.or_else(|| self.frozen.get(name).cloned()).with_context(|| format!("no tensor {name}"))
    }

    /// The FFNs with the present weights, outside any graph, first layer first.
    ///
    /// # Errors
    /// Never, unless the device fails.
    pub fn detached_ffns(&self) -> Result<Vec<TrainableFfn>> {
        let ffn = |layer| Ok(layer_weights(&self.config, layer, &mut |name, _| self.in_f32(name))?.0);
        (0..self.config.num_hidden_layers).map(ffn).collect()
    }

    /// The model as it is served, with the present weights.
    pub fn routed(&self) -> Result<RoutedModel> {
        RoutedModel::from_tensors(&self.config, &mut |name, _| self.in_f32(name))
    }

    /// [`TrainModel::tensor`] in f32.
    ///
    /// # Errors
    /// A name that the model does not have.
    pub fn in_f32(&self, name: &str) -> Result<Tensor> {
        Ok(self.tensor(name)?.to_dtype(DType::F32)?)
    }

    /// A layer's FFN with f32 weights; those that are f32 are shared.
    pub(super) fn ffn(&self, layer: usize) -> CandleResult<TrainableFfn> {
        let f32 = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let ffn = &self.ffns[layer];
        Ok(TrainableFfn {
            gate_proj: f32(&ffn.gate_proj)?,
            up_proj: f32(&ffn.up_proj)?,
            down_proj: f32(&ffn.down_proj)?,
            ..ffn.clone()
        })
    }

    /// Replaces every router's logits by `scale · logit + shift`: the same routes at another place of the dial.
    pub fn rescale_routers(&self, scale: f64, shift: f64) -> Result<()> {
        for (name, var) in self.params.iter() {
            if name.ends_with(tensors::ROUTER_FC2_WEIGHT) {
                var.set(&(var.as_detached_tensor() * scale)?)?;
            } else if name.ends_with(tensors::ROUTER_FC2_BIAS) {
                var.set(&((var.as_detached_tensor() * scale)? + shift)?)?;
            }
        }
        Ok(())
    }

    /// Each shell's share of the width.
    pub(super) fn shell_shares(&self) -> Vec<f32> {
        let widths = self.config.expert_widths();
        let full = self.config.intermediate_size as f32;
        dynamoe::train::glu::shell_ranges(&widths).map(|shell| shell.len() as f32 / full).collect()
    }
}

/// Whether the tensor `name` of a model is trained.
pub(super) fn is_trained(name: &str, train: &TrainConfig, separate: bool) -> bool {
    let group = Group::of(name);
    let routes = train.method.has_router() || name.ends_with(tensors::COMPENSATION);
    let wanted = match group {
        Group::Router => routes && train.method != Method::Dense,
        Group::Separate => train.method != Method::Dense && train.train != Trained::Routers,
        Group::DenseFfn | Group::Backbone => train.train == Trained::All,
    };
    wanted && train.rate(group, separate) > 0.0
}

fn layer_weights(
    config: &ModelConfig,
    layer: usize,
    take: &mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
) -> Result<(TrainableFfn, Option<RouterWeights>)> {
    let (d, section) = (config.hidden_size, config.dynamoe.as_ref());
    let mut take = below_mlp(layer, take);
    let dense = tensors::read_projections(&tensors::dense(config.intermediate_size, d), &mut take)?;
    let separate = section.and_then(|section| tensors::separate(section, d));
    let separate = separate.map(|table| tensors::read_projections(&table, &mut take)).transpose()?;
    let compensation = section.and_then(|section| tensors::compensation(section, d));
    let compensation = compensation.map(|named| tensors::read(&named, &mut take)).transpose()?;
    let ffn = TrainableFfn {
        gate_proj: dense.gate_proj,
        up_proj: dense.up_proj,
        down_proj: dense.down_proj,
        separate,
        compensation,
        widths: config.expert_widths(),
        hidden_act: config.hidden_act,
    };
    let Some(table) = section.and_then(|section| tensors::router(section, d)) else {
        return Ok((ffn, None));
    };
    let mut read = |named| tensors::read(named, &mut take);
    let [fc1_weight, fc1_bias, fc2_weight, fc2_bias] = &table;
    let router = RouterWeights {
        fc1: [read(fc1_weight)?, read(fc1_bias)?],
        fc2: [read(fc2_weight)?, read(fc2_bias)?],
    };
    Ok((ffn, Some(router)))
}
