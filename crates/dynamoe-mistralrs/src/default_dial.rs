//! The dial of requests that bring none.

use std::sync::{Arc, RwLock};

use dynamoe::Dial;

use crate::locks::{read, write};

/// A dial and what it means for each layer. It may change at any time.
#[derive(Debug)]
pub(crate) struct DefaultDial(RwLock<(Dial, Arc<[f64]>)>);

impl DefaultDial {
    /// A dial that gives each layer its sensitivity in `sensitivities`.
    pub fn new(dial: Dial, sensitivities: Arc<[f64]>) -> Self {
        Self(RwLock::new((dial, sensitivities)))
    }

    /// The dial now.
    pub fn dial(&self) -> Dial {
        read(&self.0).0
    }

    /// The sensitivity of each layer now. Whoever holds it sees by [`Arc::ptr_eq`] whether it has been set since.
    pub fn sensitivities(&self) -> Arc<[f64]> {
        Arc::clone(&read(&self.0).1)
    }

    /// Another dial from now on.
    pub fn set(&self, dial: Dial, sensitivities: Arc<[f64]>) {
        *write(&self.0) = (dial, sensitivities);
    }
}
