//! `dynamoe-serve`: mistral.rs's OpenAI-compatible server with DynaMoE models in it.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    dynamoe_mistralrs::serve::main().await
}
