//! Text that the model writes itself, as a user asks for it.

use anyhow::{Context, Result};

/// `self[:TOKENS]` in the place of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnText {
    /// Tokens to write; none to go by the training's.
    pub tokens: Option<u64>,
}

impl OwnText {
    /// What a user writes in the place of a path.
    pub const NAME: &str = "self";

    /// What `argument` asks for; none if it is a path.
    pub(super) fn asked(argument: &str) -> Option<Result<Self>> {
        let rest = argument.strip_prefix(Self::NAME)?;
        if rest.is_empty() {
            return Some(Ok(Self { tokens: None }));
        }
        let number = rest.strip_prefix(':')?;
        let tokens = number.parse().ok().filter(|&tokens: &u64| tokens > 0);
        Some(tokens.map(|tokens| Self { tokens: Some(tokens) }).with_context(|| {
            format!(
                "{argument}: expected self or self:TOKENS, a whole number of 1 or more, found {number:?} (a file of this \
                 name is ./{argument})"
            )
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_tokens_may_be_asked_for() {
        let asked = |argument: &str| OwnText::asked(argument).map(|own| own.unwrap().tokens);
        assert_eq!(asked("self"), Some(None));
        assert_eq!(asked("self:20000"), Some(Some(20_000)));
        for file in ["./self", "self.txt", "selfish:2", "a/self"] {
            assert_eq!(asked(file), None, "{file}");
        }
        for wrong in ["self:0", "self:", "self:-1", "self:0.5", "self:many", "self:1e6"] {
            let error = OwnText::asked(wrong).unwrap().unwrap_err().to_string();
            assert!(error.contains("self:TOKENS") && error.contains(&format!("./{wrong}")), "{error}");
        }
    }
}
