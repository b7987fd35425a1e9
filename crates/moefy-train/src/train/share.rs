//! Handing out updated weights: each rank has those of its shard, and afterwards all of them.

use anyhow::Result;
use candle_core::Var;
use dynamoe_model::Params;

use super::optimizer::edit;
use super::shards::Shards;
use super::sum::BLOCK;
use crate::ranks::Ranks;

/// Gives every rank the weights of the others' shards.
///
/// # Errors
/// Weights that are not on the CPU.
pub(super) fn share(ranks: &dyn Ranks, shards: &Shards, params: &Params) -> Result<()> {
    if ranks.size() == 1 {
        return Ok(());
    }
    let vars: Vec<&Var> = params.iter().map(|(_, var)| var).collect();
    for start in (0..shards.longest()).step_by(BLOCK) {
        let part = start..shards.longest().min(start + BLOCK);
        let mut own = vec![0f32; part.len()];
        let mut all = vec![0f32; part.len() * ranks.size()];
        for span in shards.spans(ranks.rank(), part.clone()) {
            edit(vars[span.param], |values| {
                own[span.before..][..span.range.len()].copy_from_slice(&values[span.range]);
                Ok(())
            })?;
        }
        ranks.share(&own, &mut all);
        for (shard, block) in all.chunks(part.len()).enumerate().filter(|(shard, _)| *shard != ranks.rank()) {
            for span in shards.spans(shard, part.clone()) {
                edit(vars[span.param], |values| {
                    let len = span.range.len();
                    values[span.range].copy_from_slice(&block[span.before..][..len]);
                    Ok(())
                })?;
            }
        }
    }
    Ok(())
}
