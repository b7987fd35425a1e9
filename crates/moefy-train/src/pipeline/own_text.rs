//! The stage before all others where the model writes the training text itself.

use std::path::Path;

use anyhow::Result;
use dynamoe_model::RoutedModel;
use dynamoe_model::ops::Precision;

use super::lab::Lab;
use crate::writing;

/// The name of the file, among the intermediate results of a run.
pub const OWN_TEXT: &str = "self.jsonl";

/// Lets the model write the text that the lab has planned, if it has planned one, into the file at `path`, unless it is
/// there. From then on the lab's sources name that file. The writer is `dense`, or without it the lab's model, which is in
/// memory only meanwhile. It computes in f32, however the text is trained on: the process's precision is f32 afterwards.
///
/// # Errors
/// Those of [`writing::write`]; tensors that do not fit.
pub fn write_own_text(lab: &mut Lab<'_>, dense: Option<&RoutedModel>, path: &Path) -> Result<()> {
    let Some(plan) = &lab.own_text else { return Ok(()) };
    Precision::F32.set()?;
    lab.ranks.first(|| {
        if path.is_file() {
            return Ok(());
        }
        match dense {
            Some(dense) => writing::write(dense, &lab.texts, plan, path),
            None => writing::write(&lab.teacher()?, &lab.texts, plan, path),
        }
    })?;
    let own = lab.inputs.data.iter_mut().filter(|source| source.own.is_some());
    own.for_each(|source| source.path = path.to_owned());
    Ok(())
}
