//! Nested experts over packed matrices: the whole FFN in one parallel region.
//!
//! ```text
//! h   = act(W_gate x) ∘ (W_up x)       x rounded to 8 bits once
//! y   = Σ_s W_down,s · h_s             h rounded to 8 bits once, shells added in their order
//! ```
//!
//! Rows are sorted by expert as they are rounded, so that shell `s` serves the first `reach[s]` of them, and
//! put back as results are stored: no row is copied for that.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Module, Result, Tensor, bail};
use candle_nn::Activation;

use super::format::Encoding;
use super::host::Host;
use super::input::{Input, TILE};
use super::isa::Isa;
use super::lanes::LANES;
use super::loops::Sums;
use super::matrix::{PackedMatrix, groups_each};
use super::output::{Output, unset};
use super::parallel::{Phase, run};
use super::writer::Writer;
use crate::experts::{NestedExperts, Shell};

/// Sums of 16 rows that an item of few tokens keeps: groups times tokens.
const RUN: usize = 8 * TILE;

/// Neurons whose outputs are rounded together: blocks of 256 or a divisor of them.
const CHUNK: usize = 256;

/// Experts as shells of packed matrices, each of any type that can be packed.
#[derive(Debug, Clone)]
pub struct PackedExperts {
    shells: Vec<Shell<Arc<PackedMatrix>>>,
    activation: Activation,
    widths: Vec<usize>,
    hidden_size: usize,
    own_shells: usize,
    narrow: Option<Arc<Self>>,
}

impl PackedExperts {
    /// `widths` are those of the experts (cumulative), one for each shell; `gate_proj`, `up_proj`
    /// `(shell width, D)`, `down_proj (D, shell width)`.
    ///
    /// # Errors
    /// [`crate::Error::Widths`] if widths do not increase or are not as many as the shells,
    /// [`crate::Error::Shape`] for a matrix of another shape; an activation that changes its input's shape.
    pub fn new(
        shells: Vec<Shell<Arc<PackedMatrix>>>,
        activation: Activation,
        widths: &[usize],
    ) -> crate::Result<Self> {
        let full = widths.last().copied().unwrap_or(0);
        crate::config::check_widths(widths, full)?;
        if shells.len() != widths.len() {
            return Err(crate::Error::Widths { widths: widths.to_vec(), intermediate_size: full });
        }
        let hidden_size = shells[0].down_proj.shape().0;
        let mut start = 0;
        for (shell, &end) in shells.iter().zip(widths) {
            let (inner, outer) = ((end - start, hidden_size), (hidden_size, end - start));
            for (matrix, name, expected) in [
                (&shell.gate_proj, crate::names::GATE_PROJ, inner),
                (&shell.up_proj, crate::names::UP_PROJ, inner),
                (&shell.down_proj, crate::names::DOWN_PROJ, outer),
            ] {
                if matrix.shape() != expected {
                    let found = matrix.shape();
                    let pair = |(a, b): (usize, usize)| vec![a, b];
                    return Err(crate::Error::Shape {
                        tensor: format!("{name}, shell of neurons {start} to {end}"),
                        expected: pair(expected),
                        found: pair(found),
                    });
                }
            }
            start = end;
        }
        if activation == Activation::Swiglu {
            let problem = "activation swiglu is not one of single numbers: use silu";
            return Err(candle_core::Error::Msg(problem.into()).into());
        }
        let widths = widths.to_vec();
        Ok(Self { shells, activation, widths, hidden_size, own_shells: 0, narrow: None })
    }

    /// The same whose narrow experts have `own` in place of as many first shells; the other shells are shared.
    ///
    /// # Errors
    /// As many shells as experts, or more; as [`PackedExperts::new`].
    pub fn with_own(self, own: Vec<Shell<Arc<PackedMatrix>>>) -> crate::Result<Self> {
        let (own_shells, narrower) = (own.len(), self.shells.len() - 1);
        crate::config::check_own_shells(own_shells, self.shells.len())?;
        if own_shells == 0 {
            return Ok(Self { own_shells, narrow: None, ..self });
        }
        let shared = self.shells[own_shells..narrower].iter().cloned();
        let shells = own.into_iter().chain(shared).collect();
        let narrow = Self::new(shells, self.activation, &self.widths[..narrower])?;
        Ok(Self { own_shells, narrow: Some(Arc::new(narrow)), ..self })
    }

    /// The shells, narrowest expert's first.
    pub fn shells(&self) -> &[Shell<Arc<PackedMatrix>>] {
        &self.shells
    }

