//! Libraries that panic on damaged files.

use std::panic::AssertUnwindSafe;
use std::sync::Mutex;

use anyhow::{Result, bail};

use crate::locks::lock;

/// Runs code of `library`, which panics on some broken files: a panic is an error here, and is not shown.
pub(super) fn without_panic<T>(library: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    static HOOK: Mutex<()> = Mutex::new(());
    let _alone = lock(&HOOK);
    let shown = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = std::panic::catch_unwind(AssertUnwindSafe(run));
    std::panic::set_hook(shown);
    result.unwrap_or_else(|panic| {
        let told = panic.downcast_ref::<String>().map(String::as_str);
        let told = told.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
        bail!("it breaks {library} ({told})")
    })
}
