//! Loads a DynaMoE checkpoint: the dense model from the engine's own loader, its FFNs from here. Loads the dense
//! checkpoints of the same architectures too, because the engine's own loaders ignore keys of config.json; and MoE models,
//! whose experts have a dial.

use std::{collections::HashMap, fmt::Debug};

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use dynamoe::DynaMoeConfig;
use mistralrs_core::{
    AutoDeviceMapParams, Ordering,
    matformer::MatformerSliceConfig,
    plugin::{
        AttentionImplementation, DeviceMappedModelLoader, IsqModelLoader, LoraConfig, ModelConfigLike,
        NormalLoadingMetadata, NormalModel, NormalModelLoader, XLoraConfig,
    },
};
use mistralrs_quant::ShardedVarBuilder;
use regex::Regex;

use crate::{
    base_config::BaseConfig,
    checked::{self, check_tied_head},
    ffn::swap_ffns,
    loaded::LoadedModel,
    model::{NO_ADAPTERS, SwappedModel},
    weights::LayerWeights,
};

/// The shells' projections, as [`LayerWeights`] names them for quantization while loading.
const SHELLS: &str = r"layers\.(\d+)\.mlp\.(own\.)?shells\.(\d+)\.(gate|up|down)_proj\.(weight|bias)$";

/// mistral.rs's loader of DynaMoE models, of dense models of the architectures that these are made of, and of MoE models.
///
/// Everything but the FFNs is the dense model's: each method rewrites config.json to the dense model's, as the engine
/// understands it, and asks mistral.rs's own loader. Keys that the engine would ignore are errors.
pub struct DynaMoeLoader;

/// What is asked instead, and the config.json that it is given.
fn base(config: &str) -> Result<(Box<dyn NormalModelLoader>, String)> {
    let base = BaseConfig::parse(config)?;
    Ok((base.loader(), base.text()))
}

impl DynaMoeLoader {
    /// Loads the dense model of `base` around empty FFNs, and puts those of the checkpoint in.
    fn load_dynamoe(
        base: &BaseConfig,
        dynamoe: &DynaMoeConfig,
        vb: &ShardedVarBuilder,
        metadata: NormalLoadingMetadata,
        attention: AttentionImplementation,
    ) -> Result<Box<dyn NormalModel + Send + Sync>> {
        ensure!(
            metadata.matformer_slicing_config.is_none(),
            "a MatFormer slice of a DynaMoE model is not supported: set the dial instead"
        );
        let (mapper, loading_isq) = (&metadata.mapper, metadata.loading_isq);
        let mut weights = Vec::new();
        for layer in 0..base.loader().num_layers(&base.text())? {
            let ranks = mapper.get_comm_for(layer)?.world_size();
            ensure!(ranks == 1, "tensor parallelism over {ranks} ranks is not supported for DynaMoE models");
            let ffn = vb.pp("model.layers").pp(layer).pp("mlp");
            weights.push(LayerWeights {
                vb: mapper.set_device(layer, ffn, metadata.loading_isq),
                device: mapper.device_for(layer, false).unwrap_or(&metadata.real_device).clone(),
            });
        }
        let stub = base.text_with_width(checked::WIDTH);
        let mut dense = base.loader().load(&stub, checked::without_ffns(vb), metadata, attention)?;
        let ffns =
            swap_ffns(dense.get_mlps_mut(), dynamoe, weights).context("cannot load the DynaMoE FFNs")?;
        let mut model = SwappedModel::new(dense, ffns);
        // what is quantized or filled after loading gets them then
        if !loading_isq {
            model.use_cpu_kernels()?;
        }
        Ok(Box::new(model))
    }
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
        if base.is_tied() && !base.is_quantized() {
            check_tied_head(&vb)?;
        }
        if let Some(dynamoe) = &base.dynamoe {
            return Self::load_dynamoe(&base, dynamoe, &vb, metadata, attention);
        }
        let vb = if base.is_quantized() { vb } else { checked::checked(&vb) };
        // what is mapped to several devices, or quantized in the checkpoint, is the engine's
        let on_cpu = metadata.real_device.is_cpu() && !base.is_quantized();
        let loading_isq = metadata.loading_isq;
        let dense = base.loader().load(&base.text(), vb, metadata, attention)?;
        let mut model = match base.moe.clone() {
            Some(experts) => SwappedModel::moe(dense, LoadedModel::register_moe(experts)?),
            None if on_cpu && base.has_mlps() => SwappedModel::dense(dense)?,
            None => return Ok(dense),
        };
        if !loading_isq {
            model.use_cpu_kernels()?;
        }
        Ok(Box::new(model))
    }

    fn load_xlora(
        &self,
        config: &str,
        vb: ShardedVarBuilder,
        lora: &[((String, String), LoraConfig)],
        xlora: Option<XLoraConfig>,
        ordering: Ordering,
        metadata: NormalLoadingMetadata,
        adapters: &Option<HashMap<String, (ShardedVarBuilder, LoraConfig)>>,
    ) -> Result<Box<dyn NormalModel + Send + Sync>> {
        let base = BaseConfig::parse(config)?;
        ensure!(base.dynamoe.is_none(), NO_ADAPTERS);
        base.loader().load_xlora(&base.text(), vb, lora, xlora, ordering, metadata, adapters)
    }

    fn is_gptx(&self, config: &str) -> Result<bool> {
        let (loader, config) = base(config)?;
        loader.is_gptx(&config)
    }

    fn supports_paged_attention(&self, config: &str) -> Result<bool> {
        let (loader, config) = base(config)?;
        loader.supports_paged_attention(&config)
    }

    fn get_config_repr(&self, config: &str) -> Result<Box<dyn Debug>> {
        let (loader, config) = base(config)?;
        loader.get_config_repr(&config)
    }
}

