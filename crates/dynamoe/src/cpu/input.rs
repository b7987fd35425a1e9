//! Inputs of products: rows of floats, encoded in ggml's blocks of 8 bits and interleaved in panels of tokens.
//!
//! A panel holds up to [`TILE`] tokens. A word is the inputs of four weights, or one float. The words of a panel's
//! tokens alternate, so that a kernel reads one stream.

use super::format::Encoding;
use super::output::UNSET;

/// Tokens of a panel, and of the largest kernel.
pub(crate) const TILE: usize = 12;

/// Encoded rows `(T, K)`: `T` tokens of `K` inputs.
#[derive(Debug)]
pub(crate) struct Input {
    encoding: Encoding,
    blocks: usize,
    rows: usize,
    stride: usize,
    words: Vec<i32>,
    scales: Vec<f32>,
    sums: Vec<i32>,
}

/// Where a kernel finds the inputs of some tokens of a panel.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    pub words: *const i32,
    pub scales: *const f32,
    pub sums: *const i32,
    /// Tokens between one word and the next of the same token.
    pub stride: usize,
}

/// Where the encoded blocks of one token go.
pub(super) struct PanelMut {
    pub words: *mut i32,
    pub scales: *mut f32,
    pub sums: *mut i32,
    /// As [`Panel::stride`].
    pub stride: usize,
}

impl Input {
    /// Room for `rows` tokens of `k` inputs, a multiple of the encoding's block.
    pub fn new(encoding: Encoding, rows: usize, k: usize) -> Self {
        let stride = rows.clamp(1, TILE);
        let (blocks, slots) = (k / encoding.block(), rows.div_ceil(stride) * stride);
        let scales = if encoding == Encoding::F32 { 0 } else { blocks * slots };
        Self {
            encoding,
            blocks,
            rows,
            stride,
            words: vec![UNSET as i32; blocks * encoding.words() * slots],
            scales: vec![f32::from_bits(UNSET); scales],
            sums: vec![UNSET as i32; blocks * encoding.sums() * slots],
        }
    }

    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Tokens of a panel.
    pub fn stride(&self) -> usize {
        self.stride
    }

    pub fn panels(&self) -> usize {
        self.rows.div_ceil(self.stride)
    }

    /// The inputs from token `token` on (up to the end of its panel) and from block `block` on.
    pub(super) fn panel(&self, token: usize, block: usize) -> Panel {
        assert!(token < self.rows && block <= self.blocks, "inputs: token {token}, block {block}");
        let at = self.offset(token, block);
        // `wrapping_add`: vectors that an encoding does not use are empty
        Panel {
            words: self.words.as_ptr().wrapping_add(at[0]),
            scales: self.scales.as_ptr().wrapping_add(at[1]),
            sums: self.sums.as_ptr().wrapping_add(at[2]),
            stride: self.stride,
        }
    }

    /// All of the memory, from the first token and block on.
    pub(super) fn start_mut(&mut self) -> PanelMut {
        PanelMut {
            words: self.words.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
            stride: self.stride,
        }
    }

    /// Indices of words, scales and sums.
    pub(super) fn offset(&self, token: usize, block: usize) -> [usize; 3] {
        let (first, lane) = (token / self.stride * self.stride * self.blocks, token % self.stride);
        let at = |each: usize| (first + block * self.stride) * each + lane;
        [at(self.encoding.words()), at(1), at(self.encoding.sums())]
    }
}
