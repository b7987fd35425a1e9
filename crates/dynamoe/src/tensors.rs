//! Every tensor of a DynaMoE layer, with its name below `mlp.` and its shape: the one table that readers and writers
//! go by.
//!
//! The dense FFN keeps its Hugging Face names, with its neurons in another order. A layer adds its router and its
//! compensation under `router`, and the smaller experts' separate weights under `own`.

use candle_core::{DType, Tensor};

use crate::config::{DynaMoeConfig, RouterKind};
use crate::error::{Error, Result};
use crate::experts::Projections;

/// gate, `(I, D)`.
pub const GATE_PROJ: &str = "gate_proj.weight";
/// up, `(I, D)`.
pub const UP_PROJ: &str = "up_proj.weight";
/// down, `(D, I)`.
pub const DOWN_PROJ: &str = "down_proj.weight";
/// The router's first matrix, `(R, D)`.
pub const ROUTER_FC1_WEIGHT: &str = "router.fc1.weight";
/// The router's first bias, `(R)`.
pub const ROUTER_FC1_BIAS: &str = "router.fc1.bias";
/// The router's second matrix, `(E-1, R)`.
pub const ROUTER_FC2_WEIGHT: &str = "router.fc2.weight";
/// The router's second bias, `(E-1)`.
pub const ROUTER_FC2_BIAS: &str = "router.fc2.bias";
/// What each expert but the largest adds for the neurons that it leaves out, `(E-1, D)`.
pub const COMPENSATION: &str = "router.compensation";
/// The smaller experts' gate, `(P, D)`.
pub const SEPARATE_GATE_PROJ: &str = "own.gate_proj.weight";
/// The smaller experts' up, `(P, D)`.
pub const SEPARATE_UP_PROJ: &str = "own.up_proj.weight";
/// The smaller experts' down, `(D, P)`.
pub const SEPARATE_DOWN_PROJ: &str = "own.down_proj.weight";
/// Where each neuron stood in the base's FFN, `(I)`: whole numbers in F32. Optional; no layer reads it.
pub const ORDER: &str = "order";
/// The smaller experts' gate, up and down.
pub const SEPARATE_TENSORS: [&str; 3] = [SEPARATE_GATE_PROJ, SEPARATE_UP_PROJ, SEPARATE_DOWN_PROJ];

/// A tensor's name below `mlp.`, and its shape.
pub type NamedShape = (&'static str, Vec<usize>);

/// Hands out the tensor of a name below `mlp.`, in a shape.
pub type Get<'a> = dyn FnMut(&str, &[usize]) -> Result<Tensor> + 'a;

/// The dense FFN's matrices: gate and up `(I, D)`, whose rows are neurons, and down `(D, I)`, whose columns are.
pub fn dense(intermediate_size: usize, hidden_size: usize) -> Projections<NamedShape> {
    let (i, d) = (intermediate_size, hidden_size);
    Projections {
        gate_proj: (GATE_PROJ, vec![i, d]),
        up_proj: (UP_PROJ, vec![i, d]),
        down_proj: (DOWN_PROJ, vec![d, i]),
    }
}

/// The smaller experts' separate weights in place of the first `P` neurons, shaped like [`dense`]; none where these
/// share all neurons with the largest.
pub fn separate(config: &DynaMoeConfig, hidden_size: usize) -> Option<Projections<NamedShape>> {
    let (p, d) = (config.separate_width(), hidden_size);
    (p > 0).then(|| Projections {
        gate_proj: (SEPARATE_GATE_PROJ, vec![p, d]),
        up_proj: (SEPARATE_UP_PROJ, vec![p, d]),
        down_proj: (SEPARATE_DOWN_PROJ, vec![d, p]),
    })
}

/// The router's first matrix `(R, D)` and bias `(R)`, and its second matrix `(E-1, R)` and bias `(E-1)`; none for
/// [`RouterKind::Static`].
pub fn router(config: &DynaMoeConfig, hidden_size: usize) -> Option<[NamedShape; 4]> {
    let (r, scores) = (config.router.hidden_size, config.expert_count() - 1);
    (config.router.kind == RouterKind::Mlp).then(|| {
        [
            (ROUTER_FC1_WEIGHT, vec![r, hidden_size]),
            (ROUTER_FC1_BIAS, vec![r]),
            (ROUTER_FC2_WEIGHT, vec![scores, r]),
            (ROUTER_FC2_BIAS, vec![scores]),
        ]
    })
}

/// What each expert but the largest adds for the neurons that it leaves out, `(E-1, D)`, if layers have it.
pub fn compensation(config: &DynaMoeConfig, hidden_size: usize) -> Option<NamedShape> {
    config.router.compensation.then(|| (COMPENSATION, vec![config.expert_count() - 1, hidden_size]))
}

/// The full name of a tensor of decoder layer `layer`, as in `model.layers.3.mlp.gate_proj.weight`.
pub fn full_name(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.mlp.{name}")
}

/// Whether a tensor of this full name belongs to a router, or is a compensation.
pub fn is_of_router(full_name: &str) -> bool {
    full_name.contains(".mlp.router.")
}

/// Whether a tensor of this full name holds the smaller experts' separate weights.
pub fn is_separate(full_name: &str) -> bool {
    full_name.contains(".mlp.own.")
}

/// Whether a tensor of this full name is the order of an FFN's neurons.
pub fn is_order(full_name: &str) -> bool {
    full_name.ends_with(".mlp.order")
}

/// Whether a tensor of this full name is one that a DynaMoE checkpoint has beyond its base's.
pub fn is_addition(full_name: &str) -> bool {
    is_of_router(full_name) || is_separate(full_name) || is_order(full_name)
}

/// Reads one tensor.
///
/// # Errors
/// Those of `get`; [`Error::Shape`] if it hands out another shape.
pub fn read((name, shape): &NamedShape, get: &mut Get) -> Result<Tensor> {
    let tensor = get(name, shape)?;
    if tensor.dims() != shape {
        let found = tensor.dims().to_vec();
        return Err(Error::Shape { tensor: (*name).into(), expected: shape.clone(), found });
    }
    Ok(tensor)
}

/// Reads three matrices.
///
/// # Errors
/// As [`read`].
pub fn read_projections(table: &Projections<NamedShape>, get: &mut Get) -> Result<Projections<Tensor>> {
    Ok(Projections {
        gate_proj: read(&table.gate_proj, get)?,
        up_proj: read(&table.up_proj, get)?,
        down_proj: read(&table.down_proj, get)?,
    })
}

/// Reads the compensation in f32, if layers have one and there is a smaller expert to use it.
///
/// # Errors
/// As [`read`].
pub fn read_compensation(
    config: &DynaMoeConfig,
    hidden_size: usize,
    get: &mut Get,
) -> Result<Option<Tensor>> {
    let named = compensation(config, hidden_size).filter(|_| config.expert_count() > 1);
    named.map(|named| Ok(read(&named, get)?.to_dtype(DType::F32)?)).transpose()
}
