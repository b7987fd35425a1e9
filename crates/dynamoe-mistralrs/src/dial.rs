//! The dial of a request, on its way through the engine.

use std::{
    any::Any,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use candle_core::Tensor;
use mistralrs_core::{CustomLogitsProcessor, row_data::RowData};

/// The dial of one request, and what the request used. It travels through the engine as row data.
#[derive(Debug)]
pub struct RequestDial {
    sensitivities: Arc<[f64]>,
    tokens: AtomicU64,
    neurons: AtomicU64,
}

impl RequestDial {
    pub(crate) fn new(sensitivities: Arc<[f64]>) -> Arc<Self> {
        Arc::new(Self { sensitivities, tokens: AtomicU64::new(0), neurons: AtomicU64::new(0) })
    }

    /// For [`NormalRequest::logits_processors`](mistralrs_core::NormalRequest): carries this dial and leaves the
    /// logits as they are.
    pub fn processor(self: &Arc<Self>) -> Arc<dyn CustomLogitsProcessor> {
        Arc::new(Carrier(Arc::clone(self)))
    }

    /// Mean width over the tokens that were computed for this request (not those of a cached prefix) and all
    /// layers, as a share of `intermediate_size`, the dense FFN's; nothing before the first token.
    pub fn mean_width(&self, intermediate_size: usize) -> Option<f64> {
        let tokens = self.tokens.load(Relaxed);
        (tokens > 0).then(|| self.neurons.load(Relaxed) as f64 / tokens as f64 / intermediate_size as f64)
    }

    pub(crate) fn sensitivity(&self, layer: usize) -> f64 {
        self.sensitivities[layer]
    }

    pub(crate) fn count(&self, tokens: usize, neurons: usize) {
        self.tokens.fetch_add(tokens as u64, Relaxed);
        self.neurons.fetch_add(neurons as u64, Relaxed);
    }

    /// The dial in a row of the engine's batch, if the request brought one of `layers` layers.
    pub(crate) fn of_row(row: &Option<Arc<dyn RowData>>, layers: usize) -> Option<&Self> {
        let data: &dyn Any = row.as_deref()?;
        data.downcast_ref::<Self>().filter(|dial| dial.sensitivities.len() == layers)
    }
}

impl RowData for RequestDial {
    /// Keys and values depend on the sensitivity of every layer below them.
    fn cache_key(&self) -> Option<u64> {
        let mut hasher = DefaultHasher::new();
        for sensitivity in self.sensitivities.iter() {
            sensitivity.to_bits().hash(&mut hasher);
        }
        Some(hasher.finish())
    }
}

/// Carries a dial into the engine: a logits processor is the only field of a request that can hold data of our own.
struct Carrier(Arc<RequestDial>);

impl CustomLogitsProcessor for Carrier {
    fn apply(&self, logits: &Tensor, _context: &[u32]) -> candle_core::Result<Tensor> {
        Ok(logits.clone())
    }

    fn row_data(&self) -> Option<Arc<dyn RowData>> {
        Some(self.0.clone())
    }
}

#[cfg(test)]
mod tests {
    use dynamoe::Dial;

    use super::*;
    use crate::loaded::tests::model;

    #[test]
    fn requests_share_a_cache_only_at_equal_sensitivities() {
        let model = model();
        let key = |dial| model.request(dial).unwrap().cache_key();
        assert_eq!(key(Dial::Sensitivity(0.5)), key(Dial::Sensitivity(0.5)));
        assert_ne!(key(Dial::Sensitivity(0.5)), key(Dial::Sensitivity(0.6)));
        assert_eq!(key(Dial::Sensitivity(1.0)), key(Dial::Budget(1.0)));
        assert_eq!(key(Dial::Sensitivity(0.9)), model.default_request().cache_key());
    }

    #[test]
    fn a_request_counts_what_it_used() {
        let dial = model().default_request();
        assert_eq!(dial.mean_width(32), None);
        dial.count(3, 3 * 16);
        dial.count(1, 32);
        assert_eq!(dial.mean_width(32), Some(80.0 / 128.0));
    }

    #[test]
    fn rows_of_other_models_are_not_ours() {
        struct Other;
        impl RowData for Other {}
        let ours: Option<Arc<dyn RowData>> = Some(model().default_request());
        assert!(RequestDial::of_row(&ours, 2).is_some());
        assert!(RequestDial::of_row(&ours, 3).is_none());
        assert!(RequestDial::of_row(&Some(Arc::new(Other)), 2).is_none());
        assert!(RequestDial::of_row(&None, 2).is_none());
    }
}
