//! Decoding kernels against their reference.

mod support;

use dynamoe_kernels::plan::Float;
use dynamoe_kernels::segments::neurons_read;
use rand_chacha::ChaCha8Rng;
use support::case::Case;
use support::layer::Layer;
use support::{FLOATS, MIXES, Mix, SEPARATE_MIXES, rng};

const SHAPES: [(usize, usize, &[usize]); 9] = [
    (0, 16, &[8, 16]),
    (1, 8, &[8]),
    (1, 328, &[40, 96, 144]),
    (2, 72, &[3, 17, 80]),
    (3, 24, &[1, 2, 8]),
    (5, 136, &[32, 64, 96, 128]),
    (7, 16, &[250, 264]),
    (8, 40, &[16, 24]),
    (13, 24, &[24, 56, 120]),
];

/// Checks the layer with weights in one piece and, where shells are whole vectors, in shells.
fn check(layer: Layer, rng: &mut ChaCha8Rng) {
    let case = Case::decode(layer, false);
    case.check(rng);
    if case.layer.widths.iter().all(|w| w % 8 == 0) {
        Case::decode(case.layer, true).check(rng);
    }
}

#[test]
fn decoding_equals_the_reference() {
    let mut rng = rng();
    for float in FLOATS {
        for (tokens, d, widths) in SHAPES {
            for mix in MIXES {
                check(Layer::random(&mut rng, float, [tokens, d], widths, mix), &mut rng);
            }
        }
    }
}

#[test]
fn separate_weights_serve_tokens_below_full_width() {
    let mut rng = rng();
    for float in FLOATS {
        for (tokens, d, widths) in SHAPES {
            for shells in Layer::separate_shells(widths, 8) {
                for mix in SEPARATE_MIXES {
                    let layer = Layer::random(&mut rng, float, [tokens, d], widths, mix);
                    let mut layer = layer.with_separate(&mut rng, shells);
                    let needed = layer.poison_unneeded();
                    if widths.iter().all(|w| w % 8 == 0) {
                        let each: Vec<u32> =
                            layer.experts.iter().map(|&e| widths[e as usize] as u32).collect();
                        assert_eq!(needed, neurons_read(&layer.segments(true), &each) as usize);
                    }
                    check(layer, &mut rng);
                }
            }
        }
    }
}

#[test]
fn neurons_beyond_the_widest_token_are_not_read() {
    let mut rng = rng();
    let mut layer = Layer::random(&mut rng, Float::Bf16, [4, 64], &[32, 256], Mix::Narrow);
    layer.dense.poison(layer.float, 32..256);
    let case = Case::decode(layer, false);
    case.check(&mut rng);
    let untouched = case.h().chunks(256).all(|row| row[32..].iter().all(|x| x.is_nan()));
    assert!(untouched, "blocks beyond the widest token must leave at once");
}
