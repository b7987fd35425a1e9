//! Names of the tensors that a DynaMoE layer reads from a checkpoint.
//!
//! The dense FFN's tensors keep their Hugging Face names (their neurons are reordered); a layer adds those of
//! its router and its compensation under `mlp.router`.

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

/// Every tensor that a routed layer has beyond the dense FFN's.
pub const ROUTER_TENSORS: [&str; 5] =
    [ROUTER_FC1_WEIGHT, ROUTER_FC1_BIAS, ROUTER_FC2_WEIGHT, ROUTER_FC2_BIAS, COMPENSATION];

/// The full name of an FFN tensor of decoder layer `layer`, as in `model.layers.3.mlp.gate_proj.weight`.
pub fn mlp(layer: usize, tensor: &str) -> String {
    format!("model.layers.{layer}.mlp.{tensor}")
}
