//! The kernels for 9 to 64 tokens against their reference.

mod support;

use dynamoe_kernels::args::FfnArgs;
use dynamoe_kernels::plan::{self, Float, Launch};
use rand::Rng;
use support::{Layer, MIXES, Memory, Mix, decode, encode, rng, run, run_without};

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
    fn new(mut layer: Layer, shells: bool) -> Self {
        let segments = if shells { layer.shells() } else { layer.prefixes() };
        let lengths: Vec<usize> = segments.iter().map(|s| (s.end - s.start) as usize).collect();
        let mut args = layer.args(&segments);
        let outputs = [layer.intermediate_size(), layer.d]
            .map(|n| Memory::poisoned(layer.tokens * n * layer.float.bytes()));
        args.splits = plan::few_splits(layer.d) as u32;
        let partial = Memory::poisoned(args.splits as usize * layer.tokens * layer.d * 4);
        (args.partial, args.h, args.y) = (partial.address(), outputs[0].address(), outputs[1].address());
        let launches = plan::few(layer.float, layer.tokens, layer.d, &lengths);
        Self { layer, launches, args, outputs, _partial: partial }
    }

    fn compare(&self) -> Result<(), String> {
        let [h, y] = [0, 1].map(|n: usize| decode(self.layer.float, &self.outputs[n]));
        self.layer.compare(&h, &y, &self.layer.in_order())
    }
}

#[test]
fn few_tokens_equal_the_reference() {
    let mut rng = rng();
    for (tokens, d, widths) in [
        (0, 16, vec![8, 16]),
        (1, 8, vec![8]),
        (2, 200, vec![3, 17, 80]),
        (9, 72, vec![64, 128]),
        (16, 568, vec![24, 56]),
        (17, 136, vec![24, 56, 88, 152]),
        (33, 64, vec![8, 72, 1200]),
        (64, 136, vec![40, 72, 104, 136]),
    ] {
        for mix in MIXES {
            for shells in [false, true] {
                if shells && widths.iter().any(|w| w % 8 != 0) {
                    continue;
                }
                let float = HALVES[rng.random_range(0..2)];
                let case = Case::new(Layer::random(&mut rng, float, [tokens, d], &widths, mix), shells);
                for launch in &case.launches {
                    run(launch, &case.args, &mut rng);
                }
                case.compare()
                    .unwrap_or_else(|e| panic!("{float:?} {tokens} {d} {widths:?} {mix:?} {shells}: {e}"));
            }
        }
    }
}

#[test]
fn weights_beyond_the_widest_token_are_not_read() {
    let mut rng = rng();
    let mut layer = Layer::random(&mut rng, Float::Bf16, [12, 64], &[64, 256], Mix::Narrow);
    for matrix in [&mut layer.gate, &mut layer.up] {
        let beyond = 64 * matrix.stride;
        matrix.values[beyond..].fill(f64::NAN);
        matrix.memory = encode(layer.float, &matrix.values);
    }
    let down = &mut layer.down;
    down.values.chunks_mut(down.stride).for_each(|row| row[64..].fill(f64::NAN));
    down.memory = encode(layer.float, &down.values);
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
    let case = Case::new(Layer::random(&mut rng, Float::F16, [20, 800], &[40], Mix::Wide), false);
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
