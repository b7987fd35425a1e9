//! The order of neurons: matrices whose rows or columns stand in another order than in their file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, ensure};
use dynamoe::tensors;

use super::layout::TensorInfo;

/// For each place, the neuron of the file that stands there.
pub(super) type Order = Arc<[usize]>;

/// Which matrices of a checkpoint are read in another order, by the tensor's name.
pub(super) type Orders = BTreeMap<String, Order>;

/// The order that `values` list, if they name every neuron once.
pub(super) fn checked(values: &[f32]) -> Result<Order> {
    let mut seen = vec![false; values.len()];
    let mut order = Vec::with_capacity(values.len());
    for &value in values {
        let neuron = value as usize;
        let new = value.fract() == 0.0 && value >= 0.0 && neuron < seen.len();
        ensure!(
            new && !std::mem::replace(&mut seen[neuron], true),
            "expected each number from 0 to {} once, found {value}",
            values.len().saturating_sub(1)
        );
        order.push(neuron);
    }
    Ok(order.into())
}

/// The order that undoes `order`.
pub(super) fn inverse(order: &Order) -> Order {
    let mut inverse = vec![0; order.len()];
    order.iter().enumerate().for_each(|(place, &neuron)| inverse[neuron] = place);
    inverse.into()
}

/// The matrices of a layer whose neurons stand in `order`.
pub(super) fn of_layer(layer: usize, order: &Order) -> impl Iterator<Item = (String, Order)> {
    let matrices = [tensors::GATE_PROJ, tensors::UP_PROJ, tensors::DOWN_PROJ];
    matrices.into_iter().map(move |name| (tensors::full_name(layer, name), Arc::clone(order)))
}

/// Bytes `range` of a matrix whose neurons are put into `order`; `read` reads bytes of the matrix as it is stored.
pub(super) fn read_ordered(
    name: &str,
    info: &TensorInfo,
    order: &Order,
    range: Range<usize>,
    read: impl Fn(Range<usize>) -> Result<Vec<u8>>,
) -> Result<Vec<u8>> {
    let rows = info.shape.first().copied().unwrap_or(0);
    if range.is_empty() || rows == 0 {
        return Ok(Vec::new());
    }
    let row = info.len / rows;
    // whole rows first
    let (first, end) = (range.start / row, range.end.div_ceil(row));
    let whole = if name.ends_with(tensors::DOWN_PROJ) {
        let stored = read(first * row..end * row)?;
        let element = row / order.len();
        let mut whole = Vec::with_capacity(stored.len());
        for row in stored.chunks_exact(row) {
            order.iter().for_each(|&j| whole.extend_from_slice(&row[j * element..][..element]));
        }
        whole
    } else {
        let mut whole = Vec::with_capacity((end - first) * row);
        for &neuron in &order[first..end] {
            whole.extend(read(neuron * row..(neuron + 1) * row)?);
        }
        whole
    };
    let start = range.start - first * row;
    Ok(whole[start..start + range.len()].to_vec())
}
