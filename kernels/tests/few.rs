//! The kernels for 9 to 64 tokens against their reference.

mod support;

use dynamoe_kernels::plan::Float;
use rand::Rng;
use support::case::{Case, HALVES};
use support::layer::Layer;
use support::{MIXES, Mix, SEPARATE_MIXES, rng};

const SHAPES: [(usize, usize, &[usize]); 8] = [
    (0, 16, &[8, 16]),
    (1, 8, &[8]),
    (2, 200, &[3, 17, 80]),
    (9, 72, &[64, 128]),
    (16, 568, &[24, 56]),
    (17, 136, &[24, 56, 88, 152]),
    (33, 64, &[8, 72, 1200]),
    (64, 136, &[40, 72, 104, 136]),
];

#[test]
fn few_tokens_equal_the_reference() {
    let mut rng = rng();
    for (tokens, d, widths) in SHAPES {
        for mix in MIXES {
            for in_shells in [false, true] {
                if in_shells && widths.iter().any(|w| w % 8 != 0) {
                    continue;
                }
                let float = HALVES[rng.random_range(0..2)];
                let layer = Layer::random(&mut rng, float, [tokens, d], widths, mix);
                Case::few(layer, in_shells).check(&mut rng);
            }
        }
    }
}

#[test]
fn separate_weights_serve_tokens_below_full_width() {
    let mut rng = rng();
    for (tokens, d, widths) in SHAPES {
        for shells in Layer::separate_shells(widths, 8) {
            for mix in SEPARATE_MIXES {
                let in_shells = rng.random_bool(0.5);
                let float = HALVES[rng.random_range(0..2)];
                let layer = Layer::random(&mut rng, float, [tokens, d], widths, mix);
                let mut layer = layer.with_separate(&mut rng, shells);
                layer.poison_unneeded();
                Case::few(layer, in_shells).check(&mut rng);
            }
        }
    }
}

#[test]
fn weights_beyond_the_widest_token_are_not_read() {
    let mut rng = rng();
    let mut layer = Layer::random(&mut rng, Float::Bf16, [12, 64], &[64, 256], Mix::Narrow);
    layer.dense.poison(layer.float, 64..256);
    let case = Case::few(layer, false);
    case.check(&mut rng);
    let untouched = case.h().chunks(256).all(|row| row[64..].iter().all(|x| x.is_nan()));
    assert!(untouched, "blocks beyond must leave at once");
}

#[test]
fn a_missing_barrier_is_found() {
    let mut rng = rng();
    let layer = Layer::random(&mut rng, Float::F16, [20, 800], &[32, 40], Mix::OneWide);
    let case = Case::few(layer.with_separate(&mut rng, 1), false);
    case.run(&mut rng);
    let found = case.losses(0..4);
    assert_eq!(found, [true; 4], "the wait for copies and the barriers are needed, and their loss is seen");
}
