//! Fetches a model's files. What the hub answers is trusted with nothing: a name that becomes part of a path is a plain
//! name, or it is refused.
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

/// What the hub says about a repository.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
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
    pub fn fetch(&self, id: &str) -> Result<PathBuf> {
        let folder = self.settings.cache.join(format!("models--{}", id.replace('/', "--")));
        if self.settings.offline {
            return cached(&folder).context(
                "HF_HUB_OFFLINE is set, and the cache does not hold the model: unset it, or fetch the model first",
            );
        }
        let listing = match self.list(id) {
            Ok(listing) => listing,
            // the cache may hold the model
            Err(error) => match cached(&folder) {
                Some(snapshot) => {
                    tracing::warn!("{id}: taken from the cache, because the hub cannot be asked: {error:#}");
                    return Ok(snapshot);
                }
                None => return Err(error),
            },
        };
        let files = wanted(&listing)?;
        let snapshot = folder.join("snapshots").join(&listing.sha);
        for file in files {
            if !snapshot.join(file).exists() {
                self.download(id, &listing.sha, file, &snapshot)
                    .with_context(|| format!("fetching {file}"))?;
            }
        }
        let refs = folder.join("refs");
        fs::create_dir_all(&refs)
            .and_then(|()| fs::write(refs.join("main"), &listing.sha))
            .with_context(|| format!("{}: writing", refs.display()))?;
        Ok(snapshot)
    }

    fn list(&self, id: &str) -> Result<Listing> {
        let url = format!("{}/api/models/{id}/revision/main", self.settings.endpoint);
        let text = self.get(&url, 0)?.into_string().with_context(|| format!("{url}: reading"))?;
        let listing: Listing = serde_json::from_str(&text)
            .with_context(|| format!("{url}: expected \"sha\" and \"siblings\" of a repository"))?;
        ensure!(is_plain(&listing.sha), "{url}: expected a commit, found {:?}", listing.sha);
        Ok(listing)
    }

    /// Downloads a file of a commit into its snapshot, going on where an earlier download broke off.
    fn download(&self, id: &str, sha: &str, file: &str, snapshot: &Path) -> Result<()> {
        fs::create_dir_all(snapshot).with_context(|| snapshot.display().to_string())?;
        let partial = snapshot.join(format!(".{file}.incomplete"));
        let cannot = || format!("{}: writing", partial.display());
        let mut out = OpenOptions::new().append(true).create(true).open(&partial).with_context(cannot)?;
        // another process may be fetching it; a file system without locks has none that could
        let _ = flock(&out, FlockOperation::LockExclusive);
        let place = snapshot.join(file);
        if place.exists() {
            return Ok(());
        }
        let url = format!("{}/{id}/resolve/{sha}/{file}", self.settings.endpoint);
        let done = out.metadata().with_context(cannot)?.len();
        let answer = self.get(&url, done)?;
        if answer.status() != 206 {
            out.set_len(0).with_context(cannot)?;
        }
        tracing::info!("fetching {file} of {id}");
        std::io::copy(&mut answer.into_reader(), &mut out).with_context(|| format!("{url}: reading"))?;
        out.flush().and_then(|()| out.sync_all()).with_context(cannot)?;
        fs::rename(&partial, &place).with_context(|| format!("{}: moving into place", place.display()))?;
        File::open(snapshot).and_then(|folder| folder.sync_all()).with_context(cannot)
    }

    /// Asks for `url`, from byte `start` on.
    fn get(&self, url: &str, start: u64) -> Result<ureq::Response> {
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
            Err(ureq::Error::Status(416, _)) if start > 0 => self.get(url, 0),
            Err(ureq::Error::Status(code @ (401 | 403), _)) => bail!(
                "{url}: the hub answered {code}: there is no such model, or it is private or gated; HF_TOKEN takes a token \
                 that may read it"
            ),
            Err(ureq::Error::Status(code, _)) => bail!("{url}: the hub answered {code}"),
            Err(error) => Err(error).with_context(|| format!("{url}: the hub cannot be reached")),
        }
    }
}

