use candle_core::Device;
use dynamoe::NestedExperts;
use dynamoe_model::model::Experts;
use rand::Rng;

use super::*;
use crate::testing::{normal, rng};

#[test]
fn quantiles_are_those_of_a_sorted_list() {
    let mut rng = rng();
    for count in [1usize, 2, 3, 10, 257, 1000] {
        let mut sorted: Vec<f32> = (0..count).map(|_| rng.random::<f32>() + 1e-3).collect();
        let mut any_order = sorted.clone();
        sorted.sort_by(f32::total_cmp);
        for sparsity in [0.0, 0.1, 0.25, 0.4, 0.5, 0.9, 0.999, 1.0 - f64::EPSILON / 2.0] {
            let threshold = quantile(&mut any_order, sparsity);
            let below = sorted.iter().filter(|magnitude| **magnitude < threshold).count();
            let expected = ((sparsity * count as f64).floor() as usize).min(count - 1);
            assert_eq!(below, expected, "{sparsity} of {count}");
            assert_eq!(threshold, if below == 0 { 0.0 } else { sorted[below] });
        }
    }
    assert_eq!(quantile(&mut [], 0.5), 0.0);
    // of equal magnitudes all stay
    assert_eq!(quantile(&mut [2.0, 1.0, 1.0, 1.0], 0.5), 1.0);
}

#[test]
fn a_small_ffn_by_hand() {
    let tensor =
        |rows: &[[f32; 2]]| Tensor::from_slice(rows.as_flattened(), (rows.len(), 2), &Device::Cpu).unwrap();
    let ffn = Projections {
        gate_proj: tensor(&[[1.0, 10.0], [0.5, -10.0], [2.0, 7.0]]),
        up_proj: tensor(&[[3.0, 20.0], [1.0, 30.0], [-1.0, 5.0]]),
        down_proj: Tensor::new(&[[1f32, 100.0, 1.0], [2.0, 50.0, -1.0]], &Device::Cpu).unwrap(),
    };
    let silu = |x: f32| x / (1.0 + (-x).exp());
    let x = tensor(&[[2.0, -0.1], [-0.1, 0.05]]);
    // of the first row, x' is (2, 0): h is (silu(2) · 6, silu(1) · 2, silu(4) · -2) = (10.6, 1.5, -7.9). The second
    // row is nothing.
    let thresholds = LayerThresholds { input: 0.5, neurons: 2.0 };
    let (y, kept) = sparse_ffn(&ffn, HiddenAct::Silu, &x, thresholds).unwrap();
    let (first, last) = (silu(2.0) * 6.0, silu(4.0) * -2.0);
    let expected = [[first + last, 2.0 * first - last], [0.0, 0.0]];
    for (found, expected) in y.to_vec2::<f32>().unwrap().iter().flatten().zip(expected.iter().flatten()) {
        assert!((found - expected).abs() < 1e-4, "{found} {expected}");
    }
    let half_and_two_thirds = (2.0 * (1.0 / 2.0) + 2.0 / 3.0) / 3.0;
    assert!((kept[0] - half_and_two_thirds).abs() < 1e-12 && kept[1] == 0.0, "{kept:?}");
}

#[test]
fn an_entry_at_the_threshold_stays() {
    let x = Tensor::new(&[[0.5f32, -0.5, 0.4, -0.4, f32::NAN]], &Device::Cpu).unwrap();
    let (x, kept) = sparsified(&x, 0.5).unwrap();
    let x = x.to_vec2::<f32>().unwrap();
    assert_eq!(x[0][..4], [0.5, -0.5, 0.0, 0.0]);
    assert!(x[0][4].is_nan() && (kept[0] - 0.6).abs() < 1e-12);
}

#[test]
fn the_sample_is_bounded_and_sees_every_column_and_no_padding() {
    // padding is 1000, and entries of column k are about k
    let (rows, columns) = (3000, 64);
    let weights: Vec<f32> = (0..rows).map(|row| f32::from(u8::from(row % 3 > 0))).collect();
    let entries = (0..rows * columns).map(|n| if weights[n / columns] > 0.0 { n % columns } else { 1000 });
    let entries: Vec<f32> = entries.map(|column| -(column as f32)).collect();
    let x = Tensor::from_vec(entries, (rows, columns), &Device::Cpu).unwrap();
    let batch = PaddedBatch {
        batch_size: 1,
        length: rows,
        tokens: vec![0; rows],
        targets: vec![0; rows],
        weights,
        items: vec![0],
    };
    // this batch is one of many with 10 times the sample in all
    let tokens = 10 * SAMPLE / columns;
    let found = magnitudes(&x, &batch, 12_345, tokens).unwrap();
    let share = found.len() as f64 / (batch.scored() * columns) as f64;
    assert!((0.08..=0.1).contains(&share), "{share}");
    let mut counts = [0usize; 64];
    found.iter().for_each(|&magnitude| counts[magnitude as usize] += 1);
    let even = found.len() / columns;
    assert!(counts.iter().all(|&count| count.abs_diff(even) <= even / 10), "{counts:?}");
    // a small text is taken whole
    let all = magnitudes(&x, &batch, 0, batch.scored()).unwrap();
    assert_eq!(all.len(), batch.scored() * columns);
}

#[test]
fn without_thresholds_it_is_the_dense_ffn() {
    let mut rng = rng();
    let ffn = Projections {
        gate_proj: normal(&mut rng, 0.3, (24, 16)),
        up_proj: normal(&mut rng, 0.3, (24, 16)),
        down_proj: normal(&mut rng, 0.3, (16, 24)),
    };
    let x = normal(&mut rng, 1.0, (40, 16));
    for act in HiddenAct::ALL {
        let (y, kept) = sparse_ffn(&ffn, act, &x, LayerThresholds::default()).unwrap();
        let dense = Experts::new(ffn.clone(), act, &[24]).unwrap().forward(&x, &[40]).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), dense.to_vec2::<f32>().unwrap());
        assert!(kept.iter().all(|&kept| kept == 1.0));
    }
}

#[test]
fn shares_outside_the_range_are_refused() {
    check_sparsities(&[0.0, 0.5, 0.999]).unwrap();
    for wrong in [-0.1, 1.0, 1.5, f64::NAN, f64::INFINITY] {
        let said = check_sparsities(&[0.5, wrong]).unwrap_err().to_string();
        assert!(said.contains("below 1") && said.contains(&format!("found {wrong}")), "{said}");
    }
}
