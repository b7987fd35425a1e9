//! Text in the files that people have: compressed, Parquet, folders and patterns, records by their keys.

use std::cell::Cell;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use dynamoe_model::chat::ChatTemplate;
use flate2::Compression;
use flate2::write::GzEncoder;
use moefy_train::data::source::Documents;
use moefy_train::data::{DataSource, Framing, TextFormat, TokenCache, load_tokenizer};
use parquet::basic::Compression as Codec;
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use serde_json::json;
use tempfile::TempDir;

fn folder() -> TempDir {
    TempDir::new().unwrap()
}

fn file(dir: &TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    path
}

fn read_as(path: &Path, format: &TextFormat) -> Result<Vec<String>> {
    Documents::open(path, format)?.map(|document| Ok(document?.text)).collect()
}

fn read(path: &Path) -> Result<Vec<String>> {
    read_as(path, &TextFormat::default())
}

fn refused(path: &Path) -> String {
    format!("{:#}", read(path).expect_err("an error"))
}

fn field(name: &str) -> TextFormat {
    TextFormat { field: Some(name.into()), ..TextFormat::default() }
}

fn gz(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn zst(content: &[u8]) -> Vec<u8> {
    zstd::encode_all(content, 3).unwrap()
}

/// A Parquet file of one group of rows for each list of texts; a text may be absent.
fn parquet_of(path: &Path, schema: &str, codec: Codec, groups: &[Vec<Option<&str>>]) {
    write_parquet(path, schema, codec, groups.len(), |group, number| {
        let mut column = group.next_column().unwrap().unwrap();
        let levels: Vec<i16> = groups[number].iter().map(|text| i16::from(text.is_some())).collect();
        let texts: Vec<ByteArray> =
            groups[number].iter().flatten().map(|text| ByteArray::from(*text)).collect();
        column.typed::<ByteArrayType>().write_batch(&texts, Some(&levels), None).unwrap();
        column.close().unwrap();
    });
}

fn write_parquet(
    path: &Path,
    schema: &str,
    codec: Codec,
    groups: usize,
    mut fill: impl FnMut(&mut SerializedRowGroupWriter<'_, std::fs::File>, usize),
) {
    let properties = WriterProperties::builder().set_compression(codec).build();
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let out = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(out, schema, Arc::new(properties)).unwrap();
    for number in 0..groups {
        let mut group = writer.next_row_group().unwrap();
        fill(&mut group, number);
        group.close().unwrap();
    }
    writer.close().unwrap();
}

const TEXTS: &str = "message rows { OPTIONAL BYTE_ARRAY text (UTF8); }";

#[test]
fn compressed_files_hold_what_the_plain_ones_do() {
    let dir = folder();
    let long = "ü one two three ".repeat(200_000);
    let text = format!("\u{feff}a\r\nb<|endoftext|>{long}<|endoftext|>c");
    let lines = format!("{}\n\n{}\n", json!({"text": "a\nb"}), json!({"text": long}));
    let plain = [file(&dir, "a.txt", &text), file(&dir, "a.jsonl", &lines)].map(|path| read(&path).unwrap());
    assert_eq!(plain[0], ["a\nb", long.trim(), "c"]);
    for (pack, ending) in [(gz as fn(&[u8]) -> Vec<u8>, "gz"), (zst, "zst")] {
        let packed = [
            file(&dir, &format!("a.txt.{ending}"), pack(text.as_bytes())),
            file(&dir, &format!("a.jsonl.{ending}"), pack(lines.as_bytes())),
        ];
        assert_eq!(packed.map(|path| read(&path).unwrap()), plain, "{ending}");
        // files that were compressed in parts are the parts one after the other
        let (first, second) = text.split_at(text.len() - 4);
        let parts = [pack(first.as_bytes()), pack(second.as_bytes())].concat();
        assert_eq!(read(&file(&dir, &format!("parts.txt.{ending}"), parts)).unwrap(), plain[0], "{ending}");
    }
}

#[test]
fn a_compressed_file_that_is_cut_off_is_refused_where_its_end_is_missed() {
    let dir = folder();
    // numbers do not compress to nothing
    let text: String =
        (0..50_000u64).map(|n| format!("{} ", n.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
    for (packed, ending) in [(gz(text.as_bytes()), "gz"), (zst(text.as_bytes()), "zst")] {
        for kept in [packed.len() - 1, packed.len() / 2, 12] {
            let path = file(&dir, &format!("a.txt.{ending}"), &packed[..kept]);
            let told = refused(&path);
            assert!(told.contains(&format!("truncated, damaged or no .{ending} file")), "{kept}: {told}");
        }
        let path = file(&dir, &format!("b.txt.{ending}"), "not compressed at all");
        assert!(refused(&path).contains(&format!("no .{ending} file")), "{}", refused(&path));
        assert!(refused(&file(&dir, &format!("c.txt.{ending}"), "")).contains("the file is empty"));
        let told = refused(&file(&dir, "a.txt", &packed));
        assert!(
            told.contains(&format!("a.txt: the file is compressed: its name has to end in .{ending}")),
            "{told}"
        );
    }
    let told = refused(&file(&dir, "a.txt.zst", gz(b"text")));
    assert!(told.contains("its name has to end in .gz"), "{told}");
}

#[test]
fn what_is_no_text_is_refused() {
    let dir = folder();
    for name in ["a", "a.gz", "a.csv", "a.json", "a.md.gz", "a.txt.bz2", "a.parquet.gz", ".txt.xz"] {
        assert!(
            refused(&file(&dir, name, "text")).contains("expected a name that ends in .txt or .jsonl"),
            "{name}"
        );
    }
    assert!(
        refused(&file(&dir, "a.txt", b"some\0text"))
            .contains("byte 4 is 0: expected UTF-8 text, found a binary")
    );
    let wide: Vec<u8> = "text".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(refused(&file(&dir, "b.txt", wide)).contains("UTF-16"));
    let late = [vec![b'x'; 3_000_000], vec![0]].concat();
    assert!(refused(&file(&dir, "c.txt", late)).contains("byte 3000000 is 0"));
    let picture = [b"\x89PNG\r\n\x1a\n".as_slice(), &[7; 100]].concat();
    assert!(refused(&file(&dir, "d.jsonl", picture)).contains("invalid UTF-8 at byte 0"));
}

#[test]
fn parquet_files_are_read_group_by_group_whatever_their_compression() {
    let dir = folder();
    let path = dir.path().join("a.parquet");
    let many: Vec<String> = (0..300).map(|n| format!("text {n}")).collect();
    let groups = vec![
        vec![Some(" one "), Some("two\nlines")],
        vec![],
        vec![Some(""), Some("ü")],
        many.iter().map(|text| Some(text.as_str())).collect(),
    ];
    let expected: Vec<&str> =
        ["one", "two\nlines", "ü"].into_iter().chain(many.iter().map(String::as_str)).collect();
    for codec in [
        Codec::UNCOMPRESSED,
        Codec::SNAPPY,
        Codec::GZIP(Default::default()),
        Codec::ZSTD(Default::default()),
        Codec::LZ4_RAW,
    ] {
        parquet_of(&path, TEXTS, codec, &groups);
        assert_eq!(read(&path).unwrap(), expected, "{codec:?}");
    }
    // older writers do not mark text as text
    parquet_of(&path, "message rows { OPTIONAL BYTE_ARRAY body; }", Codec::SNAPPY, &[vec![Some("ü")]]);
    assert_eq!(read_as(&path, &field("body")).unwrap(), ["ü"]);
}

#[test]
fn a_parquet_file_without_the_column_names_those_that_it_has() {
    let dir = folder();
    let path = dir.path().join("a.parquet");
    parquet_of(&path, "message m { OPTIONAL BYTE_ARRAY body (UTF8); }", Codec::SNAPPY, &[vec![Some("a")]]);
    let told = refused(&path);
    assert!(told.contains("expected the column \"text\"") && told.contains("[\"body\"]"), "{told}");
    let told = format!("{:#}", read_as(&path, &field("txt")).unwrap_err());
    assert!(told.contains("a.parquet: expected a column \"txt\", found [\"body\"]"), "{told}");
    assert_eq!(read_as(&path, &field("body")).unwrap(), ["a"]);
    write_parquet(&path, "message m { REQUIRED INT64 text; }", Codec::SNAPPY, 1, |group, _| {
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&[1, 2], None, None).unwrap();
        column.close().unwrap();
    });
    assert!(
        refused(&path).contains("the column \"text\" holds INT64: expected strings"),
        "{}",
        refused(&path)
    );
    parquet_of(&path, TEXTS, Codec::SNAPPY, &[vec![Some("a")], vec![Some("b"), None]]);
    let told = refused(&path);
    assert!(told.contains("a.parquet: row 3: the field \"text\" is null"), "{told}");
}

#[test]
fn a_damaged_parquet_file_is_an_error_and_no_panic() {
    let dir = folder();
    let path = dir.path().join("a.parquet");
    let texts: Vec<Option<&str>> = vec![Some("one"), Some("two"), Some("three and four")];
    parquet_of(&path, TEXTS, Codec::SNAPPY, &[texts.clone(), texts]);
    let sound = std::fs::read(&path).unwrap();
    assert_eq!(read(&path).unwrap().len(), 6);
    for length in [1, 8, sound.len() / 2, sound.len() - 1] {
        std::fs::write(&path, &sound[..length]).unwrap();
        assert!(refused(&path).contains("truncated, damaged or no Parquet file"), "{length}");
    }
    for at in 0..sound.len() {
        for flip in [1, 0x80, 0xff] {
            let mut bytes = sound.clone();
            bytes[at] ^= flip;
            std::fs::write(&path, &bytes).unwrap();
            // some bytes matter to nobody; none may panic or hang
            let _ = read(&path);
        }
    }
}

#[test]
fn records_are_read_by_their_keys() {
    let dir = folder();
    let chat = folder();
    std::fs::write(
        chat.path().join("chat_template.jinja"),
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    )
    .unwrap();
    std::fs::write(chat.path().join("tokenizer_config.json"), "{\"bos_token\": \"<s>\"}").unwrap();
    let chat = ChatTemplate::read(chat.path()).unwrap();
    let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]);
    let (prompt, completion) = (json!([messages[0]]), json!([messages[1]]));
    let lines = [
        json!({"text": "t", "prompt": "p", "completion": "c", "messages": messages}),
        json!({"prompt": "2 + 2 =", "completion": " 4", "messages": messages}),
        json!({"prompt": prompt, "completion": completion}),
        json!({"id": 7, "messages": messages}),
    ];
    let lines = lines.map(|line| line.to_string()).join("\n");
    let path = file(&dir, "a.jsonl", lines);
    let format = TextFormat { chat, ..TextFormat::default() };
    let said = "user: Hi\nassistant: Ho";
    assert_eq!(read_as(&path, &format).unwrap(), ["t", "2 + 2 = 4", said, said]);
    let named = TextFormat { field: Some("prompt".into()), ..format.clone() };
    assert!(
        format!("{:#}", read_as(&path, &named).unwrap_err())
            .contains("line 3: the field \"prompt\" is not a")
    );

    assert!(
        refused(&path)
            .contains("line 3: messages are written out by a chat template, and the model has none")
    );
    let refuse = |line: serde_json::Value| {
        let path = file(&dir, "b.jsonl", line.to_string());
        format!("{:#}", read_as(&path, &format).unwrap_err())
    };
    assert!(
        refuse(json!({"prompt": "p"})).contains("\"prompt\" and \"completion\", or \"messages\"; --field")
    );
    assert!(refuse(json!({"messages": []})).contains("found an empty list"));
    assert!(refuse(json!({"messages": "Hi"})).contains("expected a list of messages"));
    assert!(refuse(json!({"messages": ["Hi"]})).contains("expected messages with a \"role\""));
    assert!(refuse(json!({"prompt": "p", "completion": 4})).contains("\"completion\" is not a string"));
}

#[test]
fn parquet_files_hold_conversations_too() {
    let dir = folder();
    let path = dir.path().join("a.parquet");
    let schema = "message m {
        OPTIONAL BYTE_ARRAY id (UTF8);
        OPTIONAL group messages (LIST) { REPEATED group list { OPTIONAL group element {
            OPTIONAL BYTE_ARRAY content (UTF8); OPTIONAL BYTE_ARRAY role (UTF8); } } }
    }";
    write_parquet(&path, schema, Codec::SNAPPY, 1, |group, _| {
        let columns: [(&[&str], &[i16], &[i16]); 3] = [
            (&["x", "y"], &[1, 1], &[]),
            (&["Hi", "Ho", "So?"], &[4, 4, 4], &[0, 1, 0]),
            (&["user", "assistant", "user"], &[4, 4, 4], &[0, 1, 0]),
        ];
        for (texts, definition, repetition) in columns {
            let mut column = group.next_column().unwrap().unwrap();
            let texts: Vec<ByteArray> = texts.iter().map(|text| ByteArray::from(*text)).collect();
            let repetition = Some(repetition).filter(|levels| !levels.is_empty());
            column.typed::<ByteArrayType>().write_batch(&texts, Some(definition), repetition).unwrap();
            column.close().unwrap();
        }
    });
    let chat = folder();
    std::fs::write(
        chat.path().join("chat_template.jinja"),
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}",
    )
    .unwrap();
    let format = TextFormat { chat: ChatTemplate::read(chat.path()).unwrap(), ..TextFormat::default() };
    assert_eq!(read_as(&path, &format).unwrap(), ["[user] Hi [assistant] Ho", "[user] So?"]);
    let told = format!("{:#}", read_as(&path, &field("messages")).unwrap_err());
    assert!(told.contains("holds lists or groups: expected strings"), "{told}");
}

