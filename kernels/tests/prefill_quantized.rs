//! Prefill with quantized weights against the reference.

mod support;

use dynamoe_kernels::args::FfnArgs;
use dynamoe_kernels::plan::{self, Block, Float, Launch};
use dynamoe_kernels::reference;
use dynamoe_kernels::segments::list;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use support::blocks::Shells;
use support::layer::Layer;
use support::{MIXES, Memory, Mix, SEPARATE_MIXES, decode, lengths, rng, run, run_without};

const HALVES: [Float; 2] = [Float::F16, Float::Bf16];

/// Plans, arguments and outputs of one layer.
struct Case {
    layer: Layer,
    launches: [Launch; 2],
    args: FfnArgs,
    outputs: [Memory; 2],
    sorted: Vec<u32>,
    _held: (Memory, [Shells; 2]),
}

impl Case {
    /// `ends` of shells in multiples of 256, `widths` of experts up to the last; the first `separate` shells twice.
    fn random(
        rng: &mut ChaCha8Rng,
        block: [Block; 2],
        [tokens, d]: [usize; 2],
        [ends, widths]: [&[usize]; 2],
        (mix, separate): (Mix, usize),
    ) -> Self {
        let float = HALVES[rng.random_range(0..2)];
        let mut layer = Layer::random(rng, float, [tokens, d], widths, mix);
        let mut dense = Shells::random(rng, block, d, ends);
        let mut separate = Shells::random(rng, block, d, &ends[..separate]);
        layer.dense = dense.matrices(float);
        if separate.neurons() > 0 {
            layer.separate = Some(separate.matrices(float));
            Shells::poison_unneeded([&mut dense, &mut separate], &layer.experts);
        }
        let segments = list(&dense.segments(), &separate.segments(), block.map(Into::into));
        let mut args = layer.args(&segments);
        let sorted = reference::sort(&layer.experts);
        let order = Memory::of(&sorted);
        let outputs = [layer.intermediate_size(), d].map(|n| Memory::poisoned(tokens * n * float.bytes()));
        (args.order, args.h, args.y) = (order.address(), outputs[0].address(), outputs[1].address());
        let launches = plan::prefill_quantized(block, float, tokens, d, &lengths(&segments));
        Self { layer, launches, args, outputs, sorted, _held: (order, [dense, separate]) }
    }

    fn compare(&self) -> Result<(), String> {
        let [h, y] = [0, 1].map(|n: usize| decode(self.layer.float, &self.outputs[n]));
        self.layer.compare(&h, &y, &self.sorted)
    }
}

const FORMATS: [[Block; 2]; 3] =
    [[Block::Q4K, Block::Q4K], [Block::Q8_0, Block::Q8_0], [Block::Q4K, Block::Q8_0]];

fn check(case: Case, rng: &mut ChaCha8Rng) {
    for launch in &case.launches {
        run(launch, &case.args, rng);
    }
    case.compare().unwrap_or_else(|e| panic!("{} {}: {e}", case.launches[0].kernel, case.layer.name()));
}

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
            check(Case::random(&mut rng, block, [tokens, d], [&ends, &widths], (mix, 0)), &mut rng);
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
                let case = Case::random(&mut rng, block, [tokens, d], [&widths, &widths], (mix, separate));
                check(case, &mut rng);
            }
        }
    }
}

#[test]
fn a_missing_barrier_is_found() {
    let mut rng = rng();
    let case = Case::random(&mut rng, [Block::Q4K; 2], [9, 512], [&[256], &[256]], (Mix::Wide, 0));
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
