//! The engine's projections on the CPU kernels of `dynamoe`.
//!
//! candle multiplies a quantized matrix with one token at a time. Packed matrices do better, and a layer's shells
//! together are one pass over the FFN instead of three products for each shell. Packed projections stand in the
//! slots of the engine's own, which may quantize or serialize each of them and gets the blocks that were packed.
//! Unquantized shells become parts of whole matrices, so that full width is the dense FFN's three products.

use std::{
    borrow::Cow,
    sync::{Arc, PoisonError, RwLock, atomic::AtomicUsize},
};

use candle_core::{
    DType, Device, Module, Result, Tensor,
    quantized::{GgmlDType, QTensor, ggml_file::qtensor_from_ggml},
};
use candle_nn::{Activation, Linear};
use dynamoe::{
    NestedExperts, PrefixExperts, Shell, ShellExperts,
    cpu::{PackedExperts, PackedMatrix},
};
use mistralrs_quant::{
    GgufMatMul, IsqType, QuantMethod, QuantMethodConfig, QuantizeOntoGuard, QuantizedSerde,
    QuantizedSerdeType, UQFF_QUANT_TYPE_OFFSET, UnquantLinear,
};

use crate::weights::{Projection, fused_glu};

pub(crate) type Slot = Arc<dyn QuantMethod>;

/// [`PackedLinear`]'s name, by which it is known in its slot.
const PACKED: &str = "packed-gguf";

/// A projection over a packed matrix, in the place of one of the engine's.
#[derive(Debug)]
struct PackedLinear {
    weight: Arc<PackedMatrix>,
    bias: Option<Tensor>,
}

impl PackedLinear {
    /// The engine's own projection again.
    fn unpack(&self) -> Result<GgufMatMul> {
        let q_weight = Arc::new(self.weight.to_qtensor()?);
        GgufMatMul::new(QuantMethodConfig::Gguf { q_weight, b: self.bias.clone() })
    }
}

impl QuantMethod for PackedLinear {
    fn new(_: QuantMethodConfig) -> Result<Self> {
        candle_core::bail!("a packed projection is made of one of the engine's, not of a configuration")
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.weight.forward(x)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    fn quantized_act_type(&self) -> Option<DType> {
        Some(DType::F32)
    }

    fn dtype_and_device(&self) -> (DType, Device) {
        (DType::F32, Device::Cpu)
    }

    fn dequantize_w(&self) -> Result<Tensor> {
        self.weight.dequantize()
    }

    fn add_delta_w(&self, delta: &Tensor) -> Result<Slot> {
        self.unpack()?.add_delta_w(delta)
    }

    fn apply_isq(
        self: Arc<Self>,
        dtype: Option<IsqType>,
        device: Device,
        n_quantized: &AtomicUsize,
        imatrix_weight: Option<Vec<f32>>,
        guard: QuantizeOntoGuard,
    ) -> Result<Slot> {
        Arc::new(self.unpack()?).apply_isq(dtype, device, n_quantized, imatrix_weight, guard)
    }
}

impl QuantizedSerde for PackedLinear {
    fn name(&self) -> &'static str {
        PACKED
    }

    fn isq_serde_supported(&self) -> bool {
        true
    }

    fn serialize(&self) -> Result<Cow<'_, [u8]>> {
        Ok(Cow::Owned(self.unpack()?.serialize()?.into_owned()))
    }
}

/// A projection as far as it can be taken out of its slot.
enum Taken {
    Packed(Arc<PackedLinear>),
    Unquantized(Tensor),
}

