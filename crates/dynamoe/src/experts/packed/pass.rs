//! One forward pass over packed shells, as one parallel region of three or four phases.
//!
//! For few tokens: encode `x`; compute the neurons' floats; round them; compute the outputs. For many tokens, neurons
//! are computed and rounded at once, chunk by chunk.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Module, Result, Tensor};
use candle_nn::Activation;

use crate::HiddenAct;
use crate::cpu::{
    Encoding, Input, Isa, LANES, Output, PackedMatrix, Phase, Sums, TILE, Writer, groups_each, lock, run,
    unset,
};
use crate::experts::Projections;

/// How many sums of 16 rows an item of few tokens keeps: groups times tokens.
const RUN: usize = 8 * TILE;

/// Neurons whose outputs are rounded together: blocks of 256 or a divisor of them.
const CHUNK: usize = 256;

/// What a pass computes, and with what.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    pub isa: Isa,
    pub shells: &'a [Projections<Arc<PackedMatrix>>],
    pub activation: Activation,
    /// `H_e` of each expert: where each shell ends.
    pub widths: &'a [usize],
    pub hidden_size: usize,
    /// Row-major `(T, D)`.
    pub x: &'a [f32],
    /// The rows of `x`, widest expert first.
    pub order: &'a [u32],
    /// How many of these rows each shell serves.
    pub reach: &'a [usize],
}

impl Task<'_> {
    /// Runs the pass. Returns `y (T, D)`, row-major, in the order of `x`.
    pub fn run(self) -> Result<Vec<f32>> {
        let (tokens, d) = (self.order.len(), self.hidden_size);
        if tokens == 0 || d == 0 {
            return Ok(Vec::new());
        }
        let used = self.reach.iter().take_while(|&&rows| rows > 0).count();
        let task = Task { shells: &self.shells[..used], reach: &self.reach[..used], ..self };
        let mut y = unset(tokens * d);
        let mut encodings: Vec<Encoding> = Vec::new();
        for matrix in task.shells.iter().flat_map(|s| [&s.gate_proj, &s.up_proj]) {
            if !encodings.contains(&matrix.encoding()) {
                encodings.push(matrix.encoding());
            }
        }
        let mut inputs: Vec<Input> = encodings.iter().map(|&e| Input::new(e, tokens, d)).collect();
        let mut hidden: Vec<Input> = task
            .shells
            .iter()
            .zip(task.reach)
            .map(|(s, &rows)| Input::new(s.down_proj.encoding(), rows, s.down_proj.shape().1))
            .collect();
        // few tokens: floats of all neurons; many tokens keep theirs within an item
        let width = task.widths[used - 1];
        let floats = if tokens <= TILE { tokens * width } else { 0 };
        let (mut gate, mut up) = (unset(floats), unset(floats));
        let pass = Pass {
            task,
            inputs: inputs.iter_mut().map(Writer::new).collect(),
            hidden: hidden.iter_mut().map(Writer::new).collect(),
            gate: Output::new(&mut gate, width),
            up: Output::new(&mut up, width),
            y: Output::new(&mut y, d),
            error: Mutex::new(None),
        };
        pass.run_phases();
        match pass.error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(y),
        }
    }

    /// Number of neurons of a shell.
    fn shell_width(&self, shell: usize) -> usize {
        self.shells[shell].down_proj.shape().1
    }

    /// The first neuron of a shell.
    fn shell_start(&self, shell: usize) -> usize {
        self.widths[shell] - self.shell_width(shell)
    }

    /// The activation, if there is a kernel for it.
    fn act(&self) -> Option<HiddenAct> {
        HiddenAct::of(self.activation)
    }

    /// All shells' neurons in pieces of at most `size`.
    fn items(&self, size: usize) -> Vec<Item> {
        let mut items = Vec::new();
        for (shell, &rows) in self.reach.iter().enumerate() {
            let width = self.shell_width(shell);
            for start in (0..width).step_by(size) {
                items.push(Item { shell, neurons: start..(start + size).min(width), tokens: 0..rows });
            }
        }
        items
    }
}

/// Some neurons of a shell, and the tokens for which an item computes them.
struct Item {
    shell: usize,
    neurons: Range<usize>,
    tokens: Range<usize>,
}

/// The memory of a pass, shared by its threads.
struct Pass<'a> {
    task: Task<'a>,
    /// `x` in each encoding that a shell's gate or up needs.
    inputs: Vec<Writer<'a>>,
    /// Each shell's `h`.
    hidden: Vec<Writer<'a>>,
    /// For few tokens, `act(gate) ∘ up` if there is a kernel for the activation, else `gate`.
    gate: Output<'a>,
    /// For few tokens and an activation without a kernel, `up`.
    up: Output<'a>,
    y: Output<'a>,
    error: Mutex<Option<candle_core::Error>>,
}

