//! Inputs of products: rows of floats, rounded to 8 bits in ggml's blocks and interleaved in panels of tokens.
//!
//! A panel holds up to [`TILE`] tokens; its words (four weights' inputs, or one float) alternate between the
//! tokens, so that a kernel reads one stream.

use super::kernel::Isa;

/// Tokens of a panel, and of the largest kernel.
pub(super) const TILE: usize = 12;

/// What memory holds before it is written: in tests a NaN, so that reading it shows.
pub(super) const UNSET: u32 = if cfg!(test) { 0x7fc0_7f7f } else { 0 };

/// What a type of weights wants its inputs to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    F32,
    /// Blocks of 32 (ggml's Q8_0), with `-offset` times their sum.
    Block32 {
        offset: i32,
    },
    /// Blocks of 256 (ggml's Q8_K), with `-offset` times the sum of each 16.
    Block256 {
        offset: i32,
    },
    /// Blocks of 256 with the sums of each 32, as pairs of 16 bits.
    Block256Pairs,
}

impl Encoding {
    /// Inputs in a block.
    pub fn block(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Block32 { .. } => 32,
            Self::Block256 { .. } | Self::Block256Pairs => 256,
        }
    }

    /// Words of a block.
    fn words(self) -> usize {
        self.block().div_ceil(4)
    }

    /// Sums of a block.
    fn sums(self) -> usize {
        match self {
            Self::F32 => 0,
            Self::Block32 { .. } => 1,
            Self::Block256 { .. } => 16,
            Self::Block256Pairs => 4,
        }
    }
}

/// Encoded rows `(T, K)`.
#[derive(Debug)]
pub(super) struct Input {
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
    pub fn panel(&self, token: usize, block: usize) -> Panel {
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

    /// Indices of words, scales and sums.
    fn offset(&self, token: usize, block: usize) -> [usize; 3] {
        let (first, lane) = (token / self.stride * self.stride * self.blocks, token % self.stride);
        let at = |each: usize| (first + block * self.stride) * each + lane;
        [at(self.encoding.words()), at(1), at(self.encoding.sums())]
    }

    /// For threads that each encode their own blocks.
    pub fn writer(&mut self) -> Writer<'_> {
        let pointers = (self.words.as_mut_ptr(), self.scales.as_mut_ptr(), self.sums.as_mut_ptr());
        Writer { words: pointers.0, scales: pointers.1, sums: pointers.2, input: self }
    }
}

/// Writes to an [`Input`] from several threads.
pub(super) struct Writer<'a> {
    words: *mut i32,
    scales: *mut f32,
    sums: *mut i32,
    input: &'a Input,
}

// SAFETY: the pointers are to memory that `input` owns and that `encode`'s callers divide among themselves.
unsafe impl Sync for Writer<'_> {}

impl Writer<'_> {
    pub fn input(&self) -> &Input {
        self.input
    }

    /// Encodes `x`, inputs of whole blocks from `block` on, of one token.
    ///
    /// # Safety
    /// No other thread may write the same blocks of the same token, or read them, at the same time.
    pub unsafe fn encode(&self, isa: Isa, token: usize, block: usize, x: &[f32]) {
        let input = self.input;
        let size = input.encoding.block();
        let blocks = x.len() / size;
        assert!(token < input.rows && x.len().is_multiple_of(size) && block + blocks <= input.blocks);
        let [words, scales, sums] = input.offset(token, block);
        // SAFETY: checked above; the caller has these blocks for itself
        let out = unsafe {
            Encoded {
                words: self.words.add(words),
                scales: self.scales.wrapping_add(scales),
                sums: self.sums.wrapping_add(sums),
                stride: input.stride,
            }
        };
        // SAFETY: as above, and `isa` exists only where the processor has it
        unsafe { isa.encode(input.encoding, x, &out) }
    }
}

/// Where the blocks of one token go.
pub(super) struct Encoded {
    words: *mut i32,
    scales: *mut f32,
    sums: *mut i32,
    stride: usize,
}

