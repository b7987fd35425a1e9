//! A layer with its plan, its arguments and its outputs, ready to run.

use std::ops::Range;

use dynamoe_kernels::args::{FfnArgs, Segment};
use dynamoe_kernels::plan::{self, Block, Float, Launch, Tile};
use dynamoe_kernels::reference;
use dynamoe_kernels::segments::list;
use rand_chacha::ChaCha8Rng;

use super::blocks::Shells;
use super::layer::Layer;
use super::{Memory, decode, lengths, losses, run, run_without};

/// The types that kernels for many tokens take.
pub const HALVES: [Float; 2] = [Float::F16, Float::Bf16];

pub struct Case {
    pub layer: Layer,
    launches: Vec<Launch>,
    args: FfnArgs,
    h: Memory,
    y: Memory,
    /// The token of each row of `h`.
    order: Vec<u32>,
    held: Vec<Memory>,
    shells: Vec<Shells>,
}

impl Case {
    /// For up to 8 tokens at a time. The weights are in one piece, or in shells.
    pub fn decode(mut layer: Layer, in_shells: bool) -> Self {
        let segments = layer.segments(in_shells);
        let launches = plan::decode(layer.float, layer.tokens, layer.d, &lengths(&segments));
        Self::new(layer, &segments, launches.into())
    }

    /// For 9 to 64 tokens.
    pub fn few(mut layer: Layer, in_shells: bool) -> Self {
        let segments = layer.segments(in_shells);
        let launches = plan::few(layer.float, layer.tokens, layer.d, &lengths(&segments));
        let mut case = Self::new(layer, &segments, launches.into());
        let splits = plan::few_splits(case.layer.d);
        let partial = Memory::poisoned(splits * case.layer.tokens * case.layer.d * 4);
        (case.args.splits, case.args.partial) = (splits as u32, partial.address());
        case.held.push(partial);
        case
    }

    /// For many tokens, sorted by expert.
    pub fn prefill(mut layer: Layer, tile: Tile, in_shells: bool) -> Self {
        let segments = layer.segments(in_shells);
        let launches = plan::prefill(layer.float, [tile; 2], layer.tokens, layer.d, &lengths(&segments));
        Self::new(layer, &segments, launches.into()).sorted()
    }

    /// For many tokens, sorted by expert, with weights in blocks: those of gate and up projection, and of down projection.
    /// `layer` has the same weights in full.
    pub fn prefill_quantized(layer: Layer, block: [Block; 2], [dense, separate]: [Shells; 2]) -> Self {
        let segments = list(&dense.segments(), &separate.segments(), block.map(Into::into));
        let launches =
            plan::prefill_quantized(block, layer.float, layer.tokens, layer.d, &lengths(&segments));
        let mut case = Self::new(layer, &segments, launches.into()).sorted();
        case.shells = vec![dense, separate];
        case
    }

    fn new(mut layer: Layer, segments: &[Segment], launches: Vec<Launch>) -> Self {
        let mut args = layer.args(segments);
        let [h, y] = [layer.intermediate_size(), layer.d]
            .map(|n| Memory::poisoned(layer.tokens * n * layer.float.bytes()));
        (args.h, args.y) = (h.address(), y.address());
        let order = layer.in_order();
        Self { layer, launches, args, h, y, order, held: vec![], shells: vec![] }
    }

    fn sorted(mut self) -> Self {
        self.order = reference::sort(&self.layer.experts);
        let order = Memory::of(&self.order);
        self.args.order = order.address();
        self.held.push(order);
        self
    }

    /// Runs all kernels.
    pub fn run(&self, rng: &mut ChaCha8Rng) {
        self.launches.iter().for_each(|launch| run(launch, &self.args, rng));
    }

    /// `h`, row by row.
    pub fn h(&self) -> Vec<f64> {
        decode(self.layer.float, &self.h)
    }

    /// Whether the outputs are the reference's.
    pub fn compare(&self) -> Result<(), String> {
        self.layer.compare(&self.h(), &decode(self.layer.float, &self.y), &self.order)
    }

    /// Runs all kernels and compares the outputs.
    pub fn check(&self, rng: &mut ChaCha8Rng) {
        self.run(rng);
        self.compare().unwrap_or_else(|error| {
            let segments = self.args.segment_count;
            panic!("{} {}, {segments} segments: {error}", self.launches[0].kernel, self.layer.name())
        });
    }

    /// Of each barrier of the first kernel: whether its loss is seen in the outputs.
    pub fn losses(&self, seeds: Range<u64>) -> Vec<bool> {
        losses(seeds, |seed, without| {
            let sites = run_without(&self.launches[0], &self.args, seed, without)?;
            for launch in &self.launches[1..] {
                run_without(launch, &self.args, seed, None)?;
            }
            self.compare().map(|()| sites)
        })
    }
}
