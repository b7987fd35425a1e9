//! The layer as it reads on paper: one token at a time, in f64, with no cleverness. Fast paths are tested
//! against it.

/// Weights as rows of numbers.
#[derive(Debug, Clone)]
pub struct ReferenceFfn {
    /// `(I, D)`
    pub gate_proj: Vec<Vec<f64>>,
    /// `(I, D)`
    pub up_proj: Vec<Vec<f64>>,
    /// `(D, I)`
    pub down_proj: Vec<Vec<f64>>,
    /// `fc1` `(R, D)`, its bias `(R)`, `fc2` `(E-1, R)`, its bias `(E-1)`.
    pub router: (Vec<Vec<f64>>, Vec<f64>, Vec<Vec<f64>>, Vec<f64>),
    /// `(E-1, D)`, empty for none.
    pub compensation: Vec<Vec<f64>>,
    /// `H_e`.
    pub widths: Vec<usize>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

impl ReferenceFfn {
    /// The scores of all experts but the largest for one token `x (D)`.
    pub fn scores(&self, x: &[f64]) -> Vec<f64> {
        let (fc1, b1, fc2, b2) = &self.router;
        let hidden: Vec<f64> =
            fc1.iter().zip(b1).map(|(w, b)| dot(w, x) + b).map(|z| z * sigmoid(z)).collect();
        fc2.iter().zip(b2).map(|(w, b)| sigmoid(dot(w, &hidden) + b)).collect()
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
        let neuron = |j: usize| {
            let gate = dot(&self.gate_proj[j], x);
            gate * sigmoid(gate) * dot(&self.up_proj[j], x)
        };
        let h: Vec<f64> = (0..self.widths[expert]).map(neuron).collect();
        let mut y: Vec<f64> = self.down_proj.iter().map(|row| dot(row, &h)).collect();
        if let Some(compensation) = self.compensation.get(expert) {
            y.iter_mut().zip(compensation).for_each(|(y, c)| *y += c);
        }
        y
    }
}
