//! One matrix, as an engine's projection.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{D, DType, Device, Module, Result, Storage, Tensor, bail};

use super::format::Format;
use super::input::{Input, TILE, UNSET};
use super::kernel::{Group, Isa};
use super::lanes::LANES;
use super::memory::Memory;
use super::pack;
use super::parallel::{Phase, run};

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
    /// A type that [`PackedMatrix::supports`] denies, a shape that is no matrix of whole blocks; candle's.
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
    /// A tensor that is no matrix; candle's.
    pub fn from_tensor(weight: &Tensor) -> Result<Self> {
        let (rows, columns) = weight.dims2()?;
        let weight = weight.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
        with_rows(&weight, |data| {
            let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
            Self::new(Format::F32, rows, columns, &bytes)
        })?
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
    ///
    /// # Errors
    /// candle's.
    pub fn to_qtensor(&self) -> Result<QTensor> {
        let data = pack::unpack(self.format, &self.packed, self.rows, self.blocks());
        // borrowed: candle 0.10 would read an owned one after it is freed
        let storage = QStorage::from_data(Cow::Borrowed(data.bytes()), &Device::Cpu, self.dtype())?;
        QTensor::new(storage, (self.rows, self.columns))
    }

    /// The weights `(N, K)` in f32.
    ///
    /// # Errors
    /// candle's.
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

    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// Groups of 16 rows.
    pub(super) fn groups(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    fn blocks(&self) -> usize {
        self.columns / self.format.layout().weights
    }

    /// Bytes of a group.
    pub(super) fn group_bytes(&self) -> usize {
        self.blocks() * pack::unit(self.format)
    }

    /// Adds the products of group `group` with `tokens` tokens of `input` from `token` on, within a panel,
    /// to as many `sums`.
    pub(super) fn multiply(
        &self,
        isa: Isa,
        group: usize,
        input: &Input,
        tokens: std::ops::Range<usize>,
        sums: &mut [[f32; LANES]],
    ) {
        assert!(input.encoding() == self.format.encoding() && input.blocks() == self.blocks());
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

    pub(super) fn forward_rows(&self, isa: Isa, x: &[f32], tokens: usize) -> Vec<f32> {
        let (n, k) = (self.rows, self.columns);
        if k == 0 {
            return vec![0.0; tokens * n];
        }
        let mut y = unset(tokens * n);
        if y.is_empty() {
            return y;
        }
        let mut input = Input::new(self.format.encoding(), tokens, k);
        let (stride, panels) = (input.stride(), input.panels());
        let writer = input.writer();
        let encode = |panel: usize| {
            for token in panel * stride..((panel + 1) * stride).min(tokens) {
                // SAFETY: each panel is one item, read in the next phase only
                unsafe { writer.encode(isa, token, 0, &x[token * k..][..k]) }
            }
        };
        let out = Output::new(&mut y, n);
        let each = groups_each(self.groups(), self.group_bytes(), tokens);
        let multiply = |item: usize| {
            let mut sums = [[0f32; LANES]; TILE];
            for token in (0..tokens).step_by(stride) {
                let range = token..(token + stride).min(tokens);
                for group in item * each..((item + 1) * each).min(self.groups()) {
                    let sums = &mut sums[..range.len()];
                    sums.fill([0.0; LANES]);
                    self.multiply(isa, group, writer.input(), range.clone(), sums);
                    let count = LANES.min(n - group * LANES);
                    for (token, sums) in range.clone().zip(&*sums) {
                        // SAFETY: each group is in one item
                        unsafe { out.store(token, group * LANES, sums, count) }
                    }
                }
            }
        };
        run(&[
            Phase { items: panels, cost: 4 * x.len(), run: &encode },
            Phase { items: self.groups().div_ceil(each), cost: self.bytes() * tokens, run: &multiply },
        ]);
        y
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
        let y = with_rows(&rows, |rows| self.forward_rows(Isa::best(), rows, tokens))?;
        Tensor::from_vec(y, shape, &Device::Cpu)?.to_dtype(x.dtype())
    }
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix({:?}, {} x {})", self.dtype(), self.rows, self.columns)
    }
}

/// Hands out the numbers of a contiguous f32 tensor.
pub(super) fn with_rows<T>(x: &Tensor, read: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => Ok(read(&storage.as_slice::<f32>()?[start..end])),
        _ => bail!("packed product: expected inputs on the CPU, found {:?}", x.device()),
    }
}

/// Memory for results that are all written.
pub(super) fn unset(len: usize) -> Vec<f32> {
    vec![f32::from_bits(UNSET); len]
}

/// Groups of `bytes` bytes that one item takes, fine enough to share them fairly. For few tokens, about 128 KiB of
/// weights: memory delivers long runs faster than short ones (docs/log.md). For many, some groups that share a
/// panel of inputs.
pub(super) fn groups_each(groups: usize, bytes: usize, tokens: usize) -> usize {
    let fair = groups / (8 * rayon::current_num_threads());
    let enough = if tokens <= TILE { (128 << 10) / bytes.max(1) } else { 4 };
    enough.min(fair).max(1)
}

/// An output `(T, N)` that threads fill, each its own columns.
pub(super) struct Output<'a> {
    data: *mut f32,
    len: usize,
    columns: usize,
    _borrow: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: `store` is unsafe: its callers write to different places.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    pub fn new(data: &'a mut [f32], columns: usize) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), columns, _borrow: std::marker::PhantomData }
    }

    /// Stores `count` columns of one row.
    ///
    /// # Safety
    /// No other thread may use the same place at the same time.
    pub unsafe fn store(&self, row: usize, column: usize, values: &[f32; LANES], count: usize) {
        let at = row * self.columns + column;
        assert!(count <= LANES && column + count <= self.columns && at + count <= self.len);
        // SAFETY: within the slice; the caller has this place for itself
        unsafe {
            let to = self.data.add(at);
            if count == LANES {
                // a length that the compiler knows
                to.cast::<[f32; LANES]>().write_unaligned(*values);
            } else {
                std::ptr::copy_nonoverlapping(values.as_ptr(), to, count);
            }
        }
    }

    /// Reads `count` columns of one row.
    ///
    /// # Safety
    /// No thread may write to the same place while the slice lives.
    pub unsafe fn read(&self, row: usize, column: usize, count: usize) -> &[f32] {
        let at = row * self.columns + column;
        assert!(column + count <= self.columns && at + count <= self.len);
        // SAFETY: within the slice; the caller keeps others from writing
        unsafe { std::slice::from_raw_parts(self.data.add(at), count) }
    }
}