impl Pass<'_> {
    fn run_phases(&self) {
        let task = &self.task;
        let (tokens, d) = (task.order.len(), task.hidden_size);
        let bytes = |of: fn(&Projections<Arc<PackedMatrix>>) -> usize| -> usize {
            task.shells.iter().zip(task.reach).map(|(s, &rows)| of(s) * rows).sum()
        };
        let inner = bytes(|s| s.gate_proj.bytes() + s.up_proj.bytes());
        let outer = bytes(|s| s.down_proj.bytes());
        let panels = tokens.div_ceil(TILE);
        let encode = |panel: usize| self.encode_x(panel);

        let down = &task.shells[0].down_proj;
        let each = groups_of_item(down.groups(), down.group_bytes(), tokens);
        let outputs = |item: usize| self.compute_outputs(item * each..((item + 1) * each).min(down.groups()));

        let encode = Phase { items: panels, cost: 4 * tokens * d, run: &encode };
        let outputs = Phase { items: down.groups().div_ceil(each), cost: outer, run: &outputs };
        if tokens <= TILE {
            let groups = task.shells.iter().map(|s| s.gate_proj.groups()).sum();
            let each = groups_of_item(groups, task.shells[0].gate_proj.group_bytes(), tokens);
            let (items, chunks) = (task.items(LANES * each), task.items(CHUNK));
            let neurons = |item: usize| self.compute_neurons(&items[item]);
            let round = |item: usize| self.round_neurons(&chunks[item]);
            let neurons = Phase { items: items.len(), cost: inner, run: &neurons };
            let round = Phase { items: chunks.len(), cost: 0, run: &round };
            run(&[encode, neurons, round, outputs]);
        } else {
            let items = task.items(CHUNK);
            let chunk = |item: usize| self.compute_and_round_neurons(&items[item]);
            run(&[encode, Phase { items: items.len(), cost: inner, run: &chunk }, outputs]);
        }
    }

    fn encode_x(&self, panel: usize) {
        let Task { order, x, hidden_size: d, isa, .. } = self.task;
        for token in panel * TILE..((panel + 1) * TILE).min(order.len()) {
            let x = &x[order[token] as usize * d..][..d];
            for input in &self.inputs {
                // SAFETY: each panel is one item; it is read in later phases only
                unsafe { input.encode(isa, token, 0, x) }
            }
        }
    }

    /// `x` as `matrix` needs it.
    fn input_of(&self, matrix: &PackedMatrix) -> &Input {
        let input = self.inputs.iter().find(|input| input.input().encoding() == matrix.encoding());
        input.expect("inputs were made for all encodings").input()
    }

    /// Few tokens: computes the floats of neurons.
    fn compute_neurons(&self, item: &Item) {
        let (isa, Projections { gate_proj, up_proj, .. }) = (self.task.isa, &self.task.shells[item.shell]);
        let (tokens, start) = (item.tokens.len(), self.task.shell_start(item.shell));
        let groups = item.neurons.start / LANES..item.neurons.end.div_ceil(LANES);
        // one matrix after the other: the memory delivers long runs faster
        let (mut gate, mut up) = ([[0f32; LANES]; RUN], [[0f32; LANES]; RUN]);
        for (matrix, sums) in [(gate_proj, &mut gate), (up_proj, &mut up)] {
            for (group, sums) in groups.clone().zip(sums.chunks_exact_mut(tokens)) {
                matrix.multiply(isa, group, self.input_of(matrix), item.tokens.clone(), sums);
            }
        }
        if let Some(act) = self.task.act() {
            isa.glu(act, &mut gate[..groups.len() * tokens], &up[..groups.len() * tokens]);
        }
        for (group, (gate, up)) in groups.zip(gate.chunks_exact(tokens).zip(up.chunks_exact(tokens))) {
            let count = LANES.min(item.neurons.end - group * LANES);
            for (token, (gate, up)) in item.tokens.clone().zip(gate.iter().zip(up)) {
                // SAFETY: each neuron is in one item
                unsafe {
                    self.gate.store(token, start + group * LANES, gate, count);
                    if self.task.act().is_none() {
                        self.up.store(token, start + group * LANES, up, count);
                    }
                }
            }
        }
    }

    /// Few tokens: rounds the floats that [`Pass::compute_neurons`] has stored.
    fn round_neurons(&self, item: &Item) {
        let (start, count) = (self.task.shell_start(item.shell) + item.neurons.start, item.neurons.len());
        for token in item.tokens.clone() {
            // SAFETY: the phase before wrote these, this one does not
            let (gate, up) =
                unsafe { (self.gate.read(token, start, count), self.up.read(token, start, count)) };
            self.encode_h(item, token, gate, up);
        }
    }

    /// Many tokens: computes the neurons of a chunk and rounds them, panel by panel.
    fn compute_and_round_neurons(&self, item: &Item) {
        let size = item.neurons.len();
        let mut sums = [[[0f32; LANES]; TILE]; 2];
        // whole groups: lanes of rows that do not exist are written, but not read
        let (mut gate, mut up) =
            ([[[0f32; LANES]; CHUNK / LANES]; TILE], [[[0f32; LANES]; CHUNK / LANES]; TILE]);
        for first in item.tokens.clone().step_by(TILE) {
            let tokens = first..(first + TILE).min(item.tokens.end);
            for group in 0..size.div_ceil(LANES) {
                self.compute_group(item.shell, item.neurons.start / LANES + group, tokens.clone(), &mut sums);
                let rows = gate.iter_mut().zip(&mut up).take(tokens.len());
                for (token, (gate, up)) in rows.enumerate() {
                    gate[group] = sums[0][token];
                    up[group] = sums[1][token];
                }
            }
            for (token, (gate, up)) in tokens.zip(gate.iter().zip(&up)) {
                self.encode_h(item, token, &gate.as_flattened()[..size], &up.as_flattened()[..size]);
            }
        }
    }

    /// Gate and up of one group for tokens of one panel. Where there is a kernel for the activation, the first becomes
    /// `h`.
    fn compute_group(&self, shell: usize, group: usize, tokens: Range<usize>, [gate, up]: &mut [Sums; 2]) {
        let Projections { gate_proj, up_proj, .. } = &self.task.shells[shell];
        let (gate, up) = (&mut gate[..tokens.len()], &mut up[..tokens.len()]);
        gate.fill([0.0; LANES]);
        up.fill([0.0; LANES]);
        gate_proj.multiply(self.task.isa, group, self.input_of(gate_proj), tokens.clone(), gate);
        up_proj.multiply(self.task.isa, group, self.input_of(up_proj), tokens, up);
        if let Some(act) = self.task.act() {
            self.task.isa.glu(act, gate, up);
        }
    }

    /// Rounds a chunk of `h` for one token.
    fn encode_h(&self, item: &Item, token: usize, gate: &[f32], up: &[f32]) {
        let (isa, hidden) = (self.task.isa, &self.hidden[item.shell]);
        let block = item.neurons.start / hidden.input().encoding().block();
        if self.task.act().is_some() {
            // SAFETY: each chunk is in one item, and read in the next phase only
            return unsafe { hidden.encode(isa, token, block, gate) };
        }
        match activate(self.task.activation, gate, up) {
            // SAFETY: as above
            Ok(h) => unsafe { hidden.encode(isa, token, block, &h) },
            Err(error) => *lock(&self.error) = Some(error),
        }
    }

    /// Some groups of the output: the sum over shells, in their order.
    fn compute_outputs(&self, groups: Range<usize>) {
        let task = &self.task;
        let tokens = task.order.len();
        let mut sums = [[0f32; LANES]; RUN];
        for first in (0..tokens).step_by(TILE) {
            let all = first..(first + TILE).min(tokens);
            let sums = &mut sums[..groups.len() * all.len()];
            sums.fill([0.0; LANES]);
            for ((shell, hidden), &rows) in task.shells.iter().zip(&self.hidden).zip(task.reach) {
                if rows <= first {
                    break;
                }
                let tokens = first..all.end.min(rows);
                for (group, sums) in groups.clone().zip(sums.chunks_exact_mut(all.len())) {
                    let sums = &mut sums[..tokens.len()];
                    shell.down_proj.multiply(task.isa, group, hidden.input(), tokens.clone(), sums);
                }
            }
            for (group, sums) in groups.clone().zip(sums.chunks_exact(all.len())) {
                let count = LANES.min(task.hidden_size - group * LANES);
                for (token, sums) in all.clone().zip(sums) {
                    let row = task.order[token] as usize;
                    // SAFETY: each group is in one item
                    unsafe { self.y.store(row, group * LANES, sums, count) }
                }
            }
        }
    }
}

/// [`groups_each`], but no more than an item keeps sums for.
fn groups_of_item(groups: usize, bytes: usize, tokens: usize) -> usize {
    groups_each(groups, bytes, tokens).min(RUN / tokens.min(TILE))
}

/// `act(gate) ∘ up` through candle, for activations without a kernel.
fn activate(activation: Activation, gate: &[f32], up: &[f32]) -> Result<Vec<f32>> {
    let tensor = |x: &[f32]| Tensor::from_slice(x, x.len(), &Device::Cpu);
    (activation.forward(&tensor(gate)?)? * tensor(up)?)?.to_vec1()
}
