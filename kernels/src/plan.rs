//! Which kernel runs, and with how many blocks. Plans depend on shapes only, so the host need not know the routes.

/// Type of activations, and of weights that are not quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// 32 bits.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Float {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// A kernel and the shape of its grid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The kernel's name in `cu/dynamoe.cu`.
    pub kernel: String,
    /// Blocks in x and y.
    pub grid: [u32; 2],
    /// Threads in a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

/// Tokens that decoding takes at a time. More tokens are divided into groups.
pub const DECODE_TOKENS: usize = 8;

/// Router and decision in one launch, for few tokens.
pub fn route(float: Float, tokens: usize, router_size: usize) -> Launch {
    Launch {
        kernel: format!("route_{}", float.suffix()),
        grid: [router_size as u32, tokens.div_ceil(8) as u32],
        threads: 256,
        shared_bytes: 8 * 8 * 4 + 4,
    }
}

/// The decision alone, for many tokens: `x · fc1ᵀ` comes from elsewhere.
pub fn decide(tokens: usize) -> Launch {
    Launch { kernel: "decide".into(), grid: [tokens.div_ceil(8) as u32, 1], threads: 256, shared_bytes: 0 }
}

/// Tiles of `neurons` each in every run of neurons.
fn tiles_of(segments: &[usize], neurons: usize) -> usize {
    segments.iter().map(|length| length.div_ceil(neurons)).sum()
}

/// gate_proj, up_proj and SwiGLU, then down_proj with compensation: few tokens. `segments` are the lengths of the runs of
/// neurons, of all that [`crate::segments::list`] makes.
pub fn decode(float: Float, tokens: usize, hidden_size: usize, segments: &[usize]) -> [Launch; 2] {
    let group = tokens.clamp(1, DECODE_TOKENS).next_power_of_two();
    // 16 rows to a block of tensor cores' warps, which add up in shared memory; else a warp for each row
    let tensor_cores = group == 8 && float != Float::F32;
    let (rows_of_block, threads) = if tensor_cores { (16, 256) } else { (4, 128) };
    let blocks = [tiles_of(segments, rows_of_block), hidden_size.div_ceil(rows_of_block)];
    [("gate_up", blocks[0], 2), ("down", blocks[1], 1)].map(|(half, blocks, matrices)| Launch {
        kernel: format!("decode_{half}_{}_{group}", float.suffix()),
        grid: [blocks, tokens.div_ceil(group)].map(|n| n as u32),
        threads,
        shared_bytes: if tensor_cores { 8 * matrices * 8 * 16 * 4 } else { 0 },
    })
}

/// Sorts tokens by expert, widest first, for prefill.
pub fn sort() -> Launch {
    Launch { kernel: "sort".into(), grid: [1, 1], threads: 512, shared_bytes: 16 * 4 + 16 * 16 * 4 }
}

/// The tile that a block of prefill makes: 128 rows, a number of columns, and the instruction of the tensor cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tile {
    /// 128 columns by mma.sync: sm_80 and later.
    Mma,
    /// 128 columns by wgmma: sm_90a only.
    Wgmma128,
    /// 256 columns by wgmma: sm_90a only.
    Wgmma256,
}

impl Tile {
    fn columns(self) -> usize {
        if self == Self::Wgmma256 { 256 } else { 128 }
    }

    /// Stages of the ring that operands pass through, and the suffix of kernels' names.
    fn kernel(self) -> (usize, &'static str) {
        match self {
            Self::Mma => (3, ""),
            Self::Wgmma128 => (4, "_wgmma128"),
            Self::Wgmma256 => (4, "_wgmma256"),
        }
    }

    /// Tiles for runs of neurons. A neuron takes two columns: one of gate_proj and one of up_proj.
    fn of_neurons(self, segments: &[usize]) -> usize {
        tiles_of(segments, self.columns() / 2)
    }
}

/// Multiprocessors of an H100 or H200: as many blocks keep it busy.
const HOPPER_BLOCKS: usize = 132;

/// The tiles of both halves of [`prefill`] on a device of compute capability `major`.x. With wgmma, a half takes the large
/// tile if that makes enough blocks.
pub fn tiles(major: i32, tokens: usize, hidden_size: usize, segments: &[usize]) -> [Tile; 2] {
    if major != 9 {
        return [Tile::Mma; 2];
    }
    let large = Tile::Wgmma256;
    [large.of_neurons(segments), hidden_size.div_ceil(large.columns())]
        .map(|tiles| if tokens.div_ceil(128) * tiles >= HOPPER_BLOCKS { large } else { Tile::Wgmma128 })
}

/// gate_proj, up_proj and SwiGLU, then down_proj with compensation: many tokens, in f16 or bf16. `segments` are the
/// lengths of the runs of neurons.
pub fn prefill(
    float: Float,
    tiles: [Tile; 2],
    tokens: usize,
    hidden_size: usize,
    segments: &[usize],
) -> [Launch; 2] {
    let launch = |half, tile: Tile, columns: usize| {
        let (stages, suffix) = tile.kernel();
        Launch {
            kernel: format!("prefill_{half}_{}{suffix}", float.suffix()),
            grid: [tokens.div_ceil(128) as u32, columns as u32],
            threads: 256,
            shared_bytes: (stages * (128 + tile.columns()) * 128) as u32,
        }
    };
    let [first, second] = tiles;
    [
        launch("gate_up", first, first.of_neurons(segments)),
        launch("down", second, hidden_size.div_ceil(second.columns())),
    ]
}

