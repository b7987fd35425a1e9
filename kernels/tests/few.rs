//! The kernels for 9 to 64 tokens against their reference.

mod support;

use dynamoe_kernels::args::FfnArgs;
use dynamoe_kernels::plan::{self, Float, Launch};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use support::layer::Layer;
use support::{MIXES, Memory, Mix, SEPARATE_MIXES, decode, lengths, rng, run, run_without};

const HALVES: [Float; 2] = [Float::F16, Float::Bf16];

/// Plans, arguments and outputs of one layer.
struct Case {
    layer: Layer,
    launches: [Launch; 3],
    args: FfnArgs,
    outputs: [Memory; 2],
    _partial: Memory,
}

impl Case {
    fn new(mut layer: Layer, in_shells: bool) -> Self {
        let segments = layer.segments(in_shells);
        let mut args = layer.args(&segments);
        let outputs = [layer.intermediate_size(), layer.d]
            .map(|n| Memory::poisoned(layer.tokens * n * layer.float.bytes()));
        args.splits = plan::few_splits(layer.d) as u32;
        let partial = Memory::poisoned(args.splits as usize * layer.tokens * layer.d * 4);
        (args.partial, args.h, args.y) = (partial.address(), outputs[0].address(), outputs[1].address());
        let launches = plan::few(layer.float, layer.tokens, layer.d, &lengths(&segments));
        Self { layer, launches, args, outputs, _partial: partial }
    }

    fn compare(&self) -> Result<(), String> {
        let [h, y] = [0, 1].map(|n: usize| decode(self.layer.float, &self.outputs[n]));
        self.layer.compare(&h, &y, &self.layer.in_order())
    }
}

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

fn check(layer: Layer, in_shells: bool, rng: &mut ChaCha8Rng) {
    let case = Case::new(layer, in_shells);
    for launch in &case.launches {
        run(launch, &case.args, rng);
    }
    case.compare().unwrap_or_else(|e| panic!("{}, in shells {in_shells}: {e}", case.layer.name()));
}

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
                check(Layer::random(&mut rng, float, [tokens, d], widths, mix), in_shells, &mut rng);
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
                check(layer, in_shells, &mut rng);
            }
        }
    }
}

#[test]
fn weights_beyond_the_widest_token_are_not_read() {
    let mut rng = rng();
    let mut layer = Layer::random(&mut rng, Float::Bf16, [12, 64], &[64, 256], Mix::Narrow);
    layer.dense.poison(layer.float, 64..256);
    let case = Case::new(layer, false);
    for launch in &case.launches {
        run(launch, &case.args, &mut rng);
    }
    let h = decode(Float::Bf16, &case.outputs[0]);
    assert!(
        h.chunks(256).all(|row| row[64..].iter().all(|x| x.is_nan())),
        "blocks beyond must leave at once"
    );
    case.compare().unwrap();
}

#[test]
fn a_missing_barrier_is_found() {
    let mut rng = rng();
    let layer = Layer::random(&mut rng, Float::F16, [20, 800], &[32, 40], Mix::OneWide);
    let case = Case::new(layer.with_separate(&mut rng, 1), false);
    for launch in &case.launches {
        run(launch, &case.args, &mut rng);
    }
    let mut found = vec![];
    for seed in 0..4 {
        let attempt = |without| {
            let sites = run_without(&case.launches[0], &case.args, seed, without)?;
            for launch in &case.launches[1..] {
                run_without(launch, &case.args, seed, None)?;
            }
            case.compare().map(|()| sites)
        };
        let sites = attempt(None).unwrap();
        found.resize(sites as usize, false);
        for site in 0..sites {
            found[site as usize] |= attempt(Some(site)).is_err();
        }
    }
    assert_eq!(found, [true; 4], "the wait for copies and the barriers are needed, and their loss is seen");
}
