//! A layer's experts as the engine's projections, and on the CPU's kernels.
//!
//! Packed shells together are one pass over the FFN instead of three products for each shell. Unquantized shells
//! become parts of whole matrices, so that full width is the dense FFN's three products.

use std::sync::{Arc, RwLock};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::Activation;
use dynamoe::{
    NestedExperts, PackedExperts, PrefixExperts, Projections, ShellExperts, cpu::PackedMatrix, experts::rows,
};

use mistralrs_core::plugin::MlpLayer;

use crate::locks::{read, write};
use crate::projection::{Extracted, Projection, Slot, extract, fused_glu, unquantized};

/// A layer's shells as the engine's projections, and their faster form while there is one.
#[derive(Clone)]
pub(crate) struct EngineExperts {
    pub shells: ShellExperts<Projection>,
    pub fast: Arc<FastExperts>,
    #[cfg(feature = "cuda")]
    pub cuda: Arc<crate::cuda::CudaExperts>,
}

impl EngineExperts {
    /// gate, up and down projection of each shell, narrowest expert's first, then of the separate shells.
    pub fn slots(&mut self) -> Vec<&mut Slot> {
        let (shells, separate) = self.shells.all_mut();
        let all = shells.iter_mut().chain(separate);
        all.flat_map(|s| [&mut s.gate_proj.0, &mut s.up_proj.0, &mut s.down_proj.0]).collect()
    }

    /// Type and device of the weights.
    pub fn dtype_device(&self) -> (DType, Device) {
        let first = self.shells.shells().first();
        first.map_or((DType::F32, Device::Cpu), |shell| shell.gate_proj.0.dtype_and_device())
    }
}

impl NestedExperts for EngineExperts {
    fn widths(&self) -> &[usize] {
        self.shells.widths()
    }

