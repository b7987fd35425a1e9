//! Prefill with quantized weights against the reference.

mod support;

use dynamoe_kernels::args::{FfnArgs, Segment};
use dynamoe_kernels::plan::{self, Block, Float, Launch};
use dynamoe_kernels::reference;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use support::blocks::Blocks;
use support::{Layer, MIXES, Memory, Mix, Strided, decode, rng, round, run, run_without};

const HALVES: [Float; 2] = [Float::F16, Float::Bf16];

/// Plans, arguments and outputs of one layer.
struct Case {
    layer: Layer,
    launches: [Launch; 2],
    args: FfnArgs,
    outputs: [Memory; 2],
    sorted: Vec<u32>,
    _held: (Memory, Vec<[Blocks; 3]>),
}

/// Shells' weights one below the other, as the kernels unpack them.
fn stack(float: Float, d: usize, shells: &[[Blocks; 3]], matrix: usize) -> Strided {
    let values = shells.iter().flat_map(|s| &s[matrix].weights).map(|&w| round(float, w)).collect();
    Strided { values, stride: d, memory: Memory::of::<u8>(&[]) }
}

/// Shells' weights side by side.
fn join(float: Float, d: usize, shells: &[[Blocks; 3]]) -> Strided {
    let row = |r: usize| {
        shells.iter().flat_map(move |s| {
            let columns = s[2].weights.len() / d;
            s[2].weights[r * columns..][..columns].iter().map(move |&w| round(float, w))
        })
    };
    let values: Vec<f64> = (0..d).flat_map(row).collect();
    Strided { stride: values.len() / d, values, memory: Memory::of::<u8>(&[]) }
}

impl Case {
    /// `ends` of shells in multiples of 256, `widths` of experts up to the last.
    fn random(
        rng: &mut ChaCha8Rng,
        block: [Block; 2],
        [tokens, d]: [usize; 2],
        [ends, widths]: [&[usize]; 2],
        mix: Mix,
    ) -> Self {
        let float = HALVES[rng.random_range(0..2)];
        let mut layer = Layer::random(rng, float, [tokens, d], widths, mix);
        let (mut start, mut shells, mut segments) = (0, vec![], vec![]);
        for &end in ends {
            let neurons = end - start;
            let mut matrix = |block, shape| Blocks::random(rng, block, shape);
            let [gate, up] = [0, 1].map(|_| matrix(block[0], [neurons, d]));
            let down = matrix(block[1], [d, neurons]);
            let [across, along] = [(block[0], d), (block[1], neurons)].map(|(b, n)| (n / b.weights()) as u32);
            segments.push(Segment {
                gate: gate.memory.address(),
                up: up.memory.address(),
                down: down.memory.address(),
                start: start as u32,
                end: end as u32,
                gate_stride: across,
                up_stride: across,
                down_stride: along,
                reserved: 0,
            });
            shells.push([gate, up, down]);
            start = end;
        }
        (layer.gate, layer.up) = (stack(float, d, &shells, 0), stack(float, d, &shells, 1));
        layer.down = join(float, d, &shells);
        let mut args = layer.args(&segments);
        let sorted = reference::sort(&layer.experts);
        let order = Memory::of(&sorted);
        let outputs = [layer.intermediate_size(), d].map(|n| Memory::poisoned(tokens * n * float.bytes()));
        (args.order, args.h, args.y) = (order.address(), outputs[0].address(), outputs[1].address());
        let lengths: Vec<usize> = segments.iter().map(|s| (s.end - s.start) as usize).collect();
        let launches = plan::prefill_quantized(block, float, tokens, d, &lengths);
        Self { layer, launches, args, outputs, sorted, _held: (order, shells) }
    }

    fn compare(&self) -> Result<(), String> {
        let [h, y] = [0, 1].map(|n: usize| decode(self.layer.float, &self.outputs[n]));
        self.layer.compare(&h, &y, &self.sorted)
    }
}

#[test]
fn quantized_prefill_equals_the_reference() {
    let mut rng = rng();
    use Block::{Q4K, Q8_0};
    let formats = [[Q4K, Q4K], [Q8_0, Q8_0], [Q4K, Q8_0]];
    for (tokens, d, ends, widths) in [
        (0, 256, vec![256], vec![256]),
        (1, 256, vec![256, 512], vec![256, 512]),
        (2, 768, vec![512], vec![100, 301, 512]),
        (7, 512, vec![256, 768], vec![256, 768]),
        (64, 256, vec![512], vec![60, 512]),
        (513, 256, vec![256], vec![64, 130, 256]),
    ] {
        for block in formats {
            let mix = MIXES[rng.random_range(0..3)];
            let case = Case::random(&mut rng, block, [tokens, d], [&ends, &widths], mix);
            for launch in &case.launches {
                run(launch, &case.args, &mut rng);
            }
            case.compare().unwrap_or_else(|e| panic!("{block:?} {tokens} {d} {widths:?} {mix:?}: {e}"));
        }
    }
}

#[test]
fn a_missing_barrier_is_found() {
    let mut rng = rng();
    let case = Case::random(&mut rng, [Block::Q4K; 2], [9, 512], [&[256], &[256]], Mix::Wide);
    for launch in &case.launches {
        run(launch, &case.args, &mut rng);
    }
    let mut found = vec![];
    for seed in 0..3 {
        let attempt = |without| {
            let sites = run_without(&case.launches[0], &case.args, seed, without)?;
            run_without(&case.launches[1], &case.args, seed, None)?;
            case.compare().map(|()| sites)
        };
        let sites = attempt(None).unwrap();
        found.resize(sites as usize, false);
        for site in 0..sites {
            found[site as usize] |= attempt(Some(site)).is_err();
        }
    }
    assert_eq!(found, [true; 2], "the wait for copies and the barrier are needed, and their loss is seen");
}
