//! What an answer took.

use serde_json::{Value, json};

use super::Asked;
use crate::RequestDial;

/// Tokens of the prompts and of all answers, and the mean FFN width over what was computed.
pub(super) fn usage(
    asked: &Asked,
    completion_tokens: usize,
    scored: &[std::sync::Arc<RequestDial>],
) -> Value {
    let prompt_tokens = asked.prompt_tokens();
    let mut usage = json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    });
    if let Some(model) = &asked.model {
        let dials = asked.jobs.iter().filter_map(|job| job.dial.as_ref()).chain(scored);
        let (tokens, neurons) =
            dials.map(|dial| dial.used()).fold((0, 0), |sum, used| (sum.0 + used.0, sum.1 + used.1));
        let width = neurons as f64 / tokens as f64 / model.config().intermediate_size() as f64;
        usage["mean_ffn_width"] = (tokens > 0).then_some(width).into();
    }
    asked.watch.used(prompt_tokens, completion_tokens, usage["mean_ffn_width"].as_f64());
    usage
}
