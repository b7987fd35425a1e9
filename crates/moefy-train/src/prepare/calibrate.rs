//! Statistics of a dense model's FFN neurons on calibration text.
//!
//! `h = act(W_gate x) ∘ (W_up x)` is what the neurons put out. [`super::convert()`] orders neurons by their importance
//! and estimates from `mean h_j` what left-out neurons would add.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use dynamoe::tensors;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::activations::{Activations, DenseFfn, measure};
use super::importance::importance;
use crate::data::PaddedBatch;
use crate::progress::Progress;
use dynamoe_model::checkpoint::{Checkpoint, write_atomic};
use dynamoe_model::model::Backbone;

/// Statistics of one layer's neurons.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerStatistics {
    /// The rank of each neuron, 1 for the least important: `(I)`.
    pub importance: Vec<f32>,
    /// `mean h_j` for each neuron: `(I)`.
    pub mean_activation: Vec<f32>,
}

/// What calibration found out about a model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Calibration {
    /// One for each layer.
    pub layers: Vec<LayerStatistics>,
    /// Tokens that the means are over.
    pub tokens: usize,
    /// [`Checkpoint::fingerprint`] of the model.
    pub fingerprint: String,
}

const IMPORTANCE: &str = "importance";
const MEAN_ACTIVATION: &str = "mean_activation";

impl Calibration {
    /// Checks that these are statistics of `source`.
    ///
    /// # Errors
    /// Another model's, another shape, or a value that is not finite.
    pub fn check(&self, source: &Checkpoint) -> Result<()> {
        let found = source.fingerprint()?;
        ensure!(
            found == self.fingerprint,
            "the calibration is of another model (fingerprint {:.12}…) than {} ({found:.12}…): calibrate again",
            self.fingerprint,
            source.dir().display()
        );
        let (layers, width) = (source.config().num_hidden_layers, source.config().intermediate_size);
        ensure!(
            self.layers.len() == layers,
            "calibration: expected {layers} layers, found {}",
            self.layers.len()
        );
        for (number, layer) in self.layers.iter().enumerate() {
            for (name, values) in [(IMPORTANCE, &layer.importance), (MEAN_ACTIVATION, &layer.mean_activation)]
            {
                ensure!(
                    values.len() == width && values.iter().all(|v| v.is_finite()),
                    "calibration: layer {number}: expected {width} finite values of {name}, found {}",
                    values.len()
                );
            }
        }
        Ok(())
    }

    /// Writes a safetensors file: `layers.N.importance` and `layers.N.mean_activation`, F32 of shape `(I)`;
    /// `tokens` and `fingerprint` are its metadata.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let mut data = BTreeMap::new();
        for (number, layer) in self.layers.iter().enumerate() {
            data.insert(format!("layers.{number}.{IMPORTANCE}"), bytes(&layer.importance));
            data.insert(format!("layers.{number}.{MEAN_ACTIVATION}"), bytes(&layer.mean_activation));
        }
        let views = data
            .iter()
            .map(|(name, bytes)| Ok((name, TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes)?)))
            .collect::<Result<Vec<_>>>()?;
        let metadata = HashMap::from([
            ("format".to_owned(), "dynamoe-calibration".to_owned()),
            ("tokens".to_owned(), self.tokens.to_string()),
            ("fingerprint".to_owned(), self.fingerprint.clone()),
        ]);
        write_atomic(path, &safetensors::serialize(views, Some(metadata))?)
    }

    /// Reads what [`Calibration::save`] wrote.
    ///
    /// # Errors
    /// A missing or broken file, or one of another kind.
    pub fn load(path: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            let bytes = std::fs::read(path)?;
            let (_, metadata) = SafeTensors::read_metadata(&bytes)?;
            let file = SafeTensors::deserialize(&bytes)?;
            let meta = metadata.metadata().as_ref().context("no metadata")?;
            let key = |key: &str| meta.get(key).with_context(|| format!("metadata has no {key:?}"));
            let values = |name: String| -> Result<Vec<f32>> {
                let view = file.tensor(&name).with_context(|| name.clone())?;
                ensure!(view.dtype() == Dtype::F32, "{name}: expected F32, found {}", view.dtype());
                let tensor = candle_core::Tensor::from_raw_buffer(
                    view.data(),
                    DType::F32,
                    &[view.data().len() / 4],
                    &Device::Cpu,
                )?;
                Ok(tensor.to_vec1()?)
            };
            let layers = (0..file.len() / 2)
                .map(|number| {
                    Ok(LayerStatistics {
                        importance: values(format!("layers.{number}.{IMPORTANCE}"))?,
                        mean_activation: values(format!("layers.{number}.{MEAN_ACTIVATION}"))?,
                    })
                })
                .collect::<Result<_>>()?;
            Ok(Self {
                layers,
                tokens: key("tokens")?.parse().context("tokens")?,
                fingerprint: key("fingerprint")?.clone(),
            })
        };
        read().with_context(|| format!("{}: not a calibration file", path.display()))
    }
}

/// Measures a dense model on text, with a progress bar.
///
/// # Errors
/// A model that is not dense; no tokens.
pub fn calibrate(source: &Checkpoint, batches: &[PaddedBatch]) -> Result<Calibration> {
    let config = source.config();
    ensure!(
        config.dynamoe.is_none(),
        "{}: a DynaMoE checkpoint; calibration is of the dense model that it is made from",
        source.dir().display()
    );
    config.refuse_biases("calibration").with_context(|| source.dir().display().to_string())?;
    let mut get = |name: &str, shape: &[usize]| source.tensor(name, shape, DType::F32, &Device::Cpu);
    let backbone = Backbone::from_tensors(config, &mut get)?;
    let (d, i) = (config.hidden_size, config.intermediate_size);
    let ffns = (0..config.num_hidden_layers)
        .map(|layer| {
            let get = |name: &str, shape: [usize; 2]| get(&tensors::full_name(layer, name), &shape);
            Ok(DenseFfn {
                gate_proj: get(tensors::GATE_PROJ, [i, d])?,
                up_proj: get(tensors::UP_PROJ, [i, d])?,
                down_proj: get(tensors::DOWN_PROJ, [d, i])?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let (activations, tokens) = measure(&backbone, &ffns, batches)?;
    let progress = Progress::new("ordering neurons", "layers", ffns.len() as u64, 0);
    let mut layers = Vec::with_capacity(ffns.len());
    for (Activations { mean, sample }, ffn) in activations.into_iter().zip(&ffns) {
        layers.push(LayerStatistics {
            importance: importance(&sample, &ffn.down_proj)?,
            mean_activation: mean,
        });
        progress.add(1);
    }
    progress.finish();
    Ok(Calibration { layers, tokens, fingerprint: source.fingerprint()? })
}
