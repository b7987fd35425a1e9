//! What a training needs in memory, known before it starts.
//!
//! Three phases follow each other, and the largest one counts. Letters are those of the crate, and `N` is the tokens that
//! are computed at a time, `q = H·d`, `k = K·d`, `P` the neurons with separate weights, `R` the routers' hidden size. All
//! numbers take 4 bytes, but with `recompute` frozen dense weights take what they take on disk.
//!
//! ```text
//! calibrating   dense weights + sample of activations + 4 I²
//! training      all weights + 3 · trained weights (gradient, two moments; these in a byte each with `moment_bits` 8)
//!               + another model as teacher
//!               + activations + logits; with `recompute` also one layer and the output matrix in f32;
//!               with several batches in a step also the sum of their gradients, 1 · trained weights
//! publishing    all weights + what the smaller experts' matrices take as copies
//!
//! a layer keeps N · (11 D + 2 q + 2 k + 2 I + 2 P + R) for its backward pass, and 2 · N · D more for each norm of outputs
//! or factor of the residual stream
//! activations   L layers, or with `recompute` one layer and L · N · D; the teacher's hidden states; one backward pass
//! logits        8 blocks of 32 MiB, or less if there are fewer logits
//! ```
//!
//! With several ranks, each holds its share of the moments and of the sum of gradients.
//!
//! Not every intermediate result is counted. Tests compare the sum with what a process takes.

use std::fmt;

use dynamoe::DynaMoeConfig;
use dynamoe::tensors::is_addition;
use dynamoe_model::ModelConfig;
use dynamoe_model::tensors::{added_tensors, expected_tensors};

use super::blockwise::BLOCK;
use super::config::{MomentBits, TrainConfig, Trained};
use super::head::block_rows;
use super::model::is_trained;

/// What the program takes besides: code, tokenizer, text, buffers of threads.
const PROGRAM: u64 = 100 << 20;
/// Tensors of a block of logits that are there at a time.
const LOGITS: usize = 8;

/// Bytes that a training needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// The weights, trained and frozen.
    pub weights: u64,
    /// Gradients and moments of trained weights.
    pub state: u64,
    /// A second model as teacher.
    pub teacher: u64,
    /// What layers keep for the backward pass, and what that pass takes.
    pub activations: u64,
    /// Logits and their gradients.
    pub logits: u64,
    /// All that calibrating needs, where it is part of the work.
    pub calibrating: u64,
    /// All that publishing needs.
    pub publishing: u64,
}

impl Memory {
    /// Estimates a training of a model with these experts, whose dense weights are stored in `stored` bytes each. `sample`
    /// is the most that a sample of activations may take, where calibrating is part of the work.
    pub fn of(config: &ModelConfig, train: &TrainConfig, stored: u64, sample: Option<u64>) -> Self {
        Self::of_rank(config, train, stored, sample, 1)
    }

    /// [`Memory::of`] for one of `ranks` ranks.
    pub fn of_rank(
        config: &ModelConfig,
        train: &TrainConfig,
        stored: u64,
        sample: Option<u64>,
        ranks: usize,
    ) -> Self {
        let all = numbers(&expected_tensors(config), |_| true);
        let dense = all - numbers(&added_tensors(config), |_| true);
        let separate = config.dynamoe.as_ref().is_some_and(|section| section.separate_shells > 0);
        let trained = numbers(&expected_tensors(config), |name| is_trained(name, train, separate));
        let frozen = dense.min(all - trained);
        let frozen_bytes = if train.recompute { stored * frozen } else { 4 * frozen };
        let converted = if train.recompute && frozen > 0 && stored < 4 { converted(config) } else { 0 };
        let tokens = train.micro_batch() * train.sequence_length;
        let sum = if train.accumulation() > 1 { 4 } else { 0 };
        let moments = match train.moment_bits {
            MomentBits::Bits32 => 8 * trained.div_ceil(ranks as u64),
            MomentBits::Bits8 => 2 * (trained + 4 * trained.div_ceil(BLOCK as u64)).div_ceil(ranks as u64),
        };
        let calibrating = |sample: u64| {
            let square = (4 * config.intermediate_size * config.intermediate_size) as u64;
            PROGRAM + 4 * dense + sample_bytes(config, sample) + 4 * square
        };
        Self {
            weights: 4 * (all - frozen + converted) + frozen_bytes,
            state: 4 * trained + moments + sum * trained.div_ceil(ranks as u64),
            teacher: if train.needs_other_teacher() { 4 * dense } else { 0 },
            activations: 4 * (tokens as u64) * activations(config, train),
            logits: 4 * (LOGITS * config.vocab_size * block_rows(config.vocab_size).min(tokens)) as u64,
            calibrating: sample.map_or(0, calibrating),
            publishing: PROGRAM
                + 4 * all
                + 4 * narrow(config)
                + if train.recompute { frozen_bytes } else { 0 },
        }
    }

    /// What training itself needs.
    pub fn training(&self) -> u64 {
        PROGRAM + self.weights + self.state + self.teacher + self.activations + self.logits
    }

