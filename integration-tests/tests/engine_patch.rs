//! The build script of patches/mistralrs-core: where it takes upstream's source from, what it says when it cannot,
//! and that the patches fit the crate they are for.

#[path = "../../patches/mistralrs-core/build/crate_file.rs"]
mod crate_file;
#[path = "../../patches/mistralrs-core/build/source.rs"]
mod source;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use crate_file::{NAME, OVERRIDE, SHA256, VERSION};
use tempfile::TempDir;

fn package() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../patches/mistralrs-core")
}

/// The crate as the build script finds it.
static PRISTINE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let scratch = TempDir::new().unwrap();
    let given = std::env::var_os(OVERRIDE).map(PathBuf::from);
    let cargo = std::env::var_os("CARGO").unwrap();
    let download = || crate_file::download(Path::new(&cargo), scratch.path());
    crate_file::load(given.as_deref(), &crate_file::cargo_home().unwrap(), download).unwrap()
});

/// A download that the test must not need.
fn no_download() -> crate_file::Result<()> {
    Err("the network is down".into())
}

/// A cargo home whose cache holds `bytes` as the crate's file.
fn cargo_home_with(bytes: &[u8]) -> TempDir {
    let home = TempDir::new().unwrap();
    put_in_cache(home.path(), bytes);
    home
}

fn put_in_cache(home: &Path, bytes: &[u8]) {
    let registry = home.join("registry/cache/some-registry");
    fs::create_dir_all(&registry).unwrap();
    fs::write(registry.join(format!("{NAME}-{VERSION}.crate")), bytes).unwrap();
}

#[test]
fn the_package_stands_in_for_the_version_it_patches() {
    let manifest = fs::read_to_string(package().join("Cargo.toml")).unwrap();
    assert!(manifest.contains(&format!("name = \"{NAME}\"\nversion = \"{VERSION}\"\n")));
}

/// Dependencies and features must equal upstream's, or the package would not be a drop-in.
#[test]
fn the_manifest_is_upstreams_and_then_ours() {
    let out = TempDir::new().unwrap();
    let root = source::unpack(&PRISTINE, out.path()).unwrap();
    let without_header = |path: PathBuf| {
        let text = fs::read_to_string(path).unwrap();
        let from = text.find("[package]").unwrap();
        text[from..].replace("readme = \"README.md\"\n", "")
    };
    let (theirs, ours) =
        (without_header(root.join("Cargo.toml")), without_header(package().join("Cargo.toml")));
    assert_eq!(ours.split("\n# Ours\n").next().unwrap(), theirs);
}

#[test]
fn the_crate_comes_from_cargos_cache_without_a_download() {
    let home = cargo_home_with(&PRISTINE);
    assert_eq!(crate_file::load(None, home.path(), || panic!("no download is needed")).unwrap(), *PRISTINE);
}

#[test]
fn what_a_download_leaves_in_the_cache_is_used() {
    let home = cargo_home_with(b"half a file");
    let download = || {
        put_in_cache(home.path(), &PRISTINE);
        Ok(())
    };
    assert_eq!(crate_file::load(None, home.path(), download).unwrap(), *PRISTINE);
}

#[test]
fn the_override_goes_first() {
    let home = TempDir::new().unwrap();
    let file = home.path().join("copied.crate");
    fs::write(&file, &*PRISTINE).unwrap();
    assert_eq!(crate_file::load(Some(&file), home.path(), no_download).unwrap(), *PRISTINE);
}

#[test]
fn an_override_with_another_digest_is_refused() {
    let home = cargo_home_with(&PRISTINE);
    let file = home.path().join("tampered.crate");
    fs::write(&file, b"tampered").unwrap();
    let error = crate_file::load(Some(&file), home.path(), no_download).unwrap_err();
    for part in [OVERRIDE, "tampered.crate", "is not mistralrs-core 0.8.1", SHA256] {
        assert!(error.contains(part), "{part:?} is missing in {error:?}");
    }
}

