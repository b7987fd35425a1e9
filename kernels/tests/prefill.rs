//! Sorting and the prefill kernels against their reference.

mod support;

use dynamoe_kernels::args::SortArgs;
use dynamoe_kernels::plan::{self, Float, Tile};
use dynamoe_kernels::reference;
use rand::Rng;
use support::case::{Case, HALVES};
use support::layer::Layer;
use support::{MIXES, Memory, Mix, SEPARATE_MIXES, experts, losses, rng, run, run_without};

const TILES: [Tile; 3] = [Tile::Mma, Tile::Wgmma128, Tile::Wgmma256];

#[test]
fn sorting_equals_the_reference() {
    let mut rng = rng();
    for tokens in [0, 1, 2, 7, 64, 512, 513, 1700] {
        for mix in MIXES {
            for count in [1, 4, 16] {
                let chosen = experts(&mut rng, mix, tokens, count);
                let (experts, order) = (Memory::of(&chosen), Memory::poisoned(tokens * 4));
                let args = SortArgs {
                    experts: experts.address(),
                    order: order.address(),
                    tokens: tokens as u32,
                    expert_count: count as u32,
                };
                run(&plan::sort(), &args, &mut rng);
                assert_eq!(order.read::<u32>(), reference::sort(&chosen), "{tokens} {mix:?} {count}");
            }
        }
    }
}

const SHAPES: [(usize, usize, &[usize]); 7] = [
    (0, 16, &[8, 16]),
    (1, 8, &[8]),
    (2, 200, &[3, 17, 80]),
    (7, 72, &[64, 128]),
    (64, 136, &[24, 56, 88, 152]),
    (130, 64, &[8, 72, 320]),
    (513, 40, &[40, 72, 104, 136]),
];

#[test]
fn prefill_equals_the_reference() {
    let mut rng = rng();
    for (tokens, d, widths) in SHAPES {
        for mix in MIXES {
            for in_shells in [false, true] {
                if in_shells && widths.iter().any(|w| w % 8 != 0) {
                    continue;
                }
                for tile in TILES {
                    let float = HALVES[rng.random_range(0..2)];
                    let layer = Layer::random(&mut rng, float, [tokens, d], widths, mix);
                    Case::prefill(layer, tile, in_shells).check(&mut rng);
                }
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
                for tile in TILES {
                    let in_shells = rng.random_bool(0.5);
                    let float = HALVES[rng.random_range(0..2)];
                    let layer = Layer::random(&mut rng, float, [tokens, d], widths, mix);
                    let mut layer = layer.with_separate(&mut rng, shells);
                    layer.poison_unneeded();
                    Case::prefill(layer, tile, in_shells).check(&mut rng);
                }
            }
        }
    }
}

#[test]
fn tiles_outside_the_staircase_are_not_made() {
    let mut rng = rng();
    for tile in TILES {
        // 130 rows of which the last two tiles' rows are narrow
        let mut layer = Layer::random(&mut rng, Float::Bf16, [260, 16], &[64, 384], Mix::Narrow);
        layer.experts[200] = 1;
        let case = Case::prefill(layer, tile, false);
        case.check(&mut rng);
        let h = case.h();
        let first = if tile == Tile::Wgmma256 { 128 } else { 64 };
        for (row, h) in h.chunks(384).enumerate() {
            let made = if row < 128 { 384 } else { first };
            let is_made = h.iter().map(|x| !x.is_nan());
            assert!(is_made.enumerate().all(|(j, m)| m == (j < made)), "{tile:?}, row {row}");
        }
    }
}

#[test]
fn tiles_of_separate_weights_are_made_for_rows_below_full_width_only() {
    let mut rng = rng();
    for tile in TILES {
        // sorted: 150 rows at full width, 50 of width 256, 100 of width 64; separate weights for 256 neurons
        let mut layer = Layer::random(&mut rng, Float::F16, [300, 16], &[64, 256, 512], Mix::Wide);
        layer.experts[..100].fill(0);
        layer.experts[100..150].fill(1);
        let case = Case::prefill(layer.with_separate(&mut rng, 2), tile, false);
        case.check(&mut rng);
        let h = case.h();
        let narrow = if tile == Tile::Wgmma256 { 128 } else { 64 };
        for (row, h) in h.chunks(512).enumerate() {
            // the second tile of rows has both
            let made = if row < 256 { 512 } else { narrow };
            let is_made = h.iter().map(|x| !x.is_nan());
            assert!(is_made.enumerate().all(|(j, m)| m == (j < made)), "{tile:?}, row {row}");
        }
    }
}

#[test]
fn a_missing_barrier_is_found() {
    let mut rng = rng();
    let chosen = experts(&mut rng, Mix::Mixed, 1100, 5);
    let experts = Memory::of(&chosen);
    let found = losses(0..8, |seed, without| {
        let order = Memory::of(&vec![0u32; chosen.len()]);
        let args = SortArgs {
            experts: experts.address(),
            order: order.address(),
            tokens: chosen.len() as u32,
            expert_count: 5,
        };
        let sites = run_without(&plan::sort(), &args, seed, without)?;
        if order.read::<u32>() == reference::sort(&chosen) { Ok(sites) } else { Err("order".into()) }
    });
    assert_eq!(found, [true; 5], "sort: each barrier is needed, and its loss is seen");

    for (tile, waits) in [(Tile::Mma, 2), (Tile::Wgmma128, 7), (Tile::Wgmma256, 7)] {
        let layer = Layer::random(&mut rng, Float::F16, [20, 504], &[64, 72], Mix::OneWide);
        let case = Case::prefill(layer.with_separate(&mut rng, 1), tile, false);
        case.run(&mut rng);
        let found = case.losses(0..3);
        // for copies, and the barrier; with wgmma also three fences and waits in the loop, and the last wait
        assert_eq!(found, vec![true; waits], "{tile:?}: each is needed, and its loss is seen");
    }
}
