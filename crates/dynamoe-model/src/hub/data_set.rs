//! Files of a data set: `hf://datasets/ORG/NAME[@REVISION][/PATTERN]`.
//!
//! The cache has Hugging Face's layout, `datasets--ORG--NAME/snapshots/COMMIT`. Beside it, `listings/COMMIT` has the names
//! of all files of a commit, one a line. So what is missing of a commit is known without the hub.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::client::{Hub, Kind, Repository, note_revision, noted_revision};
use super::{Settings, is_hub_id, is_plain};
use crate::checkpoint::write_atomic;

/// How addresses of data sets begin.
const SCHEME: &str = "hf://datasets/";

/// Names that an error message lists at most.
const SHOWN: usize = 8;

/// Which files of which data set are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataSet {
    /// `ORG/NAME`
    pub id: String,
    /// A branch, a tag or a commit; `main` unless one is given.
    pub revision: String,
    /// Which of its files, as the address names them; empty for all.
    pub pattern: String,
}

/// Whether a text is meant as an address on the hub.
pub fn is_address(text: &str) -> bool {
    text.starts_with("hf://")
}

impl DataSet {
    /// Parses an address. As in other programs, `@~parquet` stands for the branch `refs/convert/parquet`, and a revision
    /// with slashes may be written as it is or with `%2F`.
    ///
    /// # Errors
    /// Not such an address.
    pub fn parse(address: &str) -> Result<Self> {
        let parse = || {
            let (org, rest) = address.strip_prefix(SCHEME)?.split_once('/')?;
            let (name, rest) = rest.split_at(rest.find(['/', '@']).unwrap_or(rest.len()));
            let (revision, rest) = match rest.strip_prefix('@') {
                Some(rest) => {
                    // references of the hub have two slashes
                    let slashes =
                        if ["refs/convert/", "refs/pr/"].iter().any(|p| rest.starts_with(p)) { 2 } else { 0 };
                    let end = rest.match_indices('/').nth(slashes).map_or(rest.len(), |(at, _)| at);
                    rest.split_at(end)
                }
                None => ("main", rest),
            };
            let revision = match revision {
                "~parquet" => "refs/convert/parquet".to_owned(),
                revision => revision.replace("%2F", "/"),
            };
            let id = format!("{org}/{name}");
            let known = is_hub_id(&id) && revision.split('/').all(is_plain);
            known.then(|| Self { id, revision, pattern: rest.trim_matches('/').to_owned() })
        };
        parse().with_context(|| format!("{address}: expected {SCHEME}ORG/NAME[@REVISION][/PATTERN]"))
    }

    /// Fetches its files that `wanted` accepts by their names into the cache, unless they are there, and returns the commit
    /// that they are of. A commit that was listed before is not asked for again. [`Settings`] lists the environment
    /// variables.
    ///
    /// # Errors
    /// A data set that does not exist or that the token may not read; no file that is wanted; a download that breaks off;
    /// without the network, files that the cache does not hold.
    pub fn fetch(&self, wanted: &dyn Fn(&str) -> bool) -> Result<String> {
        self.fetch_from(&Hub::new(Settings::from_env()?), wanted).with_context(|| self.to_string())
    }

    fn fetch_from(&self, hub: &Hub, wanted: &dyn Fn(&str) -> bool) -> Result<String> {
        let repository = self.repository();
        let folder = hub.folder(repository);
        let commit = self.commit(hub, &folder)?;
        let snapshot = folder.join("snapshots").join(&commit);
        let files = files(&folder, &commit, wanted)?;
        for file in &files {
            if !snapshot.join(file).exists() {
                ensure!(
                    !hub.is_offline(),
                    "HF_HUB_OFFLINE is set, and the cache does not hold {file} of commit {commit}: unset it"
                );
                hub.download(repository, &commit, file, &snapshot)?;
            }
        }
        tracing::info!("{self}: {} files of commit {commit}", files.len());
        Ok(commit)
    }

