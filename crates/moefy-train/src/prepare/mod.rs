//! From a dense checkpoint to one that can be trained: [`calibrate()`] measures the FFNs' neurons on text, [`convert()`]
//! orders them by importance, cuts them into nested experts and adds routers.

mod activations;
pub mod calibrate;
pub mod convert;
pub mod experts;
mod importance;

pub use activations::{SAMPLE_TOKENS, sample_limit};
pub use calibrate::{Calibration, LayerStatistics, calibrate};
pub use convert::{ConvertOptions, convert};
pub use experts::{ExpertConfig, Experts};
