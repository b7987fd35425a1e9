//! Runs the kernels of `kernels/cu` on a CPU: the same source, with a fibre for each CUDA thread. It tells nothing about
//! speed. It also cannot prove that a kernel is right on a GPU: blocks run one after the other, and threads take turns only
//! at barriers and exchanges.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

unsafe extern "C" {
    fn sim_args_bytes(name: *const c_char) -> usize;
    #[allow(clippy::too_many_arguments)]
    fn sim_launch(
        name: *const c_char,
        grid: *const c_uint,
        threads: c_uint,
        shared_bytes: usize,
        args: *const c_void,
        seed: u64,
        skipped: c_int,
        sites: *mut c_uint,
    ) -> *const c_char;
}

/// What the simulated kernel did wrong.
#[derive(Debug, thiserror::Error)]
#[error("{kernel}: {what}")]
pub struct Fault {
    /// The kernel's name.
    pub kernel: String,
    /// A divergent barrier, a misaligned access, …
    pub what: String,
}

/// How to run a kernel.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// The kernel's name.
    pub kernel: &'a str,
    /// Blocks in x and y.
    pub grid: [u32; 2],
    /// Threads in a block.
    pub threads: u32,
    /// Shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Decides the order of threads and blocks.
    pub seed: u64,
    /// The number of a barrier to leave out: tests do so to see that the simulation finds it.
    pub without_barrier: Option<u32>,
}

impl Launch<'_> {
    /// Runs the kernel with its one argument and returns the number of barriers in its source that were met.
    ///
    /// # Safety
    /// `args` must be laid out as the kernel's struct, and its pointers must be valid for the kernel's reads and writes.
    ///
    /// # Errors
    /// An unknown kernel, an argument of another size, and what the simulation finds.
    pub unsafe fn run<A>(&self, args: &A) -> Result<u32, Fault> {
        let fault = |what: String| Fault { kernel: self.kernel.into(), what };
        let name = CString::new(self.kernel).map_err(|e| fault(e.to_string()))?;
        // SAFETY: a C string, read only
        let expected = unsafe { sim_args_bytes(name.as_ptr()) };
        if expected != size_of::<A>() {
            return Err(fault(format!("expected an argument of {expected} bytes, found {}", size_of::<A>())));
        }
        let mut sites = 0;
        let skipped = self.without_barrier.map_or(-1, |site| site as c_int);
        let args = std::ptr::from_ref(args).cast();
        // SAFETY: the name and the grid live through the call; the caller promises a valid argument
        let error = unsafe {
            sim_launch(
                name.as_ptr(),
                self.grid.as_ptr(),
                self.threads,
                self.shared_bytes as usize,
                args,
                self.seed,
                skipped,
                &mut sites,
            )
        };
        if error.is_null() {
            return Ok(sites);
        }
        // SAFETY: a static string, or the thread's own buffer, unchanged until this thread's next launch
        Err(fault(unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned()))
    }
}
