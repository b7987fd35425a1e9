//! One process at a time writes to an output folder.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// The name of the lock's file.
pub(super) const LOCK: &str = "lock";

/// Held for as long as it lives; a process that ends, however it ends, lets go of it.
pub(super) struct OutputLock(#[expect(dead_code, reason = "held, not read")] File);

impl OutputLock {
    /// Takes the lock of the folder `dir`, which exists; `out` is what the user calls it.
    ///
    /// # Errors
    /// Another process holds it; the file cannot be written.
    pub(super) fn take(dir: &Path, out: &Path) -> Result<Self> {
        let path = dir.join(LOCK);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("{}: cannot be written", path.display()))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                bail!(
                    "{}: another process ({}) is working in this output folder; wait for it, or choose another --out",
                    out.display(),
                    holder.trim()
                )
            }
            // a file system without locks: better unguarded than unusable
            Err(_) => tracing::warn!("{}: its file system has no locks", out.display()),
        }
        file.rewind()
            .and_then(|()| file.set_len(0))
            .and_then(|()| write!(file, "{}", std::process::id()))
            .with_context(|| format!("{}: cannot be written", path.display()))?;
        Ok(Self(file))
    }

    /// Takes the lock of a folder that may not exist; none then.
    ///
    /// # Errors
    /// As [`OutputLock::take`].
    pub(super) fn of_existing(dir: &Path, out: &Path) -> Result<Option<Self>> {
        if dir.is_dir() { Self::take(dir, out).map(Some) } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_locked_once_and_free_again() {
        let dir = tempfile::tempdir().unwrap();
        let lock = OutputLock::take(dir.path(), Path::new("out")).unwrap();
        let Err(error) = OutputLock::take(dir.path(), Path::new("out")) else { panic!("taken twice") };
        let process = format!("another process ({})", std::process::id());
        assert!(error.to_string().contains(&process), "{error}");
        drop(lock);
        OutputLock::take(dir.path(), Path::new("out")).unwrap();
        assert!(OutputLock::of_existing(&dir.path().join("absent"), Path::new("out")).unwrap().is_none());
    }
}
