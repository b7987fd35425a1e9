//! Turns the `.crate` file into patched source that `include!` accepts.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use diffy::patch_set::{FileOperation, ParseOptions, PatchSet};
use flate2::read::GzDecoder;

use crate::crate_file::{NAME, Result, VERSION};

/// Unpacks the crate below `out` and returns the folder, which is new: what an earlier build left is removed.
/// Files keep the archive's modification times, so that an unchanged file looks unchanged to whoever compares them.
///
/// # Errors
/// The file system's, or an archive that holds anything but the crate's folder.
pub fn unpack(crate_file: &[u8], out: &Path) -> Result<PathBuf> {
    let root = out.join(format!("{NAME}-{VERSION}"));
    if root.exists() {
        fs::remove_dir_all(&root).map_err(|e| format!("cannot remove {}: {e}", root.display()))?;
    }
    tar::Archive::new(GzDecoder::new(crate_file))
        .unpack(out)
        .map_err(|e| format!("cannot unpack {NAME} {VERSION} into {}: {e}", out.display()))?;
    if root.join("src/lib.rs").is_file() {
        Ok(root)
    } else {
        Err(format!("{NAME} {VERSION} has no src/lib.rs"))
    }
}

/// The `.patch` files of a folder, in the order of their names.
///
/// # Errors
/// A folder that cannot be read.
pub fn patches(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|e| format!("cannot read {}: {e}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "patch"));
    files.sort();
    Ok(files)
}

/// Applies one patch file (a header, then diffs as `git diff` writes them) to the source in `root`.
///
/// # Errors
/// Says which patch does not apply to which file, and where; a file that is not in `root`.
pub fn apply(root: &Path, patch_file: &Path) -> Result<()> {
    let name = patch_file.file_name().unwrap_or_default().to_string_lossy();
    let text =
        fs::read_to_string(patch_file).map_err(|e| format!("cannot read {}: {e}", patch_file.display()))?;
    for file_patch in PatchSet::parse(&text, ParseOptions::gitdiff()) {
        let file_patch = file_patch.map_err(|e| format!("{name} is not a patch: {e}"))?;
        let (target, is_new) = match file_patch.operation().strip_prefix(1) {
            FileOperation::Create(path) => (path.into_owned(), true),
            FileOperation::Modify { original, modified } if original == modified => {
                (modified.into_owned(), false)
            }
            other => {
                return Err(format!(
                    "{name}: only files that are changed or new are supported, found {other:?}"
                ));
            }
        };
        let diff =
            file_patch.patch().as_text().ok_or_else(|| format!("{name}: {target} has no text diff"))?;
        if !Path::new(&target).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(format!("{name}: {target} leads out of the source of {NAME}"));
        }
        let path = root.join(&target);
        let fails = |why: String| {
            format!(
                "{name} does not apply to {target} of {NAME} {VERSION}: {why}. Was it made for another version?"
            )
        };
        let before = match fs::read_to_string(&path) {
            Ok(_) if is_new => return Err(fails("the file is there already".into())),
            Ok(text) => text,
            Err(_) if is_new => String::new(),
            Err(e) => return Err(fails(e.to_string())),
        };
        let after = diffy::apply(&before, diff).map_err(|e| fails(e.to_string()))?;
        write(&path, &after)?;
    }
    Ok(())
}

/// Makes src/lib.rs fit for `include!`, which refuses two things that a crate root may have:
///
/// - inner attributes: they are removed (upstream's only choose lints);
/// - `#[macro_export]` macros that are named by path (rust-lang/rust#52234): each moves to the top of the crate
///   root and is named by a `use` there. Thereby they are no longer exported; upstream hides them from its docs.
///
/// # Errors
/// The file system's, or source that is not laid out as expected.
pub fn make_includable(root: &Path) -> Result<()> {
    let mut macros = String::new();
    for file in rust_files(&root.join("src"))? {
        let text = read(&file)?;
        if !text.contains(MACRO_EXPORT) {
            continue;
        }
        let (kept, moved) = take_exported_macros(&text).map_err(|e| format!("{}: {e}", file.display()))?;
        macros.push_str(&moved);
        write(&file, &kept)?;
    }
    let crate_root = root.join("src/lib.rs");
    let text = read(&crate_root)?;
    write(&crate_root, &(macros + without_inner_attributes(&text)))
}

const MACRO_EXPORT: &str = "#[macro_export]";

/// Splits source into what stays and its exported macros, each followed by a `use` that gives it a path.
///
/// Relies on rustfmt's layout: attributes on lines of their own, a macro ends with a `}` at the line's start.
///
/// # Errors
/// A `#[macro_export]` that no macro in that layout follows.
pub fn take_exported_macros(text: &str) -> Result<(String, String)> {
    let (mut kept, mut moved) = (String::new(), String::new());
    let mut lines = text.split_inclusive('\n');
    let mut attributes = String::new();
    while let Some(line) = lines.next() {
        if line.starts_with("#[") || line.starts_with("///") {
            attributes.push_str(line);
            continue;
        }
        if !attributes.contains(MACRO_EXPORT) {
            kept.push_str(&attributes);
            attributes.clear();
            kept.push_str(line);
            continue;
        }
        let name = line.strip_prefix("macro_rules! ").and_then(|rest| rest.split([' ', '{']).next());
        let name =
            name.ok_or_else(|| format!("expected a macro after {MACRO_EXPORT}, found `{}`", line.trim()))?;
        moved.push_str(&attributes.replace(&format!("{MACRO_EXPORT}\n"), ""));
        attributes.clear();
        moved.push_str(line);
        loop {
            let line = lines.next().ok_or_else(|| format!("macro {name} does not end with a line `}}`"))?;
            moved.push_str(line);
            if line.trim_end() == "}" {
                break;
            }
        }
        moved.push_str(&format!("pub(crate) use {name};\n\n"));
    }
    kept.push_str(&attributes);
    Ok((kept, moved))
}

/// The text after the `#![…]` lines that open it.
fn without_inner_attributes(mut text: &str) -> &str {
    while text.starts_with("#![") {
        text = text.split_once('\n').map_or("", |(_, rest)| rest);
    }
    text
}

/// All `.rs` files below a folder, sorted.
fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).map_err(|e| format!("cannot read {}: {e}", folder.display()))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    // a new file may be the first of its folder
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    made.and_then(|()| fs::write(path, text)).map_err(|e| format!("cannot write {}: {e}", path.display()))
}
