//! The kernels on candle's tensors: checks shapes, types and strides, then launches. Nothing here waits for the device, and
//! launches do not depend on the routes.
//!
//! candle keeps one stream for each device. So kernels run in the order of their launches, and memory that is dropped here
//! is freed after they have run.

mod ffn;
mod launch;
mod operand;
mod route;
mod weights;

pub use ffn::{forward, forward_as};
pub use route::{Routed, Router, Thresholds, route};
pub use weights::{Segment, Segments, Weight, unsupported};
