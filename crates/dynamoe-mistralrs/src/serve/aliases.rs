//! The names of the model: its dial is a part of them, for clients that can add no field.

use axum::http::StatusCode;

use super::error::{ApiError, ApiResult};
use crate::{Dial, LoadedModel};

const DEFAULT: &str = "default";

/// The names that the model answers to.
#[derive(Debug, Clone)]
pub(super) struct Names {
    name: String,
    /// Widths of the model's table of budgets.
    budgets: Vec<f64>,
    dense: bool,
}

impl Names {
    pub fn new(name: &str, model: Option<&LoadedModel>) -> Self {
        let mut budgets: Vec<f64> = model
            .map(|model| model.kind().budgets().iter().map(|budget| budget.width).collect())
            .unwrap_or_default();
        budgets.sort_by(|a, b| b.total_cmp(a));
        Self { name: name.to_owned(), budgets, dense: model.is_none() }
    }

    /// What `/v1/models` lists: any other budget, and a sensitivity, may be asked for as well.
    pub fn list(&self) -> Vec<String> {
        let dials = self.budgets.iter().map(|budget| format!("{}@{budget}", self.name));
        [DEFAULT.to_owned(), self.name.clone()].into_iter().chain(dials).collect()
    }

    /// The dial in a name: `NAME@0.6` is a budget, `NAME@s0.3` a sensitivity.
    ///
    /// # Errors
    /// 404: another model; 400: a dial that is none.
    pub fn dial(&self, name: &str) -> ApiResult<Option<Dial>> {
        let ours = |name: &str| name == DEFAULT || name == self.name;
        if ours(name) {
            return Ok(None);
        }
        let Some((_, dial)) = name.rsplit_once('@').filter(|(name, _)| ours(name)) else {
            let names = self.list().join(", ");
            return Err(ApiError::new(
                StatusCode::NOT_FOUND,
                format!("model: there is no {name:?} here; what is: {names}"),
            ));
        };
        if self.dense {
            return Err(ApiError::bad_request(
                "model: the model is dense: it takes neither sensitivity nor budget",
            ));
        }
        let (number, of): (_, fn(f64) -> Dial) = match dial.strip_prefix('s') {
            Some(sensitivity) => (sensitivity, Dial::Sensitivity),
            None => (dial, Dial::Budget),
        };
        match number.parse::<f64>() {
            Ok(number) if (0.0..=1.0).contains(&number) => Ok(Some(of(number))),
            _ => Err(ApiError::bad_request(format!(
                "model: expected a budget from 0 to 1 after @, or s and a sensitivity, found {dial:?}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names { name: "org/na@me".into(), budgets: vec![0.75, 0.5], dense: false }
    }

    #[test]
    fn a_name_may_end_with_a_dial() {
        let dial = |name| names().dial(name).unwrap();
        assert_eq!(names().list(), ["default", "org/na@me", "org/na@me@0.75", "org/na@me@0.5"]);
        assert_eq!(dial("default"), None);
        assert_eq!(dial("org/na@me"), None);
        assert_eq!(dial("org/na@me@0.6"), Some(Dial::Budget(0.6)));
        assert_eq!(dial("default@s0.3"), Some(Dial::Sensitivity(0.3)));
        assert_eq!(dial("default@1"), Some(Dial::Budget(1.0)));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for (name, status, word) in [
            ("another", 404, "org/na@me@0.75"),
            ("another@0.5", 404, "another@0.5"),
            ("", 404, "default"),
            ("default@", 400, "after @"),
            ("default@1.5", 400, "1.5"),
            ("default@sx", 400, "sx"),
            ("default@NaN", 400, "NaN"),
        ] {
            let error = names().dial(name).unwrap_err();
            assert!(error.status == status && error.message.contains(word), "{name}: {error:?}");
        }
        let dense = Names { budgets: vec![], dense: true, ..names() };
        assert!(dense.dial("default@0.5").unwrap_err().message.contains("dense"));
    }
}
