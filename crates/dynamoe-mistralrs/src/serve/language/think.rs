//! The tags between which a model thinks.

use tokenizers::Tokenizer;

use super::Template;

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// A model's think tags, as tokens.
#[derive(Debug, Clone)]
pub(in super::super) struct ThinkTags {
    open: Vec<u32>,
    close: Vec<u32>,
}

impl ThinkTags {
    /// The tags, if the template writes or reads them or the tokenizer knows them as tokens.
    pub fn find(tokenizer: &Tokenizer, template: Option<&Template>) -> Option<Self> {
        let known = [OPEN, CLOSE].iter().all(|tag| tokenizer.token_to_id(tag).is_some());
        if !known && !template.is_some_and(|template| template.mentions(CLOSE)) {
            return None;
        }
        let tokens = |tag| Some(tokenizer.encode_fast(tag, false).ok()?.get_ids().to_vec());
        let tags = Self { open: tokens(OPEN)?, close: tokens(CLOSE)? };
        (!tags.open.is_empty() && !tags.close.is_empty()).then_some(tags)
    }

    /// Tags of these tokens.
    #[cfg(test)]
    pub fn of(open: Vec<u32>, close: Vec<u32>) -> Self {
        Self { open, close }
    }

    /// Tags that are one token.
    pub fn single_tokens(&self) -> impl Iterator<Item = u32> {
        [&self.open, &self.close].into_iter().filter(|tag| tag.len() == 1).map(|tag| tag[0])
    }

    /// Whether the model thinks after `tokens`, if it did (`thinking`) before the last of them.
    pub fn thinking_after(&self, tokens: &[u32], thinking: bool) -> bool {
        if tokens.ends_with(&self.close) {
            return false;
        }
        thinking || tokens.ends_with(&self.open)
    }

    /// Whether a prompt ends within thoughts: its last opening tag is not closed.
    pub fn ends_in_thoughts(&self, prompt: &[u32]) -> bool {
        let last = |tag: &[u32]| prompt.windows(tag.len()).rposition(|window| window == tag);
        match (last(&self.open), last(&self.close)) {
            (Some(open), Some(close)) => open > close,
            (open, _) => open.is_some(),
        }
    }
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) enum Part {
    /// Between the think tags.
    Thought(String),
    /// Outside of them.
    Said(String),
}

/// Tells thoughts from the rest of a text that comes piece by piece.
#[derive(Debug)]
pub(in super::super) struct Thinking {
    within: bool,
    /// What may be the beginning of a tag.
    held: String,
}

impl Thinking {
    /// At the beginning of an answer, `within` thoughts if the prompt ends there.
    pub fn new(within: bool) -> Self {
        Self { within, held: String::new() }
    }

    /// Takes more text and gives what is known of it.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        loop {
            let tag = if self.within { CLOSE } else { OPEN };
            if let Some(at) = self.held.find(tag) {
                let rest = self.held.split_off(at + tag.len());
                self.held.truncate(at);
                let before = std::mem::replace(&mut self.held, rest);
                self.tell(before, &mut parts);
                self.within = !self.within;
                continue;
            }
            let keep = beginning_of(&self.held, [tag]);
            let rest = self.held.split_off(self.held.len() - keep);
            let known = std::mem::replace(&mut self.held, rest);
            self.tell(known, &mut parts);
            return parts;
        }
    }

    /// What was held back.
    pub fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        let held = std::mem::take(&mut self.held);
        self.tell(held, &mut parts);
        parts
    }

    fn tell(&self, text: String, parts: &mut Vec<Part>) {
        if !text.is_empty() {
            parts.push(if self.within { Part::Thought(text) } else { Part::Said(text) });
        }
    }
}

/// Bytes at the end of `text` that may be the beginning of one of `words`.
pub(in super::super) fn beginning_of<'a>(text: &str, words: impl IntoIterator<Item = &'a str>) -> usize {
    let of_word = |word: &str| {
        let longest = word.len().saturating_sub(1).min(text.len());
        (1..=longest).rev().find(|&length| text.as_bytes().ends_with(&word.as_bytes()[..length])).unwrap_or(0)
    };
    words.into_iter().map(of_word).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(within: bool, pieces: &[&str]) -> (String, String) {
        let mut thinking = Thinking::new(within);
        let mut all: Vec<Part> = pieces.iter().flat_map(|piece| thinking.push(piece)).collect();
        all.extend(thinking.finish());
        all.into_iter().fold(Default::default(), |(thought, said): (String, String), part| match part {
            Part::Thought(text) => (thought + &text, said),
            Part::Said(text) => (thought, said + &text),
        })
    }

    #[test]
    fn thoughts_are_told_from_the_answer_wherever_the_pieces_end() {
        let text = "<think>Hm, 1 < 2</think> Yes <thin";
        let expected = ("Hm, 1 < 2".to_owned(), " Yes <thin".to_owned());
        assert_eq!(parts(false, &[text]), expected);
        let letters: Vec<String> = text.chars().map(String::from).collect();
        assert_eq!(parts(false, &letters.iter().map(String::as_str).collect::<Vec<_>>()), expected);
        assert_eq!(parts(true, &["so", "</th", "ink>é"]), ("so".into(), "é".into()));
        assert_eq!(parts(true, &["never ends</"]), ("never ends</".into(), String::new()));
    }

    #[test]
    fn the_phase_follows_the_tags() {
        let tags = ThinkTags { open: vec![7], close: vec![8, 9] };
        assert!(tags.thinking_after(&[1, 7], false) && !tags.thinking_after(&[1, 2], false));
        assert!(tags.thinking_after(&[7, 8], true) && !tags.thinking_after(&[8, 9], true));
        assert!(tags.ends_in_thoughts(&[1, 7, 3]) && !tags.ends_in_thoughts(&[7, 8, 9, 1]));
        assert!(tags.ends_in_thoughts(&[7, 8, 9, 7]) && !tags.ends_in_thoughts(&[1]));
    }

    #[test]
    fn the_end_of_a_text_may_begin_a_word() {
        assert_eq!(beginning_of("so <th", [OPEN, "x"]), 3);
        assert_eq!(beginning_of("so", [OPEN]), 0);
        assert_eq!(beginning_of("é", ["éa"]), 2);
        // the first byte of a letter is none of another's
        assert_eq!(beginning_of("", [OPEN]), 0);
    }
}
