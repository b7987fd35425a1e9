//! The language model around the FFNs, differentiable: embeddings, attention, norms, output matrix.
//!
//! [`Backbone`] is the decoder of any of the architectures; the caller supplies each layer's FFN as a
//! closure. [`crate::ops`] holds the operations that candle lacks or differentiates slowly.
//!
//! [`RoutedModel`] is a whole model that runs sequences; [`Decoder`] runs the same model token by token.
//!
//! Activations are 2-D, one row for each token, so that every matrix product is one large contiguous one.

mod backbone;
mod decoder;
mod experts;
mod routed;

pub use backbone::{Backbone, Places};
pub use decoder::Decoder;
pub use experts::Experts;
pub use routed::RoutedModel;
