//! How the tokens of an answer are chosen.

use std::collections::HashMap;

use mistralrs_core::Constraint;
use serde_json::{Value, json};

use super::{
    Body, Limits, LogprobsField, ResponseFormat,
    body::Grammar,
    limits::{BIASES, PATTERN_BYTES, STOPS, at_most, within},
    refused,
};
use crate::serve::error::ApiResult;

/// How the tokens of an answer are chosen, and what is told of them.
#[derive(Clone)]
pub(in super::super) struct Rules {
    /// 0 takes the likeliest token.
    pub temperature: f64,
    pub top_p: f64,
    pub top_k: Option<usize>,
    pub min_p: f64,
    /// Taken from a token's score each time that the answer has it.
    pub frequency_penalty: f32,
    /// Taken from the score of each token that the answer has.
    pub presence_penalty: f32,
    /// Divides the score of each token that prompt or answer have.
    pub repetition_penalty: f32,
    pub bias: Vec<(u32, f32)>,
    pub seed: Option<u64>,
    /// Likeliest tokens to tell beside each; none if no log probabilities are asked for.
    pub logprobs: Option<usize>,
    pub stop: Vec<String>,
    pub constraint: Constraint,
}

/// The part of a body that says how tokens are chosen. `vocabulary` is the number of tokens of the model.
///
/// # Errors
/// 400: a field outside of its range, two that contradict each other.
pub(in super::super) fn rules(
    body: &mut Body,
    limits: &Limits,
    vocabulary: usize,
    chat: bool,
) -> ApiResult<Rules> {
    let top_k = match body.top_k {
        None | Some(-1 | 0) => None,
        Some(count @ 1..) => Some(count as usize),
        Some(found) => return Err(refused("top_k", format_args!("expected 1 or more, found {found}"))),
    };
    let penalty = |field, number| Ok(within(field, number, -2.0, 2.0)?.unwrap_or(0.0) as f32);
    let repetition = within("repetition_penalty", body.repetition_penalty, 0.01, 100.0)?;
    Ok(Rules {
        temperature: within("temperature", body.temperature, 0.0, 2.0)?.unwrap_or(1.0),
        top_p: within("top_p", body.top_p, 0.0, 1.0)?.unwrap_or(1.0),
        top_k,
        min_p: within("min_p", body.min_p, 0.0, 1.0)?.unwrap_or(0.0),
        frequency_penalty: penalty("frequency_penalty", body.frequency_penalty)?,
        presence_penalty: penalty("presence_penalty", body.presence_penalty)?,
        repetition_penalty: repetition.unwrap_or(1.0) as f32,
        bias: bias(body.logit_bias.take().unwrap_or_default(), vocabulary)?,
        seed: body.seed.map(|seed| seed as u64),
        logprobs: logprobs(body, limits, chat)?,
        stop: stop(body)?,
        constraint: constraint(body)?,
    })
}

fn bias(bias: HashMap<String, f64>, vocabulary: usize) -> ApiResult<Vec<(u32, f32)>> {
    at_most("logit_bias", bias.len() as u64, BIASES as u64, " tokens")?;
    let entry = |(token, bias): (String, f64)| {
        let field = format!("logit_bias.{token}");
        let id = token.parse().ok().filter(|&id: &u32| (id as usize) < vocabulary);
        let id = id
            .ok_or_else(|| refused(&field, format_args!("expected the id of a token, below {vocabulary}")))?;
        within(&field, Some(bias), -100.0, 100.0)?;
        Ok((id, bias as f32))
    };
    bias.into_iter().map(entry).collect()
}

/// A chat's `logprobs` is a flag with `top_logprobs` beside it, a text's is the number itself.
fn logprobs(body: &Body, limits: &Limits, chat: bool) -> ApiResult<Option<usize>> {
    let (field, count) = if chat {
        let wanted = match body.logprobs {
            None => false,
            Some(LogprobsField::Flag(wanted)) => wanted,
            Some(LogprobsField::Count(found)) => {
                return Err(refused("logprobs", format_args!("expected true or false, found {found}")));
            }
        };
        match (wanted, body.top_logprobs) {
            (false, Some(1..)) => {
                return Err(refused("top_logprobs", "expected only together with \"logprobs\": true"));
            }
            (false, _) => return Ok(None),
            (true, count) => ("top_logprobs", count.unwrap_or(0)),
        }
    } else {
        match body.logprobs {
            None | Some(LogprobsField::Flag(false)) => return Ok(None),
            Some(LogprobsField::Count(count)) => ("logprobs", count),
            Some(LogprobsField::Flag(true)) => {
                return Err(refused("logprobs", "expected a number of tokens, found true"));
            }
        }
    };
    at_most(field, count, limits.top_logprobs, "")?;
    Ok(Some(count as usize))
}

fn stop(body: &mut Body) -> ApiResult<Vec<String>> {
    let stop = body.stop.take().map(|stop| stop.into_strings()).unwrap_or_default();
    at_most("stop", stop.len() as u64, STOPS as u64, " entries")?;
    at_most("stop", stop.iter().map(|stop| stop.len() as u64).sum(), PATTERN_BYTES as u64, " bytes of text")?;
    if stop.iter().any(String::is_empty) {
        return Err(refused("stop", "expected texts, found an empty one"));
    }
    Ok(stop)
}

