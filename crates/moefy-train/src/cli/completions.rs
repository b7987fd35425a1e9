//! `completions`: what a shell needs to complete the command line.

use anyhow::Result;
use clap::{Args, Command};
use clap_complete::Shell;

use super::print_bytes;

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

pub fn completions(args: &CompletionsArgs, mut cli: Command) -> Result<()> {
    let (name, mut script) = (cli.get_name().to_owned(), Vec::new());
    clap_complete::generate(args.shell, &mut cli, name, &mut script);
    print_bytes(&script)
}