    /// The most that is needed at a time.
    pub fn peak(&self) -> u64 {
        self.training().max(self.calibrating).max(self.publishing)
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { weights, state, teacher, activations, logits, calibrating, publishing } = self;
        write!(f, "{} to train (weights {}", bytes(self.training()), bytes(*weights))?;
        write!(f, ", gradients and moments {}", bytes(*state))?;
        if *teacher > 0 {
            write!(f, ", teacher {}", bytes(*teacher))?;
        }
        write!(f, ", activations {}, logits {})", bytes(*activations), bytes(*logits))?;
        if *calibrating > 0 {
            write!(f, ", {} to calibrate", bytes(*calibrating))?;
        }
        write!(f, ", {} to publish", bytes(*publishing))
    }
}

/// Bytes as people say them.
pub fn bytes(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 1e10 => format!("{:.0} GB", b / 1e9),
        b if b >= 1e9 => format!("{:.1} GB", b / 1e9),
        b => format!("{:.0} MB", b / 1e6),
    }
}

/// Bytes of a sample of all layers' activations, `most` at most.
pub fn sample_bytes(config: &ModelConfig, most: u64) -> u64 {
    let token = 4 * (config.intermediate_size * config.num_hidden_layers) as u64;
    (most / token.max(1)).clamp(1, crate::prepare::SAMPLE_TOKENS as u64) * token
}

/// The options that make a training fit into `available` bytes, and the bytes that it then needs: first those that change
/// nothing but its speed, each together with those before it. `need` is the peak of a training with these settings.
pub fn options_that_fit(
    train: &TrainConfig,
    available: u64,
    need: impl Fn(&TrainConfig) -> u64,
) -> Option<(String, u64)> {
    let needs = savings(train).into_iter().map(|saving| (need(&saving), saving));
    let (need, found) = needs.into_iter().find(|(need, _)| *need <= available)?;
    let options = [
        (found.recompute != train.recompute).then(|| "--recompute".to_owned()),
        (found.train != train.train).then(|| "--train added".to_owned()),
        (found.micro_batch() != train.micro_batch())
            .then(|| format!("--micro-batch {}", found.micro_batch())),
        (found.moment_bits != train.moment_bits).then(|| "--moment-bits 8".to_owned()),
        (found.sequence_length != train.sequence_length)
            .then(|| format!("--sequence-length {}", found.sequence_length)),
    ];
    Some((options.into_iter().flatten().collect::<Vec<_>>().join(" "), need))
}

/// Settings that need less and less memory.
fn savings(train: &TrainConfig) -> Vec<TrainConfig> {
    let (mut list, mut now) = (Vec::new(), train.clone());
    if !now.recompute {
        now.recompute = true;
        list.push(now.clone());
    }
    let added = TrainConfig { train: Trained::Added, ..now.clone() };
    if now.train == Trained::All && added.validate().is_ok() {
        now = added;
        list.push(now.clone());
    }
    for micro in (1..train.micro_batch()).rev().filter(|&n| train.batch_size.is_multiple_of(n)) {
        now.micro_batch = Some(micro);
        list.push(now.clone());
    }
    if now.moment_bits == MomentBits::Bits32 {
        now.moment_bits = MomentBits::Bits8;
        list.push(now.clone());
    }
    while now.sequence_length > 32 {
        now.sequence_length /= 2;
        list.push(now.clone());
    }
    list
}

/// Numbers in the tensors that are wanted.
fn numbers(tensors: &[(String, Vec<usize>)], wanted: impl Fn(&str) -> bool) -> u64 {
    let wanted = tensors.iter().filter(|(name, _)| wanted(name));
    wanted.map(|(_, shape)| shape.iter().map(|&n| n as u64).product::<u64>()).sum()
}

/// Numbers of activations for each token.
fn activations(config: &ModelConfig, train: &TrainConfig) -> u64 {
    let (d, i, layers) = (config.hidden_size, config.intermediate_size, config.num_hidden_layers);
    let q = config.num_attention_heads * config.head_dim;
    let k = config.num_key_value_heads * config.head_dim;
    let section = config.dynamoe.as_ref();
    let (p, r) = section.map_or((0, 0), |section| (section.separate_width(), section.router.hidden_size));
    let raw = if config.qk_norm { q + k } else { 0 };
    let outputs = 2 * usize::from(config.output_norms) + 2 * usize::from(config.scales.residual != 1.0);
    let layer = (11 + 2 * outputs) * d + 2 * q + 2 * k + raw + 2 * i + 2 * p + r;
    let kept = if train.recompute { layer + layers * d } else { layers * layer };
    let teacher = if train.has_teacher() { layers * d } else { 0 };
    let backward = i + p + 6 * d + 3 * q + 4 * k;
    (kept + teacher + backward) as u64
}

/// Numbers that are converted to f32 at a time: a layer's, and the output matrix.
fn converted(config: &ModelConfig) -> u64 {
    let tensors = expected_tensors(config);
    let layer = numbers(&tensors, |name| name.starts_with("model.layers.0.") && !is_addition(name));
    layer + (config.vocab_size * config.hidden_size) as u64
}

/// Numbers that the smaller experts' matrices take, which are put together from separate and shared neurons.
fn narrow(config: &ModelConfig) -> u64 {
    let width = |section: &DynaMoeConfig| match section.expert_widths[..] {
        [.., width, _] if section.separate_shells > 0 => width,
        _ => 0,
    };
    let width = config.dynamoe.as_ref().map_or(0, width);
    (3 * config.num_hidden_layers * config.hidden_size * width) as u64
}

#[cfg(test)]
mod tests;
