//! FFNs of real shapes with random weights: candle's dense one, ours dense, ours of four experts.

#![allow(dead_code)] // each benchmark uses a part

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Activation, Linear};
use dynamoe::cpu::PackedMatrix;
use dynamoe::{DynaMoeFfn, PackedExperts, Projections, Router};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Name, hidden size, intermediate size.
pub const SHAPES: [(&str, usize, usize); 3] =
    [("llama-3.2-1b", 2048, 8192), ("qwen3-0.6b", 1024, 3072), ("small", 256, 1024)];

/// Types of weights.
pub const TYPES: [GgmlDType; 5] =
    [GgmlDType::F32, GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q6K, GgmlDType::Q5K];

/// A matrix of random blocks with small scales.
pub fn random_weight(rng: &mut ChaCha8Rng, dtype: GgmlDType, n: usize, k: usize) -> QTensor {
    let mut words = vec![0u32; (n * k / dtype.block_size() * dtype.type_size()).div_ceil(4)];
    if dtype == GgmlDType::F32 {
        words.iter_mut().for_each(|w| *w = rng.random_range(-0.05f32..0.05).to_bits());
    } else {
        words.iter_mut().for_each(|w| *w = rng.random());
    }
    let len = n * k / dtype.block_size() * dtype.type_size();
    // SAFETY: words are plain bytes
    let bytes = unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), len) };
    let scales: &[usize] = match dtype {
        GgmlDType::F32 => &[],
        GgmlDType::Q4K | GgmlDType::Q5K => &[0, 2],
        GgmlDType::Q6K => &[208],
        _ => &[0],
    };
    let size = if dtype == GgmlDType::Q8_0 { 5e-4 } else { 1e-4 };
    for block in bytes.chunks_exact_mut(dtype.type_size()) {
        for &at in scales {
            block[at..at + 2].copy_from_slice(&half::f16::from_f32(size).to_le_bytes());
        }
    }
    QTensor::new(QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, dtype).unwrap(), (n, k)).unwrap()
}

/// A dense FFN through candle, as an engine runs it.
pub struct CandleFfn {
    gate: QMatMul,
    up: QMatMul,
    down: QMatMul,
}

impl CandleFfn {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = (self.gate.forward(x)?.silu()? * self.up.forward(x)?)?;
        self.down.forward(&h)
    }
}

/// One layer in all forms.
pub struct Layer {
    pub candle: CandleFfn,
    pub dense: DynaMoeFfn<PackedExperts>,
    pub routed: DynaMoeFfn<PackedExperts>,
    pub bytes: usize,
}

pub fn layer(rng: &mut ChaCha8Rng, dtype: GgmlDType, d: usize, i: usize) -> Layer {
    let mut weight = |n, k| random_weight(rng, dtype, n, k);
    let pack = |w: &QTensor| Arc::new(PackedMatrix::from_qtensor(w).unwrap());
    let (gate, up, down) = (weight(i, d), weight(i, d), weight(d, i));
    let whole = Projections { gate_proj: pack(&gate), up_proj: pack(&up), down_proj: pack(&down) };
    let dense = PackedExperts::new(vec![whole], Activation::Silu, &[i]).unwrap();
    let widths = [i / 4, i / 2, i / 4 * 3, i];
    let shells = (0..4).map(|_| Projections {
        gate_proj: pack(&weight(i / 4, d)),
        up_proj: pack(&weight(i / 4, d)),
        down_proj: pack(&weight(d, i / 4)),
    });
    let shells = PackedExperts::new(shells.collect(), Activation::Silu, &widths).unwrap();
    let r = (d / 2).clamp(16, 64);
    let zeros = |n, k| Tensor::zeros((n, k), DType::F32, &Device::Cpu).unwrap();
    let fc = |n, k| Linear::new(zeros(n, k), Some(zeros(1, n).squeeze(0).unwrap()));
    // logits of 0 against the dial: chosen by the dial alone; the work is that of any router
    let router = Router::Mlp { fc1: fc(r, d), fc2: fc(3, r) };
    let bytes = [&gate, &up, &down].iter().map(|w| w.storage_size_in_bytes()).sum();
    let matmul = |w: QTensor| match dtype {
        GgmlDType::F32 => QMatMul::Tensor(w.dequantize(&Device::Cpu).unwrap()),
        _ => QMatMul::QTensor(Arc::new(w)),
    };
    Layer {
        candle: CandleFfn { gate: matmul(gate), up: matmul(up), down: matmul(down) },
        dense: DynaMoeFfn::new(dense, Router::Static(vec![]), None, 1.0).unwrap(),
        routed: DynaMoeFfn::new(shells, router, Some(zeros(3, d)), 1.0).unwrap(),
        bytes,
    }
}

/// As many layers as no cache holds, as in a whole model.
pub fn layers(dtype: GgmlDType, d: usize, i: usize) -> Vec<Layer> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut layers = vec![layer(&mut rng, dtype, d, i)];
    let limit = if i <= 1024 { 8 << 20 } else { 100 << 20 };
    while layers.len() * layers[0].bytes < limit {
        layers.push(layer(&mut rng, dtype, d, i));
    }
    layers
}

pub fn input(tokens: usize, d: usize) -> Tensor {
    Tensor::randn(0f32, 1.0, (tokens, d), &Device::Cpu).unwrap()
}
