//! The command line: raw arguments, checked, to the library's calls.

mod args;
mod compare;
mod evaluate;
mod steps;
mod whole;

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser, Subcommand};

pub use args::{ExpertArgs, from_toml};
pub use steps::measure;

/// Turns a pre-trained dense LLM into a DynaMoE checkpoint: nested experts, a router, a dial.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Convert, fine-tune, evaluate and report the embedded demo model
    Demo(whole::DemoArgs),
    /// All steps for a model of yours: calibrate, convert, fine-tune, evaluate, report
    Run(whole::RunArgs),
    /// Train methods and settings alike with several seeds; one table, one picture
    Compare(compare::CompareArgs),
    /// Measure a dense model's neurons on text
    Calibrate(steps::CalibrateArgs),
    /// Reorder a dense model's neurons and add routers
    Convert(steps::ConvertCommand),
    /// Train a converted model
    Finetune(steps::FinetuneArgs),
    /// Loss, widths and cost along the dial, of a dense or a DynaMoE model
    Evaluate(evaluate::EvaluateArgs),
    /// Rewrite a checkpoint: as a dense model, in another type, in other shards
    Export(steps::ExportArgs),
    /// Write report.html from a run's report.json again
    Report(steps::ReportArgs),
    /// Say what a checkpoint is
    Inspect(steps::InspectArgs),
    /// Train a small dense model from scratch: how the demo's base was made
    Pretrain(whole::PretrainArgs),
}

/// Runs the command line.
///
/// # Errors
/// One error that says what was expected, what was found and what to do.
pub fn main(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    let cli = Cli::parse_from(from_toml(args.into_iter().collect(), &Cli::command())?);
    match cli.command {
        Command::Demo(args) => whole::demo(&args, &*stop_on_signal()?),
        Command::Run(args) => whole::run(&args, &*stop_on_signal()?),
        Command::Compare(args) => compare::compare(&args, &*stop_on_signal()?),
        Command::Calibrate(args) => steps::calibrate(&args),
        Command::Convert(args) => steps::convert(&args),
        Command::Finetune(args) => steps::finetune(&args, &*stop_on_signal()?),
        Command::Evaluate(args) => evaluate::evaluate(&args),
        Command::Export(args) => steps::export(&args),
        Command::Report(args) => steps::report(&args),
        Command::Inspect(args) => steps::inspect(&args),
        Command::Pretrain(args) => whole::pretrain(&args, &*stop_on_signal()?),
    }
}

/// An error and its causes in one line, without the backtrace that candle makes part of its messages where
/// `RUST_BACKTRACE` is set.
pub fn message(error: &anyhow::Error) -> String {
    use candle_core::Error::WithBacktrace;
    let causes = error.chain().map(|cause| match cause.downcast_ref() {
        Some(WithBacktrace { inner, .. }) => inner.to_string(),
        _ => cause.to_string(),
    });
    causes.collect::<Vec<_>>().join(": ")
}

/// Prints a line to standard output. A reader that has left, as `head` does, ends the program quietly.
fn print(line: &dyn Display) -> Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.context("writing to standard output"),
    }
}

/// The first Ctrl-C (or SIGTERM) asks training to save and stop; a second one stops at once. Where nothing is
/// trained, there is nothing to save, and the first one stops at once.
fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) || !crate::train::is_running() {
            eprintln!("stopped; what is finished is kept, and --resume continues");
            std::process::exit(130);
        }
        eprintln!("stopping after the step at hand; again to stop at once");
    })
    .context("installing the handler for Ctrl-C")?;
    Ok(stop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_no_backtrace() {
        let inner = Box::new(candle_core::Error::Msg("no such device".into()));
        let backtrace = Box::new(std::backtrace::Backtrace::force_capture());
        let error = anyhow::Error::new(candle_core::Error::WithBacktrace { inner, backtrace });
        assert_eq!(message(&error.context("--device cuda")), "--device cuda: no such device");
    }
}
