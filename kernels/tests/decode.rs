//! Decoding kernels against their reference.

mod support;

use dynamoe_kernels::plan;
use dynamoe_kernels::segments::neurons_read;
use rand_chacha::ChaCha8Rng;
use support::layer::Layer;
use support::{FLOATS, MIXES, Memory, Mix, SEPARATE_MIXES, decode, lengths, rng, run};

/// Runs the layer, with weights in one piece or in shells; `h` and `y`.
fn run_layer(layer: &mut Layer, in_shells: bool, rng: &mut ChaCha8Rng) -> [Vec<f64>; 2] {
    let (float, tokens, d) = (layer.float, layer.tokens, layer.d);
    let segments = layer.segments(in_shells);
    let mut args = layer.args(&segments);
    let [h, y] = [layer.intermediate_size(), d].map(|n| Memory::poisoned(tokens * n * float.bytes()));
    (args.h, args.y) = (h.address(), y.address());
    for launch in plan::decode(float, tokens, d, &lengths(&segments)) {
        run(&launch, &args, rng);
    }
    [h, y].map(|memory| decode(float, &memory))
}

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

fn check(layer: &mut Layer, in_shells: bool, rng: &mut ChaCha8Rng) {
    let [h, y] = run_layer(layer, in_shells, rng);
    layer
        .compare(&h, &y, &layer.in_order())
        .unwrap_or_else(|e| panic!("{}, in shells {in_shells}: {e}", layer.name()));
}

#[test]
fn decoding_equals_the_reference() {
    let mut rng = rng();
    for float in FLOATS {
        for (tokens, d, widths) in SHAPES {
            for mix in MIXES {
                let mut layer = Layer::random(&mut rng, float, [tokens, d], widths, mix);
                check(&mut layer, false, &mut rng);
                if widths.iter().all(|w| w % 8 == 0) {
                    check(&mut layer, true, &mut rng);
                }
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
                    check(&mut layer, false, &mut rng);
                    if widths.iter().all(|w| w % 8 == 0) {
                        check(&mut layer, true, &mut rng);
                    }
                }
            }
        }
    }
}

#[test]
fn neurons_beyond_the_widest_token_are_not_read() {
    let mut rng = rng();
    let mut layer = Layer::random(&mut rng, plan::Float::Bf16, [4, 64], &[32, 256], Mix::Narrow);
    layer.dense.poison(layer.float, 32..256);
    let [h, y] = run_layer(&mut layer, false, &mut rng);
    let untouched = h.chunks(256).all(|row| row[32..].iter().all(|x| x.is_nan()));
    assert!(untouched, "blocks beyond the widest token must leave at once");
    layer.compare(&h, &y, &layer.in_order()).unwrap();
}
