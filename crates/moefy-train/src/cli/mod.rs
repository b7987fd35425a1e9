//! The command line: raw arguments, checked, to the library's calls. One file is one command.
//!
//! Only this module knows clap. It belongs to the program, not to the library, so nothing can import it.

mod calibrate;
mod card;
mod chart;
mod compare;
mod completions;
mod convert;
mod demo;
mod evaluate;
mod export;
mod finetune;
mod inspect;
mod man;
mod options;
mod pretrain;
mod report;
mod run;
mod toml;

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser, Subcommand};

use moefy_train::progress::is_silent;
use moefy_train::ranks::Ranks;
use moefy_train::train::Stop;

/// Turns a pre-trained dense LLM into a DynaMoE checkpoint: nested experts, a router, a dial.
#[derive(Debug, Parser)]
#[command(version = dynamoe_model::version!("cuda", "mpi"), about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Convert, fine-tune, evaluate and report the embedded demo model
    Demo(demo::DemoArgs),
    /// All steps for a model of yours: calibrate, convert, fine-tune, evaluate, report
    Run(run::RunArgs),
    /// Train several methods or settings with several seeds, and compare them in a table and a picture
    Compare(compare::CompareArgs),
    /// Measure a dense model's neurons on text
    Calibrate(calibrate::CalibrateArgs),
    /// Reorder a dense model's neurons and add routers
    Convert(convert::ConvertArgs),
    /// Train a converted model
    Finetune(finetune::FinetuneArgs),
    /// Measure loss, widths and cost of a dense or DynaMoE model along the dial
    Evaluate(evaluate::EvaluateArgs),
    /// Rewrite a checkpoint: as a dense model, as an add-on, in another type, in other shards
    Export(export::ExportArgs),
    /// Write report.html again from a run's report.json
    Report(report::ReportArgs),
    /// Draw loss against width as one SVG file
    Chart(chart::ChartArgs),
    /// Write a model card, README.md with the Hub's metadata, into a checkpoint's folder
    Card(card::CardArgs),
    /// Say what a checkpoint is
    Inspect(inspect::InspectArgs),
    /// Train a small dense model from scratch: how the demo's base was made
    Pretrain(pretrain::PretrainArgs),
    /// Write the completions of a shell to standard output
    Completions(completions::CompletionsArgs),
    /// Write the manual: its first page to standard output, or all pages into a folder
    Man(man::ManArgs),
}

/// Runs the command line, with these other processes.
///
/// # Errors
/// One error that says what was expected, what was found and what to do.
pub fn main(args: impl IntoIterator<Item = OsString>, ranks: &dyn Ranks) -> Result<()> {
    let args = toml::from_toml(args.into_iter().collect(), &Cli::command())?;
    let command = match Cli::try_parse_from(args) {
        Ok(cli) => cli.command,
        Err(error) => return usage(&error, ranks),
    };
    match command {
        Command::Demo(args) => demo::demo(&args, &*stop_on_signal()?, ranks),
        Command::Run(args) => run::run(&args, &*stop_on_signal()?, ranks),
        Command::Compare(args) => compare::compare(&args, &*stop_on_signal()?, ranks),
        Command::Finetune(args) => finetune::finetune(&args, &*stop_on_signal()?, ranks),
        Command::Pretrain(args) => pretrain::pretrain(&args, &*stop_on_signal()?, ranks),
        Command::Evaluate(args) => evaluate::evaluate(&args, ranks),
        _ if !ranks.is_first() => Ok(()), // the others are one process's work
        Command::Calibrate(args) => calibrate::calibrate(&args),
        Command::Convert(args) => convert::convert(&args),
        Command::Card(args) => card::card(&args),
        Command::Export(args) => export::export(&args),
        Command::Report(args) => report::report(&args),
        Command::Chart(args) => chart::chart(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Completions(args) => completions::completions(&args, Cli::command()),
        Command::Man(args) => man::man(&args, Cli::command()),
    }
}

/// Shows the usage, which somebody asked for or which their arguments do not follow.
fn usage(error: &clap::Error, ranks: &dyn Ranks) -> Result<()> {
    if ranks.size() == 1 {
        error.exit();
    }
    if ranks.is_first() {
        error.print().context("writing the usage")?;
        if error.use_stderr() {
            ranks.end(error.exit_code());
        }
    }
    Ok(()) // and wait for the first rank
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

/// Prints a line to standard output, on the first rank. A reader that has left, as `head` does, ends the program quietly.
fn print(line: &dyn Display) -> Result<()> {
    print_bytes(format!("{line}\n").as_bytes())
}

/// The same for bytes, as they are.
fn print_bytes(bytes: &[u8]) -> Result<()> {
    if is_silent() {
        return Ok(());
    }
    let mut out = std::io::stdout();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.context("writing to standard output"),
    }
}

/// Prints a line to standard error, on the first rank, unless its reader has left.
pub fn tell(line: &str) {
    if is_silent() {
        return;
    }
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Says that a training was stopped after `step` and how it goes on.
fn stopped(step: u64) -> Result<()> {
    print(&format_args!("stopped after step {step}; the same command with --resume continues"))
}

/// The first Ctrl-C (or SIGTERM, or SIGUSR1) asks training to save and stop; a second one stops at once. Where nothing is
/// trained, there is nothing to save, and the first one stops at once.
fn stop_on_signal() -> Result<Arc<Stop>> {
    let stop = Arc::new(Stop::default());
    let asked = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if asked.ask() || !asked.is_training() {
            tell("stopped; what is finished is kept, and --resume continues");
            std::process::exit(130);
        }
        tell("stopping after this step; press Ctrl-C again to stop at once");
    })
    .context("installing the handler for Ctrl-C")?;
    take_usr1_for_term();
    Ok(stop)
}

/// `mpirun` passes SIGUSR1 on at once and waits for the processes. After SIGTERM it gives them a second.
fn take_usr1_for_term() {
    extern "C" fn term(_: libc::c_int) {
        // SAFETY: `raise` may be called by a signal handler.
        unsafe { libc::raise(libc::SIGTERM) };
    }
    let term: extern "C" fn(libc::c_int) = term;
    // SAFETY: the handler calls nothing but `raise`.
    unsafe { libc::signal(libc::SIGUSR1, term as libc::sighandler_t) };
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
