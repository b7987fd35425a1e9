//! `dynamoe-budgets`: solves the table of budgets of an MoE model.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    dynamoe_mistralrs::moe::solve::main().await
}