/// Most tokens for [`few`], whose tiles have 64 tokens at most. More tokens fill [`prefill`]'s tiles of 128 better.
pub const FEW_TOKENS: usize = 64;

/// How more than [`DECODE_TOKENS`] tokens run in f16 or bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Many {
    /// By [`few`], up to [`FEW_TOKENS`].
    Few,
    /// By [`prefill`] with these tiles.
    Tiles([Tile; 2]),
}

/// The kernels that should be fastest on a device of compute capability `major`.x. Not measured on a GPU yet.
pub fn many(major: i32, tokens: usize, hidden_size: usize, segments: &[usize]) -> Many {
    match tokens {
        0..=FEW_TOKENS => Many::Few,
        _ => Many::Tiles(tiles(major, tokens, hidden_size, segments)),
    }
}

/// Parts into which [`few`] divides the columns of down_proj, so that enough blocks read it.
pub fn few_splits(hidden_size: usize) -> usize {
    (2 * HOPPER_BLOCKS / hidden_size.div_ceil(64).max(1)).clamp(1, 8)
}

/// gate_proj, up_proj and SwiGLU, then partial sums of down_proj, then their sum with compensation: up to
/// [`FEW_TOKENS`] tokens, in f16 or bf16. `segments` are the lengths of the runs of neurons.
pub fn few(float: Float, tokens: usize, hidden_size: usize, segments: &[usize]) -> [Launch; 3] {
    let columns = tokens.clamp(16, FEW_TOKENS).next_power_of_two();
    let half = |half, grid: [usize; 2]| Launch {
        kernel: format!("few_{half}_{}_{columns}", float.suffix()),
        grid: grid.map(|n| n as u32),
        threads: 128,
        shared_bytes: (6 * (64 + columns) * 128) as u32,
    };
    let sum = Launch {
        kernel: format!("few_sum_{}", float.suffix()),
        grid: [hidden_size.div_ceil(256), tokens].map(|n| n as u32),
        threads: 256,
        shared_bytes: 0,
    };
    [
        half("gate_up", [1, tiles_of(segments, 32)]),
        half("down", [hidden_size.div_ceil(64), few_splits(hidden_size)]),
        sum,
    ]
}

/// A format of GGUF's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// 256 weights of 4 bits in 144 bytes.
    Q4K,
    /// 32 weights of 8 bits in 34 bytes.
    Q8_0,
}

impl Block {
    /// Weights in one block.
    pub fn weights(self) -> usize {
        if self == Self::Q4K { 256 } else { 32 }
    }

    /// Bytes of one block.
    pub fn bytes(self) -> usize {
        if self == Self::Q4K { 144 } else { 34 }
    }

    fn suffix(self) -> &'static str {
        if self == Self::Q4K { "q4k" } else { "q8_0" }
    }

    // what a block of threads stages of `rows` rows
    fn shared_bytes(self, rows: usize) -> u32 {
        if self == Self::Q4K { 4 } else { (4 * 2 * rows * (32 * 34 / 16 + 1) * 16) as u32 }
    }
}

/// Columns of quantized weights are multiples of this, in every matrix of every segment.
pub const QUANTIZED_COLUMNS: usize = 256;

/// Quantizes activations `(T, columns)` for quantized decoding.
pub fn quantize(float: Float, tokens: usize, columns: usize) -> Launch {
    Launch {
        kernel: format!("quantize_{}", float.suffix()),
        grid: [columns.div_ceil(256) as u32, tokens as u32],
        threads: 256,
        shared_bytes: 0,
    }
}

/// [`decode`] with quantized weights: `block` of gate_proj and up_proj, and of down_proj. `h` is f32 and is quantized
/// between the two; `float` is the type of `y`.
pub fn decode_quantized(
    block: [Block; 2],
    float: Float,
    tokens: usize,
    hidden_size: usize,
    segments: &[usize],
) -> [Launch; 2] {
    let group = tokens.clamp(1, DECODE_TOKENS).next_power_of_two();
    let launch = |kernel, blocks: usize, shared_bytes| Launch {
        kernel,
        grid: [blocks, tokens.div_ceil(group)].map(|n| n as u32),
        threads: 128,
        shared_bytes,
    };
    let [gate_up, down] = block.map(Block::suffix);
    [
        launch(format!("decode_gate_up_{gate_up}_{group}"), tiles_of(segments, 4), block[0].shared_bytes(2)),
        launch(
            format!("decode_down_{down}_{}_{group}", float.suffix()),
            hidden_size.div_ceil(4),
            block[1].shared_bytes(1),
        ),
    ]
}

/// [`prefill`] with quantized weights, which are unpacked to the type of the activations, f16 or bf16: `block` of
/// gate_proj and up_proj, and of down_proj.
pub fn prefill_quantized(
    block: [Block; 2],
    float: Float,
    tokens: usize,
    hidden_size: usize,
    segments: &[usize],
) -> [Launch; 2] {
    let [gate_up, down] = prefill(float, [Tile::Mma; 2], tokens, hidden_size, segments);
    let named = |half, block: Block, launch| Launch {
        kernel: format!("prefill_{half}_{}_{}", block.suffix(), float.suffix()),
        // three stages of activations, two of unpacked weights
        shared_bytes: (3 + 2) * 128 * 128,
        ..launch
    };
    [named("gate_up", block[0], gate_up), named("down", block[1], down)]
}
