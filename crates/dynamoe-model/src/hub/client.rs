//! Fetches files of repositories. What the hub answers is trusted with nothing: a name that becomes part of a path leads
//! nowhere else, or it is refused.
//!
//! The cache has Hugging Face's layout: `models--ORG--NAME/refs/main` names a commit, and `snapshots/COMMIT` holds its
//! files. All files of a model come from one commit.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};
use serde::Deserialize;

use super::{Settings, is_plain};

/// Files fetched if the repository has them, besides config.json and the weights.
const OPTIONAL: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "adapter_config.json",
    "LICENSE",
];

/// A client of the hub.
pub struct Hub {
    settings: Settings,
    agent: ureq::Agent,
}

/// What the hub says about a repository at a revision.
#[derive(Deserialize)]
pub(super) struct Listing {
    /// The commit.
    pub(super) sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Listing {
    /// The names of its files.
    pub(super) fn files(&self) -> impl Iterator<Item = &str> {
        self.siblings.iter().map(|file| file.rfilename.as_str())
    }
}

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Model,
    DataSet,
}

/// A repository of the hub.
#[derive(Debug, Clone, Copy)]
pub(super) struct Repository<'a> {
    pub(super) kind: Kind,
    /// `ORG/NAME`
    pub(super) id: &'a str,
}

impl Repository<'_> {
    /// How the hub's programming interface and the cache name its kind.
    fn kinds(self) -> &'static str {
        match self.kind {
            Kind::Model => "models",
            Kind::DataSet => "datasets",
        }
    }

    fn noun(self) -> &'static str {
        match self.kind {
            Kind::Model => "model",
            Kind::DataSet => "data set",
        }
    }

    /// Its path below the hub's address.
    fn path(self) -> String {
        match self.kind {
            Kind::Model => self.id.to_owned(),
            Kind::DataSet => format!("datasets/{}", self.id),
        }
    }
}

