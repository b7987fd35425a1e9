//! One matrix, as an engine's projection.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{D, DType, Device, Module, Result, Tensor, bail};

use super::format::{Encoding, Format};
use super::host::Host;
use super::input::{Input, TILE};
use super::isa::Isa;
use super::lanes::LANES;
use super::loops::Group;
use super::memory::Memory;
use super::output::{Output, unset};
use super::pack;
use super::parallel::{Phase, run};
use super::writer::Writer;

/// A weight matrix `(N, K)`, its blocks interleaved for the CPU; as large as the blocks themselves.
///
/// Types: F32, Q4_0, Q8_0, Q4K, Q5K, Q6K; see [`PackedMatrix::supports`].
pub struct PackedMatrix {
    format: Format,
    rows: usize,
    columns: usize,
    packed: Memory,
}

impl PackedMatrix {
    /// Whether matrices of this type can be packed. Others keep the engine's projection.
    pub fn supports(dtype: GgmlDType) -> bool {
        Format::new(dtype).is_some()
    }

    /// Packs a quantized matrix `(N, K)`; the original is not needed any more.
    ///
    /// # Errors
    /// A type that [`PackedMatrix::supports`] denies, a shape that is no matrix of whole blocks.
    pub fn from_qtensor(weight: &QTensor) -> Result<Self> {
        let (rows, columns) = weight.shape().dims2()?;
        let Some(format) = Format::new(weight.dtype()) else {
            bail!(
                "pack: expected one of F32, Q4_0, Q8_0, Q4K, Q5K, Q6K, found {:?}: keep the quantized matrix",
                weight.dtype()
            );
        };
        Self::new(format, rows, columns, &weight.data()?)
    }

    /// Packs a dense matrix `(N, K)` as f32.
    ///
    /// # Errors
    /// A tensor that is no matrix.
    pub fn from_tensor(weight: &Tensor) -> Result<Self> {
        let (rows, columns) = weight.dims2()?;
        let weight = weight.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
        let bytes: Vec<u8> = Host::of(&weight)?.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self::new(Format::F32, rows, columns, &bytes)
    }

    fn new(format: Format, rows: usize, columns: usize, data: &[u8]) -> Result<Self> {
        let layout = format.layout();
        let blocks = columns / layout.weights;
        let expected = rows * blocks * layout.bytes;
        if !columns.is_multiple_of(layout.weights) || data.len() != expected {
            bail!(
                "pack: expected {expected} bytes and columns in blocks of {} for {:?} ({rows}, {columns}), found {} bytes",
                layout.weights,
                format.dtype(),
                data.len()
            );
        }
        Ok(Self { format, rows, columns, packed: pack::pack(format, data, rows, blocks) })
    }

    /// The matrix in ggml's layout again, bit for bit, to serialize it or to quantize it anew.
    pub fn to_qtensor(&self) -> Result<QTensor> {
        let data = pack::unpack(self.format, &self.packed, self.rows, self.blocks());
        // borrowed: candle 0.10 would read an owned one after it is freed
        let storage = QStorage::from_data(Cow::Borrowed(data.bytes()), &Device::Cpu, self.dtype())?;
        QTensor::new(storage, (self.rows, self.columns))
    }

    /// The weights `(N, K)` in f32.
    pub fn dequantize(&self) -> Result<Tensor> {
        self.to_qtensor()?.dequantize(&Device::Cpu)
    }

    /// `(N, K)`: outputs and inputs.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// The type of the weights.
    pub fn dtype(&self) -> GgmlDType {
        self.format.dtype()
    }

    /// Bytes of memory that the weights take.
    pub fn bytes(&self) -> usize {
        self.packed.bytes().len()
    }

    /// How a product with this matrix needs its inputs.
    pub(crate) fn encoding(&self) -> Encoding {
        self.format.encoding()
    }

