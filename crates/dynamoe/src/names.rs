//! Names of the tensors that a DynaMoE layer reads from a checkpoint.
//!
//! The dense FFN's tensors keep their Hugging Face names (their neurons are reordered); a layer adds those of
//! its router and its compensation under `mlp.router`, those of narrow experts' own neurons under `mlp.own`, and the order
//! of its neurons.

/// Rows are neurons: `(intermediate_size, hidden_size)`.
pub const GATE_PROJ: &str = "gate_proj.weight";
/// Rows are neurons: `(intermediate_size, hidden_size)`.
pub const UP_PROJ: &str = "up_proj.weight";
/// Columns are neurons: `(hidden_size, intermediate_size)`.
pub const DOWN_PROJ: &str = "down_proj.weight";
/// The router's first matrix: `(router.hidden_size, hidden_size)`.
pub const ROUTER_FC1_WEIGHT: &str = "router.fc1.weight";
/// The router's first bias: `(router.hidden_size)`.
pub const ROUTER_FC1_BIAS: &str = "router.fc1.bias";
/// The router's second matrix: `(experts - 1, router.hidden_size)`.
pub const ROUTER_FC2_WEIGHT: &str = "router.fc2.weight";
/// The router's second bias: `(experts - 1)`.
pub const ROUTER_FC2_BIAS: &str = "router.fc2.bias";
/// What each expert but the largest adds for the neurons it leaves out: `(experts - 1, hidden_size)`.
pub const COMPENSATION: &str = "router.compensation";

/// Every tensor of a layer's router.
pub const ROUTER_TENSORS: [&str; 5] =
    [ROUTER_FC1_WEIGHT, ROUTER_FC1_BIAS, ROUTER_FC2_WEIGHT, ROUTER_FC2_BIAS, COMPENSATION];

/// Narrow experts' own first neurons: `(own_width, hidden_size)`.
pub const OWN_GATE_PROJ: &str = "own.gate_proj.weight";
/// Narrow experts' own first neurons: `(own_width, hidden_size)`.
pub const OWN_UP_PROJ: &str = "own.up_proj.weight";
/// Narrow experts' own first neurons: `(hidden_size, own_width)`.
pub const OWN_DOWN_PROJ: &str = "own.down_proj.weight";

/// The tensors of the neurons that narrow experts have of their own.
pub const OWN_TENSORS: [&str; 3] = [OWN_GATE_PROJ, OWN_UP_PROJ, OWN_DOWN_PROJ];

/// Where each neuron stood in the base's FFN: `(intermediate_size)`, whole numbers in F32. Optional.
pub const ORDER: &str = "order";

/// Whether a tensor of this full name is the order of an FFN's neurons.
pub fn is_order(name: &str) -> bool {
    name.ends_with(".mlp.order")
}

/// Whether a tensor of this full name is a router's, or its compensation.
pub fn is_of_router(name: &str) -> bool {
    name.contains(".mlp.router.")
}

/// Whether a tensor of this full name holds neurons of narrow experts' own.
pub fn is_own(name: &str) -> bool {
    name.contains(".mlp.own.")
}

/// Whether a tensor of this full name is one that a DynaMoE checkpoint has beyond its base's.
pub fn is_addition(name: &str) -> bool {
    is_of_router(name) || is_own(name) || is_order(name)
}

/// The full name of an FFN tensor of decoder layer `layer`, as in `model.layers.3.mlp.gate_proj.weight`.
pub fn mlp(layer: usize, tensor: &str) -> String {
    format!("model.layers.{layer}.mlp.{tensor}")
}
