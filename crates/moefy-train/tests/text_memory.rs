//! Memory while text is read: alone in its process, because the highest use so far is what Linux tells.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::GzEncoder;
use moefy_train::data::TextFormat;
use moefy_train::data::source::Documents;
use parquet::basic::Compression as Codec;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

/// Documents of 4 kB each: 256 MB of text.
const DOCUMENTS: usize = 64_000;
const LENGTH: usize = 4_000;

/// The process's highest resident memory so far, in MB.
fn peak_resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024 / 1_000_000
}

fn document(number: usize) -> String {
    format!("{number:08} ").repeat(LENGTH / 9)
}

fn write_lines(out: &mut dyn Write) {
    for number in 0..DOCUMENTS {
        writeln!(out, "{{\"text\": \"{}\"}}", document(number)).unwrap();
    }
}

/// One group of rows, so that reading a group at a time would not be enough.
fn write_rows(path: &Path) {
    let schema = parse_message_type("message rows { REQUIRED BYTE_ARRAY text (UTF8); }").unwrap();
    let properties = WriterProperties::builder().set_compression(Codec::SNAPPY).set_dictionary_enabled(false);
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::new(properties.build())).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    for first in (0..DOCUMENTS).step_by(100) {
        let texts: Vec<ByteArray> =
            (first..first + 100).map(|number| ByteArray::from(document(number).into_bytes())).collect();
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
    }
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
}

fn write_all(dir: &Path) {
    write_lines(&mut BufWriter::new(File::create(dir.join("a.jsonl")).unwrap()));
    write_lines(&mut GzEncoder::new(File::create(dir.join("a.jsonl.gz")).unwrap(), Compression::fast()));
    let mut zst = zstd::Encoder::new(File::create(dir.join("a.jsonl.zst")).unwrap(), 1).unwrap();
    write_lines(&mut zst);
    zst.finish().unwrap();
    write_rows(&dir.join("a.parquet"));
}

/// Where a process that runs this test is to write the files and do nothing else: writing takes memory that would hide
/// what reading takes.
const WRITE_TO: &str = "TEXT_MEMORY_WRITE_TO";

#[test]
#[cfg(target_os = "linux")]
fn memory_does_not_grow_with_the_file() {
    if let Some(dir) = std::env::var_os(WRITE_TO) {
        return write_all(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Command::new(std::env::current_exe().unwrap());
    assert!(writer.env(WRITE_TO, dir.path()).output().unwrap().status.success());
    for name in ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"] {
        let before = peak_resident();
        let mut bytes = 0;
        for document in Documents::open(&dir.path().join(name), &TextFormat::default()).unwrap() {
            bytes += document.unwrap().text.len();
        }
        let grown = peak_resident() - before;
        println!("{name}: {bytes} bytes of text, {grown} MB more memory than {before} MB");
        assert!(bytes > 250_000_000 && before < 40, "{bytes} {before}");
        // buffers of a megabyte each, a window of Zstandard, a page of Parquet
        assert!(grown < 40, "{name}: {grown} MB");
    }
}