#[test]
fn an_override_that_is_missing_is_named() {
    let home = cargo_home_with(&PRISTINE);
    let error = crate_file::load(Some(Path::new("nowhere.crate")), home.path(), no_download).unwrap_err();
    assert!(error.contains(OVERRIDE) && error.contains("nowhere.crate"), "{error}");
}

#[test]
fn without_a_crate_the_error_says_what_was_tried_and_what_to_do() {
    let home = TempDir::new().unwrap();
    let error = crate_file::load(None, home.path(), no_download).unwrap_err();
    for part in
        [OVERRIDE, "no such file", "cargo info mistralrs-core@0.8.1", "the network is down", "With a network"]
    {
        assert!(error.contains(part), "{part:?} is missing in {error}");
    }
}

#[test]
fn a_cached_file_with_another_digest_is_not_used_and_is_named() {
    let home = cargo_home_with(b"damaged");
    let error = crate_file::load(None, home.path(), no_download).unwrap_err();
    assert!(
        error.contains("some-registry") && error.contains("is not mistralrs-core 0.8.1 as published"),
        "{error}"
    );
}

#[test]
fn cargos_words_are_passed_on_when_it_cannot_download() {
    let scratch = TempDir::new().unwrap();
    let error = crate_file::download(Path::new("no-such-cargo"), scratch.path()).unwrap_err();
    assert!(error.contains("no-such-cargo"), "{error}");
}

#[test]
fn every_patch_applies_to_the_pristine_crate() {
    let out = TempDir::new().unwrap();
    let root = source::unpack(&PRISTINE, out.path()).unwrap();
    let patches = source::patches(&package().join("patches")).unwrap();
    assert!(!patches.is_empty());
    for patch in patches {
        let text = fs::read_to_string(&patch).unwrap();
        let header = text.split("\ndiff --git ").next().unwrap();
        assert!(header.lines().count() > 3, "{} needs a header that says what and why", patch.display());
        source::apply(&root, &patch).unwrap();
    }
    source::make_includable(&root).unwrap();
    let crate_root = fs::read_to_string(root.join("src/lib.rs")).unwrap();
    assert!(crate_root.starts_with("#[doc(hidden)]\nmacro_rules! "), "{}", &crate_root[..80]);
    assert!(!crate_root.contains("#![") && crate_root.contains("pub mod plugin;"));
}

/// The cache file and the patches are only read; everything that is written lies in the output folder.
#[test]
fn a_second_build_starts_from_the_pristine_source() {
    let out = TempDir::new().unwrap();
    let root = source::unpack(&PRISTINE, out.path()).unwrap();
    let pristine = fs::read(root.join("src/lib.rs")).unwrap();
    fs::write(root.join("src/lib.rs"), "changed").unwrap();
    fs::write(root.join("src/left_over.rs"), "").unwrap();
    assert_eq!(source::unpack(&PRISTINE, out.path()).unwrap(), root);
    assert_eq!(fs::read(root.join("src/lib.rs")).unwrap(), pristine);
    assert!(!root.join("src/left_over.rs").exists());
}

/// A tree of one file, and a patch file with the diff given.
fn tree_and_patch(diff: &str) -> (TempDir, PathBuf) {
    let tree = TempDir::new().unwrap();
    fs::write(tree.path().join("poem.txt"), "roses\nviolets\nsugar\n").unwrap();
    let patch = tree.path().join("0001-poem.patch");
    fs::write(&patch, format!("Change the poem\n\nIt was too sweet.\n\n{diff}")).unwrap();
    (tree, patch)
}

