//! The DynaMoE FFN: router, dispatch and experts behind candle's [`Module`].
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_nn::{Activation, Module};
//! use dynamoe::{DynaMoeFfn, PrefixExperts, Router};
//!
//! let (device, d, i) = (Device::Cpu, 8, 32);
//! let weight = |rows, columns| Tensor::randn(0f32, 0.1, (rows, columns), &device);
//! let widths = [8, 16, 24, 32];
//! let experts = PrefixExperts::new(weight(i, d)?, weight(i, d)?, weight(d, i)?, Activation::Silu, &widths)?;
//! let ffn = DynaMoeFfn::new(experts, Router::of_widths(&widths), None, 0.5)?;
//! let x = Tensor::randn(0f32, 1.0, (1, 5, d), &device)?; // (batch, sequence, D)
//! let (y, routes) = ffn.forward_routed(&x, &[0.5])?;
//! assert_eq!((y.dims(), routes.wait()?.mean_width(&widths)), ([1, 5, d].as_slice(), 0.5));
//! assert_eq!(ffn.forward(&x)?.dims(), x.dims()); // drops in where an MLP stood
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{D, Tensor};
use candle_nn::Module;

use crate::config::check_dial;
use crate::error::{Error, Result};
use crate::experts::{NestedExperts, places};
use crate::router::{Router, logit};
use crate::routes::{PendingRoutes, Routes};

/// Whether the router has nothing to say.
fn is_dense(sensitivities: &[f64]) -> bool {
    sensitivities.iter().all(|&s| s >= 1.0)
}

/// A SwiGLU FFN whose width follows each token's difficulty.
#[derive(Debug)]
pub struct DynaMoeFfn<X> {
    experts: X,
    router: Router,
    compensation: Option<Tensor>,
    sensitivity: AtomicU64,
}

impl<X: NestedExperts> DynaMoeFfn<X> {
    /// `compensation (E-1, D)`: what each expert but the largest adds for the neurons it leaves out.
    ///
    /// # Errors
    /// A router or a compensation made for another number of experts, a sensitivity outside 0 to 1.
    pub fn new(experts: X, router: Router, compensation: Option<Tensor>, sensitivity: f64) -> Result<Self> {
        check_dial("sensitivity", sensitivity)?;
        let narrower = experts.widths().len() - 1;
        let scores = match &router {
            Router::Mlp { fc2, .. } => fc2.weight().dim(0)?,
            Router::Static(logits) => logits.len(),
        };
        let rows = compensation.as_ref().map_or(Ok(narrower), |c| c.dim(0))?;
        for (tensor, found) in [(crate::names::ROUTER_FC2_WEIGHT, scores), (crate::names::COMPENSATION, rows)]
        {
            if found != narrower {
                let (expected, found) = (vec![narrower], vec![found]);
                return Err(Error::Shape { tensor: format!("{tensor}, rows"), expected, found });
            }
        }
        Ok(Self { experts, router, compensation, sensitivity: AtomicU64::new(sensitivity.to_bits()) })
    }

    /// The experts.
    pub fn experts(&self) -> &X {
        &self.experts
    }

    /// The experts, for an engine that quantizes them in place.
    pub fn experts_mut(&mut self) -> &mut X {
        &mut self.experts
    }

    /// The router.
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// The compensation `(E-1, D)`, if the layer has one.
    pub fn compensation(&self) -> Option<&Tensor> {
        self.compensation.as_ref()
    }

    /// The dial that [`Module::forward`] uses.
    pub fn sensitivity(&self) -> f64 {
        f64::from_bits(self.sensitivity.load(Ordering::Relaxed))
    }

    /// Turns the dial that [`Module::forward`] uses.
    ///
    /// # Errors
    /// [`Error::Dial`] for a value outside 0 to 1.
    pub fn set_sensitivity(&self, sensitivity: f64) -> Result<()> {
        check_dial("sensitivity", sensitivity)?;
        self.sensitivity.store(sensitivity.to_bits(), Ordering::Relaxed);
        Ok(())
    }

    /// Routes and runs `x (…, D)` with one sensitivity for all tokens or one for each. Where all are 1, this
    /// is the dense FFN and the router does not run.
    ///
    /// On CUDA, with weights that dynamoe-kernels knows, the host does not wait for the routes.
    ///
    /// # Errors
    /// A number of sensitivities that is neither 1 nor the number of tokens; candle's.
    pub fn forward_routed(
        &self,
        x: &Tensor,
        sensitivities: &[f64],
    ) -> candle_core::Result<(Tensor, PendingRoutes)> {
        let rows = x.reshape(((), x.dim(D::Minus1)?))?; // (T, D)
        #[cfg(feature = "cuda")]
        if !is_dense(sensitivities) {
            let compensation = self.compensation.as_ref();
            let routed =
                crate::cuda::forward(&self.experts, &self.router, compensation, &rows, sensitivities)?;
            if let Some((y, experts)) = routed {
                return Ok((y.reshape(x.shape())?, PendingRoutes::on_device(experts)));
            }
        }
        let routes = self.route(&rows, sensitivities)?;
        let y = self.forward_with(&rows, &routes)?;
        Ok((y.reshape(x.shape())?, routes.into()))
    }

