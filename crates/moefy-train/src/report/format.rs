//! Numbers as people read them.

/// A number with `decimals`, a true minus sign, and words where it is not finite.
pub(super) fn number(value: f64, decimals: usize) -> String {
    if value.is_nan() {
        return "not a number".into();
    }
    if value.is_infinite() {
        return "infinite".into();
    }
    if value.abs() >= 1e6 {
        return format!("{value:.2e}").replace('-', "\u{2212}");
    }
    let text = format!("{value:.decimals$}");
    // No "−0.00".
    match text.strip_prefix('-') {
        Some(rest) if rest.chars().all(|c| c == '0' || c == '.') => rest.to_owned(),
        Some(rest) => format!("\u{2212}{rest}"),
        None => text,
    }
}

/// A loss in nats.
pub(super) fn nats(value: f64) -> String {
    number(value, 3)
}

/// A share as a percentage.
pub(super) fn percent(share: f64, decimals: usize) -> String {
    if share.is_finite() { format!("{}%", number(share * 100.0, decimals)) } else { number(share, 0) }
}

/// `± stderr`, or nothing where no error was measured.
pub(super) fn plus_minus(stderr: f64, decimals: usize) -> String {
    if stderr.is_finite() && stderr > 0.0 {
        format!(" ± {}", number(stderr, decimals))
    } else {
        String::new()
    }
}

/// A dial value without trailing zeros, at most four decimals; a dash where a method has no dial.
pub(super) fn dial(sensitivity: f64) -> String {
    if sensitivity.is_nan() {
        return "–".into();
    }
    let text = number(sensitivity, 4);
    if !text.contains('.') || text.contains('e') {
        return text;
    }
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A count with a space between thousands that does not break.
pub(super) fn count(value: usize) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(c);
    }
    out
}

/// A large count in short: `1.5M`.
pub(super) fn short_count(value: f64) -> String {
    let units = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")];
    for (size, unit) in units {
        if value.abs() >= size {
            let text = format!("{:.2}", value / size);
            return format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'));
        }
    }
    number(value, 0)
}

/// At most `max` characters, with an ellipsis where some were cut.
pub(super) fn shorten(text: &str, max: usize) -> String {
    if text.chars().count() <= max {
        return text.to_owned();
    }
    let cut: String = text.chars().take(max.saturating_sub(1)).collect();
    format!("{}…", cut.trim_end())
}
