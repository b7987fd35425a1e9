//! The dial of a request, on its way through the engine.

use std::{
    any::Any,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use candle_core::Tensor;
use dynamoe::Dial;
use mistralrs_core::{
    CustomLogitsProcessor,
    row_data::{ExpertChoice, RowData},
};

use crate::{counters::Counters, default_dial::DefaultDial, moe};

/// Which part of a request a token belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// What the client sent.
    Prompt,
    /// What the model writes between its think tags.
    Thinking,
    /// What else the model writes.
    Answer,
}

/// A dial for each phase of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PhaseDials {
    /// The dial of the prompt's tokens.
    pub prompt: Dial,
    /// The dial of tokens between the model's think tags.
    pub thinking: Dial,
    /// The dial of all other tokens that the model writes.
    pub answer: Dial,
}

impl From<Dial> for PhaseDials {
    fn from(dial: Dial) -> Self {
        Self { prompt: dial, thinking: dial, answer: dial }
    }
}

/// The dial of one request, and what the request used. It travels through the engine as row data.
#[derive(Debug)]
pub struct RequestDial {
    /// Of each layer, by [`Phase`].
    sensitivities: [Arc<[f64]>; 3],
    phase: AtomicUsize,
    /// Makes its keys and values its own; see [`RowData::cache_key`].
    salt: Option<u64>,
    follows: Option<Follows>,
    /// Of the model, if that is an MoE model.
    moe: Option<Arc<Counters>>,
    tokens: AtomicU64,
    used: AtomicU64,
}

/// A dial that changes with the model's default, also in the middle of an answer.
#[derive(Debug)]
struct Follows {
    default: Arc<DefaultDial>,
    /// The default has changed since the request began.
    changed: AtomicBool,
    /// The salt of its keys and values from then on.
    salt: u64,
}

impl Follows {
    /// The default of a layer now; `first` is what it was when the request began.
    fn sensitivity(&self, layer: usize, first: &Arc<[f64]>) -> f64 {
        let now = self.default.sensitivities();
        if !Arc::ptr_eq(&now, first) {
            self.changed.store(true, Relaxed);
        }
        now[layer]
    }
}

/// Salts so far.
static SALTS: AtomicU64 = AtomicU64::new(0);

impl RequestDial {
    pub(crate) fn new(sensitivities: Arc<[f64]>, moe: Option<Arc<Counters>>) -> Arc<Self> {
        Self::phased([sensitivities.clone(), sensitivities.clone(), sensitivities], moe)
    }

    /// Sensitivities of the prompt, of thinking and of the answer.
    ///
    /// Where they differ, the keys and values of an answer are not those of a prompt with the same tokens, and the
    /// engine keeps both under one key: such a request shares with no other.
    pub(crate) fn phased(sensitivities: [Arc<[f64]>; 3], moe: Option<Arc<Counters>>) -> Arc<Self> {
        let mixed = sensitivities[1..].iter().any(|other| *other != sensitivities[0]);
        Arc::new(Self::with_salt(sensitivities, moe, mixed))
    }

    /// The model's default, whatever it becomes while the request runs.
    #[cfg(feature = "serve")]
    pub(crate) fn following(default: &Arc<DefaultDial>, moe: Option<Arc<Counters>>) -> Arc<Self> {
        let now = default.sensitivities();
        let salt = SALTS.fetch_add(1, Relaxed);
        let follows = Follows { default: Arc::clone(default), changed: AtomicBool::new(false), salt };
        let fixed = Self::with_salt([now.clone(), now.clone(), now], moe, false);
        Arc::new(Self { follows: Some(follows), ..fixed })
    }

    /// The same dial for a request that must compute each of its tokens: it begins from no cached prefix.
    #[cfg(feature = "serve")]
    pub(crate) fn alone(self: &Arc<Self>) -> Arc<Self> {
        Arc::new(Self::with_salt(self.sensitivities.clone(), self.moe.clone(), true))
    }

    fn with_salt(sensitivities: [Arc<[f64]>; 3], moe: Option<Arc<Counters>>, salted: bool) -> Self {
        let salt = salted.then(|| SALTS.fetch_add(1, Relaxed));
        Self {
            sensitivities,
            phase: AtomicUsize::new(Phase::Prompt as usize),
            salt,
            follows: None,
            moe,
            tokens: AtomicU64::new(0),
            used: AtomicU64::new(0),
        }
    }

