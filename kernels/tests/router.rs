//! The router's kernels against their reference.

mod support;

use dynamoe_kernels::args::RouteArgs;
use dynamoe_kernels::plan::{self, Float};
use dynamoe_kernels::reference::{Matrix, Route};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use support::{FLOATS, Memory, Strided, floats, rng, run, run_without};

/// A router, its input, and what came out.
pub struct Case {
    tokens: usize,
    d: usize,
    r: usize,
    widths: Vec<u32>,
    x: Strided,
    fc1: Vec<f64>,
    fc1_bias: Vec<f64>,
    fc2: Vec<f64>,
    fc2_bias: Vec<f64>,
    thresholds: Vec<f32>,
    memory: Vec<Memory>,
}

impl Case {
    fn random(rng: &mut ChaCha8Rng, float: Float, [tokens, d, r, experts]: [usize; 4]) -> Self {
        let narrower = experts - 1;
        let dials = [f32::NEG_INFINITY, -1.0, 0.0, 0.3, 1.5, f32::INFINITY];
        Self {
            tokens,
            d,
            r,
            widths: (1..=experts as u32).map(|e| e * 8).collect(),
            x: Strided::random(rng, float, [tokens, d], 2.0),
            fc1: floats(rng, r * d, 2.0 / (d as f64).sqrt()),
            fc1_bias: floats(rng, r, 0.5),
            fc2: floats(rng, narrower * r, 2.0 / (r as f64).sqrt()),
            fc2_bias: floats(rng, narrower, 0.5),
            thresholds: (0..tokens).map(|_| dials[rng.random_range(0..dials.len())]).collect(),
            memory: vec![],
        }
    }

    fn hold(&mut self, values: &[f64]) -> u64 {
        self.memory.push(Memory::of(&values.iter().map(|&v| v as f32).collect::<Vec<_>>()));
        self.memory[self.memory.len() - 1].address()
    }

    fn args(&mut self) -> RouteArgs {
        let mut expert_widths = [0; dynamoe_kernels::MAX_EXPERTS];
        expert_widths[..self.widths.len()].copy_from_slice(&self.widths);
        let thresholds: Vec<f64> = self.thresholds.iter().map(|&t| f64::from(t)).collect();
        RouteArgs {
            x: self.x.memory.address(),
            fc1: self.hold(&self.fc1.clone()),
            fc1_bias: self.hold(&self.fc1_bias.clone()),
            fc2: self.hold(&self.fc2.clone()),
            fc2_bias: self.hold(&self.fc2_bias.clone()),
            thresholds: self.hold(&thresholds),
            tokens: self.tokens as u32,
            hidden_size: self.d as u32,
            router_size: self.r as u32,
            expert_count: self.widths.len() as u32,
            x_stride: self.x.stride as u32,
            expert_widths,
            ..RouteArgs::default()
        }
    }

    fn reference(&self) -> Route<'_> {
        Route {
            x: self.x.view(),
            fc1: Matrix { data: &self.fc1, stride: self.d },
            fc1_bias: &self.fc1_bias,
            fc2: Matrix { data: &self.fc2, stride: self.r },
            fc2_bias: &self.fc2_bias,
            tokens: self.tokens,
            hidden_size: self.d,
        }
    }

    /// Whether each expert is the reference's, but for logits that are as good as the threshold.
    fn compare(
        &self,
        experts: &[u32],
        widths: &[u32],
        threshold: impl Fn(usize) -> f64,
    ) -> Result<(), String> {
        for (token, logits) in self.reference().logits().iter().enumerate() {
            let choose = |margin: f64| {
                let reaches = |&l: &f64| l + margin >= threshold(token);
                logits.iter().position(reaches).unwrap_or(logits.len()) as u32
            };
            let expert = experts[token];
            if expert != choose(0.0) && expert != choose(1e-4) && expert != choose(-1e-4) {
                return Err(format!("token {token}: found expert {expert}, logits {logits:?}"));
            }
            if widths[token] != self.widths[expert as usize] {
                return Err(format!("token {token}: found width {}", widths[token]));
            }
        }
        Ok(())
    }
}

const SHAPES: [[usize; 4]; 7] = [
    [0, 16, 4, 3],
    [1, 72, 16, 4],
    [2, 1040, 33, 2],
    [7, 136, 5, 4],
    [8, 24, 64, 16],
    [64, 40, 3, 4],
    [21, 24, 32, 1],
];