    #[cfg(feature = "cuda")]
    fn cuda_segments(&self) -> Option<dynamoe::CudaSegments> {
        self.cuda.get()
    }

    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        match self.fast.get() {
            Some(fast) => fast.forward(x, reach),
            None => self.shells.forward(x, reach),
        }
    }

    fn forward_unsorted(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Result<Tensor> {
        match self.fast.get() {
            Some(fast) => fast.forward_unsorted(x, order, reach),
            None => self.shells.forward_unsorted(x, order, reach),
        }
    }

    fn forward_separate(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Option<Result<Tensor>> {
        match self.fast.get() {
            Some(fast) => fast.forward_separate(x, order, reach),
            None => self.shells.forward_separate(x, order, reach),
        }
    }
}

/// The faster forms of all layers' FFNs, for those that can have one.
pub(crate) struct CpuKernels(pub Vec<Option<Arc<FastExperts>>>);

impl CpuKernels {
    /// Builds them from the shells of `mlps`, and returns how many there are; see [`FastExperts::try_build`].
    pub fn build(&self, mlps: Vec<&mut Box<dyn MlpLayer>>) -> Result<usize> {
        let mut built = 0;
        for (fast, mlp) in self.0.iter().zip(mlps) {
            if let Some(fast) = fast {
                built += usize::from(fast.try_build(mlp.get_isq_layers())?);
            }
        }
        Ok(built)
    }

    /// Forgets them; see [`FastExperts::release`].
    pub fn release(&self, mlps: Vec<&mut Box<dyn MlpLayer>>) -> Result<()> {
        for (fast, mlp) in self.0.iter().zip(mlps) {
            if let Some(fast) = fast {
                fast.release(mlp.get_isq_layers())?;
            }
        }
        Ok(())
    }
}

/// A faster form of a layer's shells over the same weights, while there is one.
pub(crate) struct FastExperts {
    activation: Activation,
    widths: Vec<usize>,
    experts: RwLock<Option<Arc<dyn NestedExperts>>>,
}

impl FastExperts {
    pub fn new(activation: Activation, widths: &[usize]) -> Self {
        Self { activation, widths: widths.to_vec(), experts: RwLock::default() }
    }

    /// One for other weights of the same shape, not built yet.
    pub fn empty(&self) -> Self {
        Self::new(self.activation, &self.widths)
    }

    /// Forgets it, since the engine is about to change the shells in `slots`: parts of whole matrices become
    /// matrices of their own.
    pub fn release(&self, slots: Vec<&mut Slot>) -> Result<()> {
        if write(&self.experts).take().is_none() {
            return Ok(());
        }
        for slot in slots {
            if let Some((weight, None)) = slot.unquant_weight_bias() {
                *slot = unquantized(weight.force_contiguous()?)?;
            }
        }
        Ok(())
    }

    fn get(&self) -> Option<Arc<dyn NestedExperts>> {
        read(&self.experts).clone()
    }

    /// Builds it from the shells in `slots` (gate, up and down projection of each, narrowest expert's first, then those
    /// of the separate shells), which hold the same weights afterwards, in the memory that is used
    /// here.
    ///
    /// Returns whether there is one: shells must all be on the CPU, and all of types that can be packed or all
    /// unquantized.
    pub fn try_build(&self, mut slots: Vec<&mut Slot>) -> Result<bool> {
        let extracted = slots.iter_mut().map(|slot| extract(slot)).collect::<Result<Vec<_>>>()?;
        let Some(extracted) = extracted.into_iter().collect::<Option<Vec<_>>>() else { return Ok(false) };
        let packed: Option<Vec<_>> = extracted.iter().map(Extracted::packed).collect();
        let unquantized: Option<Vec<_>> = extracted.iter().map(Extracted::unquantized).collect();
        let experts: Arc<dyn NestedExperts> = match (packed, unquantized) {
            (Some(matrices), _) => Arc::new(self.packed(&matrices)?),
            (_, Some(weights)) => self.prefixes(&mut slots, &weights)?,
            _ => return Ok(false),
        };
        *write(&self.experts) = Some(experts);
        Ok(true)
    }

    fn packed(&self, matrices: &[Arc<PackedMatrix>]) -> Result<PackedExperts> {
        let shell = |m: &[Arc<PackedMatrix>]| Projections {
            gate_proj: Arc::clone(&m[0]),
            up_proj: Arc::clone(&m[1]),
            down_proj: Arc::clone(&m[2]),
        };
        let mut shells: Vec<_> = matrices.chunks_exact(3).map(shell).collect();
        let separate = shells.split_off(self.widths.len());
        let experts = PackedExperts::new(shells, self.activation, &self.widths);
        experts.and_then(|experts| experts.with_separate(separate)).map_err(candle_core::Error::wrap)
    }

    fn prefixes(&self, slots: &mut [&mut Slot], weights: &[Tensor]) -> Result<Arc<dyn NestedExperts>> {
        let new = |matrices: Projections<Tensor>, widths: &[usize]| -> Result<PrefixExperts> {
            let experts = PrefixExperts::new(matrices, self.activation, widths);
            Ok(experts.map_err(candle_core::Error::wrap)?.with_glu(fused_glu))
        };
        let (slots, separate_slots) = slots.split_at_mut(3 * self.widths.len());
        let (weights, separate_weights) = weights.split_at(slots.len());
        let joined = join(slots, weights)?;
        let shells = separate_slots.len() / 3;
        let smaller = &self.widths[..self.widths.len() - 1];
        let full = new(joined.clone(), &self.widths)?;
        let Some(&width) = shells.checked_sub(1).map(|last| &smaller[last]) else {
            return Ok(Arc::new(full));
        };
        let shared: Vec<usize> = smaller[shells..].iter().map(|end| end - width).collect();
        let shared = match shared.last() {
            None => None,
            Some(&len) => {
                let part = Projections {
                    gate_proj: joined.gate_proj.narrow(0, width, len)?,
                    up_proj: joined.up_proj.narrow(0, width, len)?,
                    down_proj: joined.down_proj.narrow(1, width, len)?,
                };
                Some(new(part, &shared)?)
            }
        };
        let separate = new(join(separate_slots, separate_weights)?, &smaller[..shells])?;
        Ok(Arc::new(SharingPrefixes { full, separate, shared }))
    }
}

/// Joins shells' weights to whole matrices (gate, up, down), and leaves parts of these in the slots.
fn join(slots: &mut [&mut Slot], weights: &[Tensor]) -> Result<Projections<Tensor>> {
    let mut join = |matrix: usize, dim: usize| -> Result<Tensor> {
        let shells: Vec<&Tensor> = weights.iter().skip(matrix).step_by(3).collect();
        let joined = Tensor::cat(&shells, dim)?;
        let mut start = 0;
        for (shell, slot) in shells.iter().zip(slots.iter_mut().skip(matrix).step_by(3)) {
            let part = joined.narrow(dim, start, shell.dim(dim)?)?;
            start += shell.dim(dim)?;
            **slot = unquantized(part)?;
        }
        Ok(joined)
    };
    Ok(Projections { gate_proj: join(0, 0)?, up_proj: join(1, 0)?, down_proj: join(2, 1)? })
}

/// Prefixes of whole matrices where the smaller experts have separate weights: these, and the neurons behind them,
/// which are parts of the whole matrices.
struct SharingPrefixes {
    full: PrefixExperts,
    separate: PrefixExperts,
    shared: Option<PrefixExperts>,
}

impl SharingPrefixes {
    /// `x (T, D)` sorted by expert, all smaller than the largest.
    fn smaller(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        let (separate, behind) = reach.split_at(self.separate.widths().len());
        let y = self.separate.forward(x, separate)?;
        let (Some(shared), Some(&rows)) = (&self.shared, behind.first()) else { return Ok(y) };
        if rows == 0 {
            return Ok(y);
        }
        let more = shared.forward(&x.narrow(0, 0, rows)?, behind)?;
        let sum = (y.narrow(0, 0, rows)? + more)?;
        match y.dim(0)? - rows {
            0 => Ok(sum),
            rest => Tensor::cat(&[sum, y.narrow(0, rows, rest)?], 0),
        }
    }
}

impl NestedExperts for SharingPrefixes {
    fn widths(&self) -> &[usize] {
        self.full.widths()
    }

    fn forward(&self, x: &Tensor, reach: &[usize]) -> Result<Tensor> {
        self.full.forward(x, reach)
    }

    fn forward_separate(&self, x: &Tensor, order: &[u32], reach: &[usize]) -> Option<Result<Tensor>> {
        Some(rows(x, order).and_then(|x| self.smaller(&x, reach)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use candle_core::{Device, quantized::GgmlDType};
    use mistralrs_quant::{IsqType, QuantizeOntoGuard};

    use super::*;
    use crate::projection::tests::{difference, plain, quantized, random};

    /// Shells of `widths` over fresh matrices, as `projection` makes them, and separate ones for `separate` of them.
    fn experts(
        widths: &[usize],
        separate: usize,
        d: usize,
        projection: impl Fn(&Tensor) -> Slot,
    ) -> EngineExperts {
        let shells = |widths: &[usize]| -> Vec<Projections<Projection>> {
            let mut start = 0;
            let shell = |&end: &usize| {
                let width = end - std::mem::replace(&mut start, end);
                let projection = |rows, columns| Projection(projection(&random(rows, columns)));
                Projections {
                    gate_proj: projection(width, d),
                    up_proj: projection(width, d),
                    down_proj: projection(d, width),
                }
            };
            widths.iter().map(shell).collect()
        };
        let all = ShellExperts::new(shells(widths), Activation::Silu, widths).unwrap();
        EngineExperts {
            shells: all.with_separate(shells(&widths[..separate])).unwrap(),
            fast: Arc::new(FastExperts::new(Activation::Silu, widths)),
            #[cfg(feature = "cuda")]
            cuda: Arc::default(),
        }
    }

    fn agrees(mut experts: EngineExperts, tolerance: f32) {
        let (x, order) = (random(5, 256), [3, 0, 4, 2, 1]);
        let reaches = [[5, 3, 1], [5, 5, 5], [5, 0, 0]];
        let run = |experts: &EngineExperts| {
            let mut found =
                reaches.map(|reach| experts.forward_unsorted(&x, &order, &reach).unwrap()).to_vec();
            found.extend(
                reaches
                    .iter()
                    .filter_map(|reach| experts.forward_separate(&x, &order, &reach[..2]))
                    .map(Result::unwrap),
            );
            found
        };
        let expected = run(&experts);
        let separate = !experts.shells.separate().is_empty();
        assert_eq!(expected.len(), if separate { 2 } else { 1 } * reaches.len());
        let fast = Arc::clone(&experts.fast);
        assert!(fast.try_build(experts.slots()).unwrap());
        let by_kernels = run(&experts);
        // what is left in the slots is the same, and can be quantized
        fast.release(experts.slots()).unwrap();
        let shells = run(&experts);
        for slot in experts.slots() {
            let (count, isq) = (AtomicUsize::new(0), Some(IsqType::Q8_0));
            let (before, guard) = (Arc::clone(slot), QuantizeOntoGuard::new());
            let after = Arc::clone(slot).apply_isq(isq, Device::Cpu, &count, None, guard).unwrap();
            let before = before.dequantize_w().unwrap();
            assert!(difference(&after.dequantize_w().unwrap(), &before) < 0.01);
        }
        for found in [by_kernels, shells] {
            for (case, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let difference = difference(found, expected);
                assert!(difference < tolerance, "case {case}: {difference}");
            }
        }
    }

    #[test]
    fn fast_experts_are_the_shells() {
        let widths = [256, 512, 768];
        for separate in [0, 1, 2] {
            agrees(experts(&widths, separate, 256, plain), 1e-5);
            // next to a tie an activation may be rounded to either side: a step is up to a tenth of most of its block
            agrees(experts(&widths, separate, 256, |w| quantized(w, GgmlDType::Q4K, None)), 2e-2);
            agrees(experts(&widths, separate, 256, |w| quantized(w, GgmlDType::Q8_0, None)), 2e-2);
        }
    }

    #[test]
    fn shells_without_a_kernel_run_one_by_one() {
        let mut experts = experts(&[64, 128], 0, 64, |w| quantized(w, GgmlDType::Q4_1, None));
        let fast = Arc::clone(&experts.fast);
        assert!(!fast.try_build(experts.slots()).unwrap());
        assert_eq!(experts.forward(&random(2, 64), &[2, 1]).unwrap().dims(), [2, 64]);
    }
}
