//! Routes that the device knows and the host does not yet: they are counted once for each forward of the model.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use candle_core::Result;
use dynamoe::PendingRoutes;
use mistralrs_core::row_data::RowData;

use crate::{dial::RequestDial, loaded::LoadedModel, locks::lock};

/// A row of the engine's batch.
pub(crate) type Row = Option<Arc<dyn RowData>>;

/// What one layer has routed.
struct Pass {
    layer: usize,
    rows: Vec<Row>,
    routes: PendingRoutes,
}

/// Passes that are not counted yet.
#[derive(Default)]
pub(crate) struct Passes(Mutex<Vec<Pass>>);

impl Passes {
    /// Keeps the routes of a layer, of `rows` with equal shares of its tokens.
    pub fn push(&self, layer: usize, rows: Vec<Row>, routes: PendingRoutes) {
        lock(&self.0).push(Pass { layer, rows, routes });
    }

    /// Forgets what a forward that failed has left.
    pub fn clear(&self) {
        lock(&self.0).clear();
    }

    /// Waits for the device, once, and counts for `model` and for each request.
    pub fn count(&self, model: &LoadedModel) -> Result<()> {
        let passes = std::mem::take(&mut *lock(&self.0));
        let routes = PendingRoutes::wait_all(passes.iter().map(|pass| pass.routes.clone()).collect())?;
        for (pass, routes) in passes.iter().zip(routes) {
            let dials: Vec<_> =
                pass.rows.iter().map(|row| RequestDial::of_row(row, model.layers())).collect();
            // the device's router takes no time of the host's
            model.count(pass.layer, &dials, &routes, Duration::ZERO);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dynamoe::Routes;

    #[test]
    fn a_forward_is_counted_when_it_is_over() {
        let model = crate::loaded::tests::model();
        let requests = [model.default_request(), model.default_request()];
        let rows = || requests.iter().map(|dial| Some(dial.clone() as Arc<dyn RowData>)).collect();
        let passes = Passes::default();
        // a forward that failed
        passes.push(0, rows(), Routes(vec![1; 4]).into());
        passes.clear();
        // two rows of two tokens, two layers
        passes.push(0, rows(), Routes(vec![0, 0, 0, 1]).into());
        passes.push(1, rows(), Routes(vec![0, 1, 1, 1]).into());
        assert_eq!(requests[0].mean_width(32), None);
        for _ in 0..2 {
            passes.count(&model).unwrap(); // the second time there is nothing left
            assert_eq!(requests.each_ref().map(|r| r.mean_width(32)), [Some(0.625), Some(0.875)]);
            let layers = model.counters().layers();
            assert_eq!([&layers[0].tokens[..], &layers[1].tokens[..]], [[3, 1], [1, 3]]);
        }
    }
}
