//! Prefill with quantized weights against the reference.

mod support;

use dynamoe_kernels::plan::Block;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use support::blocks::Shells;
use support::case::{Case, HALVES};
use support::layer::Layer;
use support::{MIXES, Mix, SEPARATE_MIXES, rng};

/// `ends` of shells in multiples of 256, `widths` of experts up to the last; the first `separate` shells twice.
fn random(
    rng: &mut ChaCha8Rng,
    block: [Block; 2],
    [tokens, d]: [usize; 2],
    [ends, widths]: [&[usize]; 2],
    (mix, separate): (Mix, usize),
) -> Case {
    let float = HALVES[rng.random_range(0..2)];
    let mut layer = Layer::random(rng, float, [tokens, d], widths, mix);
    let mut dense = Shells::random(rng, block, d, ends);
    let mut separate = Shells::random(rng, block, d, &ends[..separate]);
    layer.dense = dense.matrices(float);
    if separate.neurons() > 0 {
        layer.separate = Some(separate.matrices(float));
        Shells::poison_unneeded([&mut dense, &mut separate], &layer.experts);
    }
    Case::prefill_quantized(layer, block, [dense, separate])
}

const FORMATS: [[Block; 2]; 3] =
    [[Block::Q4K, Block::Q4K], [Block::Q8_0, Block::Q8_0], [Block::Q4K, Block::Q8_0]];

#[test]
fn quantized_prefill_equals_the_reference() {
    let mut rng = rng();
    for (tokens, d, ends, widths) in [
        (0, 256, vec![256], vec![256]),
        (1, 256, vec![256, 512], vec![256, 512]),
        (2, 768, vec![512], vec![100, 301, 512]),
        (7, 512, vec![256, 768], vec![256, 768]),
        (64, 256, vec![512], vec![60, 512]),
        (513, 256, vec![256], vec![64, 130, 256]),
    ] {
        for block in FORMATS {
            let mix = MIXES[rng.random_range(0..3)];
            random(&mut rng, block, [tokens, d], [&ends, &widths], (mix, 0)).check(&mut rng);
        }
    }
}

#[test]
fn separate_weights_serve_tokens_below_full_width() {
    let mut rng = rng();
    for (tokens, d, widths) in
        [(2, 256, vec![256, 512]), (7, 512, vec![256, 768, 1024]), (150, 256, vec![256, 512, 768])]
    {
        for separate in 1..widths.len() {
            for mix in SEPARATE_MIXES {
                let block = FORMATS[rng.random_range(0..3)];
                let case = random(&mut rng, block, [tokens, d], [&widths, &widths], (mix, separate));
                case.check(&mut rng);
            }
        }
    }
}

#[test]
fn a_missing_barrier_is_found() {
    let mut rng = rng();
    let case = random(&mut rng, [Block::Q4K; 2], [9, 512], [&[256], &[256]], (Mix::Wide, 0));
    case.run(&mut rng);
    let found = case.losses(0..3);
    assert_eq!(found, [true; 2], "the wait for copies and the barrier are needed, and their loss is seen");
}
