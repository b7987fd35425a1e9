//! A model of the engine with its FFNs swapped.

use std::{path::PathBuf, sync::Arc};

use candle_core::{Device, Result, Tensor};
use mistralrs_core::{
    AnyMoeConfig, AnyMoeExpertType, Topology,
    plugin::{
        AnyMoeBaseModelMixin, DeviceMapper, EitherCache, FlashParams, ImatrixDataSource, IsqModel,
        IsqOrganization, MlpLayer, ModelConfigLike, ModelConfigMetadata, MultiProgress, NonGranularState,
        NormalModel, PagedAttentionInputMetadata, UqffFullSer,
    },
    row_data::RowData,
};
use mistralrs_quant::{CollectedImatrixData, IsqType, ShardedVarBuilder};

use crate::{
    dense::swap_dense,
    experts::CpuKernels,
    ffn::SwappedFfns,
    loaded::LoadedModel,
    projection::{Slot, speed_up},
};

pub(crate) const NO_ADAPTERS: &str = "LoRA and X-LoRA adapters on a DynaMoE model are not supported: merge them into the dense model, then convert";

/// Passes everything on to the engine's model, and adds what that does not know of: CPU kernels to what is on the CPU,
/// and for a DynaMoE model the tensors of the routers to what is written, and the default dial to requests that bring
/// none.
pub(crate) struct SwappedModel {
    inner: Inner,
}

/// The engine's model with its FFNs swapped: the engine's own ways to quantize, read and write work on this.
struct Inner {
    base: Box<dyn NormalModel + Send + Sync>,
    ffns: Ffns,
}

/// What took the place of the engine's FFNs.
enum Ffns {
    DynaMoe(SwappedFfns),
    Dense(CpuKernels),
    /// The experts of an MoE model are still the engine's, and only their dial is ours.
    Moe(Arc<LoadedModel>),
}

impl SwappedModel {
    /// A DynaMoE model.
    pub fn new(base: Box<dyn NormalModel + Send + Sync>, ffns: SwappedFfns) -> Self {
        Self { inner: Inner { base, ffns: Ffns::DynaMoe(ffns) } }
    }

    /// A dense model.
    ///
    /// # Errors
    /// An activation that candle does not know.
    pub fn dense(mut base: Box<dyn NormalModel + Send + Sync>) -> anyhow::Result<Self> {
        let kernels = swap_dense(base.get_mlps_mut())?;
        Ok(Self { inner: Inner { base, ffns: Ffns::Dense(kernels) } })
    }

    /// An MoE model.
    pub fn moe(base: Box<dyn NormalModel + Send + Sync>, model: Arc<LoadedModel>) -> Self {
        Self { inner: Inner { base, ffns: Ffns::Moe(model) } }
    }

    /// Runs what is on the CPU on dynamoe's kernels, until the engine changes it.
    pub fn use_cpu_kernels(&mut self) -> Result<()> {
        let Inner { base, ffns } = &mut self.inner;
        let (built, layers) = match ffns {
            Ffns::DynaMoe(ffns) => (ffns.use_cpu_kernels(base.get_mlps_mut())?, base.get_mlps_mut().len()),
            Ffns::Dense(kernels) => (kernels.build(base.get_mlps_mut())?, base.get_mlps_mut().len()),
            Ffns::Moe(_) => (0, 0),
        };
        let mut projections = 0;
        for (slot, _) in base.get_layers().0 {
            projections += usize::from(speed_up(slot)?);
        }
        tracing::info!("CPU kernels run {built} of {layers} FFNs and {projections} other projections");
        #[cfg(feature = "cuda")]
        if let Ffns::DynaMoe(ffns) = ffns {
            let built = ffns.use_cuda_kernels(base.get_mlps_mut())?;
            tracing::info!("CUDA kernels run {built} of {layers} FFNs");
        }
        Ok(())
    }
}

impl Inner {
    fn release_cpu_kernels(&mut self) -> Result<()> {
        match &self.ffns {
            Ffns::DynaMoe(ffns) => {
                #[cfg(feature = "cuda")]
                ffns.release_cuda_kernels();
                ffns.release_cpu_kernels(self.base.get_mlps_mut())
            }
            Ffns::Dense(kernels) => kernels.release(self.base.get_mlps_mut()),
            Ffns::Moe(_) => Ok(()),
        }
    }
}

impl IsqModel for Inner {
    fn get_layers(&mut self) -> (Vec<(&mut Slot, Option<usize>)>, &dyn DeviceMapper) {
        self.base.get_layers()
    }

    fn residual_tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = self.base.residual_tensors();
        if let Ffns::DynaMoe(ffns) = &self.ffns {
            tensors.extend(ffns.tensors.iter().cloned());
        }
        tensors
    }
}

/// As [`Inner`], but the engine gets its own projections before it changes or watches them.
impl IsqModel for SwappedModel {
    fn get_layers(&mut self) -> (Vec<(&mut Slot, Option<usize>)>, &dyn DeviceMapper) {
        self.inner.get_layers()
    }