impl Hub {
    pub fn new(settings: Settings) -> Self {
        let agent = ureq::builder()
            .try_proxy_from_env(true)
            .redirect_auth_headers(ureq::RedirectAuthHeaders::SameHost)
            .timeout_connect(Duration::from_secs(10))
            .timeout_read(Duration::from_secs(60))
            .user_agent(concat!("dynamoe/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { settings, agent }
    }

    /// The folder of the model `id`, its files fetched unless they are in the cache.
    pub fn fetch(&self, id: &str, weights: Weights<'_>) -> Result<PathBuf> {
        let repository = Repository { kind: Kind::Model, id };
        let folder = self.folder(repository);
        if self.settings.offline {
            return cached(&folder, weights).context(
                "HF_HUB_OFFLINE is set, and the cache does not hold the model: unset it, or fetch the model first",
            );
        }
        let listing = match self.list(repository, "main") {
            Ok(listing) => listing,
            // the cache may hold the model
            Err(error) => match cached(&folder, weights) {
                Some(snapshot) => {
                    tracing::warn!("{id}: taken from the cache, because the hub cannot be asked: {error:#}");
                    return Ok(snapshot);
                }
                None => return Err(error),
            },
        };
        let files = wanted(&listing, weights)?;
        let snapshot = folder.join("snapshots").join(&listing.sha);
        for file in files {
            if !snapshot.join(file).exists() {
                self.download(repository, &listing.sha, file, &snapshot)?;
            }
        }
        note_revision(&folder, "main", &listing.sha)?;
        Ok(snapshot)
    }

    /// The folder of a repository in the cache.
    pub(super) fn folder(&self, repository: Repository<'_>) -> PathBuf {
        self.settings.cache.join(format!("{}--{}", repository.kinds(), repository.id.replace('/', "--")))
    }

    /// Whether the hub must not be asked.
    pub(super) fn is_offline(&self) -> bool {
        self.settings.offline
    }

    /// Asks for the commit of a revision, and for the names of its files.
    pub(super) fn list(&self, repository: Repository<'_>, revision: &str) -> Result<Listing> {
        let (kinds, id) = (repository.kinds(), repository.id);
        let revision = encoded(revision, "");
        let url = format!("{}/api/{kinds}/{id}/revision/{revision}", self.settings.endpoint);
        let text = self.get(repository, &url, 0)?.into_string().with_context(|| format!("{url}: reading"))?;
        let listing: Listing = serde_json::from_str(&text)
            .with_context(|| format!("{url}: expected \"sha\" and \"siblings\" of a repository"))?;
        ensure!(is_plain(&listing.sha), "{url}: expected a commit, found {:?}", listing.sha);
        Ok(listing)
    }

    /// Downloads a file of a commit into its snapshot, going on where an earlier download broke off. `file` is a path that
    /// leads nowhere else.
    pub(super) fn download(
        &self,
        repository: Repository<'_>,
        sha: &str,
        file: &str,
        snapshot: &Path,
    ) -> Result<()> {
        let url =
            format!("{}/{}/resolve/{sha}/{}", self.settings.endpoint, repository.path(), encoded(file, "/"));
        let place = snapshot.join(file);
        let fetch = || -> Result<()> {
            let (folder, name) = (place.parent().unwrap_or(snapshot), place.file_name().unwrap_or_default());
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
            let partial = folder.join(format!(".{}.incomplete", name.display()));
            let cannot = || format!("{}: writing", partial.display());
            let mut out = OpenOptions::new().append(true).create(true).open(&partial).with_context(cannot)?;
            // another process may be fetching it; a file system without locks has none that could
            let _ = flock(&out, FlockOperation::LockExclusive);
            if place.exists() {
                return Ok(());
            }
            let done = out.metadata().with_context(cannot)?.len();
            let answer = self.get(repository, &url, done)?;
            if answer.status() != 206 {
                out.set_len(0).with_context(cannot)?;
            }
            tracing::info!("fetching {file} of {}", repository.id);
            std::io::copy(&mut answer.into_reader(), &mut out).with_context(|| {
                format!("{url}: the download broke off; the same command goes on with it")
            })?;
            out.flush().and_then(|()| out.sync_all()).with_context(cannot)?;
            fs::rename(&partial, &place)
                .with_context(|| format!("{}: moving into place", place.display()))?;
            File::open(folder).and_then(|folder| folder.sync_all()).with_context(cannot)
        };
        fetch().with_context(|| format!("fetching {file}"))
    }

    /// Asks for `url`, from byte `start` on.
    fn get(&self, repository: Repository<'_>, url: &str, start: u64) -> Result<ureq::Response> {
        let noun = repository.noun();
        let mut request = self.agent.get(url);
        if let Some(token) = &self.settings.token {
            request = request.set("Authorization", &format!("Bearer {token}"));
        }
        if start > 0 {
            request = request.set("Range", &format!("bytes={start}-"));
        }
        match request.call() {
            Ok(answer) => Ok(answer),
            // all of the file is there already
            Err(ureq::Error::Status(416, _)) if start > 0 => self.get(repository, url, 0),
            Err(ureq::Error::Status(code @ (401 | 403), _)) => bail!(
                "{url}: the hub answered {code}: there is no such {noun}, or it is private or gated; HF_TOKEN takes a token \
                 that may read it"
            ),
            Err(ureq::Error::Status(404, _)) => {
                bail!("{url}: the hub answered 404: there is no such {noun}, or no such revision of it")
            }
            Err(ureq::Error::Status(code, _)) => bail!("{url}: the hub answered {code}"),
            Err(error) => Err(error).with_context(|| format!("{url}: the hub cannot be reached")),
        }
    }
}

/// Writes down which commit a revision was.
pub(super) fn note_revision(folder: &Path, revision: &str, commit: &str) -> Result<()> {
    let path = folder.join("refs").join(revision);
    let parent = path.parent().unwrap_or(folder);
    fs::create_dir_all(parent)
        .and_then(|()| fs::write(&path, commit))
        .with_context(|| format!("{}: writing", path.display()))
}

/// The commit that a revision was when it was last fetched.
pub(super) fn noted_revision(folder: &Path, revision: &str) -> Option<String> {
    let commit = fs::read_to_string(folder.join("refs").join(revision)).ok()?;
    Some(commit.trim().to_owned()).filter(|commit| is_plain(commit))
}

/// A text as a part of an address: letters, digits, `-`, `_`, `.`, `~` and the characters of `kept` stand for themselves.
fn encoded(text: &str, kept: &str) -> String {
    let known = |c: char| c.is_ascii_alphanumeric() || "-_.~".contains(c) || kept.contains(c);
    let mut buffer = [0; 4];
    let mut all = String::with_capacity(text.len());
    for c in text.chars() {
        if known(c) {
            all.push(c);
        } else {
            all.extend(c.encode_utf8(&mut buffer).bytes().map(|byte| format!("%{byte:02X}")));
        }
    }
    all
}

/// Which weights of a model are fetched.
#[derive(Debug, Clone, Copy)]
pub(super) enum Weights<'a> {
    /// `model*.safetensors`
    Safetensors,
    /// These files of quantized weights, separated by `;`, and what belongs to them.
    Uqff(&'a str),
}

impl Weights<'_> {
    /// The files that were asked for by name.
    fn named(&self) -> impl Iterator<Item = &str> {
        let names = match self {
            Self::Safetensors => "",
            Self::Uqff(names) => names,
        };
        names.split(';').map(str::trim).filter(|name| !name.is_empty())
    }

    fn include(&self, file: &str) -> bool {
        match self {
            Self::Safetensors => {
                let kind = file.ends_with(".safetensors") || file.ends_with(".safetensors.index.json");
                kind && file.starts_with("model")
            }
            Self::Uqff(_) => file == "residual.safetensors" || self.named().any(|name| is_shard(file, name)),
        }
    }
}

/// Whether `file` is the `.uqff` file `name` or another shard of it: they are numbered, as `q4k-0.uqff`.
fn is_shard(file: &str, name: &str) -> bool {
    let stem = |file: &str| {
        let (stem, number) = file.strip_suffix(".uqff")?.rsplit_once('-')?;
        number.parse::<u32>().is_ok().then(|| stem.to_owned())
    };
    file == name || (stem(file).is_some() && stem(file) == stem(name))
}

/// The files of a repository that a model needs.
fn wanted<'a>(listing: &'a Listing, weights: Weights<'_>) -> Result<Vec<&'a str>> {
    let files: Vec<&str> = listing.files().collect();
    let of_weights = |file: &str| is_plain(file) && weights.include(file);
    let adapter = files.contains(&"adapter_config.json");
    ensure!(files.contains(&"config.json") || adapter, "the repository holds no config.json");
    for name in weights.named() {
        let known: Vec<&str> = files.iter().copied().filter(|file| file.ends_with(".uqff")).collect();
        ensure!(
            files.contains(&name) && is_plain(name),
            "the repository holds no file {name}; its files of quantized weights are: {}",
            known.join(", ")
        );
    }
    ensure!(
        files.iter().any(|file| of_weights(file)) || adapter,
        "the repository holds no model*.safetensors"
    );
    let small = |file: &str| file == "config.json" || OPTIONAL.contains(&file);
    Ok(files.into_iter().filter(|file| small(file) || of_weights(file)).collect())
}

/// The snapshot in the cache that `refs/main` names, if it holds a config.json and the files that were named.
fn cached(folder: &Path, weights: Weights<'_>) -> Option<PathBuf> {
    let snapshot = folder.join("snapshots").join(noted_revision(folder, "main")?);
    let mut files = weights.named().chain(["config.json"]);
    files.all(|file| snapshot.join(file).exists()).then_some(snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::testing::{SHA, files, hub, listing, settings};

    fn good(path: &str) -> Option<(String, String)> {
        // headers that hf-hub's client would make paths of
        let hostile = "x-repo-commit: ../../../escaped\r\netag: \"../../../escaped\"\r\n";
        let body = match path {
            "/api/models/org/name/revision/main" => {
                let outside = "../../../model-escaped.safetensors";
                listing(
                    SHA,
                    &["config.json", "model.safetensors", outside, "model/../../x.safetensors", "notes.md"],
                )
            }
            _ => format!("body of {}", path.rsplit_once('/')?.1),
        };
        Some((body, hostile.to_owned()))
    }

    #[test]
    fn named_files_of_quantized_weights_come_with_their_shards() {
        let answer = |path: &str| {
            let files = [
                "config.json",
                "tokenizer.json",
                "q4k-0.uqff",
                "q4k-1.uqff",
                "q8_0-0.uqff",
                "residual.safetensors",
                "model.safetensors",
            ];
            let is_listing = path == "/api/models/org/name/revision/main";
            Some((if is_listing { listing(SHA, &files) } else { "weights".into() }, String::new()))
        };
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, _asked) = hub(answer);
        let online = Hub::new(settings(&endpoint, dir.path()));
        let folder = online.fetch("org/name", Weights::Uqff("q4k-0.uqff")).unwrap();
        let names: Vec<String> =
            files(&folder).iter().map(|file| file.rsplit('/').next().unwrap().into()).collect();
        assert_eq!(
            names,
            ["config.json", "q4k-0.uqff", "q4k-1.uqff", "residual.safetensors", "tokenizer.json"]
        );
        let error = format!("{:#}", online.fetch("org/name", Weights::Uqff("q6k-0.uqff")).unwrap_err());
        assert!(error.contains("no file q6k-0.uqff") && error.contains("q8_0-0.uqff"), "{error}");
        let offline = Hub::new(Settings { offline: true, ..settings(&endpoint, dir.path()) });
        assert_eq!(offline.fetch("org/name", Weights::Uqff("q4k-0.uqff; q4k-1.uqff")).unwrap(), folder);
        assert!(offline.fetch("org/name", Weights::Uqff("q8_0-0.uqff")).is_err());
    }

    #[test]
    fn files_come_from_one_commit_with_the_token_and_stay_in_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("deep/in/cache");
        let (endpoint, asked) = hub(good);
        let folder = Hub::new(settings(&endpoint, &cache)).fetch("org/name", Weights::Safetensors).unwrap();
        assert_eq!(folder, cache.join("models--org--name/snapshots").join(SHA));
        assert_eq!(fs::read_to_string(folder.join("config.json")).unwrap(), "body of config.json");
        let repository = cache.join("models--org--name");
        let expected = [
            "refs/main".to_owned(),
            format!("snapshots/{SHA}/config.json"),
            format!("snapshots/{SHA}/model.safetensors"),
        ];
        assert_eq!(files(dir.path()), expected.map(|file| repository.join(file).display().to_string()));
        let questions: Vec<String> = asked.try_iter().collect();
        assert_eq!(questions.len(), 3);
        for question in &questions {
            assert!(question.contains("Authorization: Bearer hf_secret"), "{question}");
        }
        assert!(
            questions[1].starts_with(&format!("GET /org/name/resolve/{SHA}/config.json ")),
            "{}",
            questions[1]
        );

        // a second time only the listing is asked for
        assert_eq!(
            Hub::new(settings(&endpoint, &cache)).fetch("org/name", Weights::Safetensors).unwrap(),
            folder
        );
        assert_eq!(asked.try_iter().count(), 1);
        let offline = Settings { offline: true, ..settings(&endpoint, &cache) };
        assert_eq!(Hub::new(offline).fetch("org/name", Weights::Safetensors).unwrap(), folder);
        assert_eq!(asked.try_iter().count(), 0);
        // nor is the network needed
        assert_eq!(
            Hub::new(settings("http://127.0.0.1:9", &cache)).fetch("org/name", Weights::Safetensors).unwrap(),
            folder
        );
    }