#[test]
fn a_patch_changes_and_adds_files() {
    let (tree, patch) = tree_and_patch(
        "diff --git a/poem.txt b/poem.txt\n--- a/poem.txt\n+++ b/poem.txt\n@@ -1,3 +1,3 @@\n roses\n violets\n-sugar\n+salt\n\
         diff --git a/new.txt b/new.txt\nnew file mode 100644\n--- /dev/null\n+++ b/new.txt\n@@ -0,0 +1 @@\n+new\n",
    );
    source::apply(tree.path(), &patch).unwrap();
    assert_eq!(fs::read_to_string(tree.path().join("poem.txt")).unwrap(), "roses\nviolets\nsalt\n");
    assert_eq!(fs::read_to_string(tree.path().join("new.txt")).unwrap(), "new\n");
}

#[test]
fn a_patch_that_does_not_apply_is_named_with_its_file() {
    let (tree, patch) = tree_and_patch(
        "diff --git a/poem.txt b/poem.txt\n--- a/poem.txt\n+++ b/poem.txt\n@@ -1,3 +1,3 @@\n roses\n tulips\n-sugar\n+salt\n",
    );
    let error = source::apply(tree.path(), &patch).unwrap_err();
    assert!(error.contains("0001-poem.patch does not apply to poem.txt of mistralrs-core 0.8.1"), "{error}");
    assert_eq!(fs::read_to_string(tree.path().join("poem.txt")).unwrap(), "roses\nviolets\nsugar\n");
}

#[test]
fn a_patch_of_a_missing_file_is_named_with_its_file() {
    let (tree, patch) = tree_and_patch(
        "diff --git a/ode.txt b/ode.txt\n--- a/ode.txt\n+++ b/ode.txt\n@@ -1 +1 @@\n-sugar\n+salt\n",
    );
    let error = source::apply(tree.path(), &patch).unwrap_err();
    assert!(error.contains("0001-poem.patch does not apply to ode.txt"), "{error}");
}

#[test]
fn a_patch_of_a_file_elsewhere_is_refused() {
    let outside = TempDir::new().unwrap();
    let place = outside.path().join("new.txt");
    let absolute = place.display().to_string();
    for target in ["../new.txt", "a/../../new.txt", &absolute] {
        let diff = format!(
            "diff --git a/{target} b/{target}\nnew file mode 100644\n--- /dev/null\n+++ b/{target}\n@@ -0,0 +1 @@\n+new\n"
        );
        let (tree, patch) = tree_and_patch(&diff);
        let error = source::apply(tree.path(), &patch).unwrap_err();
        assert!(error.contains("0001-poem.patch") && error.contains("leads out"), "{error}");
        assert!(!place.exists() && !tree.path().parent().unwrap().join("new.txt").exists());
    }
}

#[test]
fn a_patch_without_a_diff_is_refused() {
    let (tree, patch) = tree_and_patch("");
    let error = source::apply(tree.path(), &patch).unwrap_err();
    assert!(error.contains("0001-poem.patch is not a patch"), "{error}");
}

#[test]
fn exported_macros_move_with_their_attributes_and_get_a_path() {
    let text = "use a::b;\n\n#[doc(hidden)]\n#[macro_export]\nmacro_rules! twice {\n    ($x:expr) => {\n        $x * 2\n    };\n}\n\n\
                #[derive(Debug)]\nstruct Kept;\n";
    let (kept, moved) = source::take_exported_macros(text).unwrap();
    assert_eq!(kept, "use a::b;\n\n\n#[derive(Debug)]\nstruct Kept;\n");
    assert_eq!(
        moved,
        "#[doc(hidden)]\nmacro_rules! twice {\n    ($x:expr) => {\n        $x * 2\n    };\n}\npub(crate) use twice;\n\n"
    );
}

#[test]
fn a_macro_that_is_not_laid_out_as_expected_is_named() {
    let error = source::take_exported_macros("#[macro_export]\npub fn f() {}\n").unwrap_err();
    assert!(error.contains("pub fn f()"), "{error}");
    let error = source::take_exported_macros("#[macro_export]\nmacro_rules! open {\n").unwrap_err();
    assert!(error.contains("macro open"), "{error}");
}