    /// Groups of 16 rows.
    pub(crate) fn groups(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    fn blocks(&self) -> usize {
        self.columns / self.format.layout().weights
    }

    /// Bytes of a group.
    pub(crate) fn group_bytes(&self) -> usize {
        self.blocks() * pack::unit(self.format)
    }

    /// Adds the products of group `group` with `tokens` tokens of `input` from `token` on, within a panel,
    /// to as many `sums`.
    pub(crate) fn multiply(
        &self,
        isa: Isa,
        group: usize,
        input: &Input,
        tokens: Range<usize>,
        sums: &mut [[f32; LANES]],
    ) {
        assert!(input.encoding() == self.encoding() && input.blocks() == self.blocks());
        assert!(
            sums.len() == tokens.len()
                && tokens.end <= input.rows()
                && tokens.start % input.stride() + tokens.len() <= input.stride()
        );
        let bytes = self.group_bytes();
        let data = self.packed.bytes()[group * bytes..][..bytes].as_ptr();
        let group = Group { format: self.format, data, blocks: self.blocks() };
        // SAFETY: checked above; the group was packed with as many blocks
        unsafe { isa.multiply(group, input.panel(tokens.start, 0), sums) }
    }

    /// Row-major `x (T, K)` → `(T, N)`.
    pub(super) fn forward_rows(&self, isa: Isa, x: &[f32], tokens: usize) -> Vec<f32> {
        let (n, k) = (self.rows, self.columns);
        if k == 0 {
            return vec![0.0; tokens * n];
        }
        let mut y = unset(tokens * n);
        if y.is_empty() {
            return y;
        }
        let mut input = Input::new(self.encoding(), tokens, k);
        let panels = input.panels();
        let each = groups_each(self.groups(), self.group_bytes(), tokens);
        let product =
            Product { matrix: self, isa, x, input: Writer::new(&mut input), y: Output::new(&mut y, n) };
        let multiply =
            |item: usize| product.multiply_groups(item * each..((item + 1) * each).min(self.groups()));
        run(&[
            Phase { items: panels, cost: 4 * x.len(), run: &|panel| product.encode_panel(panel) },
            Phase { items: self.groups().div_ceil(each), cost: self.bytes() * tokens, run: &multiply },
        ]);
        y
    }
}

/// One product `x (T, K)` → `y (T, N)`, whose items run on several threads.
struct Product<'a> {
    matrix: &'a PackedMatrix,
    isa: Isa,
    x: &'a [f32],
    input: Writer<'a>,
    y: Output<'a>,
}

impl Product<'_> {
    /// First phase: encodes the inputs of one panel of tokens.
    fn encode_panel(&self, panel: usize) {
        let (input, k) = (self.input.input(), self.matrix.columns);
        for token in panel * input.stride()..((panel + 1) * input.stride()).min(input.rows()) {
            // SAFETY: each panel is one item, and is read in the next phase only
            unsafe { self.input.encode(self.isa, token, 0, &self.x[token * k..][..k]) }
        }
    }

    /// Second phase: the outputs of some groups of rows for all tokens.
    fn multiply_groups(&self, groups: Range<usize>) {
        let (input, n) = (self.input.input(), self.matrix.rows);
        let mut sums = [[0f32; LANES]; TILE];
        for token in (0..input.rows()).step_by(input.stride()) {
            let tokens = token..(token + input.stride()).min(input.rows());
            for group in groups.clone() {
                let sums = &mut sums[..tokens.len()];
                sums.fill([0.0; LANES]);
                self.matrix.multiply(self.isa, group, input, tokens.clone(), sums);
                let count = LANES.min(n - group * LANES);
                for (token, sums) in tokens.clone().zip(&*sums) {
                    // SAFETY: each group is in one item
                    unsafe { self.y.store(token, group * LANES, sums, count) }
                }
            }
        }
    }
}

impl Module for PackedMatrix {
    /// `x (…, K)` of any float type → `(…, N)` of the same.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let k = x.dim(D::Minus1)?;
        if k != self.columns {
            bail!(
                "packed matrix ({}, {}): expected {} inputs, found {:?}",
                self.rows,
                self.columns,
                self.columns,
                x.dims()
            );
        }
        let mut shape = x.dims().to_vec();
        shape.pop();
        let tokens = shape.iter().product();
        shape.push(self.rows);
        let rows = x.to_dtype(DType::F32)?.contiguous()?;
        let y = self.forward_rows(Isa::best(), &Host::of(&rows)?, tokens);
        Tensor::from_vec(y, shape, &Device::Cpu)?.to_dtype(x.dtype())
    }
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix({:?}, {} x {})", self.dtype(), self.rows, self.columns)
    }
}

/// How many groups of `bytes` bytes one item takes: small enough to balance the threads. For few tokens about 128 KiB
/// of weights, since memory delivers long runs faster than short ones (docs/log.md). For many tokens some groups, which
/// share a panel of inputs.
pub(crate) fn groups_each(groups: usize, bytes: usize, tokens: usize) -> usize {
    let fair = groups / (8 * rayon::current_num_threads());
    let enough = if tokens <= TILE { (128 << 10) / bytes.max(1) } else { 4 };
    enough.min(fair).max(1)
}
