//! The dial in a body: a number, or one for each phase.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor, value::MapAccessDeserializer},
};

use super::refused;
use crate::{Dial, PhaseDials, serve::error::ApiResult};

/// `"sensitivity"` or `"budget"`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in super::super) enum DialField {
    All(f64),
    Phases(Phases),
}

/// A number for some of the phases.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in super::super) struct Phases {
    prompt: Option<f64>,
    thinking: Option<f64>,
    answer: Option<f64>,
}

struct NumberOrPhases;

impl<'de> Visitor<'de> for NumberOrPhases {
    type Value = DialField;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a number from 0 to 1, or an object with prompt, thinking and answer")
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<DialField, E> {
        Ok(DialField::All(number))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<DialField, E> {
        Ok(DialField::All(number as f64))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<DialField, E> {
        Ok(DialField::All(number as f64))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<DialField, A::Error> {
        Phases::deserialize(MapAccessDeserializer::new(map)).map(DialField::Phases)
    }
}

impl<'de> Deserialize<'de> for DialField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberOrPhases)
    }
}

impl DialField {
    fn into_dials(self, name: &str, of: fn(f64) -> Dial, default: Dial) -> ApiResult<PhaseDials> {
        let check = |field: &str, number: f64| match (0.0..=1.0).contains(&number) {
            true => Ok(of(number)),
            false => Err(refused(field, format_args!("expected a number from 0 to 1, found {number}"))),
        };
        match self {
            Self::All(number) => Ok(check(name, number)?.into()),
            Self::Phases(Phases { prompt: None, thinking: None, answer: None }) => {
                Err(refused(name, "expected a number, or one for prompt, thinking or answer, found none"))
            }
            Self::Phases(phases) => {
                let of_phase = |phase: &str, number: Option<f64>| {
                    number.map_or(Ok(default), |number| check(&format!("{name}.{phase}"), number))
                };
                Ok(PhaseDials {
                    prompt: of_phase("prompt", phases.prompt)?,
                    thinking: of_phase("thinking", phases.thinking)?,
                    answer: of_phase("answer", phases.answer)?,
                })
            }
        }
    }

    /// Whether it says something about thinking alone.
    pub fn sets_thinking(&self) -> bool {
        matches!(self, Self::Phases(Phases { thinking: Some(_), .. }))
    }
}

/// The dial that a body asks for; none if it has neither field. A phase that is left out takes `default`.
///
/// # Errors
/// 400: both fields, a number outside of 0 to 1.
pub(in super::super) fn dial_of(
    sensitivity: Option<DialField>,
    budget: Option<DialField>,
    default: Dial,
) -> ApiResult<Option<PhaseDials>> {
    match (sensitivity, budget) {
        (Some(_), Some(_)) => Err(refused("budget", "give sensitivity or budget, not both")),
        (Some(field), None) => field.into_dials("sensitivity", Dial::Sensitivity, default).map(Some),
        (None, Some(field)) => field.into_dials("budget", Dial::Budget, default).map(Some),
        (None, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const DEFAULT: Dial = Dial::Sensitivity(0.9);

    fn dials(field: Value) -> ApiResult<PhaseDials> {
        let field = serde_json::from_value(field).unwrap();
        Ok(dial_of(None, Some(field), DEFAULT)?.unwrap())
    }

    #[test]
    fn a_number_is_for_all_phases() {
        assert_eq!(dials(json!(0.5)).unwrap(), Dial::Budget(0.5).into());
        assert_eq!(dials(json!(1)).unwrap(), Dial::Budget(1.0).into());
        assert_eq!(dial_of(None, None, DEFAULT).unwrap(), None);
    }

    #[test]
    fn a_phase_that_is_left_out_takes_the_default() {
        let dials = dials(json!({"prompt": 1, "thinking": 0.5})).unwrap();
        let expected = PhaseDials { prompt: Dial::Budget(1.0), thinking: Dial::Budget(0.5), answer: DEFAULT };
        assert_eq!(dials, expected);
    }

    #[test]
    fn a_wrong_dial_is_refused_by_name() {
        for (field, word) in [
            (json!(1.01), "budget: expected a number from 0 to 1, found 1.01"),
            (json!(-1), "found -1"),
            (json!({"answer": 2}), "budget.answer"),
        ] {
            let message = dials(field).unwrap_err().message;
            assert!(message.contains(word), "{message}");
        }
        let both = dial_of(Some(DialField::All(0.5)), Some(DialField::All(0.5)), DEFAULT);
        assert!(both.unwrap_err().message.contains("not both"));
        for wrong in [json!("0.5"), json!(true), json!([0.5]), json!({"answers": 1})] {
            assert!(serde_json::from_value::<DialField>(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
