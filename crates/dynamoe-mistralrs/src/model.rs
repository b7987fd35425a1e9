//! The dense model of the engine with its FFNs swapped.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};
use mistralrs_core::{
    plugin::{
        AnyMoeBaseModelMixin, DeviceMapper, EitherCache, FlashParams, IsqModel, ModelConfigLike,
        ModelConfigMetadata, NonGranularState, NormalModel, PagedAttentionInputMetadata,
    },
    row_data::RowData,
};
use mistralrs_quant::QuantMethod;

use crate::{dial::LoadedModel, ffn::NamedTensors};

/// Passes everything on to the dense model, and adds what that does not know of: the tensors of the routers to
/// what is written, and the default dial to requests that bring none.
pub(crate) struct DynaMoeModel {
    pub base: Box<dyn NormalModel + Send + Sync>,
    pub handle: Arc<LoadedModel>,
    pub router_tensors: NamedTensors,
}

impl IsqModel for DynaMoeModel {
    fn get_layers(&mut self) -> (Vec<(&mut Arc<dyn QuantMethod>, Option<usize>)>, &dyn DeviceMapper) {
        self.base.get_layers()
    }

    fn residual_tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = self.base.residual_tensors();
        tensors.extend(self.router_tensors.iter().cloned());
        tensors
    }
}

impl NormalModel for DynaMoeModel {
    fn forward(
        &self,
        input_ids: &Tensor,
        seqlen_offsets: &[usize],
        context_lens: Vec<(usize, usize)>,
        position_ids: Vec<usize>,
        metadata: Option<(Vec<(Tensor, Tensor)>, &PagedAttentionInputMetadata)>,
        flash_params: &FlashParams,
    ) -> Result<Tensor> {
        self.base.forward(input_ids, seqlen_offsets, context_lens, position_ids, metadata, flash_params)
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
        candle_core::bail!("{}", crate::loader::NO_ADAPTERS)
    }

    fn is_xlora(&self) -> bool {
        false
    }

    fn device(&self) -> &Device {
        self.base.device()
    }

    fn cache(&self) -> &EitherCache {
        self.base.cache()
    }

    fn cache_mut(&mut self) -> &mut EitherCache {
        self.base.cache_mut()
    }

    fn max_seq_len(&self) -> usize {
        self.base.max_seq_len()
    }

    fn config(&self) -> &ModelConfigMetadata {
        self.base.config()
    }

    fn model_config(&self) -> Arc<dyn ModelConfigLike + Send + Sync> {
        self.base.model_config()
    }

    fn default_row_data(&self) -> Option<Arc<dyn RowData>> {
        Some(self.handle.default_request())
    }
}

impl AnyMoeBaseModelMixin for DynaMoeModel {}
