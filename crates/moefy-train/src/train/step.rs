//! The model while it is trained, and the loss of one batch.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use dynamoe::{TrainableFfn, names};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::config::{Method, Mode, TrainConfig};
use super::dial::Prices;
use super::objective::{LayerInput, Objective};
use dynamoe_model::Params;
use dynamoe_model::config::ModelConfig;
use dynamoe_model::model::{Backbone, RoutedModel};
use dynamoe_model::ops::{RouterWeights, ffn};

/// A model whose weights are trained, all or the routers' only.
pub struct TrainModel {
    config: ModelConfig,
    params: Params,
    frozen: BTreeMap<String, Tensor>,
    backbone: Backbone,
    ffns: Vec<TrainableFfn>,
    routers: Vec<Option<RouterWeights>>,
    prices: Option<Prices>,
}

/// The losses of one batch, each a scalar of the graph.
pub struct StepLoss {
    /// What is minimised.
    pub objective: Tensor,
    /// The language-model loss alone, nats per token.
    pub language_model: Tensor,
    /// Mean FFN width used by each sequence, as a share of the dense width: (B).
    pub widths: Vec<f32>,
    /// Each sequence's dial: (B).
    dials: Vec<f64>,
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
        ensure!(
            config.expert_widths().len() > 1 || !train.method.has_router(),
            "a checkpoint of one expert has nothing to route: --method dense trains it"
        );
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
        let sequences = train.steps() * (train.batch_size * train.accumulation) as u64;
        let priced = train.method == Method::Priced;
        let prices = priced.then(|| Prices::new(&mut params, sequences)).transpose()?;
        Ok(Self { config: config.clone(), params, frozen, backbone, ffns, routers, prices })
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

    /// A layer's FFN with the present weights, outside any graph.
    ///
    /// # Errors
    /// candle's.
    pub fn ffn(&self, layer: usize) -> Result<TrainableFfn> {
        Ok(layer_weights(&self.config, layer, &mut |name, _| self.tensor(name))?.0)
    }

    /// The model as it is served, with the present weights.
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

    /// Moves the price of width, if there is one, by the widths that came out in `loss`'s batch.
    ///
    /// # Errors
    /// candle's.
    pub fn adapt_prices(&self, loss: &StepLoss) -> Result<()> {
        let Some(prices) = &self.prices else { return Ok(()) };
        let narrowest = f64::from(self.width_shares()[0]);
        let found: Vec<f64> =
            loss.widths.iter().map(|&w| (f64::from(w) - narrowest) / (1.0 - narrowest)).collect();
        prices.adapt(&loss.dials, &found)
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
        let prices = match &self.prices {
            Some(prices) => prices.at(&dials)?,
            None => Vec::new(),
        };
        let teacher = teacher.map(|teacher| Lesson::new(teacher, tokens)).transpose()?;
        let shares = Tensor::new(self.width_shares(), tokens.device())?;
        let (mut charged, mut widths, mut strayed) = (Vec::new(), Vec::new(), Vec::new());
        let hidden = self.backbone.forward(tokens, &mut |layer, x| {
            let logits = self.routers[layer].as_ref().map(|router| router.logits(x)).transpose()?;
            let weights = &self.ffns[layer];
            let mut rng = rng(train.seed, step, stream(layer));
            if let Some(teacher) = teacher.as_ref().filter(|_| train.distill_hidden > 0.0 && layer > 0) {
                strayed.push(relative_error(x, &teacher.inputs[layer])?);
            }
            let (dials, prices) = (&dials[..], &prices[..]);
            let input = LayerInput { x, logits: logits.as_ref(), ffn: weights, dials, prices, rng: &mut rng };
            let routed = objective.route(input)?;
            charged.extend(routed.loss);
            let reach = routed.reach.detach().reshape((sequences, (), shares.dim(0)?))?;
            widths.push(reach.mean(1)?.broadcast_mul(&shares)?.sum(1)?); // (B)
            ffn(weights, x, &routed.reach)
        })?;
        let targets = targets.flatten_all()?;
        let ones = Tensor::ones(targets.dim(0)?, DType::F32, targets.device())?;
        let language_model = self.backbone.losses(&hidden, &targets, &ones)?.mean_all()?;
        let mut total = language_model.clone();
        if let Some(teacher) = &teacher {
            if train.distill > 0.0 {
                let logits = self.backbone.logits(&hidden)?;
                total = (total + (teacher.shift(&logits, &targets)? * train.distill)?)?;
            }
            if train.distill_hidden > 0.0 {
                strayed.push(relative_error(&hidden, &teacher.hidden)?);
                total = (total + (Tensor::stack(&strayed, 0)?.mean_all()? * train.distill_hidden)?)?;
            }
        }
        if !charged.is_empty() {
            total = (total + Tensor::stack(&charged, 0)?.mean_all()?)?;
        }
        Ok(StepLoss {
            objective: total,
            language_model: language_model.detach(),
            widths: Tensor::stack(&widths, 0)?.mean(0)?.to_vec1()?,
            dials,
        })
    }

