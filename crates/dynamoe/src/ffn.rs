//! The DynaMoE FFN: router, dispatch and experts behind candle's [`Module`].
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_nn::{Activation, Module};
//! use dynamoe::{DynaMoeFfn, PrefixExperts, Projections, Router};
//!
//! let (device, d, i) = (Device::Cpu, 8, 32);
//! let weight = |rows, columns| Tensor::randn(0f32, 0.1, (rows, columns), &device);
//! let widths = [8, 16, 24, 32];
//! let dense = Projections { gate_proj: weight(i, d)?, up_proj: weight(i, d)?, down_proj: weight(d, i)? };
//! let experts = PrefixExperts::new(dense, Activation::Silu, &widths)?;
//! let ffn = DynaMoeFfn::new(experts, Router::of_widths(&widths), None, 0.5)?;
//! let x = Tensor::randn(0f32, 1.0, (1, 5, d), &device)?; // (batch, sequence, D)
//! let (y, routes) = ffn.forward_routed(&x, &[0.5])?;
//! assert_eq!((y.dims(), routes.wait()?.mean_width(&widths)), ([1, 5, d].as_slice(), 0.5));
//! assert_eq!(ffn.forward(&x)?.dims(), x.dims()); // drops in where an MLP stood
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`DynaMoeFfn::load`] reads a layer of a checkpoint instead.

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{D, DType, Tensor};
use candle_nn::{Module, VarBuilder};

use crate::config::DynaMoeConfig;
use crate::error::{Error, Result};
use crate::experts::{NestedExperts, PrefixExperts, inverse, rows};
use crate::router::{Router, logit};
use crate::routes::{PendingRoutes, Routes};
use crate::sensitivity::check_dial;
use crate::tensors;

/// Whether the router has nothing to say.
fn is_dense(sensitivities: &[f64]) -> bool {
    sensitivities.iter().all(|&s| s >= 1.0)
}

/// A gated FFN whose width follows each token's difficulty.
#[derive(Debug)]
pub struct DynaMoeFfn<X> {
    experts: X,
    router: Router,
    compensation: Option<Tensor>,
    sensitivity: AtomicU64,
}

impl DynaMoeFfn<PrefixExperts> {
    /// Reads the layer's FFN of a checkpoint: `config` is the section that
    /// [`DynaMoeConfig::from_config_json`] reads, and `vb` stands at the FFN, as `vb.pp("model.layers.3.mlp")`.
    ///
    /// Matrices are in the type of `vb`; router and compensation are in f32.
    ///
    /// # Errors
    /// Tensors that are missing or of another shape.
    pub fn load(config: &DynaMoeConfig, hidden_size: usize, vb: VarBuilder) -> Result<Self> {
        let mut get = |name: &str, shape: &[usize]| {
            let exact = name.starts_with("router.");
            let vb = if exact { vb.clone().set_dtype(DType::F32) } else { vb.clone() };
            Ok(vb.get(shape, name)?)
        };
        let dense = tensors::dense(config.intermediate_size(), hidden_size);
        let dense = tensors::read_projections(&dense, &mut get)?;
        let mut experts = PrefixExperts::new(dense, config.hidden_act.into(), &config.expert_widths)?;
        if let Some(separate) = tensors::separate(config, hidden_size) {
            experts = experts.with_separate(&tensors::read_projections(&separate, &mut get)?)?;
        }
        let router = Router::load(config, hidden_size, &mut get)?;
        let compensation = tensors::read_compensation(config, hidden_size, &mut get)?;
        Self::new(experts, router, compensation, config.sensitivity)
    }
}

impl<X: NestedExperts> DynaMoeFfn<X> {
    /// `compensation (E-1, D)`: what each expert but the largest adds for the neurons it leaves out.
    ///
    /// # Errors
    /// A router or a compensation made for another number of experts, a sensitivity outside 0 to 1.
    pub fn new(experts: X, router: Router, compensation: Option<Tensor>, sensitivity: f64) -> Result<Self> {
        check_dial("sensitivity", sensitivity)?;
        let smaller = experts.widths().len() - 1;
        let scores = match &router {
            Router::Mlp { fc2, .. } => fc2.weight().dim(0)?,
            Router::Static(logits) => logits.len(),
        };
        let rows = compensation.as_ref().map_or(Ok(smaller), |c| c.dim(0))?;
        for (tensor, found) in [(tensors::ROUTER_FC2_WEIGHT, scores), (tensors::COMPENSATION, rows)] {
            if found != smaller {
                let (expected, found) = (vec![smaller], vec![found]);
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

    /// Turns the dial that [`Module::forward`] uses. It may be turned while other threads run the layer: a pass that
    /// has begun keeps the value that it read.
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
    /// A number of sensitivities that is neither 1 nor the number of tokens.
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
        Ok(Routes(self.router.route(x, &thresholds)?))
    }

    /// Runs `x (T, D)` with experts that were chosen elsewhere.
    ///
    /// # Errors
    /// As many routes as tokens are needed, each less than the number of experts.
    pub fn forward_with(&self, x: &Tensor, routes: &Routes) -> candle_core::Result<Tensor> {
        let (tokens, experts) = (x.dim(0)?, self.experts.widths().len());
        if routes.0.len() != tokens || routes.0.iter().any(|&e| e >= experts) {
            candle_core::bail!("dispatch: expected {tokens} experts below {experts}, found {:?}", routes.0);
        }
        let reach = routes.reach(experts);
        if reach[experts - 1] == tokens {
            return self.experts.forward(x, &reach);
        }
        // widest first; stable, so that the order of equals is that of the text
        let mut order: Vec<u32> = (0..tokens as u32).collect();
        order.sort_by_key(|&row| std::cmp::Reverse(routes.0[row as usize]));
        let y = match self.forward_split(x, &order, &reach) {
            Some(y) => y?,
            None if reach.iter().all(|&rows| rows == 0 || rows == tokens) => {
                self.experts.forward(x, &reach)?
            }
            None => self.experts.forward_unsorted(x, &order, &reach)?,
        };
        self.compensate(y, routes)
    }

    /// Rows at full width on the dense FFN, the others on the smaller experts' separate weights; none if these have
    /// none.
    fn forward_split(
        &self,
        x: &Tensor,
        order: &[u32],
        reach: &[usize],
    ) -> Option<candle_core::Result<Tensor>> {
        let (smaller, full) = (reach.len() - 1, reach[reach.len() - 1]);
        let rest: Vec<usize> = reach[..smaller].iter().map(|&rows| rows - full).collect();
        let (wide, narrow) = order.split_at(full);
        let narrow = self.experts.forward_separate(x, narrow, &rest)?;
        Some(narrow.and_then(|narrow| {
            let sorted = match full {
                0 => narrow,
                _ => {
                    let wide = self.experts.forward(&rows(x, wide)?, &vec![full; reach.len()])?;
                    Tensor::cat(&[wide, narrow], 0)?
                }
            };
            rows(&sorted, &inverse(order))
        }))
    }

    /// Adds the compensation to `y (T, D)`, where some token is below full width.
    fn compensate(&self, y: Tensor, routes: &Routes) -> candle_core::Result<Tensor> {
        let Some(compensation) = &self.compensation else { return Ok(y) };
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
