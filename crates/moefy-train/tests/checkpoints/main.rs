//! Reading, converting and writing checkpoints, and everything that a broken one can bring.

mod convert;
mod damaged;
mod output;
mod read;
mod slice;
#[path = "../support/mod.rs"]
mod support;
mod tools;
mod write;