    fn residual_tensors(&self) -> Vec<(String, Tensor)> {
        self.inner.residual_tensors()
    }

    fn begin_track_stats(&mut self) -> anyhow::Result<()> {
        self.inner.release_cpu_kernels()?;
        self.inner.begin_track_stats()
    }

    fn extract_imatrix_data(&mut self) -> Result<CollectedImatrixData> {
        self.inner.extract_imatrix_data()
    }

    fn quantize(
        &mut self,
        dtype: Option<IsqType>,
        device: Device,
        topology: Option<&Topology>,
        silent: bool,
        imatrix_source: Option<ImatrixDataSource<'_>>,
        organization: IsqOrganization,
        apply_quantization: bool,
        write_artifacts: Option<&PathBuf>,
        full_ser: UqffFullSer<'_>,
        multi_progress: Arc<MultiProgress>,
    ) -> Result<()> {
        if apply_quantization {
            self.inner.release_cpu_kernels()?;
        }
        self.inner.quantize(
            dtype,
            device,
            topology,
            silent,
            imatrix_source,
            organization,
            apply_quantization,
            write_artifacts,
            full_ser,
            multi_progress,
        )?;
        if apply_quantization {
            self.use_cpu_kernels()?;
        }
        Ok(())
    }

    fn load_from_artifacts(
        &mut self,
        device: Device,
        topology: Option<&Topology>,
        silent: bool,
        artifacts: &[PathBuf],
    ) -> Result<()> {
        self.inner.load_from_artifacts(device, topology, silent, artifacts)?;
        self.use_cpu_kernels()
    }
}

impl NormalModel for SwappedModel {
    fn forward(
        &self,
        input_ids: &Tensor,
        seqlen_offsets: &[usize],
        context_lens: Vec<(usize, usize)>,
        position_ids: Vec<usize>,
        metadata: Option<(Vec<(Tensor, Tensor)>, &PagedAttentionInputMetadata)>,
        flash_params: &FlashParams,
    ) -> Result<Tensor> {
        let base = &self.inner.base;
        #[cfg(feature = "cuda")]
        if let Ffns::DynaMoe(ffns) = &self.inner.ffns {
            ffns.passes.clear();
        }
        let logits =
            base.forward(input_ids, seqlen_offsets, context_lens, position_ids, metadata, flash_params)?;
        #[cfg(feature = "cuda")]
        if let Ffns::DynaMoe(ffns) = &self.inner.ffns {
            ffns.count_passes()?;
        }
        Ok(logits)
    }

    fn xlora_forward(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &[usize],
        _: &[usize],
        _: bool,
        _: &Option<NonGranularState>,
        _: Vec<(usize, usize)>,
        _: Vec<usize>,
        _: &FlashParams,
        _: &FlashParams,
    ) -> Result<Tensor> {
        candle_core::bail!("{NO_ADAPTERS}")
    }

    fn is_xlora(&self) -> bool {
        false
    }

    fn device(&self) -> &Device {
        self.inner.base.device()
    }

    fn cache(&self) -> &EitherCache {
        self.inner.base.cache()
    }

    fn cache_mut(&mut self) -> &mut EitherCache {
        self.inner.base.cache_mut()
    }

    fn max_seq_len(&self) -> usize {
        self.inner.base.max_seq_len()
    }

    fn config(&self) -> &ModelConfigMetadata {
        self.inner.base.config()
    }

    fn model_config(&self) -> Arc<dyn ModelConfigLike + Send + Sync> {
        self.inner.base.model_config()
    }

    fn default_row_data(&self) -> Option<Arc<dyn RowData>> {
        match &self.inner.ffns {
            Ffns::DynaMoe(ffns) => Some(ffns.model.default_request()),
            Ffns::Moe(model) => Some(model.default_request()),
            Ffns::Dense(_) => None,
        }
    }
}

/// A dense model's FFNs take part in the engine's AnyMoE as before.
impl AnyMoeBaseModelMixin for SwappedModel {
    fn create_anymoe_layers(
        &mut self,
        additional_vbs: Vec<ShardedVarBuilder>,
        config: AnyMoeConfig,
        names: (String, String),
        layers: Vec<usize>,
        expert_type: AnyMoeExpertType,
        gate_vb: Option<ShardedVarBuilder>,
    ) -> Result<()> {
        if !self.amoe_supported() {
            candle_core::bail!("a DynaMoE model takes no AnyMoE layers");
        }
        let base = &mut self.inner.base;
        base.create_anymoe_layers(additional_vbs, config, names, layers, expert_type, gate_vb)
    }

    fn get_mlps(&self) -> Vec<&dyn MlpLayer> {
        self.inner.base.get_mlps()
    }

    fn get_mlps_mut(&mut self) -> Vec<&mut Box<dyn MlpLayer>> {
        self.inner.base.get_mlps_mut()
    }

    fn amoe_supported(&self) -> bool {
        !matches!(self.inner.ffns, Ffns::DynaMoe(_)) && self.inner.base.amoe_supported()
    }
}
