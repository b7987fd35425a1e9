//! What an answer took.

use serde_json::{Value, json};

use super::Asked;
use crate::RequestDial;

/// Tokens of the prompts and of all answers, and the mean FFN width, or number of experts, over what was computed.
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
    let mut width = None;
    if let Some(model) = &asked.model {
        let dials = asked.jobs.iter().filter_map(|job| job.dial.as_ref()).chain(scored);
        let (tokens, used) =
            dials.map(|dial| dial.used()).fold((0, 0), |sum, used| (sum.0 + used.0, sum.1 + used.1));
        let mean = (tokens > 0).then(|| used as f64 / tokens as f64);
        let (name, _) = model.tell(0.0);
        usage[format!("mean_{name}")] = mean.map(|used| model.tell(used).1).into();
        width = mean.map(|used| used / model.full_size() as f64);
    }
    asked.watch.used(prompt_tokens, completion_tokens, width);
    usage
}