/// Takes a projection on the CPU out of `slot`, which keeps it if there is no kernel for it or it is packed.
fn take(slot: &mut Slot) -> Result<Option<Taken>> {
    if slot.name() == PACKED {
        return Ok(None);
    }
    if let Some((weight, bias)) = slot.unquant_weight_bias() {
        let usable = weight.device().is_cpu() && bias.is_none();
        return Ok(usable.then_some(Taken::Unquantized(weight)));
    }
    // the first also waits for a projection that is being quantized
    if !slot.isq_serde_supported() || !slot.dtype_and_device().1.is_cpu() {
        return Ok(None);
    }
    let blocks = match slot.serialize() {
        Ok(serialized) => ggml_blocks(&serialized, &Device::Cpu)?,
        // a matrix that fits no blocks is kept in f32, which the engine does not serialize
        Err(_) => None,
    };
    let Some((weight, has_bias)) = blocks else { return Ok(None) };
    if !PackedMatrix::supports(weight.dtype()) {
        return Ok(None);
    }
    let (_, columns) = weight.shape().dims2()?;
    let bias = match has_bias {
        // what a projection makes of zeros is its bias
        true => {
            Some(slot.forward(&Tensor::zeros((1, 1, columns), DType::F32, &Device::Cpu)?)?.flatten_all()?)
        }
        false => None,
    };
    let packed = Arc::new(PackedLinear { weight: Arc::new(PackedMatrix::from_qtensor(&weight)?), bias });
    *slot = Arc::clone(&packed) as Slot;
    Ok(Some(Taken::Packed(packed)))
}

/// Reads a projection as the engine serializes it, onto `device`, if it is one of ggml's types, and whether it has a bias.
///
/// ```text
/// u32 version · u8 kind (0: ggml's) · u32 bytes · u8 bias · u32 type · u32 dimensions · u32 each · bytes · bias
/// ```
pub(crate) fn ggml_blocks(serialized: &[u8], device: &Device) -> Result<Option<(QTensor, bool)>> {
    let u32_at = |at: usize| -> Result<usize> {
        match serialized.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()) {
            Some(bytes) => Ok(u32::from_le_bytes(bytes) as usize),
            None => candle_core::bail!("a serialized projection ends after {} bytes", serialized.len()),
        }
    };
    if serialized.get(UQFF_QUANT_TYPE_OFFSET) != Some(&(QuantizedSerdeType::Gguf as u8)) {
        return Ok(None);
    }
    let (len, has_bias, dtype) = (u32_at(5)?, serialized.get(9) == Some(&1), u32_at(10)?);
    let dims = (0..u32_at(14)?).map(|n| u32_at(18 + 4 * n)).collect::<Result<Vec<_>>>()?;
    let Some(dtype) = ggml_type(dtype) else { return Ok(None) };
    let start = 18 + 4 * dims.len();
    let Some(blocks) = serialized.get(start..start + len) else {
        candle_core::bail!("a serialized projection has {} bytes, expected {}", serialized.len(), start + len)
    };
    // a matrix of more than 4 GiB, whose length does not fit
    let elements: usize = dims.iter().product();
    if dims.len() != 2 || elements / dtype.block_size() * dtype.type_size() != len {
        return Ok(None);
    }
    Ok(Some((qtensor_from_ggml(dtype, blocks, dims, device)?, has_bias)))
}

/// ggml's number of a type that can be packed.
fn ggml_type(number: usize) -> Option<GgmlDType> {
    use GgmlDType::{F32, Q4_0, Q4K, Q5K, Q6K, Q8_0};
    let numbers = [(0, F32), (2, Q4_0), (8, Q8_0), (12, Q4K), (13, Q5K), (14, Q6K)];
    numbers.iter().find(|(n, _)| *n == number).map(|(_, dtype)| *dtype)
}

fn unquantized(weight: Tensor) -> Result<Slot> {
    Ok(Arc::new(UnquantLinear::new(QuantMethodConfig::Unquantized(Linear::new(weight, None)))?))
}

/// Puts a projection on packed kernels if it is quantized to a type that these know.
pub(crate) fn speed_up(slot: &mut Slot) -> Result<bool> {
    match slot.unquant_weight_bias() {
        Some(_) => Ok(false),
        None => Ok(take(slot)?.is_some()),
    }
}

