//! Random packed weights and inputs for tests, and products of them in f64.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

pub(crate) const CPU: Device = Device::Cpu;
pub(crate) const TYPES: [GgmlDType; 6] =
    [GgmlDType::F32, GgmlDType::Q4_0, GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K];

/// Error of a sum in f32, relative to the sum of its terms' sizes.
pub(crate) const SUM: f64 = 1e-6;

/// Miri runs everything, but less of it.
pub(crate) fn few<T: Copy>(all: &[T], under_miri: usize) -> &[T] {
    if cfg!(miri) { &all[..under_miri.min(all.len())] } else { all }
}

/// Blocks of random bits: every scale, minimum and code occurs.
pub(crate) fn random_weight(rng: &mut ChaCha8Rng, dtype: GgmlDType, n: usize, k: usize) -> QTensor {
    let blocks = n * k / dtype.block_size();
    // words, so that f32 is aligned
    let mut words: Vec<u32> = (0..(blocks * dtype.type_size()).div_ceil(4)).map(|_| rng.random()).collect();
    if dtype == GgmlDType::F32 {
        words.iter_mut().for_each(|w| *w = rng.random_range(-1f32..1.0).to_bits());
    }
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    bytes.truncate(blocks * dtype.type_size());
    let floats: &[usize] = match dtype {
        GgmlDType::F32 => &[],
        GgmlDType::Q4K | GgmlDType::Q5K => &[0, 2],
        GgmlDType::Q6K => &[208],
        _ => &[0],
    };
    for block in bytes.chunks_exact_mut(dtype.type_size()) {
        for &at in floats {
            let scale = half::f16::from_f32(rng.random_range(-0.02f32..0.02));
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    for (word, bytes) in words.iter_mut().zip(bytes.chunks(4)) {
        let mut le = [0; 4];
        le[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_le_bytes(le);
    }
    // SAFETY: words are plain bytes
    let bytes = unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), bytes.len()) };
    QTensor::new(QStorage::from_data(Cow::Borrowed(bytes), &CPU, dtype).unwrap(), (n, k)).unwrap()
}

pub(crate) fn random_input(rng: &mut ChaCha8Rng, tokens: usize, k: usize) -> Tensor {
    let mut data: Vec<f32> = (0..tokens * k).map(|_| rng.random_range(-3f32..3.0)).collect();
    // some blocks of zeros, some values that tie in magnitude
    for block in data.chunks_exact_mut(32) {
        match rng.random_range(0..10) {
            0 => block.fill(0.0),
            1 => (block[3], block[17]) = (3.5, -3.5),
            2 => (block[3], block[17]) = (-3.5, 3.5),
            _ => {}
        }
    }
    Tensor::from_vec(data, (tokens, k), &CPU).unwrap()
}

/// The input as the type's kernels see it, rounded by candle.
pub(crate) fn rounded(x: &Tensor, dtype: GgmlDType) -> Vec<f64> {
    let kind = match dtype {
        GgmlDType::F32 => None,
        GgmlDType::Q4_0 | GgmlDType::Q8_0 => Some(GgmlDType::Q8_0),
        _ => Some(GgmlDType::Q8K),
    };
    let x = match kind {
        Some(kind) if x.elem_count() > 0 => {
            QTensor::quantize(&x.contiguous().unwrap(), kind).unwrap().dequantize(&CPU).unwrap()
        }
        _ => x.clone(),
    };
    flat(&x)
}

pub(crate) fn flat(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// `x · Wᵀ` and `|x| · |W|ᵀ`, the scale of rounding errors.
pub(crate) fn product(x: &[f64], w: &[f64], k: usize) -> (Vec<f64>, Vec<f64>) {
    if k == 0 {
        return Default::default();
    }
    let pairs = x.chunks_exact(k).flat_map(|x| {
        w.chunks_exact(k).map(move |w| {
            x.iter().zip(w).fold((0.0, 0.0), |(sum, size), (x, w)| (sum + x * w, size + (x * w).abs()))
        })
    });
    pairs.unzip()
}

pub(crate) fn assert_close(found: &[f64], expected: &[f64], size: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, ((a, b), size)) in found.iter().zip(expected).zip(size).enumerate() {
        assert!((a - b).abs() <= tolerance * (size + 1e-20), "{what}, at {at}: found {a}, expected {b}");
    }
}
