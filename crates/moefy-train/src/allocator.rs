//! The C library's allocator, set to what a training loop needs.

/// Tells glibc to keep large blocks that are freed and to use them again. By default they go back to the
/// system, and every step pays for mapping and clearing its activations' pages anew. To be called once, early;
/// does nothing elsewhere. The process keeps its peak memory.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: mallopt only sets parameters of the allocator, under its own lock.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        }
    }
}
