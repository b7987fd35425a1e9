//! Encodes the rows of one [`Input`] from several threads.

use super::input::{Input, PanelMut};
use super::isa::Isa;

/// Writes to an [`Input`] from several threads, each of which encodes its own blocks.
pub(crate) struct Writer<'a> {
    /// The input's memory, from its first token and block on.
    start: PanelMut,
    input: &'a Input,
}

// SAFETY: the pointers are to memory that `input` owns and that `encode`'s callers divide among themselves.
unsafe impl Sync for Writer<'_> {}

impl<'a> Writer<'a> {
    pub fn new(input: &'a mut Input) -> Self {
        Self { start: input.start_mut(), input }
    }

    pub fn input(&self) -> &Input {
        self.input
    }

    /// Encodes `x`, inputs of whole blocks from block `block` on, of token `token`.
    ///
    /// # Safety
    /// No other thread may write the same blocks of the same token, or read them, at the same time.
    pub unsafe fn encode(&self, isa: Isa, token: usize, block: usize, x: &[f32]) {
        let (input, size) = (self.input, self.input.encoding().block());
        let blocks = x.len() / size;
        assert!(token < input.rows() && x.len().is_multiple_of(size) && block + blocks <= input.blocks());
        let [words, scales, sums] = input.offset(token, block);
        // SAFETY: the words are within the input, as was just checked. `wrapping_add`: vectors that an encoding does
        // not use are empty
        let out = unsafe {
            PanelMut {
                words: self.start.words.add(words),
                scales: self.start.scales.wrapping_add(scales),
                sums: self.start.sums.wrapping_add(sums),
                stride: self.start.stride,
            }
        };
        // SAFETY: `out` has room for these blocks, which the caller has for itself
        unsafe { isa.encode(input.encoding(), x, &out) }
    }
}
