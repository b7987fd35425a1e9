//! Errors of the layer: each says what was expected, what was found and, where one exists, the way out.

/// What can go wrong when a DynaMoE layer is configured or built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The `dynamoe` section of config.json is missing or is not what the format specifies.
    #[error("config.json, section \"dynamoe\": {0}")]
    Config(String),
    /// The checkpoint was written for a newer version of the format.
    #[error(
        "the checkpoint has format version {found}, this build reads versions 1 to {supported}: update dynamoe, or export the checkpoint again with an older moefy-train"
    )]
    Version {
        /// The version in config.json.
        found: u32,
        /// The newest version this build reads.
        supported: u32,
    },
    /// Expert widths are not a strictly increasing list that ends at the FFN's width.
    #[error(
        "expert_widths {widths:?} do not fit an FFN of width {intermediate_size}: expected at least one width, strictly increasing, the last equal to {intermediate_size}"
    )]
    Widths {
        /// The widths found.
        widths: Vec<usize>,
        /// The width of the dense FFN.
        intermediate_size: usize,
    },
    /// A number of experts or shells that the FFN cannot have.
    #[error("{what} must be from {least} to {most}, found {found}")]
    Count {
        /// What is counted.
        what: &'static str,
        /// The smallest number that is possible.
        least: usize,
        /// The largest.
        most: usize,
        /// The number found.
        found: usize,
    },
    /// A dial value outside its range.
    #[error("{dial} must be a number from 0 to 1, found {found}")]
    Dial {
        /// `sensitivity` or `budget`.
        dial: &'static str,
        /// The value found.
        found: f64,
    },
    /// A tensor of the wrong shape.
    #[error("{tensor}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// The tensor's name in the checkpoint.
        tensor: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A tensor that whoever hands tensors out could not hand out, in their words.
    #[error("{0}")]
    Tensor(String),
    /// An error of candle's.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::wrap(other),
        }
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
