//! How documents are found inside a file, and which of their tokens count.

use dynamoe_model::chat::ChatTemplate;

/// What stands between two documents of a .txt file unless another is named.
pub const DOCUMENT_MARKER: &str = "<|endoftext|>";

/// How documents are found inside a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextFormat {
    /// `.txt`: what stands between two documents.
    pub marker: String,
    /// Records: the field that holds the text. None for `text`, else `prompt` and `completion`, else `messages`.
    pub field: Option<String>,
    /// Records: how messages are written out.
    pub chat: Option<ChatTemplate>,
    /// Records: whether the loss is taken on completions and the assistant's messages only.
    pub mask_prompt: bool,
}

impl Default for TextFormat {
    fn default() -> Self {
        Self { marker: DOCUMENT_MARKER.into(), field: None, chat: None, mask_prompt: false }
    }
}
