//! The sum of the gradients of a step's batches, bit for bit the same for any number of ranks.
//!
//! The batches of a step are numbered. The ranks take them in turn, one each, and then all gradients of that turn are added
//! to the sum in the order of their batches:
//!
//! ```text
//! sum = ((g_0 + g_1) + g_2) + …
//! ```
//!
//! So neither the batches nor the order of additions depend on the ranks. Each rank adds up its shard only: it gets that
//! part of the others' gradients, and gives them theirs.

use std::ops::Range;

use anyhow::Result;
use candle_core::Var;
use dynamoe_model::Params;
use dynamoe_model::ops::{Gradient, Gradients};

use super::shards::{Shards, Span};
use crate::ranks::Ranks;

/// Numbers of each shard that travel at a time.
pub(super) const BLOCK: usize = 1 << 18;

/// The gradients of the batch at hand, and the sum so far.
#[derive(Debug, Default)]
pub(super) struct GradientSum {
    /// Of the batch at hand: all numbers.
    pub(super) batch: Gradients,
    /// Of all batches before: the numbers of this rank's shard. A parameter's are those of [`Shards::range`].
    pub(super) sum: Gradients,
}

impl GradientSum {
    /// Forgets all gradients.
    pub(super) fn clear(&mut self, ranks: &dyn Ranks) {
        if ranks.size() == 1 {
            // a step of one batch needs one buffer: the one that the last sum is in
            std::mem::swap(&mut self.batch, &mut self.sum);
        }
        self.batch.clear();
        self.sum.clear();
    }

    /// Adds the gradients of one turn, in which the first `batches` ranks had a batch. This rank's is in
    /// [`GradientSum::batch`], which is then empty.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn add(
        &mut self,
        ranks: &dyn Ranks,
        shards: &Shards,
        params: &Params,
        batches: usize,
    ) -> Result<()> {
        if ranks.size() == 1 {
            self.sum.absorb(&mut self.batch, params)?;
        } else {
            self.exchange(ranks, shards, params, batches);
        }
        self.batch.clear();
        Ok(())
    }

    fn exchange(&mut self, ranks: &dyn Ranks, shards: &Shards, params: &Params, batches: usize) {
        let vars: Vec<&Var> = params.iter().map(|(_, var)| var).collect();
        // a parameter that a batch has no gradient for: zeros travel, and are not added
        let filled = |var: &&Var| f64::from(u8::from(self.batch.get(var).is_some()));
        let filled = ranks.all_gather(&vars.iter().map(filled).collect::<Vec<_>>());
        let has = |rank: usize, param: usize| filled[rank][param] > 0.0;
        let first: Vec<Option<usize>> = (0..vars.len())
            .map(|param| {
                (0..batches).find(|&rank| has(rank, param)).filter(|_| self.sum.get(vars[param]).is_none())
            })
            .collect();
        for start in (0..shards.longest()).step_by(BLOCK) {
            let part = start..shards.longest().min(start + BLOCK);
            let blocks = self.blocks(shards, &vars, &part);
            let mut received = vec![0f32; blocks.len()];
            ranks.exchange(&blocks, &mut received);
            for (rank, received) in received.chunks(part.len()).enumerate().take(batches) {
                for Span { param, range, before } in shards.spans(ranks.rank(), part.clone()) {
                    if !has(rank, param) {
                        continue;
                    }
                    let own = shards.range(ranks.rank(), param);
                    let (_, sum) = self.sum.part(vars[param], own.len());
                    let sum = &mut sum[range.start - own.start..][..range.len()];
                    let new = &received[before..][..range.len()];
                    if first[param] == Some(rank) {
                        sum.copy_from_slice(new);
                    } else {
                        sum.iter_mut().zip(new).for_each(|(sum, new)| *sum += new);
                    }
                }
            }
        }
    }

    /// A part of every shard of this batch's gradients, one after the other.
    fn blocks(&self, shards: &Shards, vars: &[&Var], part: &Range<usize>) -> Vec<f32> {
        let mut blocks = vec![0f32; part.len() * shards.count()];
        for (shard, block) in blocks.chunks_mut(part.len()).enumerate() {
            for span in shards.spans(shard, part.clone()) {
                if let Some(Gradient::Host(gradient)) = self.batch.get(vars[span.param]) {
                    block[span.before..][..span.range.len()].copy_from_slice(&gradient[span.range]);
                }
            }
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use rand::Rng;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::ranks::threads::run;
    use crate::testing::{normal, seed};

    const LENGTHS: [usize; 4] = [5, 70_000, 1, 20_000];

    fn params() -> Params {
        let mut params = Params::new();
        for (number, length) in LENGTHS.into_iter().enumerate() {
            params
                .insert(&number.to_string(), &Tensor::zeros(length, DType::F32, &Device::Cpu).unwrap())
                .unwrap();
        }
        params
    }

    /// The bits of the sum of `batches` batches on `size` ranks, and the squares of its norm. Some batches have no gradient
    /// for some parameters.
    fn sums(seed: u64, batches: usize, size: usize) -> (Vec<Vec<u32>>, Vec<f64>) {
        let of_rank = |ranks: &dyn Ranks| {
            let params = params();
            let shards = Shards::new(&params, size);
            let mut gradients = GradientSum::default();
            for step in 0..2 {
                gradients.clear(ranks);
                for first in (0..batches).step_by(size) {
                    let batch = first + ranks.rank();
                    if batch < batches {
                        let mut rng = ChaCha8Rng::seed_from_u64(seed + (step * batches + batch) as u64);
                        for (_, var) in params.iter() {
                            let values = normal(&mut rng, 1.0, var.dims()).to_vec1().unwrap();
                            if rng.random_bool(0.7) {
                                gradients.batch.set(var, Gradient::Host(values));
                            }
                        }
                    }
                    gradients.add(ranks, &shards, &params, size.min(batches - first)).unwrap();
                }
            }
            let values = |(_, var): (&str, &Var)| match gradients.sum.get(var) {
                Some(Gradient::Host(values)) => values.iter().map(|value| value.to_bits()).collect(),
                _ => Vec::new(),
            };
            let values: Vec<Vec<u32>> = params.iter().map(values).collect();
            (values, gradients.sum.squares(&params).unwrap())
        };
        let mut whole = vec![Vec::new(); LENGTHS.len()];
        let mut squares = Vec::new();
        for (values, of_rank) in run(size, of_rank) {
            whole.iter_mut().zip(values).for_each(|(whole, part)| whole.extend(part));
            squares.extend(of_rank);
        }
        (whole, squares)
    }

    #[test]
    fn a_sum_is_the_same_bits_for_any_number_of_ranks() {
        let seed = seed() >> 8;
        for batches in [1, 2, 5, 8] {
            let expected = sums(seed, batches, 1);
            assert!(expected.1.iter().any(|&square| square > 0.0));
            for size in 2..=5 {
                assert!(sums(seed, batches, size) == expected, "{batches} batches, {size} ranks");
            }
        }
    }
}
