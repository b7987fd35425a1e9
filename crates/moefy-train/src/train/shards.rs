//! Which numbers of the trained weights are which rank's.
//!
//! The parameters, in the order of their names, make one row of numbers. It is cut into as many shards as there are ranks. A
//! rank holds the sum of the gradients and the moments of its shard, and updates its weights.

use std::ops::Range;

use dynamoe_model::Params;
use dynamoe_model::ops::PART;

/// The cuts. They lie at multiples of [`PART`] within parameters, so that a norm is the same sum for any number of ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shards {
    /// Where each parameter starts, and the end of the last one.
    starts: Vec<usize>,
    /// Where each shard starts, and the end of the last one.
    cuts: Vec<usize>,
}

/// Neighbouring numbers of a shard that belong to one parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The parameter, by its place in the order of names.
    pub param: usize,
    /// Which of its numbers.
    pub range: Range<usize>,
    /// How many numbers of the part of the shard that was asked for come before.
    pub before: usize,
}

impl Shards {
    /// Shards of about the same size, one for each of `ranks` ranks.
    pub fn new(params: &Params, ranks: usize) -> Self {
        Self::of(params.iter().map(|(_, var)| var.elem_count()), ranks)
    }

    fn of(lengths: impl Iterator<Item = usize>, ranks: usize) -> Self {
        let mut starts = vec![0];
        starts.extend(lengths.scan(0, |end, length| {
            *end += length;
            Some(*end)
        }));
        let all = *starts.last().unwrap_or(&0);
        let cut = |rank: usize| {
            let wanted = (all as u128 * rank as u128 / ranks as u128) as usize;
            let param = starts.partition_point(|&start| start <= wanted) - 1;
            let within = (wanted - starts[param]).next_multiple_of(PART);
            starts.get(param + 1).map_or(all, |&end| end.min(starts[param] + within))
        };
        let cuts = (0..=ranks).map(cut).collect();
        Self { starts, cuts }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.cuts.len() - 1
    }

    /// The numbers of a parameter that are in a shard, perhaps none.
    pub fn range(&self, shard: usize, param: usize) -> Range<usize> {
        let (start, end) = (self.starts[param], self.starts[param + 1]);
        let within = |cut: usize| cut.clamp(start, end) - start;
        within(self.cuts[shard])..within(self.cuts[shard + 1])
    }

    /// Numbers in a shard.
    pub fn len(&self, shard: usize) -> usize {
        self.cuts[shard + 1] - self.cuts[shard]
    }

    /// Numbers in the largest shard.
    pub fn longest(&self) -> usize {
        (0..self.count()).map(|shard| self.len(shard)).max().unwrap_or(0)
    }

    /// The parameters that `part` of a shard belongs to; what lies beyond the shard's end does not count.
    pub fn spans(&self, shard: usize, part: Range<usize>) -> impl Iterator<Item = Span> + '_ {
        let place = |at: usize| (self.cuts[shard] + at).min(self.cuts[shard + 1]);
        let (start, end) = (place(part.start), place(part.end));
        let first = self.starts.partition_point(|&at| at <= start).saturating_sub(1);
        let params = (first..self.starts.len() - 1).take_while(move |&param| self.starts[param] < end);
        let spans = params.map(move |param| {
            let (from, to) = (start.max(self.starts[param]), end.min(self.starts[param + 1]));
            Span { param, range: from - self.starts[param]..to - self.starts[param], before: from - start }
        });
        spans.filter(|span| !span.range.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTHS: [usize; 6] = [3, 5 * PART + 7, 0, 1, PART, 2 * PART];

    #[test]
    fn every_number_is_in_one_shard_and_squares_are_summed_alike() {
        for ranks in [1, 2, 3, 5, 8, 40] {
            let shards = Shards::of(LENGTHS.into_iter(), ranks);
            assert_eq!(shards.count(), ranks);
            for (param, length) in LENGTHS.into_iter().enumerate() {
                let mut end = 0;
                for range in
                    (0..ranks).map(|shard| shards.range(shard, param)).filter(|range| !range.is_empty())
                {
                    assert!(range.start == end && end % PART == 0, "{ranks} ranks, {range:?}");
                    end = range.end;
                }
                assert_eq!(end, length);
            }
            let even = LENGTHS.iter().sum::<usize>() / ranks;
            assert!(shards.longest() <= even + PART, "{ranks} ranks: {}", shards.longest());
        }
    }

    #[test]
    fn spans_cover_a_part_of_a_shard_in_its_order() {
        for (ranks, step) in [(1, 4), (2, PART / 3), (3, PART), (4, 3 * PART), (40, PART)] {
            let shards = Shards::of(LENGTHS.into_iter(), ranks);
            for shard in 0..ranks {
                let starts = (0..LENGTHS.len()).map(|param| shards.range(shard, param).start);
                let mut ends: Vec<usize> = starts.collect();
                for start in (0..shards.longest()).step_by(step) {
                    let mut before = 0;
                    for span in shards.spans(shard, start..start + step) {
                        assert_eq!((span.before, span.range.start), (before, ends[span.param]));
                        before += span.range.len();
                        ends[span.param] = span.range.end;
                    }
                    assert_eq!(before, shards.len(shard).saturating_sub(start).min(step));
                }
                assert!(ends.iter().enumerate().all(|(param, &end)| end == shards.range(shard, param).end));
            }
        }
    }

    #[test]
    fn nothing_to_train_makes_empty_shards() {
        let shards = Shards::of([].into_iter(), 3);
        assert_eq!((shards.longest(), shards.spans(1, 0..5).count()), (0, 0));
    }
}
