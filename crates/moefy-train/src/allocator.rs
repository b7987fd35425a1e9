//! The C library's allocator, set to what a training loop needs.

/// Tells glibc to keep large blocks that are freed and to use them again. By default they go back to the
/// system, and every step pays for mapping and clearing its activations' pages anew. To be called once, early, before
/// threads are started; does nothing elsewhere. The process keeps its peak memory.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // Blocks of any size come from one heap, which does not shrink. Other threads' heaps of 64 MiB, and larger blocks of
        // theirs, which are mapped by themselves whatever the threshold, would be unmapped when they are freed.
        let settings =
            [(libc::M_MMAP_MAX, 0), (libc::M_ARENA_MAX, 1), (libc::M_TRIM_THRESHOLD, libc::c_int::MAX)];
        for (parameter, value) in settings {
            // SAFETY: mallopt only sets parameters of the allocator, under its own lock.
            let set = unsafe { libc::mallopt(parameter, value) };
            debug_assert_eq!(set, 1, "mallopt({parameter}, {value})");
        }
    }
}
