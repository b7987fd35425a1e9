//! Runs of neurons as the kernels read them.
//!
//! Below full width, tokens may have separate weights for the first neurons. Then these neurons exist twice:
//!
//! ```text
//! neurons            0 ······ P ············ I
//! at full width      │ dense  │ dense        │
//! below full width   │separate│ dense        │
//! ```
//!
//! So dense segments up to `P` serve the tokens at full width, separate segments those below, and all others serve all
//! tokens. `cu/segments.cuh` reads the list.

use crate::args::{Segment, Serves};
use crate::plan::{Block, Float};

/// What a matrix's rows consist of.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    weights: u64,
    bytes: u64,
}

impl From<Float> for Unit {
    fn from(float: Float) -> Self {
        Self { weights: 1, bytes: float.bytes() as u64 }
    }
}

impl From<Block> for Unit {
    fn from(block: Block) -> Self {
        Self { weights: block.weights() as u64, bytes: block.bytes() as u64 }
    }
}

/// The segments of a layer: dense ones, then `separate` ones (both in order, from neuron 0 on) in place of the first
/// neurons for tokens below full width. `units` are those of gate_proj and up_proj, and of down_proj.
///
/// A dense segment is cut where separate weights end. That has to be at a whole unit of down_proj.
pub fn list(dense: &[Segment], separate: &[Segment], units: [Unit; 2]) -> Vec<Segment> {
    let end = size(separate);
    let cut = |segment: &Segment| {
        if segment.start < end && end < segment.end {
            split(segment, end, units).to_vec()
        } else {
            vec![*segment]
        }
    };
    let (first, others): (Vec<_>, Vec<_>) = dense.iter().flat_map(cut).partition(|s| s.end <= end);
    let serving = |segments: Vec<Segment>, serves| segments.into_iter().map(move |s| Segment { serves, ..s });
    serving(first, Serves::FullWidth)
        .chain(serving(separate.to_vec(), Serves::BelowFullWidth))
        .chain(serving(others, Serves::AllTokens))
        .collect()
}

/// The neurons in segments, which are in order from neuron 0 on.
pub fn size(segments: &[Segment]) -> u32 {
    segments.last().map_or(0, |last| last.end)
}

fn split(segment: &Segment, at: u32, units: [Unit; 2]) -> [Segment; 2] {
    let neurons = u64::from(at - segment.start);
    let below = |matrix, stride| matrix + neurons * u64::from(stride) * units[0].bytes;
    let behind = Segment {
        start: at,
        gate: below(segment.gate, segment.gate_stride),
        up: below(segment.up, segment.up_stride),
        down: segment.down + neurons / units[1].weights * units[1].bytes,
        ..*segment
    };
    [Segment { end: at, ..*segment }, behind]
}

/// The neurons whose weights tokens of these `widths` need together, of the segments in `list`: what decoding them in one
/// group reads.
pub fn neurons_read(list: &[Segment], widths: &[u32]) -> u32 {
    let full = size(list);
    let reach = |serves| {
        let is_served = |&&width: &&u32| match serves {
            Serves::AllTokens => true,
            Serves::FullWidth => width == full,
            Serves::BelowFullWidth => width < full,
        };
        widths.iter().filter(is_served).copied().max().unwrap_or(0)
    };
    list.iter().map(|s| reach(s.serves).min(s.end).saturating_sub(s.start)).sum()
}