/// One token for each word of `a … z`.
fn letters() -> tokenizers::Tokenizer {
    let vocab: serde_json::Map<String, serde_json::Value> =
        ('a'..='z').enumerate().map(|(id, letter)| (letter.to_string(), id.into())).collect();
    let dir = folder();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "z"}
    });
    file(&dir, "tokenizer.json", tokenizer.to_string());
    load_tokenizer(dir.path(), 27).unwrap()
}

#[test]
fn masked_prompts_are_read_and_do_not_count() {
    let dir = folder();
    let chat = folder();
    // every word is a token
    file(
        &chat,
        "chat_template.jinja",
        "{% for m in messages %}{{ m.role[:1] }} {{ m.content }} e {% endfor %}{% if add_generation_prompt %}a {% endif %}",
    );
    let chat = ChatTemplate::read(chat.path()).unwrap();
    let format = TextFormat { chat, mask_prompt: true, ..TextFormat::default() };
    let said = |role: &str, content: &str| json!({"role": role, "content": content});
    let lines = [
        json!({"text": "not this", "prompt": " b c", "completion": " d d"}),
        json!({"prompt": "b", "completion": "c"}), // together one word: a token counts where it ends
        json!({"prompt": "b c", "completion": ""}),
        json!({"messages": [said("user", "b"), said("assistant", "c d"), said("user", "f")]}),
        json!({"prompt": [said("assistant", "b")], "completion": [said("user", "c"), said("assistant", "d")]}),
    ];
    let path = file(&dir, "a.jsonl", lines.map(|line| line.to_string()).join("\n"));
    for (framing, closing) in [
        (Framing { opening: 24, closing: 24 }, 24),
        (Framing { opening: 26, closing: 24 }, 24),
        (Framing { opening: 26, closing: 4 }, 4), // which the template writes, too
    ] {
        let cache = TokenCache::open_or_build(
            &DataSource::local(&path),
            &format,
            &letters(),
            framing,
            dir.path(),
            &|_, _| {},
        )
        .unwrap();
        let shown = |document: usize| {
            let places = cache.framed_range(document).skip(1);
            let tokens = cache.framed(document).into_iter().skip(1);
            let letter = |(place, token): (usize, u32)| {
                let letter = char::from(b'a' + token as u8);
                if cache.counts(place) { letter.to_ascii_uppercase() } else { letter }
            };
            places.zip(tokens).map(letter).collect::<String>()
        };
        let closing = char::from(b'a' + closing as u8);
        let end = |text: &str, counts: bool| {
            let closing = if counts { closing.to_ascii_uppercase() } else { closing };
            // a closing token that is there already is not written again
            let text =
                if closing.eq_ignore_ascii_case(&'e') { text.trim_end_matches(['e', 'E']) } else { text };
            format!("{text}{closing}")
        };
        assert_eq!(shown(0), end("bcDD", true));
        assert_eq!(shown(1), end("Z", true)); // a word that the tokenizer does not know
        assert_eq!(shown(2), end("bc", true));
        assert_eq!(shown(3), end("ubeaCDEufe", false));
        assert_eq!(shown(4), end("abeuceaDE", true));
    }
}