/// A faster form of a layer's shells over the same weights, while there is one.
pub(crate) struct FastExperts {
    activation: Activation,
    widths: Vec<usize>,
    experts: RwLock<Option<Arc<dyn NestedExperts>>>,
}

impl FastExperts {
    pub fn new(activation: Activation, widths: &[usize]) -> Self {
        Self { activation, widths: widths.to_vec(), experts: RwLock::default() }
    }

    /// Forgets it, since the engine is about to change the shells in `slots`: parts of whole matrices become
    /// matrices of their own.
    pub fn release(&self, slots: Vec<&mut Slot>) -> Result<()> {
        if self.experts.write().unwrap_or_else(PoisonError::into_inner).take().is_none() {
            return Ok(());
        }
        for slot in slots {
            if let Some((weight, None)) = slot.unquant_weight_bias() {
                *slot = unquantized(weight.force_contiguous()?)?;
            }
        }
        Ok(())
    }

    fn get(&self) -> Option<Arc<dyn NestedExperts>> {
        self.experts.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes it of the shells in `slots` (gate, up and down projection of each, narrowest expert's first, then those
    /// that narrow experts have of their own), which hold the same weights afterwards, in the memory that is used
    /// here.
    ///
    /// Returns whether there is one: shells must all be on the CPU, and all of types that can be packed or all
    /// unquantized.
    pub fn make(&self, mut slots: Vec<&mut Slot>) -> Result<bool> {
        let taken = slots.iter_mut().map(|slot| take(slot)).collect::<Result<Vec<_>>>()?;
        let Some(taken) = taken.into_iter().collect::<Option<Vec<_>>>() else { return Ok(false) };
        let packed: Option<Vec<_>> = taken.iter().map(Taken::packed).collect();
        let unquantized: Option<Vec<_>> = taken.iter().map(Taken::unquantized).collect();
        let experts: Arc<dyn NestedExperts> = match (packed, unquantized) {
            (Some(matrices), _) => Arc::new(self.packed(&matrices)?),
            (_, Some(weights)) => self.prefixes(&mut slots, &weights)?,
            _ => return Ok(false),
        };
        *self.experts.write().unwrap_or_else(PoisonError::into_inner) = Some(experts);
        Ok(true)
    }

    fn packed(&self, matrices: &[Arc<PackedMatrix>]) -> Result<PackedExperts> {
        let shell = |m: &[Arc<PackedMatrix>]| Shell {
            gate_proj: Arc::clone(&m[0]),
            up_proj: Arc::clone(&m[1]),
            down_proj: Arc::clone(&m[2]),
        };
        let mut shells: Vec<_> = matrices.chunks_exact(3).map(shell).collect();
        let own = shells.split_off(self.widths.len());
        let experts = PackedExperts::new(shells, self.activation, &self.widths);
        experts.and_then(|experts| experts.with_own(own)).map_err(candle_core::Error::wrap)
    }

    fn prefixes(&self, slots: &mut [&mut Slot], weights: &[Tensor]) -> Result<Arc<dyn NestedExperts>> {
        let new = |[gate, up, down]: [Tensor; 3], widths: &[usize]| -> Result<PrefixExperts> {
            let experts = PrefixExperts::new(gate, up, down, self.activation, widths);
            Ok(experts.map_err(candle_core::Error::wrap)?.with_glu(fused_glu))
        };
        let (slots, own_slots) = slots.split_at_mut(3 * self.widths.len());
        let (weights, own_weights) = weights.split_at(slots.len());
        let joined = join(slots, weights)?;
        let own_shells = own_slots.len() / 3;
        let narrower = &self.widths[..self.widths.len() - 1];
        let full = new(joined.clone(), &self.widths)?;
        let Some(&width) = own_shells.checked_sub(1).map(|last| &narrower[last]) else {
            return Ok(Arc::new(full));
        };
        let shared: Vec<usize> = narrower[own_shells..].iter().map(|end| end - width).collect();
        let shared = match shared.last() {
            None => None,
            Some(&len) => {
                let [gate, up, down] = &joined;
                let parts =
                    [gate.narrow(0, width, len)?, up.narrow(0, width, len)?, down.narrow(1, width, len)?];
                Some(new(parts, &shared)?)
            }
        };
        let own = new(join(own_slots, own_weights)?, &narrower[..own_shells])?;
        Ok(Arc::new(OwnPrefixes { full, own, shared }))
    }
}

/// Joins shells' weights to whole matrices (gate, up, down), and leaves parts of these in the slots.
fn join(slots: &mut [&mut Slot], weights: &[Tensor]) -> Result<[Tensor; 3]> {
    let mut join = |matrix: usize, dim: usize| -> Result<Tensor> {
        let shells: Vec<&Tensor> = weights.iter().skip(matrix).step_by(3).collect();
        let joined = Tensor::cat(&shells, dim)?;
        let mut start = 0;
        for (shell, slot) in shells.iter().zip(slots.iter_mut().skip(matrix).step_by(3)) {
            let part = joined.narrow(dim, start, shell.dim(dim)?)?;
            start += shell.dim(dim)?;
            **slot = unquantized(part)?;
        }
        Ok(joined)
    };
    Ok([join(0, 0)?, join(1, 0)?, join(2, 1)?])
}

/// Prefixes of whole matrices where narrow experts have first neurons of their own: these, and the neurons behind
/// them, which are parts of the whole ones.
struct OwnPrefixes {
    full: PrefixExperts,
    own: PrefixExperts,
    shared: Option<PrefixExperts>,
}

impl NestedExperts for OwnPrefixes {
    fn widths(&self) -> &[usize] {
        self.full.widths()
    }

    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        self.full.forward(x, reach)
    }

    fn own_shells(&self) -> usize {
        self.own.widths().len()
    }

    fn forward_narrow(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        let (own, behind) = reach.split_at(self.own_shells());
        let y = self.own.forward(x, own)?;
        let (Some(shared), Some(&rows)) = (&self.shared, behind.first()) else { return Ok(y) };
        if rows == 0 {
            return Ok(y);
        }
        let more = shared.forward(&x.narrow(0, 0, rows)?, behind)?;
        let sum = (y.narrow(0, 0, rows)? + more)?;
        match y.dim(0)? - rows {
            0 => Ok(sum),
            rest => Tensor::cat(&[sum, y.narrow(0, rows, rest)?], 0),
        }
    }
}

impl Taken {
    fn packed(&self) -> Option<Arc<PackedMatrix>> {
        match self {
            Self::Packed(linear) if linear.bias.is_none() => Some(Arc::clone(&linear.weight)),
            _ => None,
        }
    }

