//! Groups of weights: which are trained, and at what rate.

use dynamoe::tensors;

/// What a tensor belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// A router, or what the smaller experts add for the neurons they leave out.
    Router,
    /// The smaller experts' separate weights.
    Separate,
    /// The dense FFN, which every width uses.
    DenseFfn,
    /// Embedding, attention, norms, output matrix.
    Backbone,
}

impl Group {
    /// The group of the tensor with this name.
    pub fn of(name: &str) -> Self {
        match name {
            _ if tensors::is_of_router(name) => Self::Router,
            _ if tensors::is_separate(name) => Self::Separate,
            _ if name.contains(".mlp.") => Self::DenseFfn,
            _ => Self::Backbone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_tensor_has_its_group() {
        for (name, group) in [
            ("model.embed_tokens.weight", Group::Backbone),
            ("model.layers.3.self_attn.q_proj.weight", Group::Backbone),
            ("model.layers.3.mlp.up_proj.weight", Group::DenseFfn),
            (&tensors::full_name(3, tensors::SEPARATE_UP_PROJ), Group::Separate),
            (&tensors::full_name(3, tensors::ROUTER_FC1_BIAS), Group::Router),
            (&tensors::full_name(3, tensors::COMPENSATION), Group::Router),
        ] {
            assert_eq!(Group::of(name), group, "{name}");
        }
    }
}
