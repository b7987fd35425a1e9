//! Access to the numbers of a tensor on the CPU.

use std::ops::{Deref, Range};
use std::sync::RwLockReadGuard;

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};

/// The numbers of a contiguous f32 tensor on the CPU, row-major.
pub(crate) struct Host<'a> {
    storage: RwLockReadGuard<'a, Storage>,
    range: Range<usize>,
}

impl<'a> Host<'a> {
    /// # Errors
    /// A tensor that is not contiguous, not f32 or not on the CPU.
    pub fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) => Ok(Self { storage, range: start..end }),
            _ => bail!(
                "CPU kernel: expected a contiguous f32 tensor on the CPU, found {:?} of {:?} on {:?}",
                tensor.dtype(),
                tensor.shape(),
                tensor.device()
            ),
        }
    }
}

impl Deref for Host<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(numbers)) => &numbers[self.range.clone()],
            _ => unreachable!("`Host::of` has checked the storage"),
        }
    }
}
