//! Models with a dial in memory.

use std::{
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use dynamoe::{Dial, DynaMoeConfig, Routes};

use crate::{
    counters::Counters,
    default_dial::DefaultDial,
    dial::{PhaseDials, RequestDial},
    kind::{ModelKind, Moe},
    locks::lock,
    moe::MoeExperts,
};

/// A model with a dial in memory: its default dial and its counters.
#[derive(Debug)]
pub struct LoadedModel {
    kind: ModelKind,
    sizes: Vec<usize>,
    layers: usize,
    default: Arc<DefaultDial>,
    counters: Arc<Counters>,
    on_cpu_kernels: AtomicUsize,
}

static LOADED: Registry = Registry(Mutex::new(Vec::new()));

/// The models with a dial that are in memory, in the order in which they were loaded.
pub fn loaded() -> Vec<Arc<LoadedModel>> {
    LOADED.list()
}

/// Models for as long as somebody else holds them.
struct Registry(Mutex<Vec<Weak<LoadedModel>>>);

impl Registry {
    fn add(&self, model: &Arc<LoadedModel>) {
        let mut models = lock(&self.0);
        models.retain(|model| model.strong_count() > 0);
        models.push(Arc::downgrade(model));
    }

    fn list(&self) -> Vec<Arc<LoadedModel>> {
        let models = lock(&self.0);
        models.iter().filter_map(Weak::upgrade).collect()
    }
}

impl LoadedModel {
    /// A model of `layers` layers, at the checkpoint's default, which [`loaded`] lists from now on.
    pub(crate) fn register(config: DynaMoeConfig, layers: usize) -> dynamoe::Result<Arc<Self>> {
        let default = config.sensitivity;
        Self::add(Self::new(ModelKind::DynaMoe(config), default, layers)?)
    }

    /// An MoE model at sensitivity 1, which [`loaded`] lists from now on. All its layers have one dial.
    pub(crate) fn register_moe(experts: MoeExperts) -> dynamoe::Result<Arc<Self>> {
        Self::add(Self::new(ModelKind::Moe(Moe::new(experts)), 1.0, 1)?)
    }

    fn add(model: Self) -> dynamoe::Result<Arc<Self>> {
        let model = Arc::new(model);
        LOADED.add(&model);
        Ok(model)
    }

    fn new(kind: ModelKind, sensitivity: f64, layers: usize) -> dynamoe::Result<Self> {
        let dial = Dial::Sensitivity(sensitivity);
        let default = DefaultDial::new(dial, kind.sensitivities(dial, layers)?.into());
        let sizes = kind.sizes();
        let counters = Arc::new(Counters::new(layers, sizes.len()));
        Ok(Self {
            kind,
            sizes,
            layers,
            default: Arc::new(default),
            counters,
            on_cpu_kernels: AtomicUsize::new(0),
        })
    }

    /// What its dial turns.
    pub fn kind(&self) -> &ModelKind {
        &self.kind
    }

    /// What each step of the dial uses of an FFN, smallest step first: neurons of an expert, or a number of experts.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// What a token uses of an FFN at sensitivity 1.
    pub fn full_size(&self) -> usize {
        self.sizes.last().copied().unwrap_or(1)
    }

    /// How clients are told what tokens used, from what each used on average: the field's name, and its value.
    #[cfg(feature = "serve")]
    pub(crate) fn tell(&self, used: f64) -> (&'static str, f64) {
        match self.kind {
            ModelKind::DynaMoe(_) => ("ffn_width", used / self.full_size() as f64),
            ModelKind::Moe(_) => ("experts", used),
        }
    }

    /// Layers that have a sensitivity of their own: decoder layers, or one for all MoE layers.
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
        let widths = &self.sizes;
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

    /// The dial of requests that bring none.
    pub fn dial(&self) -> Dial {
        self.default.dial()
    }

    /// The sensitivity of every layer for requests that bring no dial.
    pub fn sensitivities(&self) -> Arc<[f64]> {
        self.default.sensitivities()
    }

    /// Changes the dial of requests that bring none and have not arrived yet.
    ///
    /// # Errors
    /// A value outside 0 to 1, a budget without a table of budgets.
    pub fn set_dial(&self, dial: Dial) -> dynamoe::Result<()> {
        let sensitivities = self.kind.sensitivities(dial, self.layers)?.into();
        self.default.set(dial, sensitivities);
        Ok(())
    }

    /// The dial of one request.
    ///
    /// # Errors
    /// A value outside 0 to 1, a budget without a table of budgets.
    pub fn request(&self, dial: Dial) -> dynamoe::Result<Arc<RequestDial>> {
        Ok(RequestDial::new(self.kind.sensitivities(dial, self.layers)?.into(), self.moe_counters()))
    }

    /// The dial of one request whose prompt, thinking and answer have dials of their own.
    ///
    /// # Errors
    /// A value outside 0 to 1, a budget without a table of budgets.
    pub fn request_by_phase(&self, dials: PhaseDials) -> dynamoe::Result<Arc<RequestDial>> {
        let of = |dial: Dial| self.kind.sensitivities(dial, self.layers).map(Arc::from);
        let sensitivities = [of(dials.prompt)?, of(dials.thinking)?, of(dials.answer)?];
        Ok(RequestDial::phased(sensitivities, self.moe_counters()))
    }

    /// The dial of one request that brings none: the default as it is now.
    pub fn default_request(&self) -> Arc<RequestDial> {
        RequestDial::new(self.sensitivities(), self.moe_counters())
    }

    /// Where a request of an MoE model counts what its tokens run.
    fn moe_counters(&self) -> Option<Arc<Counters>> {
        matches!(self.kind, ModelKind::Moe(_)).then(|| Arc::clone(&self.counters))
    }

    /// The dial of one request that brings none: the default as it is at each step of the request.
    #[cfg(feature = "serve")]
    pub(crate) fn following_request(&self) -> Arc<RequestDial> {
        RequestDial::following(&self.default, self.moe_counters())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use dynamoe::{Budget, RouterConfig, RouterKind, Sensitivity};

    fn config() -> DynaMoeConfig {
        DynaMoeConfig {
            version: 1,
            base_architecture: "LlamaForCausalLM".into(),
            hidden_act: dynamoe::HiddenAct::Silu,
            base_model_type: "llama".into(),
            expert_widths: vec![16, 32],
            separate_shells: 0,
            router: RouterConfig { kind: RouterKind::Static, hidden_size: 0, compensation: false },
            sensitivity: 0.9,
            budgets: vec![Budget { width: 0.75, sensitivity: Sensitivity::PerLayer(vec![0.2, 0.4]) }],
        }
    }

    /// A model of two layers and two experts.
    pub(crate) fn model() -> Arc<LoadedModel> {
        LoadedModel::register(config(), 2).unwrap()
    }

    #[test]
    fn the_default_is_the_checkpoints_until_it_is_set() {
        let model = model();
        assert_eq!(model.dial(), Dial::Sensitivity(0.9));
        let early = model.default_request();
        model.set_dial(Dial::Budget(0.75)).unwrap();
        let late = model.default_request();
        assert_eq!([late.sensitivity(0), late.sensitivity(1)], [0.2, 0.4]);
        // as it was when the request arrived
        assert_eq!([early.sensitivity(0), early.sensitivity(1)], [0.9, 0.9]);
        assert!(model.set_dial(Dial::Sensitivity(1.5)).is_err());
        assert!(model.request(Dial::Budget(f64::NAN)).is_err());
        assert_eq!(model.dial(), Dial::Budget(0.75));
    }

    #[test]
    fn only_models_in_memory_are_listed() {
        let registry = Registry(Mutex::default());
        let models =
            [(); 3].map(|()| Arc::new(LoadedModel::new(ModelKind::DynaMoe(config()), 0.9, 2).unwrap()));
        models.iter().for_each(|model| registry.add(model));
        let lists = |models: &[&Arc<LoadedModel>]| {
            let listed = registry.list();
            listed.len() == models.len() && listed.iter().zip(models).all(|(a, b)| Arc::ptr_eq(a, b))
        };
        let [first, second, third] = models;
        assert!(lists(&[&first, &second, &third]));
        drop(second);
        assert!(lists(&[&first, &third]));
        // what is left of a dropped model goes when the next one comes
        assert_eq!(registry.0.lock().unwrap().len(), 3);
        registry.add(&first);
        assert_eq!(registry.0.lock().unwrap().len(), 3);
    }

    #[test]
    fn a_model_is_listed_from_its_registration_on() {
        let model = model();
        assert!(loaded().iter().any(|listed| Arc::ptr_eq(listed, &model)));
    }
}
