//! Letters out of bytes that come piece by piece.

/// Holds back the bytes of a letter until all of it has come.
#[derive(Debug, Default)]
pub(in super::super) struct Letters {
    begun: Vec<u8>,
}

impl Letters {
    /// Takes bytes and gives all letters that are complete. What cannot become a letter any more is given as U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.begun.extend_from_slice(bytes);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.begun) {
                Ok(whole) => {
                    text.push_str(whole);
                    self.begun.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.begun[..valid]));
                    match error.error_len() {
                        None => {
                            self.begun.drain(..valid);
                            return text;
                        }
                        Some(wrong) => {
                            text.push('\u{fffd}');
                            self.begun.drain(..valid + wrong);
                        }
                    }
                }
            }
        }
    }

    /// What is left of a letter that never got complete.
    pub fn finish(&mut self) -> String {
        if std::mem::take(&mut self.begun).is_empty() { String::new() } else { "\u{fffd}".into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(pieces: &[&[u8]]) -> Vec<String> {
        let mut letters = Letters::default();
        let mut told: Vec<String> = pieces.iter().map(|piece| letters.push(piece)).collect();
        told.push(letters.finish());
        told
    }

    #[test]
    fn a_letter_is_told_when_it_is_complete() {
        assert_eq!(told(&[b"a", "é".as_bytes(), b" b"]), ["a", "é", " b", ""]);
        assert_eq!(told(&[&[0xf0, 0x9f], &[0x98], &[0x80, b'!']]), ["", "", "😀!", ""]);
    }

    #[test]
    fn what_is_no_letter_is_replaced_as_in_the_whole() {
        for bytes in
            [&b"\xff\xfe"[..], b"a\xe2\x82b", b"\xe2\x82", b"\xf0\x9f\x98\xe2\x82\xac", b"\x80\x80\xf0"]
        {
            let whole = String::from_utf8_lossy(bytes);
            let pieces: Vec<&[u8]> = bytes.chunks(1).collect();
            assert_eq!(told(&pieces).concat(), whole);
        }
    }
}
