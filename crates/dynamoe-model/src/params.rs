//! Trainable tensors by name.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor, Var};

/// Trainable f32 tensors by their Hugging Face names, in the order of the names: optimizer state, checkpoints
/// and gradient norms walk them in this order, so that runs repeat bit for bit.
#[derive(Debug, Clone, Default)]
pub struct Params {
    vars: BTreeMap<String, Var>,
}

impl Params {
    /// No parameters.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a copy of `tensor`, in f32 (the master weight), as the parameter `name`.
    ///
    /// # Errors
    /// A name that is taken, or a failure of the copy.
    pub fn insert(&mut self, name: &str, tensor: &Tensor) -> Result<Var> {
        if self.vars.contains_key(name) {
            bail!("the parameter {name} exists already: each name may be inserted once");
        }
        let var = Var::from_tensor(&tensor.to_dtype(DType::F32)?)
            .with_context(|| format!("copying the parameter {name}"))?;
        self.vars.insert(name.to_owned(), var.clone());
        Ok(var)
    }

    /// The parameter `name`.
    pub fn get(&self, name: &str) -> Option<&Var> {
        self.vars.get(name)
    }

    /// All parameters, ascending in name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Var)> {
        self.vars.iter().map(|(name, var)| (name.as_str(), var))
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.vars.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.vars.is_empty()
    }

    /// How many numbers all tensors hold together.
    pub fn elements(&self) -> usize {
        self.vars.values().map(|var| var.elem_count()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn parameters_are_f32_unique_and_ordered() {
        let mut params = Params::new();
        let tensor = Tensor::ones((2, 3), DType::BF16, &Device::Cpu).unwrap();
        params.insert("b", &tensor).unwrap();
        params.insert("a", &tensor).unwrap();
        assert!(params.insert("b", &tensor).is_err());
        assert_eq!(params.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(params.get("a").unwrap().dtype(), DType::F32);
        assert_eq!((params.len(), params.elements(), params.is_empty()), (2, 12, false));
        assert!(params.get("c").is_none());
    }
}
