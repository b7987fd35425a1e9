//! The kernels on candle's tensors: shapes, types and strides are checked, then kernels are launched. Nothing here
//! waits for the device, and no launch depends on what the router decides.
//!
//! candle keeps one stream for each device, so kernels run in the order in which they are launched here, and memory
//! that is dropped here is freed behind them.

mod ffn;
mod launch;
mod operand;
mod route;

pub use ffn::{Segment, Weight, forward, forward_as, unsupported};
pub use route::{Routed, Router, Thresholds, route};
