//! `man`: the manual's pages.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Command};

use super::{print, print_bytes};

#[derive(Debug, Args)]
pub struct ManArgs {
    /// Folder to write a page for each command to
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub fn man(args: &ManArgs, cli: Command) -> Result<()> {
    let Some(out) = &args.out else {
        let mut page = Vec::new();
        clap_mangen::Man::new(cli).render(&mut page)?;
        return print_bytes(&page);
    };
    fs::create_dir_all(out)
        .and_then(|()| clap_mangen::generate_to(cli, out))
        .with_context(|| format!("--out {}: the pages cannot be written there", out.display()))?;
    print(&format_args!("{}", out.display()))
}
