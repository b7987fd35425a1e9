//! Rewrites a checkpoint: as an ordinary dense model, in another type, in other shards.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use dynamoe::tensors::is_order;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::checkpoint::copy::{copy_tensor, write_folder};
use crate::checkpoint::{Checkpoint, TensorSpec, float_dtype, plan_shards};
use crate::tensors::router_tensors;

/// What to change.
#[derive(Debug, Clone, Default)]
pub struct ExportOptions {
    /// Leave out the routers, the separate weights and the `dynamoe` section: any engine loads the result as the base
    /// architecture.
    pub dense: bool,
    /// Type of the weights (F32, F16 or BF16); none keeps each tensor's. Routers and the order of neurons stay in F32.
    pub dtype: Option<Dtype>,
    /// Largest shard; none keeps the source's shards.
    pub max_shard_bytes: Option<u64>,
    /// Replace an existing output folder.
    pub force: bool,
}

/// Writes `source` into the new folder `out` as `options` say. `written` is told, after each tensor, the bytes written so far
/// and all that will be.
///
/// # Errors
/// `dense` for a model that is dense already, a type that weights cannot have, a value that is not finite or
/// too large for the type, an output folder that exists or cannot be written. Nothing is left then.
pub fn export(
    source: &Checkpoint,
    options: &ExportOptions,
    out: &Path,
    written: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    if let Some(dtype) = options.dtype {
        ensure!(float_dtype(dtype).is_some(), "weights can be F32, F16 or BF16, found {dtype}");
    }
    let source = &if options.dense { source.dense()? } else { source.clone() };
    let mut config = source.json().clone();
    set_dtype(&mut config, options.dtype);
    let routers: HashSet<String> =
        router_tensors(source.config()).into_iter().map(|(name, _)| name).collect();
    let mut plan = source.plan();
    for shard in &mut plan {
        let kept = |name: &str| routers.contains(name) || is_order(name);
        for spec in shard.iter_mut().filter(|spec| !kept(&spec.name)) {
            spec.dtype = options.dtype.filter(|_| float_dtype(spec.dtype).is_some()).unwrap_or(spec.dtype);
        }
    }
    plan.retain(|shard| !shard.is_empty());
    if let Some(max) = options.max_shard_bytes {
        plan = plan_shards(plan.into_iter().flatten().collect(), max);
    }
    let specs: Vec<_> = plan.iter().flatten().cloned().collect();
    write_folder(source, &config, plan, out, options.force, |writer| {
        write_each(&specs, written, |spec| copy_tensor(source, &spec.name, spec.dtype, writer))
    })
    .with_context(|| format!("exporting {}", source.dir().display()))
}

/// Writes tensors one by one; see [`export`] for `written`.
pub(crate) fn write_each(
    specs: &[TensorSpec],
    written: &mut dyn FnMut(u64, u64),
    mut write: impl FnMut(&TensorSpec) -> Result<()>,
) -> Result<()> {
    let all = specs.iter().map(TensorSpec::len).sum();
    let mut done = 0;
    specs.iter().try_for_each(|spec| {
        write(spec)?;
        done += spec.len();
        written(done, all);
        Ok(())
    })
}

/// Names another type of weights in a config.json that names one.
pub(crate) fn set_dtype(config: &mut Value, dtype: Option<Dtype>) {
    let Some(name) = dtype.and_then(torch_name) else { return };
    for key in ["torch_dtype", "dtype"] {
        if let Some(value) = config.get_mut(key) {
            *value = json!(name);
        }
    }
}

/// The type's name in config.json's `torch_dtype`.
fn torch_name(dtype: Dtype) -> Option<&'static str> {
    match dtype {
        Dtype::F32 => Some("float32"),
        Dtype::F16 => Some("float16"),
        Dtype::BF16 => Some("bfloat16"),
        _ => None,
    }
}
