//! Which expert each token takes, known to the host or still on the device.

#[cfg(feature = "cuda")]
use candle_core::Tensor;

/// The expert of every token of one forward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routes(pub Vec<usize>);

impl Routes {
    /// Mean width as a share of the dense FFN's; 1 for no tokens.
    pub fn mean_width(&self, widths: &[usize]) -> f64 {
        let full = widths.last().copied().unwrap_or(1) as f64;
        if self.0.is_empty() {
            return 1.0;
        }
        self.0.iter().map(|&e| widths[e] as f64).sum::<f64>() / full / self.0.len() as f64
    }

    /// Tokens that use shell `s`, for each of `experts` shells.
    pub fn reach(&self, experts: usize) -> Vec<usize> {
        let mut reach = vec![0; experts];
        for &expert in &self.0 {
            reach[expert] += 1;
        }
        for s in (1..experts).rev() {
            reach[s - 1] += reach[s];
        }
        reach
    }
}

/// The routes of a pass. On CUDA they are not known to the host until it waits for them, which a pass alone does not.
#[derive(Debug, Clone)]
pub struct PendingRoutes(Pending);

#[derive(Debug, Clone)]
enum Pending {
    Known(Routes),
    /// `(T)`, u32.
    #[cfg(feature = "cuda")]
    OnDevice(Tensor),
}

impl PendingRoutes {
    /// Routes that only the device knows: `experts (T)` in u32.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(experts: Tensor) -> Self {
        Self(Pending::OnDevice(experts))
    }

    /// Waits until the device has decided; on a CPU it has.
    pub fn wait(self) -> candle_core::Result<Routes> {
        match self.0 {
            Pending::Known(routes) => Ok(routes),
            #[cfg(feature = "cuda")]
            Pending::OnDevice(experts) => {
                Ok(Routes(experts.to_vec1::<u32>()?.into_iter().map(|expert| expert as usize).collect()))
            }
        }
    }

    /// Waits for the routes of several passes at once, in their order: for those on the same device in a row there is one
    /// wait.
    pub fn wait_all(passes: Vec<Self>) -> candle_core::Result<Vec<Routes>> {
        #[cfg(feature = "cuda")]
        {
            let mut routes = Vec::with_capacity(passes.len());
            for group in passes.chunk_by(|a, b| a.shares_device_with(b)) {
                let on_device: Vec<&Tensor> = group.iter().filter_map(Self::tensor).collect();
                if on_device.len() < 2 {
                    routes.extend(
                        group.iter().cloned().map(Self::wait).collect::<candle_core::Result<Vec<_>>>()?,
                    );
                    continue;
                }
                let all = Self(Pending::OnDevice(Tensor::cat(&on_device, 0)?)).wait()?.0;
                let mut rest = all.as_slice();
                for pass in on_device {
                    let (own, others) = rest.split_at(pass.dim(0)?);
                    routes.push(Routes(own.to_vec()));
                    rest = others;
                }
            }
            Ok(routes)
        }
        #[cfg(not(feature = "cuda"))]
        passes.into_iter().map(Self::wait).collect()
    }

    #[cfg(feature = "cuda")]
    fn tensor(&self) -> Option<&Tensor> {
        match &self.0 {
            Pending::Known(_) => None,
            Pending::OnDevice(experts) => Some(experts),
        }
    }

    #[cfg(feature = "cuda")]
    fn shares_device_with(&self, other: &Self) -> bool {
        let devices = self.tensor().zip(other.tensor());
        devices.is_some_and(|(a, b)| a.device().same_device(b.device()))
    }
}

impl From<Routes> for PendingRoutes {
    /// Routes that are known.
    fn from(routes: Routes) -> Self {
        Self(Pending::Known(routes))
    }
}
