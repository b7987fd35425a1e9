//! A checkpoint as the dense model reads it: every tensor checked, and empty FFNs where ours take their place.

use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor, bail};
use candle_nn::{Init, var_builder::SimpleBackend};
use mistralrs_quant::{ShardedSafeTensors, ShardedVarBuilder};

/// Width of the FFNs that the dense model is built with; they are thrown away.
pub(crate) const WIDTH: usize = 1;

const EMBEDDING: &str = "model.embed_tokens.weight";
const LM_HEAD: &str = "lm_head.weight";

/// What is in the checkpoint, its values checked.
struct Checked {
    inner: ShardedVarBuilder,
    /// Answers zeros for the FFNs' matrices.
    without_ffns: bool,
}

/// The checkpoint behind `vb` without its FFNs.
pub(crate) fn without_ffns(vb: &ShardedVarBuilder) -> ShardedVarBuilder {
    wrap(vb, true)
}

/// The checkpoint behind `vb`.
pub(crate) fn checked(vb: &ShardedVarBuilder) -> ShardedVarBuilder {
    wrap(vb, false)
}

fn wrap(vb: &ShardedVarBuilder, without_ffns: bool) -> ShardedVarBuilder {
    let backend = Box::new(Checked { inner: vb.clone(), without_ffns });
    ShardedSafeTensors::wrap(backend, vb.dtype(), vb.device().clone())
}

fn is_ffn(name: &str) -> bool {
    let matrices = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"];
    matrices.iter().any(|matrix| name.strip_suffix(matrix).is_some_and(|layer| layer.ends_with(".mlp.")))
}

impl Checked {
    fn at(&self, dtype: DType, device: &Device) -> ShardedVarBuilder {
        self.inner.clone().set_dtype(dtype).set_device(device.clone())
    }
}

impl SimpleBackend for Checked {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        if self.without_ffns && is_ffn(name) {
            return Tensor::zeros(shape, dtype, device);
        }
        let tensor = self.at(dtype, device).get(shape, name)?;
        check_finite(name, &tensor)?;
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = self.at(dtype, device).get_unchecked_dtype(name, dtype)?;
        check_finite(name, &tensor)?;
        Ok(tensor)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.inner.contains_tensor(name)
    }
}

/// Checks that a tensor of F32, F16 or BF16 holds numbers only.
pub(crate) fn check_finite(name: &str, tensor: &Tensor) -> Result<()> {
    if !is_finite(tensor)? {
        bail!(
            "tensor {name}: a value is NaN or infinite in {:?}: the model is broken, or needs a wider type",
            tensor.dtype()
        );
    }
    Ok(())
}

fn is_finite(tensor: &Tensor) -> Result<bool> {
    // loops without an early exit, which the compiler turns into vector code
    macro_rules! all {
        ($values:expr) => {
            $values.iter().fold(true, |all, value| all & value.is_finite())
        };
    }
    if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Ok(true);
    }
    let (storage, layout) = tensor.storage_and_layout();
    if let (Storage::Cpu(cpu), Some((start, end))) = (&*storage, layout.contiguous_offsets()) {
        return Ok(match cpu {
            CpuStorage::F32(values) => all!(values[start..end]),
            CpuStorage::F16(values) => all!(values[start..end]),
            CpuStorage::BF16(values) => all!(values[start..end]),
            _ => true,
        });
    }
    drop(storage);
    // zero times what is not finite is NaN
    let sum = (tensor.to_dtype(DType::F32)? * 0.0)?.sum_all()?;
    Ok(sum.to_scalar::<f32>()? == 0.0)
}

/// Checks that an output matrix that is the embedding by config.json is the embedding in the checkpoint, too, if it is
/// there.
pub(crate) fn check_tied_head(vb: &ShardedVarBuilder) -> Result<()> {
    if !vb.contains_tensor(LM_HEAD) || !vb.contains_tensor(EMBEDDING) {
        return Ok(());
    }
    let read = |name| vb.clone().set_device(Device::Cpu).get_unchecked_dtype(name, DType::F32);
    let (head, embedding) = (read(LM_HEAD)?, read(EMBEDDING)?);
    if head.dims() != embedding.dims() || head.ne(&embedding)?.max_all()?.to_scalar::<u8>()? != 0 {
        bail!(
            "tensor {LM_HEAD} differs from {EMBEDDING}, but config.json has \"tie_word_embeddings\": true, which makes \
             them one: set it to false if the model has an output matrix of its own, or else remove {LM_HEAD}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    const NAMES: [&str; 2] =
        ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_proj.weight"];

    fn vb(tensors: &[(&str, &Tensor)]) -> ShardedVarBuilder {
        let tensors: HashMap<_, _> =
            tensors.iter().map(|(name, tensor)| ((*name).to_owned(), (*tensor).clone())).collect();
        ShardedSafeTensors::wrap(Box::new(tensors), DType::F32, Device::Cpu)
    }

    fn ones() -> Tensor {
        Tensor::ones((3, 2), DType::F32, &Device::Cpu).unwrap()
    }

    #[test]
    fn only_ffns_are_empty() {
        let ones = ones();
        let stub = without_ffns(&vb(&NAMES.map(|name| (name, &ones))));
        let sum = |tensor: Tensor| tensor.sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(sum(stub.get((WIDTH, 2), NAMES[0]).unwrap()), 0.0);
        assert_eq!(sum(stub.get((3, 2), NAMES[1]).unwrap()), 6.0);
        assert!(stub.get((2, 2), NAMES[1]).is_err() && !stub.contains_tensor(LM_HEAD));
        assert!(!is_ffn("model.layers.0.mlp.router.fc1.weight"));
    }

    #[test]
    fn a_value_that_is_no_number_is_named() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let tensor = Tensor::new(&[[1.0, bad], [2.0, 3.0]], &Device::Cpu).unwrap();
            let error = checked(&vb(&[(NAMES[1], &tensor)])).get((2, 2), NAMES[1]).unwrap_err().to_string();
            assert!(error.contains(NAMES[1]) && error.contains("NaN or infinite in F32"), "{error}");
            for dtype in [DType::F16, DType::BF16] {
                assert!(!is_finite(&tensor.to_dtype(dtype).unwrap()).unwrap());
            }
            // not contiguous
            assert!(!is_finite(&tensor.t().unwrap()).unwrap());
        }
        assert!(is_finite(&ones().t().unwrap()).unwrap() && is_finite(&ones()).unwrap());
    }

    #[test]
    fn a_tied_head_is_the_embedding() {
        let (ones, twos) = (ones(), (ones() * 2.0).unwrap());
        assert!(check_tied_head(&vb(&[(EMBEDDING, &ones)])).is_ok());
        assert!(check_tied_head(&vb(&[(EMBEDDING, &ones), (LM_HEAD, &ones)])).is_ok());
        let error = check_tied_head(&vb(&[(EMBEDDING, &ones), (LM_HEAD, &twos)])).unwrap_err().to_string();
        assert!(error.contains(LM_HEAD) && error.contains("tie_word_embeddings"), "{error}");
    }
}