/// The files of a repository that a model needs.
fn wanted(listing: &Listing) -> Result<Vec<&str>> {
    let files: Vec<&str> = listing.siblings.iter().map(|file| file.rfilename.as_str()).collect();
    let weights = |file: &str| {
        let kind = file.ends_with(".safetensors") || file.ends_with(".safetensors.index.json");
        kind && file.starts_with("model") && is_plain(file)
    };
    let adapter = files.contains(&"adapter_config.json");
    ensure!(files.contains(&"config.json") || adapter, "the repository holds no config.json");
    ensure!(files.iter().any(|file| weights(file)) || adapter, "the repository holds no model*.safetensors");
    let small = |file: &str| file == "config.json" || OPTIONAL.contains(&file);
    Ok(files.into_iter().filter(|file| small(file) || weights(file)).collect())
}

/// The snapshot in the cache that `refs/main` names, if it holds a config.json.
fn cached(folder: &Path) -> Option<PathBuf> {
    let commit = fs::read_to_string(folder.join("refs/main")).ok()?;
    let commit = Some(commit.trim()).filter(|commit| is_plain(commit))?;
    let snapshot = folder.join("snapshots").join(commit);
    snapshot.join("config.json").exists().then_some(snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::sync::mpsc::{Receiver, channel};

    const SHA: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    /// A hub on this machine: `answer` makes body and further headers of a path. What it is asked comes through the
    /// receiver, request line and headers.
    fn hub(answer: fn(&str) -> Option<(String, String)>) -> (String, Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (asked, questions) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
                let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                let path = head[0].split(' ').nth(1).unwrap().to_owned();
                let (code, (body, headers)) = match answer(&path) {
                    Some(answer) => ("200 OK", answer),
                    None => ("404 Not Found", Default::default()),
                };
                let _ = asked.send(head.join("\n"));
                let length = body.len();
                write!(
                    stream,
                    "HTTP/1.1 {code}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n{body}"
                )
                .unwrap();
            }
        });
        (address, questions)
    }

    fn settings(endpoint: &str, cache: &Path) -> Settings {
        Settings {
            endpoint: endpoint.to_owned(),
            token: Some("hf_secret".to_owned()),
            cache: cache.to_owned(),
            offline: false,
        }
    }

    fn listing(sha: &str, files: &[&str]) -> String {
        let siblings: Vec<_> = files.iter().map(|file| serde_json::json!({"rfilename": file})).collect();
        serde_json::json!({"sha": sha, "siblings": siblings}).to_string()
    }

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

    /// All files below a folder.
    fn files(folder: &Path) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            match entry.path() {
                path if path.is_dir() => found.extend(files(&path)),
                path => found.push(path.display().to_string()),
            }
        }
        found.sort();
        found
    }

    #[test]
    fn files_come_from_one_commit_with_the_token_and_stay_in_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("deep/in/cache");
        let (endpoint, asked) = hub(good);
        let folder = Hub::new(settings(&endpoint, &cache)).fetch("org/name").unwrap();
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
        assert_eq!(Hub::new(settings(&endpoint, &cache)).fetch("org/name").unwrap(), folder);
        assert_eq!(asked.try_iter().count(), 1);
        let offline = Settings { offline: true, ..settings(&endpoint, &cache) };
        assert_eq!(Hub::new(offline).fetch("org/name").unwrap(), folder);
        assert_eq!(asked.try_iter().count(), 0);
        // nor is the network needed
        assert_eq!(Hub::new(settings("http://127.0.0.1:9", &cache)).fetch("org/name").unwrap(), folder);
    }

    #[test]
    fn a_download_that_broke_off_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let snapshot = dir.path().join("models--org--name/snapshots").join(SHA);
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(snapshot.join(".model.safetensors.incomplete"), "begin").unwrap();
        let (endpoint, asked) = hub(good);
        Hub::new(settings(&endpoint, dir.path())).fetch("org/name").unwrap();
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
        let error = Hub::new(settings(&endpoint, &dir.path().join("a/b"))).fetch("org/name").unwrap_err();
        assert!(error.to_string().contains("expected a commit, found \"../../../escaped\""), "{error:#}");
        assert_eq!(files(dir.path()), [""; 0]);
    }

    #[test]
    fn what_the_hub_does_not_have_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = |settings: Settings| format!("{:#}", Hub::new(settings).fetch("org/name").unwrap_err());
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
