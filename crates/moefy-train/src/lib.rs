//! From a pre-trained dense checkpoint to a DynaMoE checkpoint.
//!
//! Data flows one way: text and a dense checkpoint → [`prepare`] (calibrate, convert) → [`train`] → [`evaluate`] →
//! [`report`]. [`methods`] are the ways to train, [`pipeline`] strings the stages together, [`ranks`] are the processes that
//! work on it. Where there is no text, the model writes one first ([`writing`]). The model itself is [`dynamoe_model`]. The
//! command line is the program's alone, so nothing here can lean on it.
//!
//! Letters in shape comments: `B` sequences, `T` positions, `N = B·T` tokens, `D` hidden_size,
//! `I` intermediate_size, `E` experts, `L` layers, `V` vocabulary.

pub mod allocator;
pub mod data;
pub mod demo;
pub mod evaluate;
mod locks;
pub mod machine;
pub mod methods;
pub mod pipeline;
pub mod prepare;
pub mod progress;
pub mod random;
pub mod ranks;
pub mod report;
#[cfg(test)]
#[path = "../tests/support/random.rs"]
mod testing;
pub mod train;
pub mod writing;
