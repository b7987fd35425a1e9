//! The model while it is trained, and the loss of one batch.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor, Var};
use dynamoe::{TrainableFfn, names};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::config::{Method, Mode, TrainConfig};
use super::objective::{LayerInput, Objective};
use crate::hf_config::ModelConfig;
use crate::model::ops::{RouterWeights, ffn};
use crate::model::{Backbone, Params, RoutedModel};

/// A model whose weights are trained, all or the routers' only.
pub struct TrainModel {
    config: ModelConfig,
    params: Params,
    frozen: BTreeMap<String, Tensor>,
    backbone: Backbone,
    ffns: Vec<TrainableFfn>,
    routers: Vec<Option<RouterWeights>>,
}

/// The losses of one batch, each a scalar of the graph.
pub struct StepLoss {
    /// What is minimised.
    pub objective: Tensor,
    /// The language-model loss alone, nats per token.
    pub language_model: Tensor,
    /// Mean FFN width used, as a share of the dense width.
    pub mean_width: Tensor,
}

/// A generator that depends on nothing but its arguments.
pub fn rng(seed: u64, step: u64, stream: u64) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    for (bytes, value) in key.chunks_exact_mut(8).zip([seed, step, stream, 0x6479_6e61_6d6f_6521]) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

impl TrainModel {
    /// Takes every tensor of `config`'s model from `get`, in f32; what `mode` and `method` do not train stays
    /// frozen.
    ///
    /// # Errors
    /// Those of `get`; tensors that do not fit.
    pub fn new(
        config: &ModelConfig,
        train: &TrainConfig,
        get: &mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut params = Params::new();
        let mut frozen = BTreeMap::new();
        let mut take = |name: &str, shape: &[usize]| -> Result<Tensor> {
            let tensor = get(name, shape)?.to_dtype(DType::F32)?;
            if is_trained(name, train) {
                return Ok(params.insert(name, &tensor)?.as_tensor().clone());
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

    /// The present value of a tensor of the model, trained or frozen, in f32, outside any graph.
    ///
    /// # Errors
    /// A name that the model does not have.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let trained = self.params.get(name).map(Var::as_detached_tensor);
        trained.or_else(|| self.frozen.get(name).cloned()).with_context(|| format!("no tensor {name}"))
    }

    /// The same model as it is served; shares the weights, so it follows the training.
    ///
    /// # Errors
    /// candle's.
    pub fn routed(&self) -> Result<RoutedModel> {
        RoutedModel::from_tensors(&self.config, &mut |name, _| self.tensor(name))
    }

    /// Replaces every router's logits by `scale · logit + shift`: the same routes at another place of the dial.
    ///
    /// # Errors
    /// candle's.
    pub fn rescale_routers(&self, scale: f64, shift: f64) -> Result<()> {
        for (name, var) in self.params.iter() {
            if name.ends_with(names::ROUTER_FC2_WEIGHT) {
                var.set(&(var.as_detached_tensor() * scale)?)?;
            } else if name.ends_with(names::ROUTER_FC2_BIAS) {
                var.set(&((var.as_detached_tensor() * scale)? + shift)?)?;
            }
        }
        Ok(())
    }

    /// The losses of one batch: `tokens` and `targets (B, T)` u32. `streams` numbers the step and the batch
    /// within it, for the dials and the noise.
    ///
    /// # Errors
    /// candle's.
    pub fn loss(
        &self,
        (tokens, targets): (&Tensor, &Tensor),
        objective: &dyn Objective,
        teacher: Option<&RoutedModel>,
        train: &TrainConfig,
        (step, micro): (u64, u64),
    ) -> Result<StepLoss> {
        let (sequences, _) = tokens.dims2()?;
        let stream = |layer: usize| micro << 20 | layer as u64;
        let dials = objective.sample(&mut rng(train.seed, step, stream(0xF_FFFF)), sequences);
        let shares = self.shares(tokens.device())?;
        let (mut charged, mut widths) = (Vec::new(), Vec::new());
        let hidden = self.backbone.forward(tokens, &mut |layer, x| {
            let logits = self.routers[layer].as_ref().map(|router| router.logits(x)).transpose()?;
            let weights = &self.ffns[layer];
            let mut rng = rng(train.seed, step, stream(layer));
            let input = LayerInput { x, logits: logits.as_ref(), ffn: weights, dials: &dials, rng: &mut rng };
            let routed = objective.route(input)?;
            charged.extend(routed.loss);
            widths.push(routed.reach.detach().mean(0)?.mul(&shares)?.sum_all()?);
            ffn(weights, x, &routed.reach)
        })?;
        let targets = targets.flatten_all()?;
        let ones = Tensor::ones(targets.dim(0)?, DType::F32, targets.device())?;
        let language_model = self.backbone.losses(&hidden, &targets, &ones)?.mean_all()?;
        let mut total = match teacher {
            Some(teacher) => {
                let distilled = distillation(&self.backbone.logits(&hidden)?, teacher, tokens)?;
                ((&language_model * (1.0 - train.distill))? + (distilled * train.distill)?)?
            }
            None => language_model.clone(),
        };
        if !charged.is_empty() {
            total = (total + Tensor::stack(&charged, 0)?.mean_all()?)?;
        }
        Ok(StepLoss {
            objective: total,
            language_model: language_model.detach(),
            mean_width: Tensor::stack(&widths, 0)?.mean_all()?,
        })
    }

    /// Each shell's share of the width, (E).
    fn shares(&self, device: &Device) -> Result<Tensor> {
        let widths = self.config.expert_widths();
        let full = self.config.intermediate_size as f32;
        let shells: Vec<f32> =
            dynamoe::swiglu::shell_ranges(&widths).map(|shell| shell.len() as f32 / full).collect();
        Ok(Tensor::new(shells, device)?)
    }
}

/// Whether `name` is trained.
fn is_trained(name: &str, train: &TrainConfig) -> bool {
    let of_router = name.contains(".mlp.router.");
    let compensation = name.ends_with(names::COMPENSATION);
    match train.mode {
        Mode::Router => of_router && (train.method.has_router() || compensation),
        Mode::Full if compensation => train.method != Method::Dense,
        Mode::Full => !of_router || train.method.has_router(),
    }
}

fn layer_weights(
    config: &ModelConfig,
    layer: usize,
    take: &mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
) -> Result<(TrainableFfn, Option<RouterWeights>)> {
    let (d, i) = (config.hidden_size, config.intermediate_size);
    let widths = config.expert_widths();
    let narrower = widths.len() - 1;
    let mut take = |name: &str, shape: &[usize]| take(&names::mlp(layer, name), shape);
    let ffn = TrainableFfn {
        gate_proj: take(names::GATE_PROJ, &[i, d])?,
        up_proj: take(names::UP_PROJ, &[i, d])?,
        down_proj: take(names::DOWN_PROJ, &[d, i])?,
        compensation: match &config.dynamoe {
            Some(dynamoe) if dynamoe.router.compensation => Some(take(names::COMPENSATION, &[narrower, d])?),
            _ => None,
        },
        widths,
    };
    let router = match &config.dynamoe {
        Some(dynamoe) if dynamoe.router.kind == dynamoe::RouterKind::Mlp => {
            let r = dynamoe.router.hidden_size;
            Some(RouterWeights {
                fc1: [take(names::ROUTER_FC1_WEIGHT, &[r, d])?, take(names::ROUTER_FC1_BIAS, &[r])?],
                fc2: [
                    take(names::ROUTER_FC2_WEIGHT, &[narrower, r])?,
                    take(names::ROUTER_FC2_BIAS, &[narrower])?,
                ],
            })
        }
        _ => None,
    };
    Ok((ffn, router))
}

/// Cross entropy of the student's prediction under the dense teacher's, nats per token.
fn distillation(logits: &Tensor, teacher: &RoutedModel, tokens: &Tensor) -> Result<Tensor> {
    let full = vec![1.0; teacher.config().num_hidden_layers];
    let hidden = teacher.forward(tokens, &full)?.0;
    let target = candle_nn::ops::softmax(&teacher.logits(&hidden)?, D::Minus1)?.detach();
    let predicted = candle_nn::ops::log_softmax(logits, D::Minus1)?;
    Ok((target * predicted)?.sum(D::Minus1)?.mean_all()?.neg()?)
}
