//! The FFN as it is served: `y = W_down[:, :w] (act(W_gate[:w] x) ∘ (W_up[:w] x))`, each row with its own width `w`.

use candle_core::{Result, Tensor, bail};
use dynamoe::{HiddenAct, Projections};
use faer::Accum;
use rayon::prelude::*;

use super::cpu::{fusable, matrix, read, rows_per_block};
use super::product::Factor;

/// Runs rows `x (N, D)`, widest expert first, through prefixes of `[gate (I, D), up (I, D), down (D, I)]`. `reach[s]` rows
/// have expert `s` or a wider one. There is no gradient. None if the tensors are not f32 on the CPU.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn expert_rows(
    matrices: &Projections<Tensor>,
    hidden_act: HiddenAct,
    widths: &[usize],
    x: &Tensor,
    reach: &[usize],
) -> Result<Option<Tensor>> {
    let [gate, up, down] = matrices.as_ref().into_array();
    if !fusable(&[gate, up, down, x]) {
        return Ok(None);
    }
    let ((n, d), (i, w_d)) = (x.dims2()?, gate.dims2()?);
    if d != w_d || reach.len() != widths.len() || reach.first() != Some(&n) {
        bail!(
            "experts: expected rows of {w_d} numbers, {n} that reach the first expert, found {d} and {reach:?}"
        );
    }
    let act = hidden_act.function();
    let mut y = vec![0f32; n * d];
    read([x, gate, up, down], |[x, gate, up, down]| {
        let block = rows_per_block(n);
        let mut tasks = Vec::new();
        let mut rest = &mut y[..];
        let mut start = 0;
        for (&width, &end) in widths.iter().zip(reach).rev() {
            for first in (start..end).step_by(block) {
                let rows = block.min(end - first);
                let (to, tail) = std::mem::take(&mut rest).split_at_mut(rows * d);
                rest = tail;
                tasks.push((width, &x[first * d..(first + rows) * d], to));
            }
            start = start.max(end);
        }
        let [gate, up] = [gate, up].map(|matrix_of| Factor::new(matrix(matrix_of, d).transpose()));
        let down = Factor::new(matrix(down, i).transpose());
        tasks.into_par_iter().for_each(|(width, x, y)| {
            let x = matrix(x, d);
            let mut h = vec![0f32; x.nrows() * width];
            let mut up_x = vec![0f32; x.nrows() * width];
            gate.multiply(&mut h, Accum::Replace, x);
            up.multiply(&mut up_x, Accum::Replace, x);
            h.iter_mut().zip(&up_x).for_each(|(h, up)| *h = act.value(*h) * up);
            down.multiply(y, Accum::Replace, matrix(&h, width));
        });
        Ok(())
    })?;
    Tensor::from_vec(y, (n, d), x.device()).map(Some)
}
