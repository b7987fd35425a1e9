//! Decoding kernels against their reference.

mod support;

use dynamoe_kernels::plan;
use support::{FLOATS, Layer, MIXES, Memory, Mix, decode, rng, run};

#[test]
fn decoding_equals_the_reference() {
    let mut rng = rng();
    for float in FLOATS {
        for (tokens, d, widths) in [
            (0, 16, vec![8, 16]),
            (1, 8, vec![8]),
            (1, 328, vec![40, 96, 144]),
            (2, 72, vec![3, 17, 80]),
            (3, 24, vec![1, 2, 8]),
            (5, 136, vec![32, 64, 96, 128]),
            (7, 16, vec![250, 264]),
            (8, 40, vec![16, 24]),
            (13, 24, vec![24, 56, 120]),
        ] {
            for mix in MIXES {
                let mut layer = Layer::random(&mut rng, float, [tokens, d], &widths, mix);
                let shells_are_aligned = widths.iter().all(|w| w % 8 == 0);
                for shells in [false, true] {
                    if shells && !shells_are_aligned {
                        continue;
                    }
                    let segments = if shells { layer.shells() } else { layer.prefixes() };
                    let mut args = layer.args(&segments);
                    let h = Memory::poisoned(tokens * layer.intermediate_size() * float.bytes());
                    let y = Memory::poisoned(tokens * d * float.bytes());
                    (args.h, args.y) = (h.address(), y.address());
                    for launch in plan::decode(float, tokens, d, layer.intermediate_size()) {
                        run(&launch, &args, &mut rng);
                    }
                    let compared = layer.compare(&decode(float, &h), &decode(float, &y), &layer.in_order());
                    compared.unwrap_or_else(|e| panic!("{float:?} {tokens} {d} {widths:?} {mix:?}: {e}"));
                }
            }
        }
    }
}

#[test]
fn neurons_beyond_the_widest_token_are_not_read() {
    let mut rng = rng();
    let mut layer = Layer::random(&mut rng, plan::Float::Bf16, [4, 64], &[32, 256], Mix::Narrow);
    for matrix in [&mut layer.gate, &mut layer.up] {
        let beyond = 32 * matrix.stride;
        matrix.values[beyond..].fill(f64::NAN);
        matrix.memory = support::encode(layer.float, &matrix.values);
    }
    let mut args = layer.args(&layer.prefixes());
    let (h, y) = (Memory::poisoned(4 * 256 * 2), Memory::poisoned(4 * 64 * 2));
    (args.h, args.y) = (h.address(), y.address());
    for launch in plan::decode(layer.float, 4, 64, 256) {
        run(&launch, &args, &mut rng);
    }
    let h = decode(layer.float, &h);
    let untouched = h.chunks(256).all(|row| row[32..].iter().all(|x| x.is_nan()));
    assert!(untouched, "blocks beyond the widest token must leave at once");
    layer.compare(&h, &decode(layer.float, &y), &layer.in_order()).unwrap();
}