    /// The activation.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// Runs `x (T, D)`; `order` lists its rows, widest expert first.
    fn run(&self, isa: Isa, x: &[f32], order: &[u32], reach: &[usize]) -> Result<Vec<f32>> {
        let (tokens, d) = (order.len(), self.hidden_size);
        let used = reach.iter().take_while(|&&rows| rows > 0).count();
        if tokens == 0 || d == 0 {
            return Ok(Vec::new());
        }
        let mut y = unset(tokens * d);
        let mut encodings: Vec<Encoding> = Vec::new();
        for matrix in self.shells[..used].iter().flat_map(|s| [&s.gate_proj, &s.up_proj]) {
            if !encodings.contains(&matrix.encoding()) {
                encodings.push(matrix.encoding());
            }
        }
        let mut inputs: Vec<Input> = encodings.iter().map(|&e| Input::new(e, tokens, d)).collect();
        let mut hidden: Vec<Input> = self.shells[..used]
            .iter()
            .zip(reach)
            .map(|(s, &rows)| Input::new(s.down_proj.encoding(), rows, s.down_proj.shape().1))
            .collect();
        // for few tokens, floats of all neurons; for many, they stay within an item
        let few = if tokens <= TILE { tokens * self.widths[used - 1] } else { 0 };
        let (mut gate, mut up) = (unset(few), unset(few));
        let width = self.widths[used - 1];
        let pass = Pass {
            experts: self,
            isa,
            order,
            reach: &reach[..used],
            x,
            inputs: inputs.iter_mut().map(Writer::new).collect(),
            hidden: hidden.iter_mut().map(Writer::new).collect(),
            gate: Output::new(&mut gate, width),
            up: Output::new(&mut up, width),
            y: Output::new(&mut y, d),
            error: Mutex::new(None),
        };
        pass.run();
        if let Some(error) = pass.error.into_inner().unwrap_or(None) {
            return Err(error);
        }
        Ok(y)
    }

    /// Neurons of a shell.
    fn shell_width(&self, shell: usize) -> usize {
        self.shells[shell].down_proj.shape().1
    }

    /// The first neuron of a shell.
    fn shell_start(&self, shell: usize) -> usize {
        self.widths[shell] - self.shell_width(shell)
    }
}

/// Some neurons of a shell and the tokens that an item takes them for.
struct Item {
    shell: usize,
    neurons: Range<usize>,
    tokens: Range<usize>,
}

/// One forward pass.
struct Pass<'a> {
    experts: &'a PackedExperts,
    isa: Isa,
    order: &'a [u32],
    /// Tokens of each shell that any token uses.
    reach: &'a [usize],
    x: &'a [f32],
    inputs: Vec<Writer<'a>>,
    hidden: Vec<Writer<'a>>,
    gate: Output<'a>,
    up: Output<'a>,
    y: Output<'a>,
    error: Mutex<Option<candle_core::Error>>,
}