    /// Each shell's share of the width.
    fn width_shares(&self) -> Vec<f32> {
        let widths = self.config.expert_widths();
        let full = self.config.intermediate_size as f32;
        dynamoe::swiglu::shell_ranges(&widths).map(|shell| shell.len() as f32 / full).collect()
    }
}

/// Whether `name` is trained.
fn is_trained(name: &str, train: &TrainConfig) -> bool {
    let of_router = names::is_of_router(name);
    let compensation = name.ends_with(names::COMPENSATION);
    let of_narrow = compensation || names::is_own(name);
    match train.mode {
        Mode::Router => of_router && (train.method.has_router() || compensation),
        Mode::Full if of_narrow => train.method != Method::Dense,
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
        own: match config.dynamoe.as_ref().map_or(0, |dynamoe| dynamoe.own_width()) {
            0 => None,
            p => Some([
                take(names::OWN_GATE_PROJ, &[p, d])?,
                take(names::OWN_UP_PROJ, &[p, d])?,
                take(names::OWN_DOWN_PROJ, &[d, p])?,
            ]),
        },
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

/// What the dense model makes of a batch, without gradient.
struct Lesson {
    /// Probabilities of the next token, (N, V).
    predicted: Tensor,
    /// Input of every layer's FFN, (N, D).
    inputs: Vec<Tensor>,
    /// After the final norm, (N, D).
    hidden: Tensor,
}

impl Lesson {
    fn new(teacher: &RoutedModel, tokens: &Tensor) -> candle_core::Result<Self> {
        let mut inputs = Vec::new();
        let hidden = teacher.backbone().forward(tokens, &mut |layer, x| {
            inputs.push(x.detach());
            Ok(teacher.ffns()[layer].forward_routed(x, &[1.0])?.0)
        })?;
        // without gradient, so the fused operation may be used
        let predicted = candle_nn::ops::softmax_last_dim(&teacher.logits(&hidden)?)?.detach();
        Ok(Self { predicted, inputs, hidden: hidden.detach() })
    }

    /// Cross entropy under the dense model's predictions, less that under the `targets (N)`. Both have the same
    /// normaliser, so with `t` predicted and `y` the target, and `z` the logits, it is `z_y - Σ_v t_v z_v`.
    fn shift(&self, logits: &Tensor, targets: &Tensor) -> candle_core::Result<Tensor> {
        let target = logits.gather(&targets.unsqueeze(1)?, 1)?.mean_all()?;
        let predicted = (&self.predicted * logits)?.sum_all()? / targets.dim(0)? as f64;
        target - predicted?
    }
}

/// `Σ (x - y)² / Σ y²`, a scalar.
fn relative_error(x: &Tensor, y: &Tensor) -> candle_core::Result<Tensor> {
    (x - y)?.sqr()?.sum_all()? / y.sqr()?.sum_all()?
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_nn::ops::{log_softmax, softmax};

    #[test]
    fn the_shift_turns_one_cross_entropy_into_the_other() {
        let random = |columns| Tensor::randn(0f32, 2.0, (6, columns), &Device::Cpu).unwrap();
        let (predicted, hidden) = (softmax(&random(11), 1).unwrap(), random(4));
        let logits = Var::from_tensor(&random(11)).unwrap();
        let targets = Tensor::new(&[0u32, 3, 10, 3, 7, 1], &Device::Cpu).unwrap();
        let log = log_softmax(logits.as_tensor(), 1).unwrap();
        let hard = log.gather(&targets.unsqueeze(1).unwrap(), 1).unwrap().mean_all().unwrap().neg().unwrap();
        let soft = (&predicted * &log).unwrap().sum(1).unwrap().mean_all().unwrap().neg().unwrap();
        let lesson = Lesson { predicted, inputs: Vec::new(), hidden };
        let shifted = (hard + lesson.shift(&logits, &targets).unwrap()).unwrap();
        let value = |t: &Tensor| t.to_scalar::<f32>().unwrap();
        assert!((value(&shifted) - value(&soft)).abs() < 1e-5);
        let gradient =
            |t: &Tensor| t.backward().unwrap().get(&logits).unwrap().flatten_all().unwrap().to_vec1::<f32>();
        for (a, b) in gradient(&shifted).unwrap().iter().zip(gradient(&soft).unwrap()) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }

    #[test]
    fn relative_errors_do_not_depend_on_the_size() {
        let x = Tensor::randn(0f32, 1.0, (5, 3), &Device::Cpu).unwrap();
        let error = |x: &Tensor, y: &Tensor| relative_error(x, y).unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(error(&x, &x), 0.0);
        for size in [1e-3, 1.0, 1e3] {
            let y = (&x * size).unwrap();
            assert!((error(&(&y * 1.5).unwrap(), &y) - 0.25).abs() < 1e-4);
        }
    }
}
