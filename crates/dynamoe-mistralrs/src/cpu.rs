//! The engine's projections on the CPU kernels of `dynamoe`.
//!
//! candle multiplies a quantized matrix with one token at a time; packed matrices do better. Packed projections stand
//! in the slots of the engine's own, which may quantize or serialize each of them and gets the blocks that were packed.

use std::{
    borrow::Cow,
    sync::{Arc, atomic::AtomicUsize},
};

use candle_core::{
    DType, Device, Module, Result, Tensor,
    quantized::{GgmlDType, QTensor, ggml_file::qtensor_from_ggml},
};
use candle_nn::Linear;
use dynamoe::cpu::PackedMatrix;
use mistralrs_quant::{
    GgufMatMul, IsqType, QuantMethod, QuantMethodConfig, QuantizeOntoGuard, QuantizedSerde,
    QuantizedSerdeType, UQFF_QUANT_TYPE_OFFSET, UnquantLinear,
};

pub(crate) type Slot = Arc<dyn QuantMethod>;

/// [`PackedLinear`]'s name, by which it is known in its slot.
const PACKED: &str = "packed-gguf";

/// A projection over a packed matrix, in the place of one of the engine's.
#[derive(Debug)]
pub(crate) struct PackedLinear {
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
pub(crate) enum Taken {
    Packed(Arc<PackedLinear>),
    Unquantized(Tensor),
}

/// Takes a projection on the CPU out of `slot`, which keeps it if there is no kernel for it or it is packed.
pub(crate) fn take(slot: &mut Slot) -> Result<Option<Taken>> {
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

pub(crate) fn unquantized(weight: Tensor) -> Result<Slot> {
    Ok(Arc::new(UnquantLinear::new(QuantMethodConfig::Unquantized(Linear::new(weight, None)))?))
}

/// Puts a projection on packed kernels if it is quantized to a type that these know.
pub(crate) fn speed_up(slot: &mut Slot) -> Result<bool> {
    match slot.unquant_weight_bias() {
        Some(_) => Ok(false),
        None => Ok(take(slot)?.is_some()),
    }
}

impl Taken {
    pub fn packed(&self) -> Option<Arc<PackedMatrix>> {
        match self {
            Self::Packed(linear) if linear.bias.is_none() => Some(Arc::clone(&linear.weight)),
            _ => None,
        }
    }

    pub fn unquantized(&self) -> Option<Tensor> {
        match self {
            Self::Unquantized(weight) => Some(weight.clone()),
            Self::Packed(_) => None,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn random(rows: usize, columns: usize) -> Tensor {
        Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu).unwrap()
    }

    pub fn quantized(weight: &Tensor, dtype: GgmlDType, bias: Option<Tensor>) -> Slot {
        let q_weight = Arc::new(QTensor::quantize(weight, dtype).unwrap());
        Arc::new(GgufMatMul::new(QuantMethodConfig::Gguf { q_weight, b: bias }).unwrap())
    }

    pub fn plain(weight: &Tensor) -> Slot {
        unquantized(weight.clone()).unwrap()
    }

    /// The largest difference as a share of the largest number of `expected`.
    pub fn difference(found: &Tensor, expected: &Tensor) -> f32 {
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
}
