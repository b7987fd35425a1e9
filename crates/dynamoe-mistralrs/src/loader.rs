//! Loads a DynaMoE checkpoint: the dense model from the engine's own loader, its FFNs from here.

use std::{collections::HashMap, fmt::Debug};

use anyhow::{Context, Result, bail, ensure};
use candle_core::DType;
use mistralrs_core::{
    AutoDeviceMapParams, Ordering,
    matformer::MatformerSliceConfig,
    plugin::{
        AttentionImplementation, AutoNormalLoader, DeviceMappedModelLoader, IsqModelLoader, LoraConfig,
        ModelConfigLike, NormalLoadingMetadata, NormalModel, NormalModelLoader, XLoraConfig,
    },
};
use mistralrs_quant::ShardedVarBuilder;
use regex::Regex;

use crate::{
    base_config::BaseConfig,
    ffn::swap_ffns,
    model::{DynaMoeModel, NO_ADAPTERS},
    stub,
    weights::LayerWeights,
};

/// The shells' projections, as [`LayerWeights`] names them for quantization while loading.
const SHELLS: &str = r"layers\.(\d+)\.mlp\.(own\.)?shells\.(\d+)\.(gate|up|down)_proj\.(weight|bias)$";

/// mistral.rs's loader of DynaMoE models.
///
/// Everything but the FFNs is the dense model's: each method rewrites config.json to the dense model's and asks
/// mistral.rs's own loader.
pub struct DynaMoeLoader;

fn base(config: &str) -> Result<String> {
    Ok(BaseConfig::parse(config)?.text())
}

impl NormalModelLoader for DynaMoeLoader {
    fn load(
        &self,
        config: &str,
        vb: ShardedVarBuilder,
        metadata: NormalLoadingMetadata,
        attention: AttentionImplementation,
    ) -> Result<Box<dyn NormalModel + Send + Sync>> {
        let base = BaseConfig::parse(config)?;
        ensure!(
            metadata.matformer_slicing_config.is_none(),
            "a MatFormer slice of a DynaMoE model is not supported: set the dial instead"
        );
        let (mapper, loading_isq) = (&metadata.mapper, metadata.loading_isq);
        let mut weights = Vec::new();
        for layer in 0..self.num_layers(config)? {
            let ranks = mapper.get_comm_for(layer)?.world_size();
            ensure!(ranks == 1, "tensor parallelism over {ranks} ranks is not supported for DynaMoE models");
            let ffn = vb.pp("model.layers").pp(layer).pp("mlp");
            weights.push(LayerWeights {
                vb: mapper.set_device(layer, ffn, metadata.loading_isq),
                device: mapper.device_for(layer, false).unwrap_or(&metadata.real_device).clone(),
            });
        }
        let stub_config = base.text_with_width(stub::WIDTH)?;
        let mut dense = AutoNormalLoader.load(&stub_config, stub::without_ffns(&vb), metadata, attention)?;
        let ffns = swap_ffns(dense.get_mlps_mut(), &base.dynamoe, weights)
            .context("cannot load the DynaMoE FFNs")?;
        let mut model = DynaMoeModel::new(dense, ffns);
        // what is quantized or filled after loading gets them then
        if !loading_isq {
            model.use_cpu_kernels()?;
        }
        Ok(Box::new(model))
    }

    fn load_xlora(
        &self,
        _: &str,
        _: ShardedVarBuilder,
        _: &[((String, String), LoraConfig)],
        _: Option<XLoraConfig>,
        _: Ordering,
        _: NormalLoadingMetadata,
        _: &Option<HashMap<String, (ShardedVarBuilder, LoraConfig)>>,
    ) -> Result<Box<dyn NormalModel + Send + Sync>> {
        bail!(NO_ADAPTERS)
    }

    fn is_gptx(&self, config: &str) -> Result<bool> {
        AutoNormalLoader.is_gptx(&base(config)?)
    }

    fn supports_paged_attention(&self, config: &str) -> Result<bool> {
        AutoNormalLoader.supports_paged_attention(&base(config)?)
    }

    fn get_config_repr(&self, config: &str) -> Result<Box<dyn Debug>> {
        AutoNormalLoader.get_config_repr(&base(config)?)
    }
}

impl IsqModelLoader for DynaMoeLoader {
    fn immediate_isq_predicates(&self, config: &str) -> Result<Vec<Regex>> {
        let mut predicates = AutoNormalLoader.immediate_isq_predicates(&base(config)?)?;
        // the stub's FFNs are not worth it
        predicates.retain(|predicate| !predicate.as_str().contains("mlp"));
        predicates.push(Regex::new(SHELLS)?);
        Ok(predicates)
    }

    fn isq_layer_regexes(&self, config: &str) -> Result<Vec<Regex>> {
        AutoNormalLoader.isq_layer_regexes(&base(config)?)
    }
}

impl DeviceMappedModelLoader for DynaMoeLoader {
    fn non_mapped_max_act_size_elems(&self, config: &str, params: &AutoDeviceMapParams) -> Result<usize> {
        AutoNormalLoader.non_mapped_max_act_size_elems(&base(config)?, params)
    }

    fn mapped_max_act_size_elems(&self, config: &str, params: &AutoDeviceMapParams) -> Result<usize> {
        AutoNormalLoader.mapped_max_act_size_elems(&base(config)?, params)
    }

    fn non_mapped_size_in_bytes(
        &self,
        config: &str,
        dtype: DType,
        weight_pack_factor: usize,
        matformer: Option<&MatformerSliceConfig>,
    ) -> Result<usize> {
        AutoNormalLoader.non_mapped_size_in_bytes(&base(config)?, dtype, weight_pack_factor, matformer)
    }

    fn layer_sizes_in_bytes(
        &self,
        config: &str,
        dtype: DType,
        weight_pack_factor: usize,
        matformer: Option<&MatformerSliceConfig>,
    ) -> Result<Vec<usize>> {
        let base = BaseConfig::parse(config)?;
        let router = base.router_elements() * DType::F32.size_in_bytes();
        let mut sizes =
            AutoNormalLoader.layer_sizes_in_bytes(&base.text(), dtype, weight_pack_factor, matformer)?;
        sizes.iter_mut().for_each(|size| *size += router);
        Ok(sizes)
    }

    fn num_layers(&self, config: &str) -> Result<usize> {
        AutoNormalLoader.num_layers(&base(config)?)
    }

    fn model_config(&self, config: &str) -> Result<Box<dyn ModelConfigLike>> {
        AutoNormalLoader.model_config(&base(config)?)
    }
}
