//! JSON as Python writes it: `NaN`, `Infinity` and `-Infinity` are numbers there, and an error everywhere else.

use serde_json::Value;

/// What Python's `json` writes for numbers that JSON does not have.
const NOT_FINITE: [&str; 3] = ["NaN", "Infinity", "-Infinity"];

/// Parses JSON, with or without a byte-order mark. A number that is not finite becomes the string of its name, so that
/// a reader that needs the number can refuse it by its name.
///
/// # Errors
/// What is wrong with the text, and where.
pub fn parse(text: &str) -> serde_json::Result<Value> {
    let text = text.trim_start_matches('\u{feff}');
    serde_json::from_str(text)
        .or_else(|error| serde_json::from_str(&quote_not_finite(text)).map_err(|_| error))
}

/// Removes the keys whose numbers are not finite, at any depth; no other program could read them. Returns their names.
pub fn remove_not_finite(value: &mut Value) -> Vec<String> {
    let mut removed = Vec::new();
    match value {
        Value::Object(map) => {
            map.retain(|key, value| {
                let keep = !value.as_str().is_some_and(|text| NOT_FINITE.contains(&text));
                if !keep {
                    removed.push(key.clone());
                }
                keep
            });
            map.values_mut().for_each(|value| removed.extend(remove_not_finite(value)));
        }
        Value::Array(list) => list.iter_mut().for_each(|value| removed.extend(remove_not_finite(value))),
        _ => {}
    }
    removed
}

/// Puts quotation marks around every bare [`NOT_FINITE`].
fn quote_not_finite(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 16);
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let taken = if first == '"' {
            string_len(rest)
        } else if let Some(word) = NOT_FINITE.iter().find(|word| rest.starts_with(**word)) {
            quoted.extend(["\"", word, "\""]);
            rest = &rest[word.len()..];
            continue;
        } else {
            first.len_utf8()
        };
        quoted.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    quoted
}

/// Bytes of the string that `text` begins with, quotation marks included.
fn string_len(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            b'"' if !escaped => return at + 1,
            b'\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_that_are_not_finite_become_their_names() {
        let text =
            r#"{"a": NaN, "NaN": "a \"NaN\\", "b": [1, -Infinity, {"c": Infinity}], "é": "Infinity:"}"#;
        let mut value = parse(text).unwrap();
        let list = json!([1, "-Infinity", {"c": "Infinity"}]);
        assert_eq!(value, json!({"a": "NaN", "NaN": "a \"NaN\\", "b": list, "é": "Infinity:"}));
        assert_eq!(remove_not_finite(&mut value), ["a", "c"]);
        assert_eq!(value, json!({"NaN": "a \"NaN\\", "b": [1, "-Infinity", {}], "é": "Infinity:"}));
    }

    #[test]
    fn other_errors_are_said_as_they_are() {
        for broken in ["{\"a\": NaNa}", "{\"a\": \"NaN", "{\"a\": }", "", "{\"a\": Infinity"] {
            let expected = serde_json::from_str::<Value>(broken).unwrap_err().to_string();
            assert_eq!(parse(broken).unwrap_err().to_string(), expected, "{broken}");
        }
    }
}
