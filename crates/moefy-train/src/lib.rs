//! From a pre-trained dense checkpoint to a DynaMoE checkpoint.
//!
//! Data flows one way: dense checkpoint → [`calibrate`] → [`convert`] → [`train`] → [`evaluate`] → [`export`].
//!
//! Letters in shape comments: `B` sequences, `T` positions, `N = B·T` tokens, `D` hidden_size,
//! `I` intermediate_size, `E` experts, `L` layers, `V` vocabulary, `H` attention heads, `K` key/value heads,
//! `d` head_dim.

pub mod activations;
pub mod allocator;
pub mod calibrate;
pub mod cli;
pub mod compare;
pub mod convert;
pub mod curves;
pub mod data;
pub mod demo;
pub mod evaluate;
pub mod order;
pub mod pretrain;
pub mod report;
pub mod results;
pub mod run;
pub mod texts;
pub mod train;