/// Encodes whole blocks of one token.
///
/// # Safety
/// `out` must have room for them.
#[inline(always)]
pub(super) unsafe fn encode(encoding: Encoding, x: &[f32], out: &Encoded) {
    // SAFETY: all indices are below what the blocks of `x` need
    unsafe {
        match encoding {
            Encoding::F32 => {
                for (at, &x) in x.iter().enumerate() {
                    out.words.add(at * out.stride).write(x.to_bits() as i32);
                }
            }
            Encoding::Block32 { offset } => {
                for (block, x) in x.as_chunks::<32>().0.iter().enumerate() {
                    let (scale, codes) = round32(x);
                    store_codes(&codes, out, block);
                    out.scales.add(block * out.stride).write(scale);
                    out.sums.add(block * out.stride).write(-offset * sum(&codes));
                }
            }
            Encoding::Block256 { offset } => {
                for (block, x) in x.as_chunks::<256>().0.iter().enumerate() {
                    let (scale, codes) = round256(x);
                    store_codes(&codes, out, block);
                    out.scales.add(block * out.stride).write(scale);
                    for (at, codes) in codes.as_chunks::<16>().0.iter().enumerate() {
                        out.sums.add((block * 16 + at) * out.stride).write(-offset * sum(codes));
                    }
                }
            }
            Encoding::Block256Pairs => {
                for (block, x) in x.as_chunks::<256>().0.iter().enumerate() {
                    let (scale, codes) = round256(x);
                    store_codes(&codes, out, block);
                    out.scales.add(block * out.stride).write(scale);
                    for (at, codes) in codes.as_chunks::<64>().0.iter().enumerate() {
                        let pair = (sum(&codes[..32]) & 0xffff) | (sum(&codes[32..]) << 16);
                        out.sums.add((block * 4 + at) * out.stride).write(pair);
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn store_codes(codes: &[u8], out: &Encoded, block: usize) {
    let quads = codes.as_chunks::<4>().0;
    for (at, &quad) in quads.iter().enumerate() {
        // SAFETY: the caller has room for the block
        unsafe { out.words.add((block * quads.len() + at) * out.stride).write(i32::from_le_bytes(quad)) }
    }
}

/// The sum of signed bytes.
#[inline(always)]
fn sum(codes: &[u8]) -> i32 {
    codes.iter().map(|&c| i32::from(c as i8)).sum()
}

/// The signed byte of a float that is already whole and small.
#[inline(always)]
fn byte(whole: f32) -> u8 {
    // adding 1.5 · 2^23 puts the number into the lowest bits
    (whole + 12_582_912.0).to_bits() as u8
}

/// ggml's Q8_0: the scale (of half precision) and 32 signed codes.
#[inline(always)]
fn round32(x: &[f32; 32]) -> (f32, [u8; 32]) {
    let mut largest = [0f32; 8];
    for x in x.as_chunks::<8>().0 {
        for (largest, x) in largest.iter_mut().zip(x) {
            *largest = if x.abs() > *largest { x.abs() } else { *largest };
        }
    }
    let scale = largest.iter().fold(0f32, |a, &b| if b > a { b } else { a }) / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    (half::f16::from_f32(scale).to_f32(), x.map(|x| byte((x * inverse).round())))
}

/// ggml's Q8_K: the scale and 256 signed codes; the input of largest magnitude becomes -128.
#[inline(always)]
fn round256(x: &[f32; 256]) -> (f32, [u8; 256]) {
    let (mut low, mut high) = ([0f32; 16], [0f32; 16]);
    for x in x.as_chunks::<16>().0 {
        for ((low, high), &x) in low.iter_mut().zip(&mut high).zip(x) {
            *low = if x < *low { x } else { *low };
            *high = if x > *high { x } else { *high };
        }
    }
    let low = low.iter().fold(0f32, |a, &b| if b < a { b } else { a });
    let high = high.iter().fold(0f32, |a, &b| if b > a { b } else { a });
    let largest = if high > -low {
        high
    } else if high < -low {
        low
    } else {
        // as large on both sides: the first one counts
        x.iter().copied().find(|x| x.abs() == high).unwrap_or(0.0)
    };
    if largest == 0.0 {
        return (0.0, [0; 256]);
    }
    let inverse = -128.0 / largest;
    let code = |x: f32| {
        let whole = (inverse * x).round();
        byte(if whole < 127.0 { whole } else { 127.0 })
    };
    (1.0 / inverse, x.map(code))
}
