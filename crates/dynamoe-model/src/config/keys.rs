//! Typed access to the keys of config.json.

use anyhow::{Context, Result};
use serde_json::Value;

use super::MAX_DIMENSION;

/// The keys of a JSON object; null counts as absent.
pub(super) struct Keys<'a>(pub &'a Value);

impl<'a> Keys<'a> {
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is not there; a null is.
    pub fn is_absent(&self, key: &str) -> bool {
        self.0.get(key).is_none()
    }

    pub fn parse<T>(
        &self,
        key: &str,
        expected: &str,
        parse: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(found) = self.get(key) else { return Ok(None) };
        parse(found).map(Some).with_context(|| format!("\"{key}\": expected {expected}, found {found}"))
    }

    pub fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        self.parse(key, "a whole number", |v| whole(v).filter(|&n| n <= MAX_DIMENSION).map(|n| n as usize))
    }

    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let expected = format!("a whole number from 1 to {MAX_DIMENSION}");
        self.parse(key, &expected, |v| {
            whole(v).filter(|n| (1..=MAX_DIMENSION).contains(n)).map(|n| n as usize)
        })
    }

    pub fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.with_context(|| format!("\"{key}\" is missing"))
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.parse(key, "a number above 0", |v| v.as_f64().filter(|x| x.is_finite() && *x > 0.0))
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.parse(key, "true or false", Value::as_bool)
    }

    /// Token ids; negative ones, which some configurations hold, mean none.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| match v.as_i64() {
            Some(negative) if negative < 0 => Some(None),
            found => found.and_then(|n| u32::try_from(n).ok()).map(Some),
        };
        let ids = self.parse(key, "a token id or a list of token ids", |v| match v.as_array() {
            Some(list) => list.iter().map(id).collect(),
            None => id(v).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default().into_iter().flatten().collect())
    }
}

/// A whole number, also where it is written as `4.0`.
fn whole(value: &Value) -> Option<u64> {
    let float = || value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..1e15).contains(x)).map(|x| x as u64);
    value.as_u64().or_else(float)
}
