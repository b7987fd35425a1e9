//! `dynamoe-budgets`: solves the table of budgets of an MoE model.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    let version = dynamoe_model::version!("accelerate", "cuda", "cudnn", "flash-attn", "metal", "mkl");
    dynamoe_mistralrs::moe::solve::main(version).await
}
