//! Products of every variant against f64, over lists of types and shapes, on fresh random weights and inputs.
//! Memory that is yet to be written holds NaN here.

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Module, Tensor};

use super::testing::{
    CPU, SUM, TYPES, assert_close, few, flat, product, random_input, random_weight, rounded,
};
use super::{Isa, PackedMatrix};
use crate::testing::{rng, uniform};

fn shapes(dtype: GgmlDType) -> Vec<(usize, usize)> {
    let block = dtype.block_size().max(3);
    let mut shapes = vec![(17, block), (1, 3 * block), (40, 5 * block)];
    if !cfg!(miri) {
        shapes.extend([(16, 2 * block), (256, 4 * block), (33, 9 * block)]);
    }
    shapes
}

#[test]
fn products_equal_the_reference() {
    let mut rng = rng();
    for isa in Isa::available() {
        for dtype in TYPES {
            for (n, k) in shapes(dtype) {
                let weight = random_weight(&mut rng, dtype, n, k);
                let packed = PackedMatrix::from_qtensor(&weight).unwrap();
                let w = flat(&weight.dequantize(&CPU).unwrap());
                for &tokens in few(&[3, 13, 0, 1, 2, 7, 8, 9, 12, 16, 64, 513], 2) {
                    if n * k * tokens > 1 << 22 {
                        continue;
                    }
                    let x = random_input(&mut rng, tokens, k);
                    let (expected, size) = product(&rounded(&x, dtype), &w, k);
                    let rows: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
                    let y: Vec<f64> =
                        packed.forward_rows(isa, &rows, tokens).into_iter().map(f64::from).collect();
                    let what = format!("{} {dtype:?} ({n}, {k}) × {tokens}", isa.name());
                    assert_close(&y, &expected, &size, SUM, &what);
                }
            }
        }
    }
}

#[test]
fn products_follow_candle() {
    let mut rng = rng();
    for dtype in TYPES {
        let (n, k) = (50, 2 * dtype.block_size().max(96));
        let weight = random_weight(&mut rng, dtype, n, k);
        let packed = PackedMatrix::from_qtensor(&weight).unwrap();
        let x = random_input(&mut rng, 5, k).reshape((1, 5, k)).unwrap();
        let y = packed.forward(&x).unwrap();
        assert_eq!(y.dims(), [1, 5, n]);
        let (_, size) = product(&flat(&x), &flat(&weight.dequantize(&CPU).unwrap()), k);
        let candle = QMatMul::from_qtensor(weight).unwrap().forward(&x).unwrap();
        assert_close(&flat(&y), &flat(&candle), &size, 2e-6, &format!("{dtype:?}"));
    }
}

#[test]
fn strided_and_half_precision_inputs() {
    let mut rng = rng();
    let packed = PackedMatrix::from_qtensor(&random_weight(&mut rng, GgmlDType::Q8_0, 20, 64)).unwrap();
    let x = random_input(&mut rng, 64, 7).to_dtype(DType::F16).unwrap();
    let strided = x.t().unwrap();
    let y = packed.forward(&strided).unwrap();
    assert_eq!((y.dims(), y.dtype()), ([7, 20].as_slice(), DType::F16));
    let exact = packed.forward(&strided.to_dtype(DType::F32).unwrap().contiguous().unwrap()).unwrap();
    assert_eq!(flat(&y), flat(&exact.to_dtype(DType::F16).unwrap()));
}

#[test]
fn packing_is_undone_bit_for_bit() {
    let mut rng = rng();
    for dtype in TYPES {
        for (n, k) in shapes(dtype) {
            let weight = random_weight(&mut rng, dtype, n, k);
            let packed = PackedMatrix::from_qtensor(&weight).unwrap();
            let back = packed.to_qtensor().unwrap();
            assert_eq!((back.shape(), back.dtype()), (weight.shape(), dtype));
            assert_eq!(back.data().unwrap(), weight.data().unwrap());
            assert_eq!(packed.bytes(), weight.storage_size_in_bytes() / n * n.next_multiple_of(16));
        }
    }
    let dense = uniform(&mut rng, 1.0, (5, 7)).t().unwrap();
    let packed = PackedMatrix::from_tensor(&dense).unwrap();
    assert_eq!(flat(&packed.dequantize().unwrap()), flat(&dense));
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let weight = Tensor::zeros((4, 256), DType::F32, &CPU).unwrap();
    let weight = QTensor::quantize(&weight, GgmlDType::Q2K).unwrap();
    assert!(!PackedMatrix::supports(GgmlDType::Q2K));
    let error = PackedMatrix::from_qtensor(&weight).unwrap_err().to_string();
    assert!(error.contains("found Q2K"), "{error}");
    let packed = PackedMatrix::from_tensor(&Tensor::zeros((4, 8), DType::F32, &CPU).unwrap()).unwrap();
    assert!(packed.forward(&Tensor::zeros((1, 7), DType::F32, &CPU).unwrap()).is_err());
}
