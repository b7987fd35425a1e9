//! Event files, in which TensorBoard finds the numbers of a training.
//!
//! A file is a sequence of records; each is an `Event`, a message of Protocol Buffers. Numbers are little endian.
//!
//! ```text
//! record    length u64, checksum of the length u32, event, checksum of the event u32
//! checksum  CRC-32C, its bits rotated right by 15, plus 0xa282ead8
//! Event     1: seconds since 1970 f64   2: step   3: version   5: Summary   7: SessionLog
//! Summary   1: a Value for each number
//! Value     1: name   2: number f32
//! ```

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::report::results::TrainMetrics;

/// What the first event of a file says.
const VERSION: &str = "brain.Event:2";

/// A file in the making.
pub(super) struct Events {
    file: File,
    path: PathBuf,
}

impl Events {
    /// Begins a new file in `dir`, which may hold earlier ones of the same training. Steps after `start` in these count for
    /// nothing: TensorBoard is told that the training starts again there.
    pub(super) fn create(dir: &Path, start: u64) -> Result<Self> {
        fs::create_dir_all(dir)
            .with_context(|| format!("--tensorboard: {} cannot be created", dir.display()))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // TensorBoard reads the files in the order of their names
        let name = format!("{}.{}.{:09}", now.as_secs(), std::process::id(), now.subsec_nanos());
        let path = dir.join(format!("events.out.tfevents.{name}"));
        let file = File::create_new(&path).with_context(|| format!("{}: writing", path.display()))?;
        let mut events = Self { file, path };
        events.write(0, &text(3, VERSION.as_bytes()))?;
        const RESTARTED: [u8; 2] = [1 << 3, 1];
        events.write(start + 1, &text(7, &RESTARTED))?;
        Ok(events)
    }

    /// Appends all numbers of a step but its own.
    pub(super) fn push(&mut self, metrics: &TrainMetrics) -> Result<()> {
        let Value::Object(numbers) = serde_json::to_value(metrics)? else { return Ok(()) };
        let mut summary = Vec::new();
        for (name, number) in numbers.iter().filter(|(name, _)| *name != "step") {
            let Some(number) = number.as_f64() else { continue };
            let number = (number as f32).to_le_bytes();
            let value = [&text(1, name.as_bytes())[..], &[(2 << 3) | 5], &number].concat();
            summary.extend(text(1, &value));
        }
        self.write(metrics.step, &text(5, &summary))
    }

    /// Appends an event: its time, its step and another field.
    fn write(&mut self, step: u64, field: &[u8]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let event = [&[(1 << 3) | 1][..], &now.to_le_bytes(), &[2 << 3], &varint(step), field].concat();
        self.file.write_all(&record(&event)).with_context(|| format!("{}: writing", self.path.display()))
    }
}

/// A record around an event.
fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    [&length[..], &checksum(&length), event, &checksum(event)].concat()
}

/// A field that holds bytes, a text or a message.
fn text(field: u8, bytes: &[u8]) -> Vec<u8> {
    [&[(field << 3) | 2][..], &varint(bytes.len() as u64), bytes].concat()
}

/// Seven bits a byte, the lowest first; all bytes but the last have the highest bit.
fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

fn checksum(bytes: &[u8]) -> [u8; 4] {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, B.4: 32 zeros, 32 ones, and 0 to 31; then the check value of CRC-32C
        let ascending: Vec<u8> = (0..32).collect();
        for (bytes, crc) in [
            (&[0; 32][..], 0x8a91_36aa_u32),
            (&[0xff; 32], 0x62a8_ab43),
            (&ascending, 0x46dd_794e),
            (b"123456789", 0xe306_9283),
        ] {
            let masked = u32::from_le_bytes(checksum(bytes));
            assert_eq!(masked.wrapping_sub(0xa282_ead8).rotate_left(15), crc);
        }
    }

    /// The records of a file, their checksums compared.
    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(bytes[8..12], checksum(&bytes[..8]));
            let event = &bytes[12..12 + length];
            assert_eq!(bytes[12 + length..16 + length], checksum(event));
            found.push(event.to_vec());
            bytes = &bytes[16 + length..];
        }
        found
    }

    #[test]
    fn a_file_holds_the_bytes_that_tensorboard_expects() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = Events::create(&dir.path().join("a/b"), 199).unwrap();
        let metrics =
            TrainMetrics { step: 300, tokens: 600, loss: 1.5, lr: f64::NAN, ..TrainMetrics::default() };
        events.push(&metrics).unwrap();
        let name = events.path.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.starts_with("events.out.tfevents."), "{name}");
        let found = records(&fs::read(&events.path).unwrap());
        let [version, restart, step] = &found[..] else { panic!("{} records", found.len()) };
        for event in [version, restart, step] {
            let seconds = f64::from_le_bytes(event[1..9].try_into().unwrap());
            assert_eq!(event[0], 0x09);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
            assert!((0.0..60.0).contains(&(now - seconds)), "{seconds}");
        }
        assert_eq!(version[9..], *b"\x10\x00\x1a\x0dbrain.Event:2");
        assert_eq!(restart[9..], *b"\x10\xc8\x01\x3a\x02\x08\x01");
        // tag and float of each value, in the order of the metrics; what is not a number is left out
        let value = |name: &str, number: f32| {
            let len = name.len() as u8;
            [&[0x0a, len + 7, 0x0a, len], name.as_bytes(), &[0x15], &number.to_le_bytes()].concat()
        };
        let summary = [
            value("tokens", 600.0),
            value("loss", 1.5),
            value("objective", 0.0),
            value("mean_width", 0.0),
            value("grad_norm", 0.0),
            value("tokens_per_second", 0.0),
        ]
        .concat();
        let expected = [&b"\x10\xac\x02\x2a"[..], &varint(summary.len() as u64), &summary].concat();
        assert_eq!(step[9..], expected);
    }
}
