//! What a loaded model has done so far.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Counts of a model's forward passes. They wrap at 2⁶⁴.
#[derive(Debug)]
pub struct Counters {
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    tokens: Vec<AtomicU64>,
    router_nanos: AtomicU64,
}

/// The counts of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerCounts {
    /// Tokens that each expert served, narrowest expert first.
    pub tokens: Vec<u64>,
    /// Time from a layer's input to its tokens' experts, on the host's clock.
    pub router: Duration,
}

impl Counters {
    pub(crate) fn new(layers: usize, experts: usize) -> Self {
        let layer = || Layer {
            tokens: std::iter::repeat_with(AtomicU64::default).take(experts).collect(),
            router_nanos: AtomicU64::default(),
        };
        Self { layers: std::iter::repeat_with(layer).take(layers).collect() }
    }

    pub(crate) fn count(&self, layer: usize, experts: &[usize], router: Duration) {
        let counts = &self.layers[layer];
        for &expert in experts {
            counts.tokens[expert].fetch_add(1, Relaxed);
        }
        counts.router_nanos.fetch_add(router.as_nanos() as u64, Relaxed);
    }

    /// Forgets everything so far.
    pub fn reset(&self) {
        for layer in &self.layers {
            layer.tokens.iter().chain([&layer.router_nanos]).for_each(|count| count.store(0, Relaxed));
        }
    }

    /// The counts of every layer.
    pub fn layers(&self) -> Vec<LayerCounts> {
        let read = |layer: &Layer| LayerCounts {
            tokens: layer.tokens.iter().map(|count| count.load(Relaxed)).collect(),
            router: Duration::from_nanos(layer.router_nanos.load(Relaxed)),
        };
        self.layers.iter().map(read).collect()
    }

    /// Mean width over all tokens and layers as a share of the dense FFN's; nothing before the first token.
    pub fn mean_width(&self, widths: &[usize]) -> Option<f64> {
        let (mut neurons, mut tokens) = (0u64, 0u64);
        for layer in self.layers() {
            for (count, &width) in layer.tokens.iter().zip(widths) {
                tokens += count;
                neurons += count * width as u64;
            }
        }
        let full = *widths.last()? as f64;
        (tokens > 0).then(|| neurons as f64 / tokens as f64 / full)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up() {
        let counters = Counters::new(2, 3);
        assert_eq!(counters.mean_width(&[1, 2, 4]), None);
        counters.count(0, &[0, 2, 2], Duration::from_nanos(5));
        counters.count(0, &[1], Duration::from_nanos(7));
        counters.count(1, &[0; 4], Duration::ZERO);
        let layers = counters.layers();
        assert_eq!(layers[0], LayerCounts { tokens: vec![1, 1, 2], router: Duration::from_nanos(12) });
        assert_eq!(layers[1].tokens, [4, 0, 0]);
        // layer 0: 1 + 4 + 4 + 2, layer 1: 4 of 4 · 8 neurons
        assert_eq!(counters.mean_width(&[1, 2, 4]), Some(15.0 / 32.0));
        counters.reset();
        assert_eq!((counters.mean_width(&[1, 2, 4]), counters.layers()[0].router), (None, Duration::ZERO));
    }
}