impl Pass<'_> {
    fn run(&self) {
        let (tokens, d) = (self.order.len(), self.experts.hidden_size);
        let bytes = |of: fn(&Shell<Arc<PackedMatrix>>) -> usize| -> usize {
            self.experts.shells.iter().zip(self.reach).map(|(s, &rows)| of(s) * rows).sum()
        };
        let inner = bytes(|s| s.gate_proj.bytes() + s.up_proj.bytes());
        let outer = bytes(|s| s.down_proj.bytes());
        let panels = tokens.div_ceil(TILE);
        let encode = |panel: usize| self.encode_x(panel);

        let down = &self.experts.shells[0].down_proj;
        let each = run_groups(down.groups(), down.group_bytes(), tokens);
        let outputs = |item: usize| self.down(item * each..((item + 1) * each).min(down.groups()));

        let encode = Phase { items: panels, cost: 4 * tokens * d, run: &encode };
        let outputs = Phase { items: down.groups().div_ceil(each), cost: outer, run: &outputs };
        if tokens <= TILE {
            let shells = &self.experts.shells[..self.reach.len()];
            let groups = shells.iter().map(|s| s.gate_proj.groups()).sum();
            let each = run_groups(groups, shells[0].gate_proj.group_bytes(), tokens);
            let (items, chunks) = (self.items(LANES * each), self.items(CHUNK));
            let neurons = |item: usize| self.neurons(&items[item]);
            let round = |item: usize| self.round(&chunks[item]);
            let neurons = Phase { items: items.len(), cost: inner, run: &neurons };
            let round = Phase { items: chunks.len(), cost: 0, run: &round };
            run(&[encode, neurons, round, outputs]);
        } else {
            let items = self.items(CHUNK);
            let chunk = |item: usize| self.chunk(&items[item]);
            run(&[encode, Phase { items: items.len(), cost: inner, run: &chunk }, outputs]);
        }
    }

    /// All shells' neurons in pieces of at most `size`.
    fn items(&self, size: usize) -> Vec<Item> {
        let mut items = Vec::new();
        for (shell, &rows) in self.reach.iter().enumerate() {
            let width = self.experts.shell_width(shell);
            for start in (0..width).step_by(size) {
                items.push(Item { shell, neurons: start..(start + size).min(width), tokens: 0..rows });
            }
        }
        items
    }

    fn encode_x(&self, panel: usize) {
        let d = self.experts.hidden_size;
        for token in panel * TILE..((panel + 1) * TILE).min(self.order.len()) {
            let x = &self.x[self.order[token] as usize * d..][..d];
            for input in &self.inputs {
                // SAFETY: each panel is one item; it is read in later phases only
                unsafe { input.encode(self.isa, token, 0, x) }
            }
        }
    }

    fn input(&self, matrix: &PackedMatrix) -> &Input {
        let encoding = matrix.encoding();
        let input = self.inputs.iter().find(|i| i.input().encoding() == encoding);
        input.expect("inputs were made for all encodings").input()
    }

    /// Gate and up of one group for tokens of one panel; with SiLU, `h` is in the first.
    fn group(&self, shell: usize, group: usize, tokens: Range<usize>, [gate, up]: &mut [Sums; 2]) {
        let Shell { gate_proj, up_proj, .. } = &self.experts.shells[shell];
        let (gate, up) = (&mut gate[..tokens.len()], &mut up[..tokens.len()]);
        gate.fill([0.0; LANES]);
        up.fill([0.0; LANES]);
        gate_proj.multiply(self.isa, group, self.input(gate_proj), tokens.clone(), gate);
        up_proj.multiply(self.isa, group, self.input(up_proj), tokens, up);
        if self.silu() {
            self.isa.swiglu(gate, up);
        }
    }

    fn silu(&self) -> bool {
        self.experts.activation == Activation::Silu
    }

    /// Few tokens: neurons' floats.
    fn neurons(&self, item: &Item) {
        let Shell { gate_proj, up_proj, .. } = &self.experts.shells[item.shell];
        let (tokens, start) = (item.tokens.len(), self.experts.shell_start(item.shell));
        let groups = item.neurons.start / LANES..item.neurons.end.div_ceil(LANES);
        // one matrix after the other: the memory delivers long runs faster
        let (mut gate, mut up) = ([[0f32; LANES]; RUN], [[0f32; LANES]; RUN]);
        for (matrix, sums) in [(gate_proj, &mut gate), (up_proj, &mut up)] {
            for (group, sums) in groups.clone().zip(sums.chunks_exact_mut(tokens)) {
                matrix.multiply(self.isa, group, self.input(matrix), item.tokens.clone(), sums);
            }
        }
        if self.silu() {
            self.isa.swiglu(&mut gate[..groups.len() * tokens], &up[..groups.len() * tokens]);
        }
        for (group, (gate, up)) in groups.zip(gate.chunks_exact(tokens).zip(up.chunks_exact(tokens))) {
            let count = LANES.min(item.neurons.end - group * LANES);
            for (token, (gate, up)) in item.tokens.clone().zip(gate.iter().zip(up)) {
                // SAFETY: each neuron is in one item
                unsafe {
                    self.gate.store(token, start + group * LANES, gate, count);
                    if !self.silu() {
                        self.up.store(token, start + group * LANES, up, count);
                    }
                }
            }
        }
    }

    /// Few tokens: neurons' floats, rounded.
    fn round(&self, item: &Item) {
        let (start, count) = (self.experts.shell_start(item.shell) + item.neurons.start, item.neurons.len());
        for token in item.tokens.clone() {
            // SAFETY: the phase before wrote these, this one does not
            let (gate, up) =
                unsafe { (self.gate.read(token, start, count), self.up.read(token, start, count)) };
            self.encode_h(item, token, gate, up);
        }
    }

    /// Many tokens: neurons of a chunk, panel by panel, rounded at once.
    fn chunk(&self, item: &Item) {
        let size = item.neurons.len();
        let mut sums = [[[0f32; LANES]; TILE]; 2];
        // whole groups: lanes of rows that do not exist are written, but not read
        let (mut gate, mut up) =
            ([[[0f32; LANES]; CHUNK / LANES]; TILE], [[[0f32; LANES]; CHUNK / LANES]; TILE]);
        for first in item.tokens.clone().step_by(TILE) {
            let tokens = first..(first + TILE).min(item.tokens.end);
            for group in 0..size.div_ceil(LANES) {
                self.group(item.shell, item.neurons.start / LANES + group, tokens.clone(), &mut sums);
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

    /// Rounds a chunk of `h` for one token.
    fn encode_h(&self, item: &Item, token: usize, gate: &[f32], up: &[f32]) {
        let hidden = &self.hidden[item.shell];
        let block = item.neurons.start / hidden.input().encoding().block();
        if self.silu() {
            // SAFETY: each chunk is in one item, and read in the next phase only
            return unsafe { hidden.encode(self.isa, token, block, gate) };
        }
        match activate(self.experts.activation, gate, up) {
            // SAFETY: as above
            Ok(h) => unsafe { hidden.encode(self.isa, token, block, &h) },
            Err(error) => *self.error.lock().unwrap_or_else(|e| e.into_inner()) = Some(error),
        }
    }

    /// Some groups of the output: the sum over shells, in their order.
    fn down(&self, groups: Range<usize>) {
        let tokens = self.order.len();
        let mut sums = [[0f32; LANES]; RUN];
        for first in (0..tokens).step_by(TILE) {
            let all = first..(first + TILE).min(tokens);
            let sums = &mut sums[..groups.len() * all.len()];
            sums.fill([0.0; LANES]);
            for ((shell, hidden), &rows) in self.experts.shells.iter().zip(&self.hidden).zip(self.reach) {
                if rows <= first {
                    break;
                }
                let tokens = first..all.end.min(rows);
                for (group, sums) in groups.clone().zip(sums.chunks_exact_mut(all.len())) {
                    let sums = &mut sums[..tokens.len()];
                    shell.down_proj.multiply(self.isa, group, hidden.input(), tokens.clone(), sums);
                }
            }
            for (group, sums) in groups.clone().zip(sums.chunks_exact(all.len())) {
                let count = LANES.min(self.experts.hidden_size - group * LANES);
                for (token, sums) in all.clone().zip(sums) {
                    let row = self.order[token] as usize;
                    // SAFETY: each group is in one item
                    unsafe { self.y.store(row, group * LANES, sums, count) }
                }
            }
        }
    }
}

/// [`groups_each`], no more than an item keeps sums for.
fn run_groups(groups: usize, bytes: usize, tokens: usize) -> usize {
    groups_each(groups, bytes, tokens).min(RUN / tokens.min(TILE))
}

fn activate(activation: Activation, gate: &[f32], up: &[f32]) -> Result<Vec<f32>> {
    let tensor = |x: &[f32]| Tensor::from_slice(x, x.len(), &Device::Cpu);
    (activation.forward(&tensor(gate)?)? * tensor(up)?)?.to_vec1()
}

impl NestedExperts for PackedExperts {
    fn widths(&self) -> &[usize] {
        &self.widths
    }

    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        let order: Vec<u32> = (0..x.dim(0)? as u32).collect();
        self.forward_ordered(Isa::best(), x, &order, reach)
    }

    fn forward_unsorted(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Result<Tensor> {
        self.forward_ordered(Isa::best(), x, order, reach)
    }

    fn own_shells(&self) -> usize {
        self.own_shells
    }

    fn narrow_experts(&self) -> Option<&dyn NestedExperts> {
        self.narrow.as_deref().map(|narrow| narrow as _)
    }
}

impl PackedExperts {
    pub(super) fn forward_ordered(
        &self,
        isa: Isa,
        x: &Tensor,
        order: &[u32],
        reach: &[usize],
    ) -> Result<Tensor> {
        let (tokens, d) = x.dims2()?;
        let valid = reach.len() == self.shells.len() && reach[0] == tokens && order.len() == tokens;
        let rows_exist = order.iter().all(|&row| (row as usize) < tokens);
        if d != self.hidden_size || !valid || !rows_exist || reach.windows(2).any(|w| w[1] > w[0]) {
            bail!(
                "packed experts: expected x (T, {}) with {} decreasing reaches from T and T rows in order, found {:?}, {reach:?} and {} rows",
                self.hidden_size,
                self.shells.len(),
                x.dims(),
                order.len()
            );
        }
        let rows = x.to_dtype(DType::F32)?.contiguous()?;
        let y = self.run(isa, &Host::of(&rows)?, order, reach)?;
        Tensor::from_vec(y, (tokens, d), &Device::Cpu)?.to_dtype(x.dtype())
    }
}