    #[test]
    fn a_download_that_broke_off_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let snapshot = dir.path().join("models--org--name/snapshots").join(SHA);
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(snapshot.join(".model.safetensors.incomplete"), "begin").unwrap();
        let (endpoint, asked) = hub(good);
        Hub::new(settings(&endpoint, dir.path())).fetch("org/name", Weights::Safetensors).unwrap();
        assert!(asked.try_iter().any(|question| question.contains("Range: bytes=5-")));
        // this hub knows no ranges, so the file is fetched anew
        assert_eq!(
            fs::read_to_string(snapshot.join("model.safetensors")).unwrap(),
            "body of model.safetensors"
        );
    }

    #[test]
    fn a_commit_that_leads_elsewhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, _asked) =
            hub(|_| Some((listing("../../../escaped", &["config.json"]), String::new())));
        let error = Hub::new(settings(&endpoint, &dir.path().join("a/b")))
            .fetch("org/name", Weights::Safetensors)
            .unwrap_err();
        assert!(error.to_string().contains("expected a commit, found \"../../../escaped\""), "{error:#}");
        assert_eq!(files(dir.path()), [""; 0]);
    }

    #[test]
    fn what_the_hub_does_not_have_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = |settings: Settings| {
            format!("{:#}", Hub::new(settings).fetch("org/name", Weights::Safetensors).unwrap_err())
        };
        let (endpoint, _asked) = hub(|_| None);
        assert!(error(settings(&endpoint, dir.path())).contains("the hub answered 404"));
        let (endpoint, _asked) =
            hub(|_| Some((listing(SHA, &["config.json", "pytorch_model.bin"]), String::new())));
        assert!(error(settings(&endpoint, dir.path())).contains("no model*.safetensors"));
        // the discard port: refused at once
        assert!(error(settings("http://127.0.0.1:9", dir.path())).contains("cannot be reached"));
        let offline = Settings { offline: true, ..settings(&endpoint, dir.path()) };
        assert!(error(offline).contains("HF_HUB_OFFLINE"));
    }
}
