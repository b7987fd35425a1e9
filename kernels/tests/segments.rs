//! The list of segments, and what decoding reads of it.

use dynamoe_kernels::args::{Segment, Serves};
use dynamoe_kernels::plan::{Block, Float};
use dynamoe_kernels::segments::{list, neurons_read};

const BF16: [Float; 2] = [Float::Bf16; 2];

/// A segment of neurons `start..end` whose matrices lie at 1000, 2000 and 3000 times `at`.
fn segment(at: u64, start: u32, end: u32) -> Segment {
    let [gate, up, down] = [1000, 2000, 3000].map(|base| base * at);
    Segment {
        gate,
        up,
        down,
        start,
        end,
        gate_stride: 10,
        up_stride: 20,
        down_stride: 30,
        serves: Serves::AllTokens,
    }
}

/// Addresses, range, and tokens of each.
fn places(list: &[Segment]) -> Vec<([u64; 3], [u32; 2], Serves)> {
    list.iter().map(|s| ([s.gate, s.up, s.down], [s.start, s.end], s.serves)).collect()
}

#[test]
fn dense_segments_are_cut_where_separate_weights_end() {
    use Serves::{AllTokens, BelowFullWidth, FullWidth};
    let separate = [segment(2, 0, 256)];
    let one = [segment(1, 0, 1024)];
    assert_eq!(
        places(&list(&one, &separate, BF16.map(Into::into))),
        [
            ([1000, 2000, 3000], [0, 256], FullWidth),
            ([2000, 4000, 6000], [0, 256], BelowFullWidth),
            // 256 rows of 10 and 20 numbers, 256 columns, of 2 bytes each
            ([1000 + 256 * 20, 2000 + 256 * 40, 3000 + 512], [256, 1024], AllTokens),
        ]
    );
    let blocks = list(&one, &separate, [Block::Q8_0, Block::Q4K].map(Into::into));
    // 256 rows of 10 and 20 blocks of 34 bytes, 1 block of 144 bytes
    assert_eq!(places(&blocks)[2].0, [1000 + 256 * 340, 2000 + 256 * 680, 3000 + 144]);

    let shells = [segment(1, 0, 128), segment(2, 128, 256), segment(3, 256, 512)];
    let separate = [segment(4, 0, 128), segment(5, 128, 256)];
    let serves = |list: Vec<Segment>| list.iter().map(|s| (s.gate / 1000, s.serves)).collect::<Vec<_>>();
    assert_eq!(
        serves(list(&shells, &separate, BF16.map(Into::into))),
        [(1, FullWidth), (2, FullWidth), (4, BelowFullWidth), (5, BelowFullWidth), (3, AllTokens)]
    );
    assert_eq!(places(&list(&shells, &[], BF16.map(Into::into))), places(&shells));
}

/// The mean share of the dense FFN that `tokens` tokens of four experts read, of all ways to choose these, with separate
/// weights for the first `shells` shells.
fn mean_share(tokens: u32, shells: u32) -> f64 {
    let separate = (shells > 0).then(|| segment(2, 0, 64 * shells));
    let list = list(&[segment(1, 0, 256)], separate.as_slice(), BF16.map(Into::into));
    let ways = 4u32.pow(tokens);
    let read = (0..ways).map(|way| {
        let widths: Vec<u32> = (0..tokens).map(|t| 64 * (way / 4u32.pow(t) % 4 + 1)).collect();
        u64::from(neurons_read(&list, &widths))
    });
    read.sum::<u64>() as f64 / f64::from(ways) / 256.0
}

/// The table in docs/kernels.md.
#[test]
fn mixed_tokens_read_some_neurons_twice() {
    let tokens = [1, 2, 4, 8];
    let shares = |shells| tokens.map(|tokens| (1000.0 * mean_share(tokens, shells)).round() / 1000.0);
    assert_eq!(shares(0), [0.625, 0.781, 0.904, 0.974]);
    assert_eq!(shares(1), [0.625, 0.875, 1.074, 1.199]);
    assert_eq!(shares(2), [0.625, 0.938, 1.23, 1.423]);
    assert_eq!(shares(3), [0.625, 0.969, 1.338, 1.624]);
}
