//! Text to batches: [`source`] reads documents, [`tokenizer`] frames them, [`cache`] keeps their tokens on disk,
//! [`batches`] packs them for training, [`documents`] and [`pairs`] pad them for evaluation ([`padded`]).

pub mod batches;
pub mod cache;
pub mod documents;
pub mod padded;
pub mod pairs;
pub mod source;
pub mod tokenizer;

pub use batches::{Batch, Batches, BatchesConfig, Origin, Split, WeightedCache};
pub use cache::{TokenCache, default_cache_dir};
pub use documents::{DocumentBatches, DocumentLimits};
pub use padded::PaddedBatch;
pub use pairs::{PairScores, Pairs};
pub use source::{DataSource, TextFormat};
pub use tokenizer::{Framing, load_tokenizer};