#[test]
fn a_folder_or_a_pattern_is_one_source_of_the_files_in_it() {
    let dir = folder();
    let cache = folder();
    let tokenizer = letters();
    file(&dir, "2.jsonl", "{\"text\": \"d\"}");
    file(&dir, "1.txt", "a b<|endoftext|>c");
    file(&dir, "3.txt.gz", gz(b"e f"));
    parquet_of(&dir.path().join("4.parquet"), TEXTS, Codec::SNAPPY, &[vec![Some("g")]]);
    file(&dir, "README.md", "no text of the data set");
    file(&dir, ".hidden.txt", "z");
    std::fs::create_dir(dir.path().join("deep.txt")).unwrap();
    let tokens = |path: &Path| -> Result<(Vec<u32>, bool)> {
        let source = DataSource::local(path);
        let built = Cell::new(0);
        let progress = |done: u64, all: u64| {
            assert!(built.get() <= done && done <= all, "{done} of {all}");
            built.set(done);
        };
        let (format, framing) = (TextFormat::default(), Framing { opening: 26, closing: 26 });
        let cache =
            TokenCache::open_or_build(&source, &format, &tokenizer, framing, cache.path(), &progress)?;
        assert!(built.get() == 0 || built.get() == source.bytes()?);
        Ok((cache.slice(0, cache.len()), built.get() > 0))
    };
    let all = vec![26, 0, 1, 26, 2, 26, 3, 26, 4, 5, 26, 6, 26];
    assert_eq!(tokens(dir.path()).unwrap(), (all.clone(), true));
    assert_eq!(tokens(dir.path()).unwrap(), (all, false), "the cache is used again");
    assert_eq!(tokens(&dir.path().join("*.txt*")).unwrap().0, [26, 0, 1, 26, 2, 26, 4, 5, 26]);
    assert_eq!(tokens(&dir.path().join("[24].*")).unwrap().0, [26, 3, 26, 6, 26]);
    // another file, another cache
    file(&dir, "5.txt", "h");
    assert!(tokens(dir.path()).unwrap().0.ends_with(&[7, 26]));

    let refused = |path: PathBuf| format!("{:#}", tokens(&path).expect_err("an error"));
    assert!(refused(dir.path().join("*.md")).contains("README.md: expected a name that ends in"));
    assert!(refused(dir.path().join("*.csv")).contains("*.csv: no files there that end in .txt"));
    assert!(refused(dir.path().join("[")).contains("not a pattern"));
    assert!(refused(dir.path().join("nowhere.txt")).contains("cannot be opened"));
    let empty = folder();
    assert!(refused(empty.path().to_owned()).contains("no files there that end in .txt"));
    let source: DataSource = dir.path().join("*.txt:0.5").to_str().unwrap().parse().unwrap();
    assert_eq!((source.weight, source.files().unwrap().len()), (0.5, 2));
}