    /// Chooses the experts of `x (T, D)`; sensitivities as for [`DynaMoeFfn::forward_routed`].
    ///
    /// # Errors
    /// As there.
    pub fn route(&self, x: &Tensor, sensitivities: &[f64]) -> candle_core::Result<Routes> {
        if is_dense(sensitivities) {
            return Ok(Routes(vec![self.experts.widths().len() - 1; x.dim(0)?]));
        }
        let thresholds: Vec<f32> = sensitivities.iter().map(|&s| logit(s)).collect();
        Ok(Routes(self.router.experts(x, &thresholds)?))
    }

    /// Runs `x (T, D)` with experts that were chosen elsewhere.
    ///
    /// # Errors
    /// As many routes as tokens are needed, each less than the number of experts; candle's.
    pub fn forward_with(&self, x: &Tensor, routes: &Routes) -> candle_core::Result<Tensor> {
        let (tokens, experts) = (x.dim(0)?, self.experts.widths().len());
        if routes.0.len() != tokens || routes.0.iter().any(|&e| e >= experts) {
            candle_core::bail!("dispatch: expected {tokens} experts below {experts}, found {:?}", routes.0);
        }
        let reach = routes.reach(experts);
        let uniform = reach.iter().all(|&rows| rows == 0 || rows == tokens);
        // widest first; stable, so that the order of equals is that of the text
        let order = || {
            let mut order: Vec<u32> = (0..tokens as u32).collect();
            order.sort_by_key(|&row| std::cmp::Reverse(routes.0[row as usize]));
            order
        };
        let y = if self.experts.own_shells() > 0 && reach[experts - 1] < tokens {
            self.forward_apart(x, &order(), &reach)?
        } else if uniform {
            self.experts.forward(x, &reach)?
        } else {
            self.experts.forward_unsorted(x, &order(), &reach)?
        };
        self.compensate(y, routes)
    }

    /// Rows at full width on the dense FFN, the others on narrow experts, which have neurons of their own.
    fn forward_apart(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> candle_core::Result<Tensor> {
        let (narrower, full) = (reach.len() - 1, reach[reach.len() - 1]);
        let rest: Vec<usize> = reach[..narrower].iter().map(|&rows| rows - full).collect();
        if rest.iter().all(|&rows| rows == 0 || rows == order.len()) {
            return self.experts.forward_narrow(x, &rest);
        }
        let x = x.contiguous()?;
        let rows = |rows: &[u32]| x.index_select(&Tensor::new(rows, x.device())?, 0);
        let (wide, narrow) = order.split_at(full);
        let narrow = self.experts.forward_narrow(&rows(narrow)?, &rest)?;
        let sorted = match full {
            0 => narrow,
            _ => Tensor::cat(&[self.experts.forward(&rows(wide)?, &vec![full; reach.len()])?, narrow], 0)?,
        };
        sorted.index_select(&Tensor::new(places(order), x.device())?, 0)
    }

    fn compensate(&self, y: Tensor, routes: &Routes) -> candle_core::Result<Tensor> {
        let Some(compensation) = &self.compensation else { return Ok(y) };
        let largest = self.experts.widths().len() - 1;
        if routes.0.iter().all(|&e| e == largest) {
            return Ok(y);
        }
        if routes.0.iter().all(|&e| e == routes.0[0]) {
            return y.broadcast_add(&compensation.narrow(0, routes.0[0], 1)?.to_dtype(y.dtype())?);
        }
        let zero = compensation.narrow(0, 0, 1)?.zeros_like()?;
        let table = Tensor::cat(&[compensation, &zero], 0)?.to_dtype(y.dtype())?; // (E, D)
        let experts: Vec<u32> = routes.0.iter().map(|&e| e as u32).collect();
        let experts = Tensor::new(experts, y.device())?;
        y + table.index_select(&experts, 0)?
    }
}

impl<X: Clone> Clone for DynaMoeFfn<X> {
    fn clone(&self) -> Self {
        Self {
            experts: self.experts.clone(),
            router: self.router.clone(),
            compensation: self.compensation.clone(),
            sensitivity: AtomicU64::new(self.sensitivity.load(Ordering::Relaxed)),
        }
    }
}

impl<X: NestedExperts> Module for DynaMoeFfn<X> {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.forward_routed(x, &[self.sensitivity()])?.0)
    }
}