impl IsqModelLoader for DynaMoeLoader {
    fn immediate_isq_predicates(&self, config: &str) -> Result<Vec<Regex>> {
        let base = BaseConfig::parse(config)?;
        let mut predicates = base.loader().immediate_isq_predicates(&base.text())?;
        if base.dynamoe.is_some() {
            // the stub's FFNs are not worth it
            predicates.retain(|predicate| !predicate.as_str().contains("mlp"));
            predicates.push(Regex::new(SHELLS)?);
        }
        Ok(predicates)
    }

    fn isq_layer_regexes(&self, config: &str) -> Result<Vec<Regex>> {
        let (loader, config) = base(config)?;
        loader.isq_layer_regexes(&config)
    }
}

impl DeviceMappedModelLoader for DynaMoeLoader {
    fn non_mapped_max_act_size_elems(&self, config: &str, params: &AutoDeviceMapParams) -> Result<usize> {
        let (loader, config) = base(config)?;
        loader.non_mapped_max_act_size_elems(&config, params)
    }

    fn mapped_max_act_size_elems(&self, config: &str, params: &AutoDeviceMapParams) -> Result<usize> {
        let (loader, config) = base(config)?;
        loader.mapped_max_act_size_elems(&config, params)
    }

    fn non_mapped_size_in_bytes(
        &self,
        config: &str,
        dtype: DType,
        weight_pack_factor: usize,
        matformer: Option<&MatformerSliceConfig>,
    ) -> Result<usize> {
        let (loader, config) = base(config)?;
        loader.non_mapped_size_in_bytes(&config, dtype, weight_pack_factor, matformer)
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
            base.loader().layer_sizes_in_bytes(&base.text(), dtype, weight_pack_factor, matformer)?;
        sizes.iter_mut().for_each(|size| *size += router);
        Ok(sizes)
    }

    fn num_layers(&self, config: &str) -> Result<usize> {
        let (loader, config) = base(config)?;
        loader.num_layers(&config)
    }

    fn model_config(&self, config: &str) -> Result<Box<dyn ModelConfigLike>> {
        let (loader, config) = base(config)?;
        loader.model_config(&config)
    }
}
