//! What a program says of itself with `--version`.
//!
//! The commit is read out of git's log of checked-out commits while the program itself is compiled, and by it alone: a new
//! commit compiles a program again, and no library. The build script of the program's crate names the log in `GIT_LOG`, or an
//! empty file where there is no git.

/// Digits of a commit that are shown.
const DIGITS: usize = 12;

/// The commit that git's log ends with: each line is `OLD NEW AUTHOR …`.
pub const fn commit(log: &[u8]) -> Option<[u8; DIGITS]> {
    let mut at = log.len().saturating_sub(1);
    while at > 0 && log[at - 1] != b'\n' {
        at -= 1;
    }
    while at < log.len() && log[at] != b' ' {
        at += 1;
    }
    let mut found = [0; DIGITS];
    let mut digit = 0;
    while digit < DIGITS {
        at += 1;
        if at >= log.len() || !log[at].is_ascii_hexdigit() {
            return None;
        }
        found[digit] = log[at];
        digit += 1;
    }
    Some(found)
}

/// `VERSION (commit COMMIT, features A, B)`, for features and whether they are built in.
pub fn text(version: &str, commit: Option<[u8; DIGITS]>, features: &[(&str, bool)]) -> String {
    let on: Vec<&str> = features.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    let features =
        if on.is_empty() { "no features".to_owned() } else { format!("features {}", on.join(", ")) };
    let commit = commit.map(|commit| format!("commit {}, ", String::from_utf8_lossy(&commit)));
    format!("{version} ({}{features})", commit.unwrap_or_default())
}

/// The version of the program that calls this, which lists the features of its crate that matter: [`text`].
#[macro_export]
macro_rules! version {
    ($($feature:literal),*) => {{
        const COMMIT: Option<[u8; 12]> = $crate::version::commit(include_bytes!(env!("GIT_LOG")));
        static TEXT: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| {
            let features = [$(($feature, cfg!(feature = $feature))),*];
            $crate::version::text(env!("CARGO_PKG_VERSION"), COMMIT, &features)
        });
        TEXT.as_str()
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_commit_of_the_log_is_told() {
        let (old, new) = ("0".repeat(40), "b396bd2e50bcf4bf3d3a63bc274706a0dc535ce3");
        let first = format!("{old} {new} A B <a@b> 1795755472 +0000\tclone: from x\n");
        let log = format!("{first}{new} {} A B <a@b> 1795755473 +0000\tcommit: 0 0\n", "a1".repeat(20));
        let told = |log: &str| text("0.1.0", commit(log.as_bytes()), &[("cuda", true), ("mkl", false)]);
        assert_eq!(told(&first), "0.1.0 (commit b396bd2e50bc, features cuda)");
        assert_eq!(told(&log), "0.1.0 (commit a1a1a1a1a1a1, features cuda)");
        for none in ["", "\n", "\n\n", &old, &format!("{old} "), &format!("{old} short\n")] {
            assert_eq!(told(none), "0.1.0 (features cuda)", "{none:?}");
        }
        assert_eq!(text("0.1.0", None, &[("cuda", false)]), "0.1.0 (no features)");
    }
}
