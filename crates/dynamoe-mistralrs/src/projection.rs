//! One of the engine's projections, and the same on the CPU kernels of `dynamoe`.
//!
//! candle multiplies a quantized matrix with one token at a time; packed matrices do better. A packed projection takes
//! the place of the engine's own. The engine may still quantize or serialize it, and gets the blocks that were packed.

use std::{
    borrow::Cow,
    sync::{Arc, atomic::AtomicUsize},
};

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Activation, Linear};
use dynamoe::cpu::PackedMatrix;
use mistralrs_quant::{
    GgufMatMul, GluActivationType, IsqType, QuantMethod, QuantMethodConfig, QuantizeOntoGuard,
    QuantizedSerde, UnquantLinear,
};

use crate::engine_blocks::EngineBlocks;

/// Where the engine keeps a projection, and where another may take its place.
pub(crate) type Slot = Arc<dyn QuantMethod>;

/// One of the engine's projections, quantized or not, as a candle module over rows.
#[derive(Debug, Clone)]
pub(crate) struct Projection(pub Slot);

impl Module for Projection {
    /// `x (rows, in)` → `(rows, out)`; the engine's projections expect a batch dimension.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward_autocast(&x.unsqueeze(0)?)?.squeeze(0)
    }
}

/// `act(gate) ∘ up` as the engine's own MLPs compute it.
pub(crate) fn fused_glu(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let kind = match activation {
        Activation::Silu | Activation::Swish => GluActivationType::Silu,
        Activation::NewGelu | Activation::GeluPytorchTanh => GluActivationType::Gelu,
        Activation::Gelu => GluActivationType::GeluErf,
        Activation::Relu => GluActivationType::Relu,
        other => return other.forward(gate)? * up,
    };
    mistralrs_quant::fused_glu(gate, up, kind)
}

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

/// What [`extract`] found in a slot.
pub(crate) enum Extracted {
    Packed(Arc<PackedLinear>),
    Unquantized(Tensor),
}

/// Hands out the weights of a projection on the CPU. A quantized one is packed in its slot first. Returns nothing, and
/// leaves the slot as it is, if there is no kernel for it or it is packed already.
pub(crate) fn extract(slot: &mut Slot) -> Result<Option<Extracted>> {
    if slot.name() == PACKED {
        return Ok(None);
    }
    if let Some((weight, bias)) = slot.unquant_weight_bias() {
        let usable = weight.device().is_cpu() && bias.is_none();
        return Ok(usable.then_some(Extracted::Unquantized(weight)));
    }
    // the first also waits for a projection that is being quantized
    if !slot.isq_serde_supported() || !slot.dtype_and_device().1.is_cpu() {
        return Ok(None);
    }
    // a matrix that fits no blocks is kept in f32, which the engine does not serialize
    let Ok(serialized) = slot.serialize() else { return Ok(None) };
    let Some(blocks) = EngineBlocks::read(&serialized, &Device::Cpu)? else { return Ok(None) };
    if !PackedMatrix::supports(blocks.weight.dtype()) {
        return Ok(None);
    }
    let weight = Arc::new(PackedMatrix::from_qtensor(&blocks.weight)?);
    let packed = Arc::new(PackedLinear { weight, bias: blocks.bias });
    *slot = Arc::clone(&packed) as Slot;
    Ok(Some(Extracted::Packed(packed)))
}

/// An unquantized projection without a bias.
pub(crate) fn unquantized(weight: Tensor) -> Result<Slot> {
    Ok(Arc::new(UnquantLinear::new(QuantMethodConfig::Unquantized(Linear::new(weight, None)))?))
}

/// Puts a projection on packed kernels if it is quantized to a type that these know.
pub(crate) fn speed_up(slot: &mut Slot) -> Result<bool> {
    Ok(slot.unquant_weight_bias().is_none() && extract(slot)?.is_some())
}

impl Extracted {
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
    use std::cell::RefCell;

    use super::*;
    use candle_core::quantized::{GgmlDType, QTensor};
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use rand_distr::{Distribution, StandardNormal};

    thread_local! {
        /// Fresh random numbers of a test, which has a thread of its own; `TEST_SEED` repeats those of one that failed.
        static RNG: RefCell<ChaCha8Rng> = {
            let given = std::env::var("TEST_SEED").ok().map(|seed| seed.parse().unwrap());
            let seed = given.unwrap_or_else(rand::random);
            println!("TEST_SEED={seed}");
            RefCell::new(ChaCha8Rng::seed_from_u64(seed))
        };
    }

    /// Standard normal numbers `(rows, columns)`.
    pub fn random(rows: usize, columns: usize) -> Tensor {
        let count = rows * columns;
        let numbers: Vec<f32> =
            RNG.with_borrow_mut(|rng| StandardNormal.sample_iter(rng).take(count).collect());
        Tensor::from_vec(numbers, (rows, columns), &Device::Cpu).unwrap()
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
                    // both round activations alike; sums of 512 terms in f32 differ by their order only
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
        // half a step of Q4K: blocks of 32 normal numbers span about 4 in 15 steps, of a largest number of about 4
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
}
