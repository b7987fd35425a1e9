//! `moefy-train`: see `moefy-train --help`.

mod cli;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Error;
use moefy_train::progress::be_silent;
use moefy_train::ranks::{self, Ranks};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    moefy_train::allocator::keep_freed_memory();
    let ranks = match ranks::join() {
        Ok(ranks) => ranks,
        Err(error) => return failed(&error, ranks::launched_rank().unwrap_or(0)),
    };
    let mut filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    if !ranks.is_first() {
        be_silent();
        filter = EnvFilter::new("off");
    }
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false) // standard error may be closed, or its disk full
        .without_time()
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match cli::main(std::env::args_os(), &*ranks) {
        Ok(()) => {
            ranks.barrier();
            ExitCode::SUCCESS
        }
        Err(error) => {
            let status = failed(&error, ranks.rank());
            end_others(&*ranks);
            status
        }
    }
}

/// Says what failed. A later rank waits first: where the first one fails too, one message is enough, and the first one ends
/// all others.
fn failed(error: &Error, rank: usize) -> ExitCode {
    let of_rank = if rank > 0 { format!("process {rank}: ") } else { String::new() };
    std::thread::sleep(Duration::from_millis(if rank > 0 { 1000 + 20 * rank as u64 } else { 0 }));
    let _ = writeln!(std::io::stderr(), "error: {of_rank}{}", cli::message(error));
    ExitCode::FAILURE
}

/// The others would wait for this one.
fn end_others(ranks: &dyn Ranks) {
    if ranks.size() > 1 {
        ranks.end(1);
    }
}
