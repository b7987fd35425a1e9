//! Whole-path tests of dynamoe; see `tests/`.
