//! Reading files that strangers made, and where to keep what was made of them.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Largest file that is read whole: a tokenizer's, at most.
pub const LARGEST: u64 = 512 << 20;

/// Reads a whole file. A pipe, a device or a folder is refused, since reading it may never end.
///
/// # Errors
/// A file that is missing, not a regular one, or larger than [`LARGEST`].
pub fn read_file(path: &Path) -> Result<Vec<u8>> {
    // looked at before it is opened: opening a pipe waits for a writer
    let meta = std::fs::metadata(path)?;
    ensure!(meta.is_file(), "expected a regular file");
    ensure!(meta.len() <= LARGEST, "expected at most {LARGEST} bytes, found {}", meta.len());
    let mut bytes = Vec::new();
    File::open(path)?.take(LARGEST + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= LARGEST, "expected at most {LARGEST} bytes, found more");
    Ok(bytes)
}

/// Reads a whole text file.
///
/// # Errors
/// As [`read_file`]; a byte that is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read_file(path)?).context("not UTF-8")
}

/// The folder of caches: `$XDG_CACHE_HOME/dynamoe`, else `~/.cache/dynamoe`.
///
/// # Errors
/// Neither `XDG_CACHE_HOME` nor `HOME` is set to an absolute path.
pub fn cache_dir() -> Result<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    Ok(base.context("no folder for caches: set XDG_CACHE_HOME or HOME")?.join("dynamoe"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(unix)]
    fn files_that_never_end_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        let zero = dir.path().join("zero");
        std::os::unix::fs::symlink("/dev/zero", &zero).unwrap();
        for path in [pipe.as_path(), &zero, dir.path()] {
            assert!(read_file(path).unwrap_err().to_string().contains("regular file"), "{}", path.display());
        }
        let sparse = dir.path().join("sparse");
        File::create(&sparse).unwrap().set_len(1 << 40).unwrap();
        assert!(read_file(&sparse).unwrap_err().to_string().contains("at most"));
        std::fs::write(dir.path().join("text"), "a\u{e9}").unwrap();
        assert_eq!(read_text(&dir.path().join("text")).unwrap(), "a\u{e9}");
    }
}