    fn unquantized(&self) -> Option<Tensor> {
        match self {
            Self::Unquantized(weight) => Some(weight.clone()),
            Self::Packed(_) => None,
        }
    }
}

/// A layer's shells as the engine's projections, and their faster form while there is one.
#[derive(Clone)]
pub(crate) struct EngineExperts {
    pub shells: ShellExperts<Projection>,
    pub fast: Arc<FastExperts>,
    #[cfg(feature = "cuda")]
    pub cuda: Arc<crate::cuda::CudaExperts>,
}

impl EngineExperts {
    /// gate, up and down projection of each shell, narrowest expert's first, then of narrow experts' own shells.
    pub fn slots(&mut self) -> Vec<&mut Slot> {
        let (shells, own) = self.shells.all_mut();
        let all = shells.iter_mut().chain(own);
        all.flat_map(|s| [&mut s.gate_proj.0, &mut s.up_proj.0, &mut s.down_proj.0]).collect()
    }
}

impl NestedExperts for EngineExperts {
    fn widths(&self) -> &[usize] {
        self.shells.widths()
    }

    #[cfg(feature = "cuda")]
    fn cuda_segments(&self) -> Option<Vec<dynamoe::CudaSegment>> {
        self.cuda.get()
    }

    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        match self.fast.get() {
            Some(fast) => fast.forward(x, reach),
            None => self.shells.forward(x, reach),
        }
    }

