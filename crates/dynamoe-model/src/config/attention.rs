//! Heads, windows and rotary embeddings: what differs from layer to layer in attention.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Architecture;
use super::keys::Keys;

/// `num_attention_heads` and `num_key_value_heads`.
pub(super) fn heads(keys: &Keys) -> Result<(usize, usize)> {
    let heads = keys.size("num_attention_heads")?;
    let shared = keys.optional_size("num_key_value_heads")?.unwrap_or(heads);
    ensure!(
        heads.is_multiple_of(shared),
        "\"num_attention_heads\" {heads} is not a multiple of \"num_key_value_heads\" {shared}"
    );
    Ok((heads, shared))
}

/// `head_dim`, or what its absence means; a null means D / H everywhere.
pub(super) fn head_dim(
    keys: &Keys,
    architecture: Architecture,
    hidden_size: usize,
    heads: usize,
) -> Result<usize> {
    let default = architecture.family().head_dim.filter(|_| keys.is_absent("head_dim"));
    let head_dim = match keys.optional_size("head_dim")?.or(default) {
        Some(given) => given,
        None => {
            ensure!(
                hidden_size.is_multiple_of(heads),
                "\"hidden_size\" {hidden_size} is not a multiple of \"num_attention_heads\" {heads} and \"head_dim\" is not given"
            );
            hidden_size / heads
        }
    };
    ensure!(
        head_dim.is_multiple_of(2),
        "\"head_dim\": rotary embeddings need an even number, found {head_dim}"
    );
    Ok(head_dim)
}

/// For each layer, whether q and k are turned. Only SmolLM3 leaves layers out.
pub(super) fn rotary_layers(keys: &Keys, architecture: Architecture, layers: usize) -> Result<Vec<bool>> {
    if architecture != Architecture::SmolLm3 {
        return Ok(vec![true; layers]);
    }
    if let Some(list) = keys.get("no_rope_layers") {
        let flags = list.as_array().filter(|list| list.len() >= layers).and_then(|list| {
            let flag = |value: &Value| value.as_bool().or(value.as_u64().map(|number| number != 0));
            list.iter().take(layers).map(flag).collect::<Option<Vec<bool>>>()
        });
        return flags.with_context(|| {
            format!(
                "\"no_rope_layers\": expected a list of 0 and 1 for each of the {layers} layers, found {list}"
            )
        });
    }
    let interval = keys.optional_size("no_rope_layer_interval")?.unwrap_or(4);
    Ok((1..=layers).map(|number| !number.is_multiple_of(interval)).collect())
}

/// Each layer's attention window, none for full attention.
pub(super) fn sliding_window(
    keys: &Keys,
    architecture: Architecture,
    rotary_layers: &[bool],
) -> Result<Vec<Option<usize>>> {
    let layers = rotary_layers.len();
    // an absent key means a window of 4096, a null none
    let given = keys.optional_size("sliding_window")?;
    let or_default = || given.or(keys.is_absent("sliding_window").then_some(4096));
    let on = keys.flag("use_sliding_window")?.unwrap_or(false);
    let (window, switch) = match architecture {
        Architecture::Llama | Architecture::Gemma | Architecture::Granite => return Ok(vec![None; layers]),
        Architecture::Mistral => return Ok(vec![or_default(); layers]),
        Architecture::Qwen2 | Architecture::Qwen3 => (or_default().filter(|_| on), true),
        Architecture::SmolLm3 => (given.filter(|_| on), true),
        Architecture::Gemma2 | Architecture::Gemma3 => (or_default(), false),
    };
    if let Some(types) = keys.get("layer_types") {
        return by_types(types, layers, window, switch);
    }
    let first = keys.optional_count("max_window_layers")?.unwrap_or(28);
    let pattern = keys.optional_size("sliding_window_pattern")?.unwrap_or(6);
    let slides = |layer: usize| match architecture {
        Architecture::Gemma2 => layer.is_multiple_of(2),
        Architecture::Gemma3 => !(layer + 1).is_multiple_of(pattern),
        Architecture::SmolLm3 => !rotary_layers[layer],
        _ => layer >= first,
    };
    Ok((0..layers).map(|layer| window.filter(|_| slides(layer))).collect())
}

/// The windows that `layer_types` gives to layers. `switch` says whether `use_sliding_window` has to be on.
fn by_types(types: &Value, layers: usize, window: Option<usize>, switch: bool) -> Result<Vec<Option<usize>>> {
    let types = types.as_array().filter(|list| list.len() == layers).with_context(|| {
        format!("\"layer_types\": expected a list with an entry for each of the {layers} layers")
    })?;
    let missing = || {
        let switch = if switch { " or \"use_sliding_window\" is not true" } else { "" };
        format!("\"layer_types\" has sliding layers, but \"sliding_window\" is not set{switch}")
    };
    let window = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => window.map(Some).with_context(missing),
        _ => bail!("\"layer_types\": expected full_attention or sliding_attention, found {kind}"),
    };
    types.iter().map(window).collect()
}
