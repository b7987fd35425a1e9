//! The DynaMoE FFN where mistral.rs expects an MLP.

use std::{sync::Arc, time::Instant};

use anyhow::{Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use dynamoe::{DynaMoeConfig, DynaMoeFfn, HiddenAct, NestedExperts, Router, tensors};
use mistralrs_core::{
    layers::Activation,
    plugin::{AnyMoeTrainableLayer, MlpLayer},
    row_data::row_data,
};

use crate::{
    dial::RequestDial,
    experts::{CpuKernels, EngineExperts},
    loaded::LoadedModel,
    projection::Slot,
    weights::LayerWeights,
};

/// Tensors under their names in the checkpoint.
pub type NamedTensors = Vec<(String, Tensor)>;

/// The FFNs that [`swap_ffns`] put into a model.
pub struct SwappedFfns {
    /// The model's handle: its default dial and its counters.
    pub model: Arc<LoadedModel>,
    /// The tensors that the model has beyond the engine's projections: an engine that writes the model has to
    /// write these too.
    pub tensors: NamedTensors,
    kernels: CpuKernels,
    #[cfg(feature = "cuda")]
    cuda: Vec<Arc<crate::cuda::CudaExperts>>,
    /// What layers have routed on a CUDA device in the forward that is running.
    #[cfg(feature = "cuda")]
    pub(crate) passes: Arc<crate::pending::Passes>,
}

impl SwappedFfns {
    /// Runs FFNs that are on the CPU as one pass over all their shells; `mlps` are those that were swapped. Call this
    /// after quantization, when the weights are final. [`SwappedFfns::release_cpu_kernels`] undoes it.
    ///
    /// Returns how many of the FFNs run so. The others run shell by shell on the engine's projections, as all do
    /// before this call.
    pub fn use_cpu_kernels(&self, mlps: Vec<&mut Box<dyn MlpLayer>>) -> candle_core::Result<usize> {
        let built = self.kernels.build(mlps)?;
        self.model.set_on_cpu_kernels(built);
        Ok(built)
    }

    /// Goes back to the engine's projections, shell by shell. Each gets memory of its own, because candle quantizes all
    /// of the memory that a tensor is a part of.
    pub fn release_cpu_kernels(&self, mlps: Vec<&mut Box<dyn MlpLayer>>) -> candle_core::Result<()> {
        self.kernels.release(mlps)?;
        self.model.set_on_cpu_kernels(0);
        Ok(())
    }

    /// Runs FFNs whose shells are on a CUDA device, unquantized or in Q4K or Q8_0, on dynamoe's kernels, which route on
    /// the device. `mlps`, and when to call this, are as for [`SwappedFfns::use_cpu_kernels`].
    ///
    /// Returns how many of the FFNs run so. The others run shell by shell, and wait for their routes.
    #[cfg(feature = "cuda")]
    pub fn use_cuda_kernels(&self, mlps: Vec<&mut Box<dyn MlpLayer>>) -> candle_core::Result<usize> {
        let mut built = 0;
        for (cuda, mlp) in self.cuda.iter().zip(mlps) {
            let is_silu = matches!(mlp.hidden_act(), Activation::Silu | Activation::Swish);
            let experts = self.model.sizes().len();
            built += usize::from(is_silu && cuda.try_build(mlp.get_isq_layers(), experts)?);
        }
        Ok(built)
    }

    /// Goes back to the engine's projections, shell by shell, because the engine is about to change them.
    #[cfg(feature = "cuda")]
    pub fn release_cuda_kernels(&self) {
        self.cuda.iter().for_each(|cuda| cuda.release());
    }

    /// Counts what layers have routed on a CUDA device since the last call. This waits for the device. Call it after
    /// each forward of the model.
    #[cfg(feature = "cuda")]
    pub fn count_passes(&self) -> candle_core::Result<()> {
        self.passes.count(&self.model)
    }
}

/// Replaces a loaded model's MLPs (one for each layer, first layer first) by the FFNs of a DynaMoE checkpoint;
/// `weights` says where each is read from.
///
/// # Errors
/// MLPs, weights and `config` that do not fit each other, in their activation too; tensors that are missing or of
/// another shape.
pub fn swap_ffns(
    mlps: Vec<&mut Box<dyn MlpLayer>>,
    config: &DynaMoeConfig,
    weights: Vec<LayerWeights>,
) -> Result<SwappedFfns> {
    let layers = mlps.len();
    ensure!(layers == weights.len(), "expected weights for {layers} layers, found {}", weights.len());
    config.validate(config.intermediate_size(), layers)?;
    let model = LoadedModel::register(config.clone(), layers)?;
    let (mut tensors, mut fast) = (Vec::new(), Vec::with_capacity(layers));
    #[cfg(feature = "cuda")]
    let mut cuda = Vec::with_capacity(layers);
    #[cfg(feature = "cuda")]
    let passes = Arc::new(crate::pending::Passes::default());
    for (layer, (mlp, weights)) in mlps.into_iter().zip(weights).enumerate() {
        let hidden_size = mlp.get_params().first().copied().unwrap_or(0);
        let activation = mlp.hidden_act();
        ensure!(
            HiddenAct::of(activation.try_into()?) == Some(config.hidden_act),
            "the engine's MLP of layer {layer} has the activation {activation:?}, expected {:?} as in \"dynamoe\"",
            config.hidden_act.name()
        );
        let ffn = weights.read(config, hidden_size)?;
        tensors.extend(router_tensors(layer, &ffn));
        fast.push(Some(Arc::clone(&ffn.experts().fast)));
        #[cfg(feature = "cuda")]
        cuda.push(Arc::clone(&ffn.experts().cuda));
        *mlp = Box::new(EngineFfn {
            ffn,
            model: Arc::clone(&model),
            #[cfg(feature = "cuda")]
            passes: Arc::clone(&passes),
            layer,
            params: [hidden_size, config.intermediate_size()],
            activation,
        });
    }
    Ok(SwappedFfns {
        model,
        tensors,
        kernels: CpuKernels(fast),
        #[cfg(feature = "cuda")]
        cuda,
        #[cfg(feature = "cuda")]
        passes,
    })
}

/// Router and compensation of a layer.
fn router_tensors<X: NestedExperts>(layer: usize, ffn: &DynaMoeFfn<X>) -> NamedTensors {
    let mut tensors = Vec::new();
    if let Router::Mlp { fc1, fc2 } = ffn.router() {
        tensors.push((tensors::ROUTER_FC1_WEIGHT, Some(fc1.weight())));
        tensors.push((tensors::ROUTER_FC1_BIAS, fc1.bias()));
        tensors.push((tensors::ROUTER_FC2_WEIGHT, Some(fc2.weight())));
        tensors.push((tensors::ROUTER_FC2_BIAS, fc2.bias()));
    }
    tensors.push((tensors::COMPENSATION, ffn.compensation()));
    let named =
        |(name, tensor): (&str, Option<&Tensor>)| Some((tensors::full_name(layer, name), tensor?.clone()));
    tensors.into_iter().filter_map(named).collect()
}

#[derive(Clone)]
struct EngineFfn {
    ffn: DynaMoeFfn<EngineExperts>,
    model: Arc<LoadedModel>,
    #[cfg(feature = "cuda")]
    passes: Arc<crate::pending::Passes>,
    layer: usize,
    params: [usize; 2],
    activation: Activation,
}

impl EngineFfn {
    /// The sensitivity of each of `tokens` tokens, which belong to the rows of a batch in equal shares: a single one
    /// if all agree.
    fn sensitivities(&self, dials: &[Option<&RequestDial>], tokens: usize) -> Vec<f64> {
        let default = self.model.sensitivities()[self.layer];
        let of_row = |dial: &Option<&RequestDial>| dial.map_or(default, |dial| dial.sensitivity(self.layer));
        let rows: Vec<f64> = dials.iter().map(of_row).collect();
        match rows.as_slice() {
            [first, others @ ..] if others.iter().all(|row| row == first) => vec![*first],
            rows => rows.iter().flat_map(|&row| std::iter::repeat_n(row, tokens / rows.len())).collect(),
        }
    }
}

impl MlpLayer for EngineFfn {
    /// `xs (batch, sequence, D)`: prompts come one by one or in batches of equal length, decoding as `(batch, 1, D)`.
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        let batch = xs.dim(0)?;
        let x = xs.reshape(((), xs.dim(D::Minus1)?))?; // (T, D)
        let rows = row_data();
        // the engine's dummy runs have no requests
        let serving = rows.len() == batch;
        let dials: Vec<Option<&RequestDial>> = if serving {
            rows.iter().map(|row| RequestDial::of_row(row, self.model.layers())).collect()
        } else {
            vec![None; batch]
        };
        let sensitivities = self.sensitivities(&dials, x.dim(0)?);
        #[cfg(feature = "cuda")]
        if self.ffn.experts().cuda.is_built() {
            let (y, routes) = self.ffn.forward_routed(&x, &sensitivities)?;
            if serving {
                self.passes.push(self.layer, rows, routes);
            }
            return y.reshape(xs.shape());
        }
        let start = Instant::now();
        let routes = self.ffn.route(&x, &sensitivities)?;
        if serving {
            self.model.count(self.layer, &dials, &routes, start.elapsed());
        }
        self.ffn.forward_with(&x, &routes)?.reshape(xs.shape())
    }

    fn get_isq_layers(&mut self) -> Vec<&mut Slot> {
        self.ffn.experts_mut().slots()
    }

    fn clone(&self) -> Box<dyn MlpLayer> {
        Box::new(Clone::clone(self))
    }

    fn get_params(&self) -> &[usize] {
        &self.params
    }

    fn hidden_act(&self) -> Activation {
        self.activation
    }

    fn new_added_delta(&self, _: Vec<Option<Tensor>>) -> candle_core::Result<Box<dyn MlpLayer>> {
        candle_core::bail!(
            "a DynaMoE FFN cannot take LoRA deltas: merge them into the dense model, then convert"
        )
    }

    fn dtype_device(&self) -> (DType, Device) {
        self.ffn.experts().dtype_device()
    }
}

impl AnyMoeTrainableLayer for EngineFfn {}
