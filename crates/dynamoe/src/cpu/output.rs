//! Results that several threads fill, each its own columns.

use super::lanes::LANES;

/// What memory holds before it is written: in tests a NaN, so that a test shows if it is read.
pub(super) const UNSET: u32 = if cfg!(test) { 0x7fc0_7f7f } else { 0 };

/// Memory for results, all of which will be written.
pub(crate) fn unset(len: usize) -> Vec<f32> {
    vec![f32::from_bits(UNSET); len]
}

/// An output `(T, N)` that threads fill, each its own columns.
pub(crate) struct Output<'a> {
    data: *mut f32,
    len: usize,
    columns: usize,
    _borrow: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: `store` is unsafe: its callers write to different places.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// `data` is row-major, `columns` numbers in a row.
    pub fn new(data: &'a mut [f32], columns: usize) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), columns, _borrow: std::marker::PhantomData }
    }

    /// Stores `count` columns of one row.
    ///
    /// # Safety
    /// No other thread may use the same place at the same time.
    pub unsafe fn store(&self, row: usize, column: usize, values: &[f32; LANES], count: usize) {
        let at = row * self.columns + column;
        assert!(count <= LANES && column + count <= self.columns && at + count <= self.len);
        // SAFETY: within the slice; the caller has this place for itself
        unsafe {
            let to = self.data.add(at);
            if count == LANES {
                // a length that the compiler knows
                to.cast::<[f32; LANES]>().write_unaligned(*values);
            } else {
                std::ptr::copy_nonoverlapping(values.as_ptr(), to, count);
            }
        }
    }

    /// Reads `count` columns of one row.
    ///
    /// # Safety
    /// No thread may write to the same place while the slice lives.
    pub unsafe fn read(&self, row: usize, column: usize, count: usize) -> &[f32] {
        let at = row * self.columns + column;
        assert!(column + count <= self.columns && at + count <= self.len);
        // SAFETY: within the slice; the caller keeps others from writing
        unsafe { std::slice::from_raw_parts(self.data.add(at), count) }
    }
}
