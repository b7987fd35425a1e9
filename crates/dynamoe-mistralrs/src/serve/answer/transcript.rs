//! The text of an answer, piece by piece.

use std::collections::VecDeque;

use crate::serve::{
    language::{Letters, SharedLanguage, beginning_of},
    run::{Chosen, End, TokenLogprob},
};

/// A piece of an answer: some text, and the tokens that it came of if their probabilities are asked for.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Piece {
    pub text: String,
    pub logprobs: Vec<TokenLogprob>,
    /// Neurons that its tokens used, of a DynaMoE model.
    pub neurons: Vec<f64>,
}

/// Makes text of tokens, up to a stop string.
pub(super) struct Transcript {
    language: SharedLanguage,
    stops: Vec<String>,
    /// Whether a token that ends the answer is told: those who score texts count on one for each that was written.
    tells_end: bool,
    letters: Letters,
    /// What may be the beginning of a stop string.
    held: String,
    /// Tokens not yet told, with the place in the text where each begins.
    tokens: VecDeque<(usize, TokenLogprob)>,
    /// What the tokens used whose text is held back.
    neurons: Vec<f64>,
    /// Bytes of text told, and of text known.
    told: usize,
    known: usize,
    finish: Option<&'static str>,
}

impl Transcript {
    pub fn new(language: SharedLanguage, stops: Vec<String>, tells_end: bool) -> Self {
        Self {
            language,
            stops,
            tells_end,
            letters: Letters::default(),
            held: String::new(),
            tokens: VecDeque::new(),
            neurons: Vec::new(),
            told: 0,
            known: 0,
            finish: None,
        }
    }