#[test]
fn routing_equals_the_reference() {
    let mut rng = rng();
    for float in FLOATS {
        for shape in SHAPES {
            let mut case = Case::random(&mut rng, float, shape);
            let [tokens, _, r, _] = shape;
            let mut args = case.args();
            let [experts, widths] = [4; 2].map(|bytes| Memory::poisoned(tokens * bytes));
            let hidden = Memory::poisoned(tokens * r * 4);
            let launch = plan::route(float, tokens, r);
            let blocks_done = Memory::of(&vec![0u32; launch.grid[1] as usize]);
            (args.experts, args.widths) = (experts.address(), widths.address());
            (args.hidden, args.blocks_done) = (hidden.address(), blocks_done.address());
            // twice: the first run leaves the counters as it found them
            for _ in 0..2 {
                run(&launch, &args, &mut rng);
                case.compare(&experts.read(), &widths.read(), |t| f64::from(case.thresholds[t])).unwrap();
                assert!(blocks_done.read::<u32>().iter().all(|&count| count == 0));
            }
            // one dial for all
            (args.thresholds, args.threshold) = (0, 0.1);
            run(&launch, &args, &mut rng);
            case.compare(&experts.read(), &widths.read(), |_| 0.1f32.into()).unwrap();
        }
    }
}

#[test]
fn deciding_alone_equals_the_reference() {
    let mut rng = rng();
    for [tokens, d, r, e] in SHAPES.into_iter().chain([[513, 8, 16, 5]]) {
        let mut case = Case::random(&mut rng, Float::F32, [tokens, d, r, e]);
        let mut args = case.args();
        let dot = |t: usize, n: usize| -> f64 {
            case.x.view().row(t, d).iter().zip(&case.fc1[n * d..]).map(|(x, w)| x * w).sum()
        };
        let hidden: Vec<f32> = (0..tokens * r).map(|at| dot(at / r, at % r) as f32).collect();
        let hidden = Memory::of(&hidden);
        let [experts, widths] = [4; 2].map(|bytes| Memory::poisoned(tokens * bytes));
        (args.experts, args.widths, args.hidden) = (experts.address(), widths.address(), hidden.address());
        run(&plan::decide(tokens), &args, &mut rng);
        case.compare(&experts.read(), &widths.read(), |t| f64::from(case.thresholds[t])).unwrap();
    }
}

#[test]
fn a_router_that_is_not_a_number_takes_the_largest_expert() {
    let mut rng = rng();
    let mut case = Case::random(&mut rng, Float::F32, [3, 16, 4, 4]);
    case.fc1_bias[2] = f64::NAN;
    let mut args = case.args();
    (args.thresholds, args.threshold) = (0, f32::NEG_INFINITY);
    let [experts, widths] = [4; 2].map(|bytes| Memory::poisoned(3 * bytes));
    let (hidden, blocks_done) = (Memory::poisoned(3 * 4 * 4), Memory::of(&[0u32]));
    (args.experts, args.widths) = (experts.address(), widths.address());
    (args.hidden, args.blocks_done) = (hidden.address(), blocks_done.address());
    run(&plan::route(Float::F32, 3, 4), &args, &mut rng);
    assert_eq!((experts.read::<u32>(), widths.read::<u32>()), (vec![3; 3], vec![32; 3]));
}

#[test]
fn a_missing_barrier_is_found() {
    let mut rng = rng();
    let mut found = vec![];
    for seed in 0..20 {
        let mut case = Case::random(&mut rng, Float::Bf16, [8, 136, 9, 4]);
        let mut args = case.args();
        (args.thresholds, args.threshold) = (0, 0.2);
        let launch = plan::route(Float::Bf16, 8, 9);
        let mut attempt = |without: Option<u32>| {
            let [experts, widths] = [4; 2].map(|bytes| Memory::of(&vec![0u32; 8 * bytes / 4]));
            let (hidden, blocks_done) = (Memory::poisoned(8 * 9 * 4), Memory::of(&[0u32]));
            (args.experts, args.widths) = (experts.address(), widths.address());
            (args.hidden, args.blocks_done) = (hidden.address(), blocks_done.address());
            let sites = run_without(&launch, &args, seed, without)?;
            // experts may come out right by luck; the sums in between do not
            let reference = case.reference();
            let right = hidden.read::<f32>().iter().enumerate().all(|(at, &found)| {
                let (x, w) = (reference.x.row(at / 9, case.d), reference.fc1.row(at % 9, case.d));
                let expected: f64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                (f64::from(found) - expected).abs() < 1e-3
            });
            if !right || blocks_done.read::<u32>() != [0] {
                return Err("hidden".into());
            }
            case.compare(&experts.read(), &widths.read(), |_| 0.2f32.into())?;
            Ok::<_, String>(sites)
        };
        let sites = attempt(None).unwrap();
        found.resize(sites as usize, false);
        for site in 0..sites {
            found[site as usize] |= attempt(Some(site)).is_err();
        }
    }
    // the second barrier orders this block's sums before what other blocks decide, and here blocks run one by one
    assert_eq!(found, [true, false, true], "the loss of a barrier is seen");
}
