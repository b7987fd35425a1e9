//! The program under test: exactly `dynamoe-budgets`.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    dynamoe_mistralrs::moe::solve::main(env!("CARGO_PKG_VERSION")).await
}
