//! The layer as it reads on paper: one token at a time, in f64, with no cleverness. Fast paths are tested
//! against it.

use crate::activation::HiddenAct;

/// A linear map with a bias.
#[derive(Debug, Clone)]
pub struct ReferenceLinear {
    /// `(out, in)`
    pub weight: Vec<Vec<f64>>,
    /// `(out)`
    pub bias: Vec<f64>,
}

impl ReferenceLinear {
    fn forward(&self, x: &[f64]) -> Vec<f64> {
        self.weight.iter().zip(&self.bias).map(|(w, b)| dot(w, x) + b).collect()
    }
}

/// Weights as rows of numbers.
#[derive(Debug, Clone)]
pub struct ReferenceFfn {
    /// The activation of the gate.
    pub hidden_act: HiddenAct,
    /// `(I, D)`
    pub gate_proj: Vec<Vec<f64>>,
    /// `(I, D)`
    pub up_proj: Vec<Vec<f64>>,
    /// `(D, I)`
    pub down_proj: Vec<Vec<f64>>,
    /// The router's first layer, `(R, D)`.
    pub fc1: ReferenceLinear,
    /// The router's second layer, `(E-1, R)`.
    pub fc2: ReferenceLinear,
    /// `(E-1, D)`, empty for none.
    pub compensation: Vec<Vec<f64>>,
    /// The smaller experts' separate weights, in place of as many of the FFN's first neurons: rows of gate and up and
    /// columns of down, empty for none.
    pub separate: [Vec<Vec<f64>>; 3],
    /// `H_e`.
    pub widths: Vec<usize>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn activate(act: HiddenAct, x: f64) -> f64 {
    match act {
        HiddenAct::Silu => x * sigmoid(x),
        HiddenAct::GeluTanh => {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + z.tanh())
        }
    }
}

impl ReferenceFfn {
    /// The scores of all experts but the largest for one token `x (D)`.
    pub fn scores(&self, x: &[f64]) -> Vec<f64> {
        let hidden: Vec<f64> = self.fc1.forward(x).into_iter().map(|z| z * sigmoid(z)).collect();
        self.fc2.forward(&hidden).into_iter().map(sigmoid).collect()
    }

    /// The expert of one token.
    pub fn route(&self, x: &[f64], sensitivity: f64) -> usize {
        let largest = self.widths.len() - 1;
        if sensitivity >= 1.0 {
            return largest;
        }
        self.scores(x).iter().position(|&score| score >= sensitivity).unwrap_or(largest)
    }

    /// `O_e(x)` for one token.
    pub fn expert(&self, x: &[f64], expert: usize) -> Vec<f64> {
        let dense = [&self.gate_proj, &self.up_proj, &self.down_proj];
        let smaller = expert + 1 < self.widths.len();
        let mut y = vec![0.0; self.down_proj.len()];
        for j in 0..self.widths[expert] {
            let separate = smaller && j < self.separate[0].len();
            let [gate, up, down] = if separate { self.separate.each_ref() } else { dense };
            let by_gate = dot(&gate[j], x);
            let h = activate(self.hidden_act, by_gate) * dot(&up[j], x);
            y.iter_mut().zip(down).for_each(|(y, row)| *y += h * row[j]);
        }
        if let Some(compensation) = self.compensation.get(expert) {
            y.iter_mut().zip(compensation).for_each(|(y, c)| *y += c);
        }
        y
    }
}
