//! A checkpoint whose FFNs are empty, to build the dense model around.

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::{Init, var_builder::SimpleBackend};
use mistralrs_quant::{ShardedSafeTensors, ShardedVarBuilder};

/// Width of the FFNs that the dense model is built with; they are thrown away.
pub(crate) const WIDTH: usize = 1;

/// Answers zeros for the FFNs' matrices, and for everything else what is in the checkpoint.
struct WithoutFfns(ShardedVarBuilder);

/// The checkpoint behind `vb` without its FFNs.
pub(crate) fn without_ffns(vb: &ShardedVarBuilder) -> ShardedVarBuilder {
    let backend = Box::new(WithoutFfns(vb.clone()));
    ShardedSafeTensors::wrap(backend, vb.dtype(), vb.device().clone())
}

fn is_ffn(name: &str) -> bool {
    let matrices = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"];
    matrices.iter().any(|matrix| name.strip_suffix(matrix).is_some_and(|layer| layer.ends_with(".mlp.")))
}

impl WithoutFfns {
    fn at(&self, dtype: DType, device: &Device) -> ShardedVarBuilder {
        self.0.clone().set_dtype(dtype).set_device(device.clone())
    }
}

impl SimpleBackend for WithoutFfns {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        if is_ffn(name) {
            Tensor::zeros(shape, dtype, device)
        } else {
            self.at(dtype, device).get(shape, name)
        }
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.at(dtype, device).get_unchecked_dtype(name, dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_tensor(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn only_ffns_are_empty() {
        let ones = Tensor::ones((3, 2), DType::F32, &Device::Cpu).unwrap();
        let names = ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_proj.weight"];
        let tensors = names.map(|name| (name.to_string(), ones.clone()));
        let vb = ShardedSafeTensors::wrap(Box::new(HashMap::from(tensors)), DType::F32, Device::Cpu);
        let stub = without_ffns(&vb);
        let sum = |tensor: Tensor| tensor.sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(sum(stub.get((WIDTH, 2), names[0]).unwrap()), 0.0);
        assert_eq!(sum(stub.get((3, 2), names[1]).unwrap()), 6.0);
        assert!(stub.get((2, 2), names[1]).is_err() && !stub.contains_tensor("lm_head.weight"));
        assert!(!is_ffn("model.layers.0.mlp.router.fc1.weight"));
    }
}
