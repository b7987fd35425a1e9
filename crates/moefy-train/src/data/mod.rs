//! Text to batches: [`source`] finds files, here or on the hub (`hub`) or those that the model writes (`own`), and reads their documents (`kind` by their names, `pieces` of text, `rows`
//! of Parquet, `records` to documents), [`tokenizer`] frames them with the tokens that `closing` finds, [`cache`] keeps their tokens on disk,
//! [`batches`] packs them for training, [`documents`], [`pairs`] and [`choices`] pad them for evaluation ([`padded`]). [`texts`] does
//! all of that for one model. [`corpus`] is text that this program generates.

pub mod batches;
pub mod cache;
pub mod choices;
mod closing;
pub mod corpus;
pub mod documents;
mod format;
mod hub;
mod kind;
mod own;
pub mod padded;
pub mod pairs;
mod panics;
mod pieces;
mod records;
mod rows;
pub mod source;
pub mod texts;
pub mod tokenizer;

pub use batches::{Batch, Batches, BatchesConfig, Origin, Split, WeightedCache};
pub use cache::TokenCache;
pub use choices::Choices;
pub use documents::{DocumentBatches, DocumentLimits};
pub use format::{DOCUMENT_MARKER, TextFormat};
pub use own::OwnText;
pub(crate) use padded::scored_by_others;
pub use padded::{BATCH_TOKENS, PaddedBatch, scored_tokens, subsample};
pub use pairs::Pairs;
pub use records::{Document, TEXT_FIELD};
pub use source::DataSource;
pub use texts::{CALIBRATION_TOKENS, SampleShape, Scope, TextOptions, Texts, calibration_batches};
pub use tokenizer::{Framing, load_tokenizer};
