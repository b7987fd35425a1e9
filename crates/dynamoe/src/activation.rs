//! The activation of an FFN's gate.
//!
//! ```text
//! act(x) = x σ(u)      u = x (a + b x²)
//!
//! SiLU                            a = 1             b = 0
//! GELU with the tanh's formula    a = 2 √(2 / π)    b = 0.044715 a
//! ```
//!
//! The second line is `x (1 + tanh(u / 2)) / 2`, because `σ(u) = (1 + tanh(u / 2)) / 2`.

use candle_nn::Activation;
use serde::{Deserialize, Serialize};

use crate::math::{mul_add, sigmoid};

/// `act` of `h = act(W_gate x) ∘ (W_up x)`, with config.json's name for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum HiddenAct {
    /// `x σ(x)`: "silu".
    #[default]
    #[serde(rename = "silu")]
    Silu,
    /// GELU (arXiv 1606.08415) with the formula of a tanh: "gelu_pytorch_tanh".
    #[serde(rename = "gelu_pytorch_tanh")]
    GeluTanh,
}

impl HiddenAct {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Silu, Self::GeluTanh];

    /// The name in config.json.
    pub fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::GeluTanh => "gelu_pytorch_tanh",
        }
    }

    /// The activation of a name that transformers knows: "silu" and "gelu_pytorch_tanh" have a second one each.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "silu" | "swish" => Some(Self::Silu),
            "gelu_pytorch_tanh" | "gelu_new" => Some(Self::GeluTanh),
            _ => None,
        }
    }

    /// The one that is candle's `activation`, if it is here.
    pub fn of(activation: Activation) -> Option<Self> {
        match activation {
            Activation::Silu | Activation::Swish => Some(Self::Silu),
            Activation::GeluPytorchTanh | Activation::NewGelu => Some(Self::GeluTanh),
            _ => None,
        }
    }

    /// The function of single numbers, for loops that the compiler vectorises.
    pub fn function(self) -> Sigmoidal {
        match self {
            Self::Silu => Sigmoidal { a: 1.0, b: 0.0 },
            Self::GeluTanh => Sigmoidal { a: 1.595_769, b: 0.044_715 * 1.595_769 },
        }
    }
}

impl From<HiddenAct> for Activation {
    fn from(act: HiddenAct) -> Self {
        match act {
            HiddenAct::Silu => Self::Silu,
            HiddenAct::GeluTanh => Self::GeluPytorchTanh,
        }
    }
}

/// `x σ(x (a + b x²))`, without branches.
#[derive(Debug, Clone, Copy)]
pub struct Sigmoidal {
    a: f32,
    b: f32,
}

impl Sigmoidal {
    /// The value at `x`.
    #[inline(always)]
    pub fn value(self, x: f32) -> f32 {
        x * sigmoid(x * mul_add(self.b * x, x, self.a))
    }

    /// The value at `x` and the slope, `σ + x σ (1 - σ) du/dx`.
    #[inline(always)]
    pub fn value_and_slope(self, x: f32) -> (f32, f32) {
        let bx = self.b * x;
        let sigma = sigmoid(x * mul_add(bx, x, self.a));
        let value = x * sigma;
        (value, mul_add(value * (1.0 - sigma), mul_add(3.0 * bx, x, self.a), sigma))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use candle_nn::Module;

    fn exact(act: HiddenAct, x: f64) -> f64 {
        match act {
            HiddenAct::Silu => x / (1.0 + (-x).exp()),
            HiddenAct::GeluTanh => {
                let z = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                0.5 * x * (1.0 + z.tanh())
            }
        }
    }

    #[test]
    fn values_and_slopes_are_those_of_the_formulas() {
        for act in HiddenAct::ALL {
            for step in -4000..=4000 {
                let x = f64::from(step) / 100.0;
                let (value, slope) = act.function().value_and_slope(x as f32);
                assert_eq!(value, act.function().value(x as f32));
                // exp is off by 2e-7 of itself, and by the rounding of its argument; x σ (1 - σ) and its like are below 1
                let expected = exact(act, x);
                assert!(
                    (f64::from(value) - expected).abs() <= 1e-6 * (1.0 + x.abs()),
                    "{act:?} of {x}: {value}"
                );
                let expected = (exact(act, x + 1e-5) - exact(act, x - 1e-5)) / 2e-5;
                assert!(
                    (f64::from(slope) - expected).abs() <= 2e-6,
                    "{act:?} at {x}: {slope}, expected {expected}"
                );
            }
            assert_eq!(act.function().value(1e30), 1e30);
            assert!(act.function().value(-1e30).abs() < 1e-7 && act.function().value(f32::NAN).is_nan());
        }
    }

    #[test]
    fn candle_and_config_json_know_the_same_functions() {
        for act in HiddenAct::ALL {
            let x: Vec<f32> = (-50..50).map(|step| step as f32 / 10.0).collect();
            let theirs = Activation::from(act).forward(&Tensor::new(&x[..], &Device::Cpu).unwrap()).unwrap();
            for (x, theirs) in x.into_iter().zip(theirs.to_vec1::<f32>().unwrap()) {
                assert!((act.function().value(x) - theirs).abs() < 2e-6, "{act:?} of {x}: {theirs}");
            }
            assert_eq!(HiddenAct::of(act.into()), Some(act));
            assert_eq!(HiddenAct::from_name(act.name()), Some(act));
            assert_eq!(serde_json::to_value(act).unwrap(), act.name());
        }
        assert_eq!((HiddenAct::from_name("gelu"), HiddenAct::of(Activation::Gelu)), (None, None));
    }
}
