//! Output that appears whole or not at all: written beside its place under a temporary name, synced to disk,
//! then renamed.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

use super::layout::ADD_ON_CONFIG;

/// A folder under construction. [`StagedFolder::commit`] puts it in place; dropped before, it is removed.
/// One left behind by a killed process is a hidden sibling named `.<name>.partial-<pid>…`; the next output of that
/// name removes it.
#[derive(Debug)]
pub struct StagedFolder {
    staged: PathBuf,
    out: PathBuf,
    /// Locked while the folder is in the making, so that no other process takes it for a leftover.
    _lock: File,
}

impl StagedFolder {
    /// Starts a folder that will be `out`. Its parent is created if need be.
    ///
    /// # Errors
    /// `out` is a file, or a folder with something in it and `force` is not given; with `force`, a folder
    /// without config.json, which no output of this program is; or the place cannot be written.
    pub fn create(out: &Path, force: bool) -> Result<Self> {
        // a link to a folder stays, its target is replaced
        let out = fs::canonicalize(out).or_else(|_| std::path::absolute(out)).context("output folder")?;
        check_free(&out, force)?;
        let (parent, name) = split(&out)?;
        let cannot = || format!("{}: the output folder cannot be created there", out.display());
        fs::create_dir_all(parent).with_context(cannot)?;
        let staged = parent.join(temporary_name(&name));
        if staged.exists() {
            fs::remove_dir_all(&staged).with_context(cannot)?;
        }
        fs::create_dir(&staged).with_context(cannot)?;
        let lock = File::open(&staged).with_context(cannot)?;
        let _ = lock_now(&lock); // a file system without locks only keeps leftovers longer
        remove_leftovers(parent, &name);
        Ok(Self { staged, out, _lock: lock })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.staged
    }

    /// Syncs everything to disk and puts the folder in place. What was there before is replaced in one step
    /// where the filesystem can swap two names, then removed.
    ///
    /// # Errors
    /// A failed sync or rename; the old folder is then as it was.
    pub fn commit(self) -> Result<()> {
        let out = self.out.display();
        sync_tree(&self.staged).with_context(|| format!("{out}: writing to disk"))?;
        let occupied = fs::read_dir(&self.out).is_ok_and(|mut entries| entries.next().is_some());
        if occupied { swap(&self.staged, &self.out) } else { fs::rename(&self.staged, &self.out) }
            .with_context(|| format!("{out}: moving the finished folder into place"))?;
        let (parent, _) = split(&self.out)?;
        File::open(parent).and_then(|dir| dir.sync_all()).with_context(|| format!("{out}: syncing"))
    }
}

impl Drop for StagedFolder {
    fn drop(&mut self) {
        // after a swap this is the old folder, after a plain rename it is gone
        let _ = fs::remove_dir_all(&self.staged);
    }
}

/// Refuses an output that is its own source, lies in it or contains it.
///
/// # Errors
/// If they overlap.
pub fn refuse_overlap(source: &Path, out: &Path) -> Result<()> {
    let (Ok(source), Ok(out)) = (fs::canonicalize(source), fs::canonicalize(out)) else {
        return Ok(()); // an output that does not exist holds no source
    };
    ensure!(
        !source.starts_with(&out) && !out.starts_with(&source),
        "the output folder {} overlaps the source {}: choose another",
        out.display(),
        source.display()
    );
    Ok(())
}

/// Writes a file so that at any moment either its old or its new content is there.
///
/// # Errors
/// The file cannot be written; what was there before is as it was.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let path = std::path::absolute(path).context("output file")?;
    let (parent, name) = split(&path)?;
    let temporary = parent.join(temporary_name(&name));
    remove_leftovers(parent, &name);
    let write = || {
        // new: in a shared folder somebody may have put a link at this name
        let mut file = File::create_new(&temporary)?;
        let _ = lock_now(&file);
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        File::open(parent)?.sync_all()
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        anyhow::Error::new(error).context(format!("{}: cannot be written", path.display()))
    })
}

fn check_free(out: &Path, force: bool) -> Result<()> {
    let Ok(meta) = fs::metadata(out) else { return Ok(()) };
    ensure!(meta.is_dir(), "{}: a file is in the way of the output folder", out.display());
    let mut entries = fs::read_dir(out).with_context(|| out.display().to_string())?;
    if entries.next().is_none() {
        return Ok(());
    }
    if !force {
        bail!("{}: the output folder exists; give --force to replace it, or another --out", out.display());
    }
    ensure!(
        ["config.json", ADD_ON_CONFIG].iter().any(|name| out.join(name).is_file()),
        "{}: --force replaces only model folders, this one has no config.json; choose another --out",
        out.display()
    );
    Ok(())
}

/// Parent and last name of an absolute path.
fn split(path: &Path) -> Result<(&Path, OsString)> {
    let parts = path.parent().zip(path.file_name());
    let (parent, name) = parts.with_context(|| format!("{}: not a name for output", path.display()))?;
    Ok((parent, name.to_owned()))
}

/// A hidden name that no other output in the making uses.
fn temporary_name(name: &OsStr) -> OsString {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let mut temporary = prefix(name);
    temporary.push(format!("{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    temporary
}

/// What the temporary names of an output begin with, before the process and a counter.
fn prefix(name: &OsStr) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".partial-");
    prefix
}

/// Locks a file or folder for as long as it is open, unless another process holds the lock.
fn lock_now(file: &File) -> rustix::io::Result<()> {
    flock(file, FlockOperation::NonBlockingLockExclusive)
}

/// Removes what killed processes left of an output `name`: their process is gone and nobody holds the lock.
/// What cannot be removed stays.
fn remove_leftovers(parent: &Path, name: &OsStr) {
    let prefix = prefix(name);
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let process = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes());
        let process = process.and_then(|rest| str::from_utf8(rest).ok()?.split('-').next()?.parse().ok());
        let Some(process) = process.and_then(Pid::from_raw) else { continue };
        let gone = test_kill_process(process) == Err(Errno::SRCH);
        let free = || File::open(&path).is_ok_and(|file| lock_now(&file).is_ok());
        if gone && free() {
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}

/// Exchanges two folders: at once where the filesystem can, else by way of a third name.
fn swap(new: &Path, old: &Path) -> std::io::Result<()> {
    if renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE).is_ok() {
        return Ok(());
    }
    let mut aside = new.as_os_str().to_owned();
    aside.push("-old");
    fs::rename(old, &aside)?;
    if let Err(error) = fs::rename(new, old) {
        fs::rename(&aside, old)?;
        return Err(error);
    }
    fs::rename(&aside, new)
}

fn sync_tree(dir: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(dir)?.sync_all()
}