fn constraint(body: &mut Body) -> ApiResult<Constraint> {
    let schema = |field: &str, schema: Value| {
        at_most(field, schema.to_string().len() as u64, PATTERN_BYTES as u64, " bytes of text")?;
        if !schema.is_object() && !schema.is_boolean() {
            return Err(refused(field, format_args!("expected a JSON schema, found {schema}")));
        }
        Ok(Constraint::JsonSchema(schema))
    };
    let text = |text: &str| at_most("grammar", text.len() as u64, PATTERN_BYTES as u64, " bytes of text");
    let format = body.response_format.take();
    let grammar = body.grammar.take();
    if grammar.is_some() && !matches!(format, None | Some(ResponseFormat::Text)) {
        return Err(refused("grammar", "give response_format or grammar, not both"));
    }
    match (format, grammar) {
        (Some(ResponseFormat::JsonObject), _) => Ok(Constraint::JsonSchema(json!({"type": "object"}))),
        (Some(ResponseFormat::JsonSchema { json_schema }), _) => {
            schema("response_format.json_schema.schema", json_schema.schema)
        }
        (_, None) => Ok(Constraint::None),
        (_, Some(Grammar::JsonSchema(value))) => schema("grammar.value", value),
        (_, Some(Grammar::Regex(regex))) => text(&regex).map(|()| Constraint::Regex(regex)),
        (_, Some(Grammar::Lark(lark))) => text(&lark).map(|()| Constraint::Lark(lark)),
        (_, Some(Grammar::Llguidance(grammar))) => Ok(Constraint::Llguidance(grammar)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits =
        Limits { choices: 8, top_logprobs: 20, prompt_bytes: 1000, answer_tokens: 1000, logits_bytes: 1000 };

    fn read(json: Value) -> ApiResult<Rules> {
        let mut body: Body = serde_json::from_value(json).unwrap();
        let chat = body.messages.is_some();
        rules(&mut body, &LIMITS, 300, chat)
    }

    #[test]
    fn what_is_not_said_is_as_openai_has_it() {
        let rules = read(json!({"prompt": "x"})).unwrap();
        assert_eq!((rules.temperature, rules.top_p, rules.min_p, rules.top_k), (1.0, 1.0, 0.0, None));
        assert!(
            rules.logprobs.is_none() && rules.seed.is_none() && matches!(rules.constraint, Constraint::None)
        );
    }

    #[test]
    fn log_probabilities_are_asked_for_in_two_ways() {
        let count = |json| read(json).unwrap().logprobs;
        let messages = json!([{"role": "user", "content": "x"}]);
        assert_eq!(count(json!({"prompt": "x", "logprobs": 3})), Some(3));
        assert_eq!(count(json!({"prompt": "x", "logprobs": 0})), Some(0));
        assert_eq!(count(json!({"messages": messages, "logprobs": true})), Some(0));
        assert_eq!(count(json!({"messages": messages, "logprobs": true, "top_logprobs": 2})), Some(2));
        assert_eq!(count(json!({"messages": messages, "logprobs": false, "top_logprobs": 0})), None);
    }

    #[test]
    fn an_answer_can_be_bound_to_a_form() {
        let constraint = |json| read(json).unwrap().constraint;
        let object = constraint(json!({"response_format": {"type": "json_object"}}));
        assert!(matches!(object, Constraint::JsonSchema(schema) if schema == json!({"type": "object"})));
        let schema = json!({"name": "n", "strict": true, "schema": {"type": "integer"}});
        let named = constraint(json!({"response_format": {"type": "json_schema", "json_schema": schema}}));
        assert!(matches!(named, Constraint::JsonSchema(schema) if schema == json!({"type": "integer"})));
        assert!(matches!(constraint(json!({"response_format": {"type": "text"}})), Constraint::None));
        assert!(matches!(
            constraint(json!({"grammar": {"type": "regex", "value": "a*"}})),
            Constraint::Regex(_)
        ));
    }

    #[test]
    fn a_field_outside_of_its_range_is_refused_by_name() {
        let many = |count: usize| (0..count).map(|n| n.to_string()).collect::<Vec<_>>();
        let messages = json!([{"role": "user", "content": "x"}]);
        let format = json!({"type": "json_object"});
        for (body, word) in [
            (json!({"temperature": -1}), "temperature: expected 0 to 2, found -1"),
            (json!({"temperature": 2.5}), "temperature: "),
            (json!({"top_p": 1.5}), "top_p: "),
            (json!({"min_p": -0.1}), "min_p: "),
            (json!({"top_k": -5}), "top_k: "),
            (json!({"frequency_penalty": 3}), "frequency_penalty: "),
            (json!({"presence_penalty": -3}), "presence_penalty: "),
            (json!({"repetition_penalty": 0}), "repetition_penalty: "),
            (json!({"logit_bias": {"5": 101}}), "logit_bias.5: "),
            (json!({"logit_bias": {"300": 1}}), "logit_bias.300: expected the id of a token"),
            (json!({"logit_bias": {"the": 1}}), "logit_bias.the: "),
            (json!({"logprobs": 21}), "logprobs: expected at most 20"),
            (json!({"logprobs": true}), "logprobs: "),
            (json!({"messages": messages, "logprobs": 5}), "logprobs: "),
            (json!({"messages": messages, "top_logprobs": 5}), "top_logprobs: "),
            (json!({"messages": messages, "logprobs": true, "top_logprobs": 21}), "top_logprobs: "),
            (json!({"stop": many(17)}), "stop: expected at most 16 entries, found 17"),
            (json!({"stop": ""}), "stop: "),
            (json!({"stop": "x".repeat(70_000)}), "stop: expected at most 65536 bytes"),
            (json!({"grammar": {"type": "regex", "value": "x".repeat(70_000)}}), "grammar: "),
            (json!({"grammar": {"type": "regex", "value": "x"}, "response_format": format}), "not both"),
            (json!({"grammar": {"type": "json_schema", "value": 3}}), "grammar.value: "),
        ] {
            let error = read(body).map(|_| ()).unwrap_err();
            assert!(error.status.is_client_error() && error.message.contains(word), "{word}: {error:?}");
        }
    }
}
