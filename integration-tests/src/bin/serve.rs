//! The server under test: exactly `dynamoe-serve`.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    dynamoe_mistralrs::serve::main(env!("CARGO_PKG_VERSION")).await
}