    fn forward_unsorted(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Result<Tensor> {
        match self.fast.get() {
            Some(fast) => fast.forward_unsorted(x, order, reach),
            None => self.shells.forward_unsorted(x, order, reach),
        }
    }

    fn own_shells(&self) -> usize {
        self.shells.own().len()
    }

    fn forward_narrow(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        match self.fast.get() {
            Some(fast) => fast.forward_narrow(x, reach),
            None => self.shells.forward_narrow(x, reach),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, columns: usize) -> Tensor {
        Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu).unwrap()
    }

    fn quantized(weight: &Tensor, dtype: GgmlDType, bias: Option<Tensor>) -> Slot {
        let q_weight = Arc::new(QTensor::quantize(weight, dtype).unwrap());
        Arc::new(GgufMatMul::new(QuantMethodConfig::Gguf { q_weight, b: bias }).unwrap())
    }

    fn plain(weight: &Tensor) -> Slot {
        unquantized(weight.clone()).unwrap()
    }

    /// The largest difference as a share of the largest number of `expected`.
    fn difference(found: &Tensor, expected: &Tensor) -> f32 {
        let largest =
            |x: &Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(found.dims(), expected.dims());
        largest(&(found - expected).unwrap()) / largest(expected)
    }

    #[test]
    fn a_packed_projection_is_the_engines() {
        for dtype in [GgmlDType::Q4_0, GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K] {
            for bias in [None, Some(random(1, 48).flatten_all().unwrap())] {
                let before = quantized(&random(48, 512), dtype, bias);
                let mut slot = Arc::clone(&before);
                assert!(speed_up(&mut slot).unwrap(), "{dtype:?}");
                assert_eq!(slot.name(), PACKED);
                for tokens in [1, 5] {
                    let x = random(tokens, 512).unsqueeze(0).unwrap();
                    let (found, expected) = (slot.forward(&x).unwrap(), before.forward(&x).unwrap());
                    let difference = difference(&found, &expected);
                    assert!(difference < 1e-5, "{dtype:?}: {difference}");
                }
                assert_eq!(slot.serialize().unwrap(), before.serialize().unwrap(), "{dtype:?}");
                // it is packed already
                assert!(!speed_up(&mut slot).unwrap());
            }
        }
    }

    #[test]
    fn a_packed_projection_can_be_quantized_again() {
        let weight = random(32, 256);
        let mut slot = quantized(&weight, GgmlDType::Q8_0, None);
        speed_up(&mut slot).unwrap();
        let count = AtomicUsize::new(0);
        let again =
            slot.apply_isq(Some(IsqType::Q4K), Device::Cpu, &count, None, QuantizeOntoGuard::new()).unwrap();
        assert_ne!(again.name(), PACKED);
        assert_eq!(count.into_inner(), 1);
        assert!(difference(&again.dequantize_w().unwrap(), &weight) < 0.1);
    }

    #[test]
    fn what_has_no_kernel_stays() {
        let weight = random(32, 64);
        let of_type = |dtype| quantized(&weight, dtype, None);
        for mut slot in [of_type(GgmlDType::Q4_1), of_type(GgmlDType::F32), plain(&weight)] {
            let before = Arc::clone(&slot);
            assert!(!speed_up(&mut slot).unwrap());
            assert!(Arc::ptr_eq(&before, &slot));
        }
    }

    #[test]
    fn serialized_projections_that_end_early_are_refused() {
        let bytes = quantized(&random(2, 64), GgmlDType::Q8_0, None).serialize().unwrap().into_owned();
        assert!(ggml_blocks(&bytes, &Device::Cpu).unwrap().is_some());
        for len in 5..bytes.len() {
            assert!(ggml_blocks(&bytes[..len], &Device::Cpu).is_err(), "{len}");
        }
        assert!(ggml_blocks(&[], &Device::Cpu).unwrap().is_none());
    }

    /// Shells of `widths` over fresh matrices, as `projection` makes them, `own` of them narrow experts' own too.
    fn experts(
        widths: &[usize],
        own: usize,
        d: usize,
        projection: impl Fn(&Tensor) -> Slot,
    ) -> EngineExperts {
        let shells = |widths: &[usize]| -> Vec<Shell<Projection>> {
            let mut start = 0;
            let shell = |&end: &usize| {
                let width = end - std::mem::replace(&mut start, end);
                let projection = |rows, columns| Projection(projection(&random(rows, columns)));
                Shell {
                    gate_proj: projection(width, d),
                    up_proj: projection(width, d),
                    down_proj: projection(d, width),
                }
            };
            widths.iter().map(shell).collect()
        };
        let all = ShellExperts::new(shells(widths), Activation::Silu, widths).unwrap();
        EngineExperts {
            shells: all.with_own(shells(&widths[..own])).unwrap(),
            fast: Arc::new(FastExperts::new(Activation::Silu, widths)),
            #[cfg(feature = "cuda")]
            cuda: Arc::default(),
        }
    }

    fn agrees(mut experts: EngineExperts, tolerance: f32) {
        let (x, order) = (random(5, 256), [3, 0, 4, 2, 1]);
        let reaches = [[5, 3, 1], [5, 5, 5], [5, 0, 0]];
        let run = |experts: &EngineExperts| {
            let mut found =
                reaches.map(|reach| experts.forward_unsorted(&x, &order, &reach).unwrap()).to_vec();
            found.extend(reaches.map(|reach| experts.forward_narrow(&x, &reach[..2]).unwrap()));
            found
        };
        let expected = run(&experts);
        let fast = Arc::clone(&experts.fast);
        assert!(fast.make(experts.slots()).unwrap());
        let by_kernels = run(&experts);
        // what is left in the slots is the same, and can be quantized
        fast.release(experts.slots()).unwrap();
        let shells = run(&experts);
        for slot in experts.slots() {
            let (count, isq) = (AtomicUsize::new(0), Some(IsqType::Q8_0));
            let (before, guard) = (Arc::clone(slot), QuantizeOntoGuard::new());
            let after = Arc::clone(slot).apply_isq(isq, Device::Cpu, &count, None, guard).unwrap();
            let before = before.dequantize_w().unwrap();
            assert!(difference(&after.dequantize_w().unwrap(), &before) < 0.01);
        }
        for found in [by_kernels, shells] {
            for (case, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let difference = difference(found, expected);
                assert!(difference < tolerance, "case {case}: {difference}");
            }
        }
    }

    #[test]
    fn fast_experts_are_the_shells() {
        let widths = [256, 512, 768];
        for own in [0, 1, 2] {
            agrees(experts(&widths, own, 256, plain), 1e-5);
            // an activation may be rounded to the next step of its own quantization
            agrees(experts(&widths, own, 256, |w| quantized(w, GgmlDType::Q4K, None)), 1e-3);
            agrees(experts(&widths, own, 256, |w| quantized(w, GgmlDType::Q8_0, None)), 1e-3);
        }
    }

    #[test]
    fn shells_without_a_kernel_run_one_by_one() {
        let mut experts = experts(&[64, 128], 0, 64, |w| quantized(w, GgmlDType::Q4_1, None));
        let fast = Arc::clone(&experts.fast);
        assert!(!fast.make(experts.slots()).unwrap());
        assert_eq!(experts.forward(&random(2, 64), &[2, 1]).unwrap().dims(), [2, 64]);
    }
}
