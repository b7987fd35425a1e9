//! From text files to batches: what is right, and what must be refused.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moefy_train::data::source::Documents;
use moefy_train::data::{
    Batches, BatchesConfig, DataSource, DocumentBatches, DocumentLimits, Framing, Origin, OwnText, Pairs,
    Split, TextFormat, TokenCache, WeightedCache, load_tokenizer,
};
use proptest::prelude::*;
use tempfile::TempDir;
use tokenizers::Tokenizer;

/// One token per word of `w0 … w299`; BOS is 300.
fn word_tokenizer() -> Tokenizer {
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0..300).map(|id| (format!("w{id}"), id.into())).chain([("<s>".to_owned(), 300.into())]).collect();
    let json = serde_json::json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    });
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    load_tokenizer(dir.path(), 301).unwrap()
}

/// BOS between documents.
const FRAMING: Framing = Framing { opening: 300, closing: 300 };
/// BOS before a document and `w299` after it.
const TWO: Framing = Framing { opening: 300, closing: 299 };

struct Fixture {
    dir: TempDir,
    tokenizer: Tokenizer,
}

impl Fixture {
    fn new() -> Self {
        Self { dir: TempDir::new().unwrap(), tokenizer: word_tokenizer() }
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// A file whose documents have the given numbers of words; word `i` of the file is `w(i % 300)`.
    fn text(&self, name: &str, lengths: &[usize]) -> PathBuf {
        let mut next = 0..;
        let documents: Vec<String> = lengths
            .iter()
            .map(|&length| {
                let words: Vec<String> =
                    next.by_ref().take(length).map(|i| format!("w{}", i % 300)).collect();
                words.join(" ")
            })
            .collect();
        self.file(name, documents.join("\n<|endoftext|>\n"))
    }

    fn cache_dir(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    /// The cache, and whether the text had to be tokenized.
    fn open(&self, path: &Path) -> anyhow::Result<(TokenCache, bool)> {
        self.framed(path, FRAMING)
    }

    fn framed(&self, path: &Path, framing: Framing) -> anyhow::Result<(TokenCache, bool)> {
        let source = DataSource::local(path);
        let built = Cell::new(false);
        let progress = |done: u64, all: u64| {
            assert!(done <= all);
            built.set(true);
        };
        let format = TextFormat::default();
        let cache = TokenCache::open_or_build(
            &source,
            &format,
            &self.tokenizer,
            framing,
            &self.cache_dir(),
            &progress,
        )?;
        Ok((cache, built.get()))
    }

    fn cache(&self, name: &str, lengths: &[usize]) -> Arc<TokenCache> {
        Arc::new(self.open(&self.text(name, lengths)).unwrap().0)
    }

    fn cache_file(&self) -> PathBuf {
        let files: Vec<PathBuf> =
            std::fs::read_dir(self.cache_dir()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }
}

fn message<T>(result: anyhow::Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(error) => format!("{error:#}"),
    }
}

fn read(path: &Path, format: &TextFormat) -> anyhow::Result<Vec<String>> {
    Documents::open(path, format)?.map(|document| Ok(document?.text)).collect()
}

#[test]
fn one_text_may_be_written_by_the_model() {
    let sources =
        |all: &[&str]| all.iter().map(|source| source.parse().unwrap()).collect::<Vec<DataSource>>();
    let own = |all: &[&str]| DataSource::own_among(&sources(all));
    assert_eq!(own(&["a.txt", "./self"]).unwrap(), None);
    assert_eq!(own(&["a.txt", "self:7"]).unwrap(), Some(OwnText { tokens: Some(7) }));
    assert!(message(own(&["self", "self:7"])).contains("twice"));
    assert!(message(DataSource::of_files("self:7")).contains("./self:7"));
    assert_eq!(DataSource::of_files("a.txt:2").unwrap().weight, 2.0);
}

#[test]
fn an_argument_is_a_path_with_or_without_a_weight() {
    let fixture = Fixture::new();
    let colon = fixture.file("a:2", "text");
    let parse = |argument: &str| argument.parse::<DataSource>();
    let source = |path: &str, weight| DataSource { weight, ..DataSource::local(path) };
    assert_eq!(parse("a.txt").unwrap(), source("a.txt", 1.0));
    assert_eq!(parse("a.txt:0.5").unwrap(), source("a.txt", 0.5));
    assert_eq!(parse("x:y.txt:3").unwrap(), source("x:y.txt", 3.0));
    let colon = colon.to_str().unwrap();
    assert_eq!(parse(colon).unwrap(), source(colon, 1.0));
    assert_eq!(parse(&format!("{colon}:2")).unwrap(), source(colon, 2.0));
    for bad in ["", "a.txt:0", "a.txt:-1", "a.txt:nan", "a.txt:inf", ":2", "a.txt:"] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
    assert!(message(parse("a.txt:two")).contains("\"two\" is not a number"));
}

#[test]
fn documents_are_split_on_the_marker_and_trimmed() {
    let fixture = Fixture::new();
    let path = fixture.file("a.txt", " one<|end \n<|endoftext|><|endoftext|>\ntwo\nthree\n<|endoftext|>\n\n");
    assert_eq!(read(&path, &TextFormat::default()).unwrap(), ["one<|end", "two\nthree"]);
    let format = TextFormat { marker: "aab".into(), ..TextFormat::default() };
    let path = fixture.file("b.txt", "xaaaabyaab");
    assert_eq!(read(&path, &format).unwrap(), ["xaa", "y"]);
    let path = fixture.file("c.jsonl", "{\"text\": \" a\\nb \"}\r\n\n{\"n\": 1, \"text\": \"ü\"}");
    assert_eq!(read(&path, &TextFormat::default()).unwrap(), ["a\nb", "ü"]);
}

#[test]
fn what_editors_on_windows_add_is_no_text() {
    let fixture = Fixture::new();
    let documents = |name: &str, content: &[u8]| read(&fixture.file(name, content), &TextFormat::default());
    let read = |name: &str, content: &str| documents(name, content.as_bytes()).unwrap();
    let plain = read("plain.txt", "one\ntwo\n<|endoftext|>\nthree\n");
    assert_eq!(plain, ["one\ntwo", "three"]);
    assert_eq!(read("mark.txt", "\u{feff}one\ntwo\n<|endoftext|>\nthree\n"), plain);
    assert_eq!(read("lines.txt", "one\r\ntwo\r\n<|endoftext|>\r\nthree\r\n"), plain);
    assert_eq!(read("mark.jsonl", "\u{feff}{\"text\": \"a\\r\\nb\"}\r\n"), ["a\r\nb"]);
    // a mark elsewhere is a character of the text
    assert_eq!(read("inside.txt", "a\u{feff}b"), ["a\u{feff}b"]);
    assert!(message(documents("x.txt", b"\xef\xbb\xbf\xff")).contains("at byte 3"));
}

#[test]
fn bad_text_is_refused_with_its_place() {
    let fixture = Fixture::new();
    let format = TextFormat::default();
    let refuse = |name: &str, content: &[u8]| message(read(&fixture.file(name, content), &format));
    let long = [vec![b'x'; 3_000_000], b"<|endoftext|>ab\xff".to_vec()].concat();
    assert!(refuse("a.txt", &long).contains("a.txt: invalid UTF-8 at byte 3000015"));
    assert!(refuse("a.txt", b"\xc3").contains("invalid UTF-8 at byte 0"));
    assert!(
        refuse("a.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}").contains("invalid UTF-8 at byte 24")
    );
    assert!(refuse("a.txt", b"").contains("the file is empty"));
    assert!(refuse("a.jsonl", b"{\"text\": \"a\"}\n\n{oops").contains("line 3 is not JSON"));
    assert!(
        refuse("a.jsonl", b"{\"text\": \"a\"}\n{\"txt\": \"a\"}").contains("line 2: expected a JSON object")
    );
    assert!(refuse("a.jsonl", b"[1]").contains("line 1: expected a JSON object with the field \"text\""));
    assert!(refuse("a.jsonl", b"{\"text\": 1}").contains("not a string"));
    assert!(refuse("a.parquet", b"x").contains("truncated, damaged or no Parquet file"));
    assert!(
        message(read(&fixture.dir.path().join("none.txt"), &format)).contains("none.txt: cannot be opened")
    );
    std::fs::create_dir(fixture.dir.path().join("dir.txt")).unwrap();
    assert!(message(read(&fixture.dir.path().join("dir.txt"), &format)).contains("expected a file"));
    let empty_marker = TextFormat { marker: String::new(), ..format.clone() };
    assert!(message(read(&fixture.file("b.txt", "x"), &empty_marker)).contains("must not be empty"));
    let white = fixture.file("c.txt", " \n<|endoftext|>\n");
    assert!(message(fixture.open(&white)).contains("c.txt: no documents"));
    assert_eq!(std::fs::read_dir(fixture.cache_dir()).unwrap().count(), 0, "nothing half-written");
}

#[test]
fn a_tokenizer_must_fit_the_embedding() {
    let dir = TempDir::new().unwrap();
    assert!(message(load_tokenizer(dir.path(), 10)).contains("tokenizer.json: cannot be read"));
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, "{}").unwrap();
    assert!(message(load_tokenizer(dir.path(), 10)).contains("not a tokenizer"));
    word_tokenizer().save(&path, false).unwrap();
    assert!(load_tokenizer(dir.path(), 301).is_ok());
    let error = message(load_tokenizer(dir.path(), 300));
    assert!(
        error.contains("does not fit the embedding: its largest token id is 300, vocab_size is 300"),
        "{error}"
    );
}

#[test]
fn bos_opens_a_document_and_eos_closes_it() {
    let framing = |bos, eos: &[u32]| Framing::new(bos, eos, 10).map(|found| (found.opening, found.closing));
    assert_eq!(framing(Some(1), &[2, 3]).unwrap(), (1, 2));
    assert_eq!(framing(Some(1), &[]).unwrap(), (1, 1));
    assert_eq!(framing(None, &[5, 2]).unwrap(), (5, 5));
    assert!(message(framing(None, &[])).contains("neither bos_token_id nor eos_token_id"));
    assert!(message(framing(Some(10), &[])).contains("in front of documents does not fit the embedding"));
    assert!(message(framing(Some(1), &[10])).contains("after documents does not fit the embedding"));
}

#[test]
fn a_cache_holds_framed_documents_and_is_used_again() {
    let fixture = Fixture::new();
    let path = fixture.text("a.txt", &[3, 5, 1]);
    let (cache, built) = fixture.open(&path).unwrap();
    assert!(built);
    assert_eq!((cache.len(), cache.documents()), (13, 3));
    assert_eq!(cache.framed(0), [300, 0, 1, 2, 300]);
    assert_eq!(cache.framed(1), [300, 3, 4, 5, 6, 7, 300]);
    assert_eq!(cache.framed(2), [300, 8, 300]);
    assert_eq!(cache.slice(2, 4), [1, 2, 300, 3]);
    assert_eq!(cache.document_range(1), 4..10);
    assert!((1..13).all(|place| cache.counts(place)));
    assert!(!fixture.open(&path).unwrap().1);
}

#[test]
fn an_opening_token_of_its_own_is_never_asked_for() {
    let fixture = Fixture::new();
    let (cache, _) = fixture.framed(&fixture.text("a.txt", &[3, 1]), TWO).unwrap();
    assert_eq!(cache.slice(0, cache.len()), [300, 0, 1, 2, 299, 300, 3, 299]);
    assert_eq!((cache.framed(0), cache.framed(1)), (vec![300, 0, 1, 2, 299], vec![300, 3, 299]));
    let counts: Vec<bool> = (0..cache.len()).map(|place| cache.counts(place)).collect();
    assert_eq!(counts, [false, true, true, true, true, false, true, true]);
    let cache = Arc::new(cache);
    let batches = Batches::new(vec![weighted(&cache, 1.0)], config(7, 1, Split::All)).unwrap();
    assert_eq!(batches.batch(0).weights, [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]);
    assert_eq!(batches.batch(0).counted(), 6);
    let limits = DocumentLimits { max_tokens: 9, positions: 9, batch_tokens: 99 };
    let batch = DocumentBatches::new(&cache, 0..2, limits).next().unwrap();
    assert_eq!(batch.targets, [0, 1, 2, 299, 3, 299, 0, 0]);
    assert_eq!(batch.weights, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
}

#[test]
fn a_closing_token_that_the_text_writes_out_is_not_written_twice() {
    let fixture = Fixture::new();
    let path = fixture.file("a.txt", "w1 w299<|endoftext|>w299 w2<|endoftext|>w299");
    let (cache, _) = fixture.framed(&path, TWO).unwrap();
    assert_eq!(cache.slice(0, cache.len()), [300, 1, 299, 300, 299, 2, 299, 300, 299]);
    let path = fixture.file("b.txt", "w1 <s><|endoftext|>w2");
    let (cache, _) = fixture.open(&path).unwrap();
    assert_eq!(cache.slice(0, cache.len()), [300, 1, 300, 2, 300]);
}

#[test]
fn a_cache_is_another_for_another_text_tokenizer_format_or_framing() {
    let mut fixture = Fixture::new();
    let path = fixture.text("a.txt", &[3]);
    assert!(fixture.open(&path).unwrap().1);
    fixture.file("a.txt", "w1 w2 w4");
    let (cache, built) = fixture.open(&path).unwrap();
    assert!(built);
    assert_eq!(cache.framed(0), [300, 1, 2, 4, 300]);
    fixture.tokenizer.add_tokens(&[tokenizers::AddedToken::from("w1 w2", false)]);
    let (cache, built) = fixture.open(&path).unwrap();
    assert!(built);
    assert_eq!(cache.framed(0), [300, 301, 4, 300]);
    let source = DataSource::local(path);
    let open = |format: &TextFormat, framing| {
        let built = Cell::new(false);
        let progress = |_, _| built.set(true);
        let cache = TokenCache::open_or_build(
            &source,
            format,
            &fixture.tokenizer,
            framing,
            &fixture.cache_dir(),
            &progress,
        );
        assert!(built.get());
        cache.unwrap()
    };
    let sevens = Framing { opening: 7, closing: 7 };
    assert_eq!(open(&TextFormat::default(), sevens).framed(0), [7, 301, 4, 7]);
    let closed = Framing { opening: 7, closing: 8 };
    assert_eq!(open(&TextFormat::default(), closed).framed(0), [7, 301, 4, 8]);
    let format = TextFormat { marker: " ".into(), ..TextFormat::default() };
    assert_eq!(open(&format, FRAMING).documents(), 3);
}

#[test]
fn large_ids_take_four_bytes() {
    let fixture = Fixture::new();
    let source = DataSource::local(fixture.text("a.txt", &[3]));
    let (format, framing) = (TextFormat::default(), Framing { opening: 1, closing: 70_000 });
    let cache = TokenCache::open_or_build(
        &source,
        &format,
        &fixture.tokenizer,
        framing,
        &fixture.cache_dir(),
        &|_, _| {},
    );
    assert_eq!(cache.unwrap().framed(0), [1, 0, 1, 2, 70_000]);
}

#[test]
fn a_damaged_cache_is_made_again() {
    let fixture = Fixture::new();
    let path = fixture.text("a.txt", &[3, 5, 1]);
    let expected = fixture.framed(&path, TWO).unwrap().0.slice(0, 12);
    let file = fixture.cache_file();
    let sound = std::fs::read(&file).unwrap();
    let mut damaged: Vec<Vec<u8>> = (0..sound.len())
        .map(|at| {
            let mut bytes = sound.clone();
            bytes[at] ^= 1 << (at % 8);
            bytes
        })
        .collect();
    damaged.extend([0, 1, 64, 103, 104, sound.len() - 1].map(|length| sound[..length].to_vec()));
    damaged.push([sound.clone(), vec![0]].concat());
    let mut huge = sound.clone();
    huge[16..40].fill(0xff);
    damaged.push(huge);
    for bytes in damaged {
        std::fs::write(&file, &bytes).unwrap();
        let (cache, built) = fixture.framed(&path, TWO).unwrap();
        assert!(built, "a damaged cache was trusted");
        assert_eq!(cache.slice(0, 12), expected);
        assert_eq!(std::fs::read(&file).unwrap(), sound);
    }
}

#[test]
fn a_cache_folder_that_cannot_be_written_is_named() {
    let fixture = Fixture::new();
    let path = fixture.text("a.txt", &[3]);
    std::fs::write(fixture.cache_dir(), "a file stands here").unwrap();
    assert!(message(fixture.open(&path)).contains("cache: the token cache cannot be written"));
}

fn config(sequence_length: usize, batch_size: usize, split: Split) -> BatchesConfig {
    BatchesConfig { sequence_length, batch_size, seed: 3, split }
}

fn weighted(cache: &Arc<TokenCache>, weight: f64) -> WeightedCache {
    WeightedCache { cache: cache.clone(), weight }
}

#[test]
fn chunks_follow_the_stream() {
    let fixture = Fixture::new();
    let cache = fixture.cache("a.txt", &[6, 6]);
    let batches = Batches::new(vec![weighted(&cache, 1.0)], config(4, 2, Split::All)).unwrap();
    let all: Vec<_> = batches.in_order().collect();
    assert_eq!(all.len(), 2);
    assert_eq!(all[0].weights, [1.0; 8]);
    assert_eq!(all[0].tokens, [300, 0, 1, 2, 3, 3, 4, 5, 300, 6]);
    assert_eq!((all[1].batch_size, &all[1].tokens[..]), (1, &[6, 7, 8, 9, 10][..]));
    let (inputs, targets, _) = all[0].tensors(&candle_core::Device::Cpu).unwrap();
    assert_eq!(inputs.to_vec2::<u32>().unwrap(), [[300, 0, 1, 2], [3, 4, 5, 300]]);
    assert_eq!(targets.to_vec2::<u32>().unwrap(), [[0, 1, 2, 3], [4, 5, 300, 6]]);
    assert!(batches.describe(all[0].origins[1]).ends_with("a.txt, tokens 4 to 8"));
}

#[test]
fn too_little_text_says_how_much_is_needed() {
    let fixture = Fixture::new();
    let cache = fixture.cache("a.txt", &[5]);
    let make = |length, split| {
        message(Batches::new(vec![weighted(&cache, 1.0)], config(length, 1, split)).map(|_| ()))
    };
    assert!(
        make(7, Split::All).contains("a.txt: 7 tokens, but one sequence needs 8"),
        "{}",
        make(7, Split::All)
    );
    assert!(
        make(5, Split::Train).contains("left for training after the held-out part, but one sequence needs 6")
    );
    assert!(make(0, Split::All).contains("at least 1"));
    assert!(
        message(Batches::new(vec![], config(1, 1, Split::All)).map(|_| ()))
            .contains("at least one data source")
    );
    for weight in [0.0, -1.0, f64::NAN] {
        assert!(Batches::new(vec![weighted(&cache, weight)], config(1, 1, Split::All)).is_err());
    }
}

#[test]
fn a_long_document_is_cut_for_the_held_out_part() {
    let fixture = Fixture::new();
    let cache = fixture.cache("a.txt", &[9998]);
    assert_eq!(Split::Train.range(&cache, 10), 0..9900);
    assert_eq!(Split::HeldOut.range(&cache, 10), 9900..10_000);
    assert_eq!(Split::HeldOut.range(&cache, 499), 9500..10_000);
}

#[test]
fn weights_count_chunks_per_epoch() {
    let fixture = Fixture::new();
    let (a, b) = (fixture.cache("a.txt", &[39]), fixture.cache("b.txt", &[23, 15]));
    let sources = vec![weighted(&a, 2.0), weighted(&b, 0.5)];
    let batches = Batches::new(sources, config(3, 1, Split::All)).unwrap();
    // 13 chunks each: 26 and round(6.5) = 7 draws.
    assert_eq!((batches.chunks(), batches.epoch_length()), (26, 33));
    let origins = |steps: std::ops::Range<u64>| -> BTreeMap<Origin, usize> {
        let mut counts = BTreeMap::new();
        for step in steps {
            *counts.entry(batches.batch(step).origins[0]).or_default() += 1;
        }
        counts
    };
    let first = origins(0..33);
    assert_eq!(first.iter().filter(|(origin, count)| origin.source == 0 && **count == 2).count(), 13);
    assert_eq!(first.keys().filter(|origin| origin.source == 1).count(), 7);
    // 13 epochs draw 7 · 13 chunks of the second source: each of its 13 chunks 7 times.
    let many = origins(0..33 * 13);
    assert!(many.iter().filter(|(origin, _)| origin.source == 1).all(|(_, count)| *count == 7));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn an_epoch_holds_each_chunk_once_and_batches_are_pure(
        lengths in prop::collection::vec(1usize..40, 1..12),
        more in prop::collection::vec(1usize..40, 1..12),
        length in 1usize..9,
        batch_size in 1usize..6,
        seed: u64,
        start in 0u64..1 << 40,
    ) {
        let fixture = Fixture::new();
        let caches = [fixture.cache("a.txt", &lengths), fixture.cache("b.txt", &more)];
        prop_assume!(caches.iter().all(|cache| cache.len() > length));
        let config = BatchesConfig { sequence_length: length, batch_size, seed, split: Split::All };
        let make = || Batches::new(caches.iter().map(|cache| weighted(cache, 1.0)).collect(), config).unwrap();
        let batches = make();
        let epoch = batches.epoch_length();
        // Two whole epochs in batches that may lie across their border.
        let mut seen = Vec::new();
        for step in 0..(2 * epoch).div_ceil(batch_size as u64) {
            let batch = batches.batch(step);
            prop_assert_eq!(batch.tokens.len(), batch_size * (length + 1));
            for (row, origin) in batch.origins.iter().enumerate() {
                let expected = caches[origin.source].slice(origin.chunk * length, length + 1);
                prop_assert_eq!(&batch.tokens[row * (length + 1)..][..length + 1], expected);
            }
            seen.extend(batch.origins);
        }
        let chunks = |cache: &Arc<TokenCache>| (cache.len() - 1) / length;
        let all: BTreeSet<Origin> = caches
            .iter()
            .enumerate()
            .flat_map(|(source, cache)| (0..chunks(cache)).map(move |chunk| Origin { source, chunk }))
            .collect();
        prop_assert_eq!(epoch as usize, all.len());
        for order in seen.chunks_exact(epoch as usize) {
            prop_assert_eq!(&order.iter().copied().collect::<BTreeSet<_>>(), &all);
        }
        // The same batch whatever was asked for before.
        let later = batches.batch(start);
        batches.batch(start / 2);
        prop_assert_eq!(&batches.batch(start), &later);
        prop_assert_eq!(&make().batch(start), &later);
    }

    #[test]
    fn no_token_is_both_trained_on_and_held_out(
        lengths in prop::collection::vec(1usize..200, 1..60),
        length in 1usize..30,
    ) {
        let fixture = Fixture::new();
        let cache = fixture.cache("a.txt", &lengths);
        let train = Split::Train.range(&cache, length);
        let held_out = Split::HeldOut.range(&cache, length);
        prop_assert_eq!(train.start, 0);
        prop_assert_eq!(train.end, held_out.start);
        prop_assert_eq!(held_out.end, cache.len());
        if cache.len() > length {
            prop_assert!(held_out.len() > length && held_out.len() * 100 >= cache.len());
        }
        let Ok(batches) = Batches::new(vec![weighted(&cache, 1.0)], config(length, 2, Split::Train)) else {
            return Ok(());
        };
        let last = batches.in_order().last().unwrap().origins.last().copied().unwrap();
        prop_assert!(last.chunk * length + length < held_out.start);
    }

    #[test]
    fn padded_documents_hold_every_token_once(
        lengths in prop::collection::vec(1usize..40, 1..30),
        max_tokens in 1usize..50,
        positions in 1usize..50,
        batch_tokens in 1usize..200,
    ) {
        let fixture = Fixture::new();
        let cache = fixture.cache("a.txt", &lengths);
        let limits = DocumentLimits { max_tokens, positions, batch_tokens };
        let mut seen = BTreeSet::new();
        for batch in DocumentBatches::new(&cache, 0..cache.documents(), limits) {
            prop_assert!(batch.length <= max_tokens.min(positions));
            prop_assert!(batch.batch_size == 1 || batch.batch_size * batch.length <= batch_tokens);
            for (row, &document) in batch.items.iter().enumerate() {
                prop_assert!(seen.insert(document));
                let framed = cache.framed(document);
                let used = (framed.len() - 1).min(max_tokens).min(positions);
                let at = row * batch.length..(row + 1) * batch.length;
                prop_assert_eq!(&batch.tokens[at.clone()][..used], &framed[..used]);
                prop_assert_eq!(&batch.targets[at.clone()][..used], &framed[1..=used]);
                let weights: Vec<f32> = (0..batch.length).map(|i| if i < used { 1.0 } else { 0.0 }).collect();
                prop_assert_eq!(&batch.weights[at], weights);
            }
        }
        prop_assert_eq!(seen.len(), lengths.len());
    }
}

#[test]
fn pairs_are_padded_and_compared() {
    let fixture = Fixture::new();
    let path = fixture.file(
        "pairs.jsonl",
        "{\"good\": \"w1 w2\", \"bad\": \"w2 w1 w3\", \"field\": \"x\"}\n{\"good\": \"w5\", \"bad\": \"w6\"}\n",
    );
    let pairs = Pairs::read(&path, &fixture.tokenizer, FRAMING, 3).unwrap();
    assert_eq!(pairs.len(), 2);
    let batches: Vec<_> = pairs.batches(6).collect();
    assert_eq!(batches[0].items, [1, 0]);
    assert_eq!(batches[0].tokens, [300, 2, 1, 300, 1, 0]);
    assert_eq!(batches[0].targets, [2, 1, 3, 1, 2, 0]);
    assert_eq!(batches[0].weights, [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]);
    assert_eq!(batches[1].items, [2, 3]);
    let scores = pairs.score(&[-1.0, -2.0, -3.0, -3.0]).unwrap();
    assert_eq!((scores.pairs, scores.accuracy), (2, 0.5));
    assert_eq!(scores.by_field, [("x".to_owned(), 1.0)]);
    assert!(message(pairs.score(&[0.0])).contains("expected 4 log-likelihoods"));
    let refuse = |content: &str, positions| {
        message(Pairs::read(&fixture.file("bad.jsonl", content), &fixture.tokenizer, FRAMING, positions))
    };
    assert!(
        refuse("{\"good\": \"w1\"}", 3).contains("line 1: expected a JSON object with the field \"bad\"")
    );
    assert!(
        refuse("{\"good\": \"w1\", \"bad\": \" \"}", 3).contains("line 1: the bad sentence has no tokens")
    );
    assert!(refuse("{\"good\": \"w1 w2\", \"bad\": \"w2\"}", 1).contains("good sentence has 2 tokens"));
    assert!(refuse("\n", 3).contains("no pairs"));
    assert!(refuse("", 3).contains("the file is empty"));
}
