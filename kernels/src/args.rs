//! The kernels' arguments, laid out as in `cu/args.h`, which says what each field holds.
//!
//! Addresses are the device's (in the simulation, the host's); 0 stands for none.

use crate::{MAX_EXPERTS, MAX_SEGMENTS};

/// An address on the device, in bytes.
pub type Address = u64;

/// Argument of `route` and `decide`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct RouteArgs {
    pub x: Address,
    pub fc1: Address,
    pub fc1_bias: Address,
    pub fc2: Address,
    pub fc2_bias: Address,
    pub thresholds: Address,
    pub hidden: Address,
    pub blocks_done: Address,
    pub experts: Address,
    pub widths: Address,
    pub threshold: f32,
    pub tokens: u32,
    pub hidden_size: u32,
    pub router_size: u32,
    pub expert_count: u32,
    pub x_stride: u32,
    pub expert_widths: [u32; MAX_EXPERTS],
}

/// Argument of `sort`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct SortArgs {
    pub experts: Address,
    pub order: Address,
    pub tokens: u32,
    pub expert_count: u32,
}

/// Rows quantized in blocks of 32.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct Quantized {
    pub q: Address,
    pub scales: Address,
    pub sums: Address,
}

/// Argument of `quantize`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct QuantizeArgs {
    pub x: Address,
    pub out: Quantized,
    pub widths: Address,
    pub tokens: u32,
    pub columns: u32,
    pub x_stride: u32,
    pub separate_size: u32,
}

/// The tokens that a segment serves. A token is at full width if its width is `I`.
#[repr(u32)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Serves {
    /// All of them.
    #[default]
    AllTokens,
    /// Those at full width.
    FullWidth,
    /// Those below.
    BelowFullWidth,
}

/// A run of neurons in matrices of its own.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct Segment {
    pub gate: Address,
    pub up: Address,
    pub down: Address,
    pub start: u32,
    pub end: u32,
    pub gate_stride: u32,
    pub up_stride: u32,
    pub down_stride: u32,
    pub serves: Serves,
}

/// Argument of both halves of the FFN.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct FfnArgs {
    pub x: Address,
    pub h: Address,
    pub y: Address,
    pub compensation: Address,
    pub experts: Address,
    pub widths: Address,
    pub order: Address,
    pub xq: Quantized,
    pub hq: Quantized,
    pub partial: Address,
    pub splits: u32,
    pub separate_size: u32,
    pub tokens: u32,
    pub hidden_size: u32,
    pub intermediate_size: u32,
    pub expert_count: u32,
    pub x_stride: u32,
    pub segment_count: u32,
    pub segments: [Segment; MAX_SEGMENTS],
}
