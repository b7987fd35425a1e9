//! `dynamoe-serve`: an OpenAI-compatible server for DynaMoE models, on mistral.rs.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    let version = dynamoe_model::version!("accelerate", "cuda", "cudnn", "flash-attn", "metal", "mkl");
    dynamoe_mistralrs::serve::main(version).await
}