    /// Says to which phase the tokens of the next forward belong.
    pub fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as usize, Relaxed);
    }

    /// For [`NormalRequest::logits_processors`](mistralrs_core::NormalRequest): carries this dial and leaves the
    /// logits as they are.
    pub fn processor(self: &Arc<Self>) -> Arc<dyn CustomLogitsProcessor> {
        Arc::new(Carrier(self.clone()))
    }

    /// What the tokens that were computed for this request (not those of a cached prefix) used on average, over all
    /// layers, as a share of `full_size` ([`LoadedModel::full_size`](crate::LoadedModel::full_size)); nothing before the
    /// first token.
    pub fn mean_width(&self, full_size: usize) -> Option<f64> {
        let tokens = self.tokens.load(Relaxed);
        (tokens > 0).then(|| self.used.load(Relaxed) as f64 / tokens as f64 / full_size as f64)
    }

    /// Tokens that were computed for this request, all layers counted, and the neurons or experts that they used.
    #[cfg(feature = "serve")]
    pub(crate) fn used(&self) -> (u64, u64) {
        (self.tokens.load(Relaxed), self.used.load(Relaxed))
    }

    pub(crate) fn sensitivity(&self, layer: usize) -> f64 {
        let own = &self.sensitivities[self.phase.load(Relaxed)];
        self.follows.as_ref().map_or_else(|| own[layer], |default| default.sensitivity(layer, own))
    }

    pub(crate) fn count(&self, tokens: usize, used: usize) {
        self.tokens.fetch_add(tokens as u64, Relaxed);
        self.used.fetch_add(used as u64, Relaxed);
    }

    /// The dial in a row of the engine's batch, if the request brought one of `layers` layers.
    pub(crate) fn of_row(row: &Option<Arc<dyn RowData>>, layers: usize) -> Option<&Self> {
        let data: &dyn Any = row.as_deref()?;
        data.downcast_ref::<Self>().filter(|dial| dial.sensitivities[0].len() == layers)
    }
}

impl RowData for RequestDial {
    /// Keys and values depend on the sensitivity of every layer below them. Where that has changed on the way, they are
    /// nobody else's.
    fn cache_key(&self) -> Option<u64> {
        let mut hasher = DefaultHasher::new();
        for sensitivity in self.sensitivities[0].iter() {
            sensitivity.to_bits().hash(&mut hasher);
        }
        let changed = self.follows.as_ref().filter(|default| default.changed.load(Relaxed));
        self.salt.or(changed.map(|default| default.salt)).hash(&mut hasher);
        Some(hasher.finish())
    }

    fn expert_choice(&self) -> Option<&dyn ExpertChoice> {
        self.moe.is_some().then_some(self)
    }
}

impl ExpertChoice for RequestDial {
    fn experts_to_run(&self, weights: &[f32]) -> usize {
        let run = moe::experts_to_run(weights, self.sensitivity(0));
        if let Some(counters) = &self.moe {
            counters.count(0, &[run - 1], Duration::ZERO);
            self.count(1, run);
        }
        run
    }
}

/// Carries row data into the engine: a logits processor is the only field of a request that can hold data of our own.
pub(crate) struct Carrier(pub Arc<dyn RowData>);

impl CustomLogitsProcessor for Carrier {
    fn apply(&self, logits: &Tensor, _context: &[u32]) -> candle_core::Result<Tensor> {
        Ok(logits.clone())
    }

    fn row_data(&self) -> Option<Arc<dyn RowData>> {
        Some(Arc::clone(&self.0))
    }
}

#[cfg(test)]
mod tests {
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
    #[cfg(feature = "serve")]
    fn a_dial_can_follow_the_default() {
        let model = model();
        model.set_dial(Dial::Sensitivity(0.5)).unwrap();
        let fixed = model.default_request();
        let following = model.following_request();
        assert_eq!(following.sensitivity(1), 0.5);
        assert_eq!(following.cache_key(), fixed.cache_key());
        model.set_dial(Dial::Sensitivity(0.25)).unwrap();
        assert_eq!((fixed.sensitivity(1), following.sensitivity(1)), (0.5, 0.25));
        // what it has computed is a mixture now, even if the default returns
        model.set_dial(Dial::Sensitivity(0.5)).unwrap();
        assert_ne!(following.cache_key(), fixed.cache_key());
        assert_ne!(following.cache_key(), model.following_request().cache_key());
    }

    #[test]
    fn the_phase_chooses_the_sensitivity() {
        let model = model();
        let dials = PhaseDials {
            prompt: Dial::Sensitivity(1.0),
            thinking: Dial::Sensitivity(0.1),
            answer: Dial::Budget(0.75),
        };
        let dial = model.request_by_phase(dials).unwrap();
        assert_eq!(dial.sensitivity(1), 1.0);
        for (phase, sensitivity) in [(Phase::Thinking, 0.1), (Phase::Answer, 0.4), (Phase::Prompt, 1.0)] {
            dial.set_phase(phase);
            assert_eq!(dial.sensitivity(1), sensitivity);
        }
    }

    #[test]
    fn a_request_with_different_phases_shares_no_cache() {
        let model = model();
        let one = Dial::Sensitivity(1.0);
        let mixed = PhaseDials { answer: Dial::Sensitivity(0.5), ..one.into() };
        let key = |dials| model.request_by_phase(dials).unwrap().cache_key();
        assert_ne!(key(mixed), key(one.into()));
        assert_ne!(key(mixed), key(mixed));
        assert_eq!(key(one.into()), key(one.into()));
        let dial = model.request(one).unwrap();
        assert_ne!(dial.alone().cache_key(), dial.cache_key());
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
