//! Interleaving the blocks of 16 rows, and the way back.

use rayon::prelude::*;

use super::format::{Format, LINE};
use super::lanes::LANES;
use super::memory::Memory;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// Bytes in ggml's layout, aligned for any of its blocks.
pub(super) struct Unpacked {
    lines: Vec<Line>,
    bytes: usize,
}

impl Unpacked {
    fn zeros(bytes: usize) -> Self {
        Self { lines: vec![Line([0; LINE]); bytes.div_ceil(LINE)], bytes }
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: lines are plain bytes, and there are at least as many
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.bytes) }
    }
}

/// Packs `rows` rows of `blocks` blocks; rows beyond the last are zeros.
pub(super) fn pack(format: Format, data: &[u8], rows: usize, blocks: usize) -> Memory {
    let (layout, unit) = (format.layout(), unit(format));
    let mut packed = Memory::zeros(rows.div_ceil(LANES) * blocks * unit);
    if blocks == 0 {
        return packed;
    }
    packed.bytes_mut().par_chunks_mut(blocks * unit).enumerate().for_each(|(group, out)| {
        for lane in 0..LANES.min(rows - group * LANES) {
            let row = &data[(group * LANES + lane) * blocks * layout.bytes..][..blocks * layout.bytes];
            for (from, to) in row.chunks_exact(layout.bytes).zip(out.chunks_exact_mut(unit)) {
                for (word, to) in to[..layout.words * LINE].chunks_exact_mut(LINE).enumerate() {
                    let word = word_of(format, &from[layout.words_at + 4 * word..]);
                    to[4 * lane..][..4].copy_from_slice(&word);
                }
                if let Some(at) = layout.scale_at {
                    to[layout.words * LINE + 2 * lane..][..2].copy_from_slice(&from[at..at + 2]);
                }
            }
        }
    });
    packed
}

/// Undoes [`pack`].
pub(super) fn unpack(format: Format, packed: &Memory, rows: usize, blocks: usize) -> Unpacked {
    let (layout, unit) = (format.layout(), unit(format));
    let mut data = Unpacked::zeros(rows * blocks * layout.bytes);
    if blocks == 0 {
        return data;
    }
    let packed = packed.bytes();
    data.bytes_mut().par_chunks_mut(blocks * layout.bytes).enumerate().for_each(|(row, out)| {
        let (group, lane) = (&packed[row / LANES * blocks * unit..][..blocks * unit], row % LANES);
        for (from, to) in group.chunks_exact(unit).zip(out.chunks_exact_mut(layout.bytes)) {
            for word in 0..layout.words {
                let bytes = word_of(format, &from[word * LINE + 4 * lane..]);
                to[layout.words_at + 4 * word..][..4].copy_from_slice(&bytes);
            }
            if let Some(at) = layout.scale_at {
                to[at..at + 2].copy_from_slice(&from[layout.words * LINE + 2 * lane..][..2]);
            }
        }
    });
    data
}

/// Bytes of a packed block of 16 rows.
pub(super) fn unit(format: Format) -> usize {
    LANES * format.layout().bytes
}

/// Signed bytes become unsigned, and back.
fn word_of(format: Format, bytes: &[u8]) -> [u8; 4] {
    let flip = if format == Format::Q8_0 { 0x80 } else { 0 };
    std::array::from_fn(|at| bytes[at] ^ flip)
}