    /// The paths of the files of a commit that was fetched, in the order of their names.
    ///
    /// # Errors
    /// Files that are not in the cache.
    pub fn fetched(&self, commit: &str, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
        let folder = Hub::new(Settings::from_env()?).folder(self.repository());
        let snapshot = folder.join("snapshots").join(commit);
        let files = files(&folder, commit, wanted).with_context(|| self.to_string())?;
        let path = |file: String| {
            let path = snapshot.join(&file);
            ensure!(path.exists(), "{self}: {} is gone from the cache: start again", path.display());
            Ok(path)
        };
        files.into_iter().map(path).collect()
    }

    fn repository(&self) -> Repository<'_> {
        Repository { kind: Kind::DataSet, id: &self.id }
    }

    /// The commit of the revision; its files are listed in the cache, as far as they are known.
    fn commit(&self, hub: &Hub, folder: &Path) -> Result<String> {
        if is_commit(&self.revision) && listing(folder, &self.revision).exists() {
            return Ok(self.revision.clone());
        }
        let noted = || {
            let commit = match is_commit(&self.revision) {
                true => Some(self.revision.clone()),
                false => noted_revision(folder, &self.revision),
            };
            commit.filter(|commit| {
                listing(folder, commit).exists() || folder.join("snapshots").join(commit).is_dir()
            })
        };
        if hub.is_offline() {
            return noted().with_context(|| {
                format!(
                    "HF_HUB_OFFLINE is set, and the cache does not hold revision {} of the data set: unset it, or fetch \
                     the data set first",
                    self.revision
                )
            });
        }
        match hub.list(self.repository(), &self.revision) {
            Ok(found) => {
                let mut names: Vec<&str> = found.files().filter(|name| is_inside(name)).collect();
                names.sort_unstable();
                let path = listing(folder, &found.sha);
                let parent = path.parent().unwrap_or(folder);
                fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
                write_atomic(&path, names.join("\n").as_bytes())?;
                if !is_commit(&self.revision) {
                    note_revision(folder, &self.revision, &found.sha)?;
                }
                Ok(found.sha)
            }
            // the cache may hold it
            Err(error) => match noted() {
                Some(commit) => {
                    tracing::warn!(
                        "{self}: taken from the cache, because the hub cannot be asked: {error:#}"
                    );
                    Ok(commit)
                }
                None => Err(error),
            },
        }
    }
}

impl fmt::Display for DataSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}@{}", self.id, self.revision)?;
        if self.pattern.is_empty() { Ok(()) } else { write!(f, "/{}", self.pattern) }
    }
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.chars().all(|c| c.is_ascii_hexdigit())
}

/// Whether the name of a file leads to a place below a folder, and to no hidden one.
fn is_inside(name: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', '\0']);
    name.split('/').all(plain) && !name.contains(char::is_control)
}

/// The file with the names of a commit's files.
fn listing(folder: &Path, commit: &str) -> PathBuf {
    folder.join("listings").join(commit)
}