    /// OpenAI's word for why the answer ends; none before its end.
    pub fn finish(&self) -> Option<&'static str> {
        self.finish
    }

    /// Takes a token, which may be the last, and gives what is known of the text.
    pub fn push(&mut self, chosen: Chosen, end: Option<End>) -> Piece {
        let ends = end == Some(End::Token);
        if let Some(logprob) = chosen.logprob.filter(|_| !ends || self.tells_end) {
            self.tokens.push_back((self.known, logprob));
        }
        if !ends {
            self.neurons.extend(chosen.neurons);
            let text = self.letters.push(self.language.text(chosen.token));
            self.known += text.len();
            self.held.push_str(&text);
        }
        if end.is_some() {
            self.held.push_str(&self.letters.finish());
            self.finish = Some(if ends { "stop" } else { "length" });
        }
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.finish = Some("stop");
            self.held.truncate(at);
            let last = self.told + at;
            // what belongs to the stop string is not told
            self.tokens.retain(|(begin, _)| *begin < last);
            return self.tell(at, usize::MAX);
        }
        if self.finish.is_some() {
            return self.tell(self.held.len(), usize::MAX);
        }
        let keep = beginning_of(&self.held, self.stops.iter().map(String::as_str));
        let sure = self.held.len() - keep;
        self.tell(sure, self.told + sure)
    }

    /// Tells `bytes` of what is held, and the tokens that begin before the place `before`.
    fn tell(&mut self, bytes: usize, before: usize) -> Piece {
        let rest = self.held.split_off(bytes);
        let text = std::mem::replace(&mut self.held, rest);
        self.told += text.len();
        let count = self.tokens.iter().take_while(|(begin, _)| *begin < before).count();
        let neurons = if text.is_empty() { Vec::new() } else { std::mem::take(&mut self.neurons) };
        let logprobs = self.tokens.drain(..count).map(|(_, logprob)| logprob).collect();
        Piece { text, logprobs, neurons }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::serve::language::tests::of_bytes;

    /// What is told of `text`, a byte a token, and the number of tokens told with each piece.
    fn told(text: &[u8], stops: &[&str], end: End) -> (Vec<(String, usize)>, Option<&'static str>) {
        let mut transcript =
            Transcript::new(of_bytes(), stops.iter().map(|stop| (*stop).into()).collect(), false);
        let mut tokens: Vec<u32> = text.iter().map(|&byte| byte.into()).collect();
        if end == End::Token {
            tokens.push(256);
        }
        let mut pieces = Vec::new();
        for (n, &token) in tokens.iter().enumerate() {
            if transcript.finish().is_some() {
                break;
            }
            let logprob = Some(TokenLogprob { token, logprob: 0.0, top: Vec::new() });
            let piece = transcript.push(
                Chosen { token, logprob, neurons: Some(n as f64), at: Instant::now() },
                (n + 1 == tokens.len()).then_some(end),
            );
            pieces.push((piece.text, piece.logprobs.len()));
        }
        pieces.retain(|piece| *piece != Default::default());
        (pieces, transcript.finish())
    }

    fn pieces(pieces: &[(&str, usize)]) -> Vec<(String, usize)> {
        pieces.iter().map(|(text, tokens)| ((*text).into(), *tokens)).collect()
    }

    #[test]
    fn letters_are_told_as_they_come() {
        let (told_now, finish) = told("aé".as_bytes(), &[], End::Length);
        assert_eq!((told_now.concat_text(), finish), ("aé".into(), Some("length")));
        assert_eq!(told(b"ab", &[], End::Token), (pieces(&[("a", 1), ("b", 1)]), Some("stop")));
        // a letter that is cut is told as in a whole answer
        let (cut, _) = told("a😀".as_bytes().split_last().unwrap().1, &[], End::Length);
        assert_eq!(cut.concat_text(), "a\u{fffd}");
    }

    #[test]
    fn the_token_that_ends_an_answer_may_be_told() {
        for tells_end in [false, true] {
            let mut transcript = Transcript::new(of_bytes(), vec![], tells_end);
            let logprob = Some(TokenLogprob { token: 256, logprob: -1.0, top: Vec::new() });
            let piece = transcript
                .push(Chosen { token: 256, logprob, neurons: None, at: Instant::now() }, Some(End::Token));
            assert_eq!((piece.text.as_str(), piece.logprobs.len()), ("", usize::from(tells_end)));
        }
    }

    #[test]
    fn a_stop_string_is_never_told() {
        let (all, finish) = told(b"one, two, three", &[", th", "xyz"], End::Length);
        assert_eq!((all.concat_text(), finish), ("one, two".into(), Some("stop")));
        assert_eq!(all.iter().map(|piece| piece.1).sum::<usize>(), 8);
        // what only began like one is told after all, with its tokens
        let (all, finish) = told(b"one, two", &[", th"], End::Token);
        assert_eq!((all.concat_text(), finish), ("one, two".into(), Some("stop")));
        assert_eq!(all.iter().map(|piece| piece.1).sum::<usize>(), 8);
        // the first of several in the text counts
        assert_eq!(told(b"abcd", &["cd", "bc"], End::Length).0.concat_text(), "a");
        assert_eq!(told(b"stop", &["stop"], End::Length), (vec![], Some("stop")));
    }

    #[test]
    fn what_held_back_tokens_used_is_told_with_their_text() {
        let mut transcript = Transcript::new(of_bytes(), vec!["bcd".into()], false);
        let mut neurons = Vec::new();
        for (n, token) in b"abce".iter().enumerate() {
            let chosen =
                Chosen { token: (*token).into(), logprob: None, neurons: Some(n as f64), at: Instant::now() };
            let piece = transcript.push(chosen, (n == 3).then_some(End::Length));
            neurons.push((piece.text, piece.neurons));
        }
        let none = (String::new(), vec![]);
        let all = [("a".into(), vec![0.0]), none.clone(), none, ("bce".into(), vec![1.0, 2.0, 3.0])];
        assert_eq!(neurons, all);
    }

    trait ConcatText {
        fn concat_text(&self) -> String;
    }

    impl ConcatText for Vec<(String, usize)> {
        fn concat_text(&self) -> String {
            self.iter().map(|piece| piece.0.as_str()).collect()
        }
    }
}
