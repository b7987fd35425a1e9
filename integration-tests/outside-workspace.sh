#!/usr/bin/env bash
# Builds a workspace outside of this repository that uses the plugin as a git dependency, as docs/engine.md says,
# and checks that mistral.rs knows the architecture there. What is committed is what is built.
#
#   integration-tests/outside-workspace.sh [cargo's arguments, e.g. --offline]
#
# Compiled dependencies go to CARGO_TARGET_DIR (default: this repository's target), so that they are shared.
set -euo pipefail

repository=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
revision=$(git -C "$repository" rev-parse HEAD)
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$repository/target}
outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT

mkdir "$outside/src"
cat > "$outside/Cargo.toml" <<TOML
[package]
name = "outside"
version = "0.0.0"
edition = "2024"

[workspace]

[dependencies]
dynamoe-mistralrs = { git = "file://$repository", rev = "$revision", default-features = false }
mistralrs-core = "0.8.1"

[patch.crates-io]
mistralrs-core = { git = "file://$repository", rev = "$revision" }

[profile.dev]
opt-level = 2
debug = "line-tables-only"

[profile.dev.package."*"]
opt-level = 3
debug = false

[profile.dev.package.mistralrs-core]
opt-level = 1
debug = false
TOML
cat > "$outside/src/main.rs" <<'RUST'
use dynamoe_mistralrs as _;
use mistralrs_core::NormalLoaderType;

fn main() {
    let by_name: NormalLoaderType = "dynamoe".parse().unwrap();
    let by_architecture = NormalLoaderType::from_causal_lm_name("DynaMoeForCausalLM").unwrap();
    assert_eq!(by_name, by_architecture);
    println!("mistral.rs loads {by_architecture}");
}
RUST
cp "$repository/Cargo.lock" "$outside/Cargo.lock" # the same versions, so that nothing is compiled twice
mkdir "$outside/.cargo" && cp "$repository/.cargo/config.toml" "$outside/.cargo/"

cd "$outside"
cargo run "$@"
