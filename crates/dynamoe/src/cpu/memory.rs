//! Memory for weights, in huge pages where the system has them.
//!
//! Decoding streams all weights for every token; where pages of 4 KiB were measured (docs/log.md), a third of the
//! bandwidth went into finding them. Matrices share slabs, since a matrix alone may be smaller than a huge page.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, Weak};

use super::pool::lock;

const HUGE_PAGE: usize = 2 << 20;

/// Bytes of a shared slab. Larger matrices have one of their own.
const SLAB: usize = if cfg!(miri) { 1 << 12 } else { 16 * HUGE_PAGE };

/// Weights start at multiples of a cache line.
const ALIGNMENT: usize = 64;

/// Bytes in a slab, freed with the last of their neighbours.
pub(super) struct Memory {
    slab: Arc<Slab>,
    at: usize,
    bytes: usize,
}

struct Slab {
    data: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a slab only owns its memory; each part of it belongs to one `Memory`.
unsafe impl Send for Slab {}
// SAFETY: as above
unsafe impl Sync for Slab {}

/// The slab that has room, and how much of it is taken.
static CURRENT: Mutex<(Weak<Slab>, usize)> = Mutex::new((Weak::new(), 0));

impl Memory {
    pub fn zeros(bytes: usize) -> Self {
        let (slab, at) = if bytes > SLAB / 2 { (Arc::new(Slab::new(bytes)), 0) } else { Self::share(bytes) };
        // SAFETY: the slab has this part for this memory alone
        unsafe { slab.data.add(at).write_bytes(0, bytes) };
        Self { slab, at, bytes }
    }

    fn share(bytes: usize) -> (Arc<Slab>, usize) {
        let mut current = lock(&CURRENT);
        let (slab, at) = match current.0.upgrade() {
            Some(slab) if current.1 + bytes <= SLAB => (slab, current.1),
            _ => (Arc::new(Slab::new(SLAB)), 0),
        };
        *current = (Arc::downgrade(&slab), (at + bytes).next_multiple_of(ALIGNMENT));
        (slab, at)
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: this part of the slab is initialized, and nobody else's
        unsafe { std::slice::from_raw_parts(self.slab.data.add(self.at).as_ptr(), self.bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably
        unsafe { std::slice::from_raw_parts_mut(self.slab.data.add(self.at).as_ptr(), self.bytes) }
    }
}

impl Slab {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes.max(1).next_multiple_of(HUGE_PAGE), HUGE_PAGE)
            .expect("weights fit into the address space");
        // SAFETY: the size is not zero
        let Some(data) = NonNull::new(unsafe { alloc(layout) }) else { handle_alloc_error(layout) };
        #[cfg(all(target_os = "linux", not(miri)))]
        // SAFETY: advice on memory that is ours, whose content does not change; without huge pages it fails, and
        // all works as before
        unsafe {
            libc::madvise(data.as_ptr().cast(), layout.size(), libc::MADV_HUGEPAGE);
        }
        Self { data, layout }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and no memory refers to it any more
        unsafe { dealloc(self.data.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_zeros_apart_and_aligned() {
        let sizes = [0, 1, 64, 100, SLAB / 2, SLAB / 2, SLAB / 2 + 1];
        let mut parts: Vec<Memory> = sizes.iter().map(|&bytes| Memory::zeros(bytes)).collect();
        for (at, part) in parts.iter_mut().enumerate() {
            assert!(part.bytes().iter().all(|&b| b == 0));
            assert_eq!(part.bytes().as_ptr() as usize % ALIGNMENT, 0);
            part.bytes_mut().fill(at as u8);
        }
        for (at, (part, &size)) in parts.iter().zip(&sizes).enumerate() {
            assert_eq!(part.bytes().len(), size);
            assert!(part.bytes().iter().all(|&b| b == at as u8));
        }
    }
}
