//! Rows of a Parquet file as records, a few in memory at a time.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use parquet::basic::Type as Physical;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::record::{Field, Row};
use parquet::schema::types::{SchemaDescPtr, SchemaDescriptor, Type};
use serde_json::{Map, Value};

use super::format::TextFormat;
use super::panics::without_panic;
use super::pieces::{Position, open_text};
use super::records::{expected, fields};

/// Rows decoded at a time.
const ROWS: usize = 64;

/// The records of a Parquet file, each with its number from 1. Only the columns that are asked for are read.
pub(super) struct Rows {
    path: PathBuf,
    file: SerializedFileReader<std::fs::File>,
    columns: SchemaDescPtr,
    /// The next group of rows.
    group: usize,
    /// What is left of the group before.
    open: Option<ReaderIter>,
    decoded: VecDeque<(usize, Value)>,
    /// Rows decoded so far.
    number: usize,
    position: Position,
    /// Bytes of the file.
    bytes: u64,
}

impl Rows {
    /// Opens a file and looks for the field that is named, or without it for the first set of [`fields`] that the file has.
    pub(super) fn open(path: &Path, format: &TextFormat, position: &Position) -> Result<Self> {
        let file = open_text(path)?;
        let bytes = file.metadata().with_context(|| path.display().to_string())?.len();
        let file = without_panic("the Parquet library", || Ok(SerializedFileReader::new(file)?))
            .with_context(|| format!("{}: truncated, damaged or no Parquet file", path.display()))?;
        let columns = columns(file.metadata().file_metadata().schema(), format)
            .with_context(|| path.display().to_string())?;
        Ok(Self {
            path: path.to_owned(),
            file,
            columns,
            group: 0,
            open: None,
            decoded: VecDeque::new(),
            number: 0,
            position: Position::clone(position),
            bytes,
        })
    }

    /// Decodes some more rows; none are left where it decodes nothing.
    fn decode(&mut self) -> Result<()> {
        while self.decoded.is_empty() {
            let Some(rows) = &mut self.open else {
                if self.group == self.file.num_row_groups() {
                    return Ok(());
                }
                let group = self.file.get_row_group(self.group)?;
                self.group += 1;
                let builder = TreeBuilder::new().with_batch_size(ROWS);
                self.open = Some(builder.as_iter(Arc::clone(&self.columns), &*group)?);
                continue;
            };
            for row in rows.by_ref().take(ROWS) {
                let row = record(row?);
                self.number += 1;
                self.decoded.push_back((self.number, row));
            }
            if self.decoded.is_empty() {
                self.open = None;
            }
        }
        let all = self.file.metadata().file_metadata().num_rows().max(1) as f64;
        self.position.set((self.bytes as f64 * (self.number as f64 / all).min(1.0)) as u64);
        Ok(())
    }
}

impl Iterator for Rows {
    type Item = Result<(usize, Value)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.decoded.is_empty() {
            let decoded = without_panic("the Parquet library", || self.decode());
            if let Err(error) = decoded {
                let place = format!("{}: row {}: cannot be read", self.path.display(), self.number + 1);
                return Some(Err(error.context(place)));
            }
        }
        self.decoded.pop_front().map(Ok)
    }
}

/// The part of a file's schema that is read.
fn columns(schema: &Type, format: &TextFormat) -> Result<SchemaDescPtr> {
    let field = format.field.as_deref();
    let find = |name: &str| schema.get_fields().iter().find(|column| column.name() == name);
    let names: Vec<&str> = schema.get_fields().iter().map(|column| column.name()).collect();
    let wanted = match &field {
        Some(field) => {
            ensure!(find(field).is_some(), "expected a column {field:?}, found {names:?}");
            std::slice::from_ref(field)
        }
        None => {
            let has = |fields: &&[&str]| fields.iter().all(|field| find(field).is_some());
            let found = fields(format).iter().copied().find(has);
            found.with_context(|| format!("expected the column {}; found {names:?}", expected(format)))?
        }
    };
    let found: Vec<_> = wanted.iter().filter_map(|name| find(name).cloned()).collect();
    for column in found.iter().filter(|column| column.is_primitive()) {
        let physical = column.get_physical_type();
        ensure!(
            physical == Physical::BYTE_ARRAY,
            "the column {:?} holds {physical}: expected strings",
            column.name()
        );
    }
    if field.is_some() && !found.iter().all(|column| column.is_primitive()) {
        bail!("the column {wanted:?} holds lists or groups: expected strings");
    }
    let projection = Type::group_type_builder(schema.name()).with_fields(found).build()?;
    Ok(Arc::new(SchemaDescriptor::new(Arc::new(projection))))
}

fn record(row: Row) -> Value {
    row.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect::<Map<_, _>>().into()
}

/// A value as JSON has it; of numbers, dates and the like, their text.
fn value(field: Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Str(text) => text.into(),
        // older writers do not say that bytes are text
        Field::Bytes(bytes) => String::from_utf8(bytes.data().to_vec()).map_or(Value::Null, Value::from),
        Field::Group(row) => record(row),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        other => other.to_string().into(),
    }
}