/// The files of a commit that are wanted, in the order of their names. Another program's snapshot has no listing: it is
/// taken to be whole.
fn files(folder: &Path, commit: &str, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<String>> {
    let names: Vec<String> = match fs::read_to_string(listing(folder, commit)) {
        Ok(names) => names.lines().filter(|name| is_inside(name)).map(str::to_owned).collect(),
        Err(_) => {
            let mut names = Vec::new();
            below(&folder.join("snapshots").join(commit), "", &mut names)?;
            names.sort();
            names
        }
    };
    let found: Vec<String> = names.iter().filter(|name| wanted(name)).cloned().collect();
    if found.is_empty() {
        let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = if names.len() > SHOWN { ", …" } else { "" };
        bail!("no file of commit {commit} matches: it holds {shown}{more}");
    }
    Ok(found)
}

/// Adds the names of all files below a folder of a snapshot.
fn below(folder: &Path, prefix: &str, names: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry.with_context(|| folder.display().to_string())?;
        let Some(name) = entry.file_name().to_str().map(|name| format!("{prefix}{name}")) else { continue };
        match entry.path() {
            path if path.is_dir() => below(&path, &format!("{name}/"), names)?,
            _ if is_inside(&name) => names.push(name),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::testing::{SHA, files as all_files, hub, hub_that, listing, settings};

    const OTHER: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn parse(address: &str) -> DataSet {
        DataSet::parse(address).unwrap()
    }

    fn jsonl(name: &str) -> bool {
        name.ends_with(".jsonl")
    }

    /// `main` is one commit and `v1` another one.
    fn good(path: &str) -> Option<(String, String)> {
        let outside = "../../../escaped.jsonl";
        let body = match path {
            "/api/datasets/org/name/revision/main" => {
                listing(SHA, &["README.md", "data/b c.jsonl", "data/a.jsonl", outside, ".hidden.jsonl"])
            }
            "/api/datasets/org/name/revision/v1" => listing(OTHER, &["old.jsonl"]),
            path if path.starts_with("/datasets/org/name/resolve/") => format!("body of {path}"),
            _ => return None,
        };
        Some((body, String::new()))
    }

    fn fetch(address: &str, settings: Settings) -> Result<String> {
        parse(address).fetch_from(&Hub::new(settings), &jsonl)
    }

    fn error(address: &str, settings: Settings) -> String {
        format!("{:#}", fetch(address, settings).unwrap_err())
    }

    #[test]
    fn an_address_names_a_data_set_a_revision_and_a_pattern() {
        for (address, id, revision, pattern) in [
            ("hf://datasets/org/name", "org/name", "main", ""),
            ("hf://datasets/org/name/", "org/name", "main", ""),
            ("hf://datasets/org/name/data/*.jsonl", "org/name", "main", "data/*.jsonl"),
            ("hf://datasets/org/name@v1.0", "org/name", "v1.0", ""),
            ("hf://datasets/org/name@v1/a@b.txt", "org/name", "v1", "a@b.txt"),
            ("hf://datasets/o/n@refs/convert/parquet/x/*", "o/n", "refs/convert/parquet", "x/*"),
            ("hf://datasets/o/n@refs%2Fpr%2F7/x", "o/n", "refs/pr/7", "x"),
            ("hf://datasets/o/n@~parquet/x", "o/n", "refs/convert/parquet", "x"),
        ] {
            let expected = DataSet { id: id.into(), revision: revision.into(), pattern: pattern.into() };
            assert_eq!(parse(address), expected, "{address}");
        }
        assert_eq!(parse("hf://datasets/org/name/a/").to_string(), "hf://datasets/org/name@main/a");
        for address in [
            "hf://org/name",
            "hf://models/org/name",
            "hf://datasets/name",
            "hf://datasets/../name",
            "hf://datasets/org/name@",
            "hf://datasets/org/name@../x",
            "hf://datasets//name",
        ] {
            let error = DataSet::parse(address).unwrap_err().to_string();
            assert!(error.contains("expected hf://datasets/ORG/NAME"), "{error}");
        }
    }

    #[test]
    fn files_that_are_wanted_are_fetched_once() {
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, asked) = hub(good);
        let online = || settings(&endpoint, dir.path());
        assert_eq!(fetch("hf://datasets/org/name", online()).unwrap(), SHA);
        let repository = dir.path().join("datasets--org--name");
        let expected = [
            format!("listings/{SHA}"),
            "refs/main".to_owned(),
            format!("snapshots/{SHA}/data/a.jsonl"),
            format!("snapshots/{SHA}/data/b c.jsonl"),
        ];
        assert_eq!(all_files(dir.path()), expected.map(|file| repository.join(file).display().to_string()));
        let body = fs::read_to_string(repository.join(format!("snapshots/{SHA}/data/b c.jsonl"))).unwrap();
        assert_eq!(body, format!("body of /datasets/org/name/resolve/{SHA}/data/b%20c.jsonl"));
        let questions: Vec<String> = asked.try_iter().collect();
        assert_eq!(questions.len(), 3);
        assert!(questions.iter().all(|question| question.contains("Authorization: Bearer hf_secret")));

        // a branch may have moved on, so it is asked for; a commit has not
        assert_eq!(fetch("hf://datasets/org/name", online()).unwrap(), SHA);
        assert_eq!(asked.try_iter().count(), 1);
        assert_eq!(fetch(&format!("hf://datasets/org/name@{SHA}"), online()).unwrap(), SHA);
        let offline = Settings { offline: true, ..online() };
        assert_eq!(fetch("hf://datasets/org/name", offline).unwrap(), SHA);
        assert_eq!(asked.try_iter().count(), 0);
        // the network may also be gone
        assert_eq!(fetch("hf://datasets/org/name", settings("http://127.0.0.1:9", dir.path())).unwrap(), SHA);
        assert_eq!(fetch("hf://datasets/org/name@v1", online()).unwrap(), OTHER);
    }

    #[test]
    fn what_the_hub_does_not_give_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, _asked) = hub(good);
        let online = || settings(&endpoint, dir.path());
        assert!(error("hf://datasets/org/nothing", online()).contains("404: there is no such data set"));
        assert!(error("hf://datasets/org/name@v9", online()).contains("no such revision"));
        let none = parse("hf://datasets/org/name").fetch_from(&Hub::new(online()), &|_| false);
        let none = format!("{:#}", none.unwrap_err());
        assert!(none.contains("matches: it holds README.md, data/a.jsonl, data/b c.jsonl"), "{none}");
        let (closed, _asked) = hub_that(|_| ("401 Unauthorized", String::new(), String::new()));
        let told = error("hf://datasets/org/closed", settings(&closed, dir.path()));
        assert!(told.contains("private or gated; HF_TOKEN"), "{told}");
        let offline = || Settings { offline: true, ..online() };
        let told = error("hf://datasets/org/other", offline());
        assert!(told.contains("HF_HUB_OFFLINE is set") && told.contains("revision main"), "{told}");
        // listed, but not fetched
        let told = error("hf://datasets/org/name", offline());
        assert!(told.contains("HF_HUB_OFFLINE is set") && told.contains("data/a.jsonl"), "{told}");
        let told = error("hf://datasets/org/far", settings("http://127.0.0.1:9", dir.path()));
        assert!(told.contains("cannot be reached"), "{told}");
    }

    #[test]
    fn a_download_that_is_cut_off_is_told_and_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, _asked) = hub_that(|path| match path.starts_with("/api/") {
            true => ("200 OK", listing(SHA, &["a.jsonl"]), String::new()),
            false => ("200 OK", "begin".to_owned(), "Content-Length: 10\r\n".to_owned()),
        });
        let told = error("hf://datasets/org/name", settings(&endpoint, dir.path()));
        assert!(told.contains("fetching a.jsonl") && told.contains("the download broke off"), "{told}");
        let snapshot = dir.path().join("datasets--org--name/snapshots").join(SHA);
        assert!(!snapshot.join("a.jsonl").exists());
        let (endpoint, asked) = hub_that(|_| ("206 Partial Content", " end".to_owned(), String::new()));
        fetch(&format!("hf://datasets/org/name@{SHA}"), settings(&endpoint, dir.path())).unwrap();
        assert!(asked.try_iter().all(|question| question.contains("Range: bytes=5-")));
        assert_eq!(fs::read_to_string(snapshot.join("a.jsonl")).unwrap(), "begin end");
    }

    #[test]
    fn a_snapshot_of_another_program_is_read_without_the_network() {
        let dir = tempfile::tempdir().unwrap();
        let repository = dir.path().join("datasets--org--name");
        fs::create_dir_all(repository.join("refs")).unwrap();
        fs::write(repository.join("refs/main"), SHA).unwrap();
        let snapshot = repository.join("snapshots").join(SHA);
        fs::create_dir_all(snapshot.join("deep")).unwrap();
        fs::write(snapshot.join("deep/a.jsonl"), "{}").unwrap();
        let offline = Settings { offline: true, ..settings("http://127.0.0.1:9", dir.path()) };
        assert_eq!(fetch("hf://datasets/org/name", offline).unwrap(), SHA);
        assert_eq!(files(&repository, SHA, &jsonl).unwrap(), ["deep/a.jsonl"]);
    }
}
