//! The dial: the default of a loaded model, and that of each request.

use std::{
    any::Any,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc, Mutex, PoisonError, RwLock, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use candle_core::Tensor;
use dynamoe::{DynaMoeConfig, Routes, config::check_dial};
use mistralrs_core::{CustomLogitsProcessor, row_data::RowData};

use crate::counters::Counters;

/// How much of the FFN a token may use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Dial {
    /// From 0 (always the smallest expert) to 1 (always the dense FFN).
    Sensitivity(f64),
    /// The mean width to aim at, as a share of the dense FFN's, through the checkpoint's table of budgets.
    Budget(f64),
}

/// A DynaMoE model in memory: its default dial and its counters.
#[derive(Debug)]
pub struct LoadedModel {
    config: DynaMoeConfig,
    layers: usize,
    default: RwLock<(Dial, Arc<[f64]>)>,
    counters: Counters,
    on_cpu_kernels: AtomicUsize,
    #[cfg(feature = "cuda")]
    passes: crate::pending::Passes,
}

static LOADED: Mutex<Vec<Weak<LoadedModel>>> = Mutex::new(Vec::new());

/// The DynaMoE models that are in memory, in the order in which they were loaded.
pub fn loaded() -> Vec<Arc<LoadedModel>> {
    let models = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    models.iter().filter_map(Weak::upgrade).collect()
}

impl LoadedModel {
    /// A model of `layers` layers, at the checkpoint's default, which [`loaded`] lists from now on.
    pub(crate) fn register(config: DynaMoeConfig, layers: usize) -> dynamoe::Result<Arc<Self>> {
        let dial = Dial::Sensitivity(config.sensitivity);
        let sensitivities = sensitivities(&config, layers, dial)?;
        let counters = Counters::new(layers, config.experts());
        let default = RwLock::new((dial, sensitivities));
        let model = Arc::new(Self {
            config,
            layers,
            default,
            counters,
            on_cpu_kernels: AtomicUsize::new(0),
            #[cfg(feature = "cuda")]
            passes: crate::pending::Passes::default(),
        });
        let mut models = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        models.retain(|model| model.strong_count() > 0);
        models.push(Arc::downgrade(&model));
        Ok(model)
    }

    /// The `dynamoe` section of the checkpoint's config.json.
    pub fn config(&self) -> &DynaMoeConfig {
        &self.config
    }

    /// Number of decoder layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// What the model has done so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Counts what a layer has routed, for the model and for the requests that `dials` belong to, whose rows have
    /// equal shares of the tokens.
    pub(crate) fn count(
        &self,
        layer: usize,
        dials: &[Option<&RequestDial>],
        routes: &Routes,
        router: Duration,
    ) {
        self.counters.count(layer, &routes.0, router);
        let widths = &self.config.expert_widths;
        let share = routes.0.len() / dials.len().max(1);
        for (dial, experts) in dials.iter().zip(routes.0.chunks_exact(share.max(1))) {
            if let Some(dial) = dial {
                dial.count(share, experts.iter().map(|&expert| widths[expert]).sum());
            }
        }
    }

    /// Layers whose FFN is one pass on dynamoe's CPU kernels; the others run shell by shell.
    pub fn on_cpu_kernels(&self) -> usize {
        self.on_cpu_kernels.load(Relaxed)
    }

    pub(crate) fn set_on_cpu_kernels(&self, layers: usize) {
        self.on_cpu_kernels.store(layers, Relaxed);
    }

    /// What layers have routed on a CUDA device in the forward that is running.
    #[cfg(feature = "cuda")]
    pub(crate) fn passes(&self) -> &crate::pending::Passes {
        &self.passes
    }

    /// The dial of requests that bring none.
    pub fn dial(&self) -> Dial {
        self.read_default().0
    }

    /// The sensitivity of every layer for requests that bring no dial.
    pub fn sensitivities(&self) -> Arc<[f64]> {
        self.read_default().1
    }

    /// Changes the dial of requests that bring none and have not arrived yet.
    ///
    /// # Errors
    /// A value outside 0 to 1, a budget without a table of budgets.
    pub fn set_dial(&self, dial: Dial) -> dynamoe::Result<()> {
        let sensitivities = sensitivities(&self.config, self.layers, dial)?;
        *self.default.write().unwrap_or_else(PoisonError::into_inner) = (dial, sensitivities);
        Ok(())
    }

    /// The dial of one request.
    ///
    /// # Errors
    /// A value outside 0 to 1, a budget without a table of budgets.
    pub fn request(&self, dial: Dial) -> dynamoe::Result<Arc<RequestDial>> {
        Ok(RequestDial::new(sensitivities(&self.config, self.layers, dial)?))
    }

    /// The dial of one request that brings none: the default as it is now.
    pub fn default_request(&self) -> Arc<RequestDial> {
        RequestDial::new(self.sensitivities())
    }

    fn read_default(&self) -> (Dial, Arc<[f64]>) {
        self.default.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn sensitivities(config: &DynaMoeConfig, layers: usize, dial: Dial) -> dynamoe::Result<Arc<[f64]>> {
    match dial {
        Dial::Sensitivity(sensitivity) => {
            check_dial("sensitivity", sensitivity)?;
            Ok(vec![sensitivity; layers].into())
        }
        Dial::Budget(width) => Ok(config.sensitivity_for_budget(width, layers)?.into()),
    }
}

/// The dial of one request, and what the request used. It travels through the engine as row data.
#[derive(Debug)]
pub struct RequestDial {
    sensitivities: Arc<[f64]>,
    tokens: AtomicU64,
    neurons: AtomicU64,
}

impl RequestDial {
    fn new(sensitivities: Arc<[f64]>) -> Arc<Self> {
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
pub(crate) mod tests {
    use super::*;
    use dynamoe::{Budget, RouterConfig, RouterKind, Sensitivity};

    pub(crate) fn model() -> Arc<LoadedModel> {
        let config = DynaMoeConfig {
            version: 1,
            base_architecture: "LlamaForCausalLM".into(),
            base_model_type: "llama".into(),
            expert_widths: vec![16, 32],
            own_shells: 0,
            router: RouterConfig { kind: RouterKind::Static, hidden_size: 0, compensation: false },
            sensitivity: 0.9,
            budgets: vec![Budget { width: 0.75, sensitivity: Sensitivity::PerLayer(vec![0.2, 0.4]) }],
        };
        LoadedModel::register(config, 2).unwrap()
    }

    #[test]
    fn the_default_is_the_checkpoints_until_it_is_set() {
        let model = model();
        assert_eq!(model.dial(), Dial::Sensitivity(0.9));
        let early = model.default_request();
        model.set_dial(Dial::Budget(0.75)).unwrap();
        assert_eq!(model.default_request().sensitivities[..], [0.2, 0.4]);
        assert_eq!(early.sensitivities[..], [0.9, 0.9]); // as it was when the request arrived
        assert!(model.set_dial(Dial::Sensitivity(1.5)).is_err());
        assert!(model.request(Dial::Budget(f64::NAN)).is_err());
        assert_eq!(model.dial(), Dial::Budget(0.75));
    }

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

    #[test]
    fn only_models_in_memory_are_listed() {
        let first = model();
        let listed = |model: &Arc<LoadedModel>| loaded().iter().any(|other| Arc::ptr_eq(other, model));
        assert!(listed(&first));
        let weak = Arc::downgrade(&first);
        drop(first);
        assert!(weak.upgrade().is_none());
    }
}
