//! What can be typed, and its help.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Containers in virtual machines of their own.
#[derive(Debug, Parser)]
#[command(
    name = "kata",
    version,
    max_term_width = 110,
    after_help = "\
Exit status: that of the command for `run` and `exec`, 125 when kata failed, 126 when the command cannot be run, 127 \
when there is no such command, 128 + N when signal N ended it. Other verbs: 0, 1 on failure, 2 for wrong usage.\n\n\
Signals sent to `run` and `exec` go to the command; the third SIGINT or SIGTERM kills it.\n\n\
The environment variable KATA_CONF_FILE names a configuration file; NO_COLOR turns colours off."
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How a list is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// A verb.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new container, in a virtual machine of its own
    Run(RunArgs),
    /// List containers, whoever started them
    #[command(visible_aliases = ["ls", "ps"])]
    List {
        /// How to print
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Run another command in a container
    Exec(ExecArgs),
    /// Send a signal to a container's command
    Kill {
        /// The container's name, or the beginning of it
        container: String,
        /// The signal: TERM, SIGTERM or 15
        #[arg(default_value = "TERM")]
        signal: String,
        /// To every process of the container
        #[arg(short, long)]
        all: bool,
    },
    /// Delete containers that have ended
    #[command(visible_alias = "rm")]
    Delete {
        /// Kill first what runs, and clean up what a crash left
        #[arg(short, long)]
        force: bool,
        /// The containers' names, or the beginnings of them
        #[arg(required = true)]
        containers: Vec<String>,
    },
    /// Look at the configuration
    Config {
        /// This file instead of the usual places (KATA_CONF_FILE goes first)
        #[arg(long, global = true)]
        file: Option<PathBuf>,
        /// What to do
        #[command(subcommand)]
        verb: ConfigVerb,
    },
    /// Make what the guest starts from
    Image {
        /// What to do
        #[command(subcommand)]
        verb: ImageVerb,
    },
    /// Make the guest's kernel
    Kernel {
        /// What to do
        #[command(subcommand)]
        verb: KernelVerb,
    },
    /// Check whether this host can run containers in virtual machines, and say what to do if not
    Check {
        /// How to print
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Print the version
    Version {
        /// How to print
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
}

/// `kata run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Delete the container when its command has ended
    #[arg(long)]
    pub(crate) rm: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Pass standard input on even if it is a terminal; a pipe or a file always is
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// The container's name; made up when not given
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// The directory that becomes the root file system; a tiny built-in one when not given
    #[arg(long, value_name = "DIR")]
    pub(crate) rootfs: Option<PathBuf>,
    /// Set an environment variable; without a value, take the one set here
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(crate) env: Vec<String>,
    /// The working directory
    #[arg(short, long, value_name = "DIR", default_value = "/")]
    pub(crate) workdir: String,
    /// Processors, in whole or in part
    #[arg(long, value_name = "N", value_parser = cpus)]
    pub(crate) cpus: Option<f64>,
    /// Memory: bytes, or with k, m or g
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    pub(crate) memory: Option<u64>,
    /// The command with its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, default_value = "sh")]
    pub(crate) command: Vec<String>,
}

/// `kata exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Pass standard input on even if it is a terminal; a pipe or a file always is
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Set an environment variable; without a value, take the one set here
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(crate) env: Vec<String>,
    /// The working directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// The container's name, or the beginning of it
    pub(crate) container: String,
    /// The command with its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub(crate) command: Vec<String>,
}

/// `kata config`.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigVerb {
    /// Print every value and where it comes from
    Show {
        /// How to print
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Report everything that is wrong, in one go
    Check,
    /// Say what a key is for, what it takes, its default and its value
    Explain {
        /// The key, with its section or without; all keys when not given
        key: Option<String>,
        /// How to print
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
}

/// `kata image`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageVerb {
    /// Make the kernel and the initrd, or a root image, from a distribution's kernel package
    Build(ImageArgs),
}

/// `kata image build`.
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    /// The agent; the installed one when not given
    #[arg(long, value_name = "FILE")]
    pub(crate) agent: Option<PathBuf>,
    /// A static busybox to put in, for debugging
    #[arg(long, value_name = "FILE")]
    pub(crate) busybox: Option<PathBuf>,
    /// Where the results go
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) out: PathBuf,
    /// A kernel image, instead of the distribution's package
    #[arg(long, value_name = "FILE", conflicts_with = "deb")]
    pub(crate) kernel: Option<PathBuf>,
    /// That kernel's modules
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub(crate) modules: Option<PathBuf>,
    /// A kernel package, instead of having apt fetch it
    #[arg(long, value_name = "FILE")]
    pub(crate) deb: Vec<PathBuf>,
    /// Make a root image with this file system instead of an initrd: erofs or ext4
    #[arg(long, value_name = "TYPE")]
    pub(crate) image: Option<String>,
    /// How the initrd is compressed
    #[arg(long, value_name = "NAME")]
    pub(crate) compression: Option<String>,
}

/// `kata kernel`.
#[derive(Debug, Subcommand)]
pub(crate) enum KernelVerb {
    /// Compile the small kernel that boots about three times faster (about 17 minutes of processor time)
    Build(KernelArgs),
}

/// `kata kernel build`.
#[derive(Debug, Args)]
pub(crate) struct KernelArgs {
    /// Where the results go
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) out: PathBuf,
    /// Where the source is kept, unpacked and compiled (about 2 GB); `kernel` in the output directory when not given
    #[arg(long, value_name = "DIR")]
    pub(crate) work: Option<PathBuf>,
    /// A linux-source package, instead of having apt fetch it
    #[arg(long, value_name = "FILE", conflicts_with = "source")]
    pub(crate) deb: Option<PathBuf>,
    /// An unpacked source tree, built in place
    #[arg(long, value_name = "DIR")]
    pub(crate) source: Option<PathBuf>,
    /// A further fragment of configuration
    #[arg(long, value_name = "FILE")]
    pub(crate) fragment: Vec<PathBuf>,
    /// Processes at once; as many as processors when not given
    #[arg(short, long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
}

/// A number of processors.
fn cpus(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number <= 1024.0 => Ok(number),
        _ => Err("not a number above 0 and up to 1024".to_owned()),
    }
}

/// An amount of memory, in bytes.
fn size(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix("ib").or_else(|| lower.strip_suffix('b')).unwrap_or(&lower);
    let (digits, shift) = match lower.strip_suffix(['k', 'm', 'g', 't']) {
        Some(digits) => (digits, 10 * (1 + "kmgt".find(&lower[digits.len()..]).unwrap_or(0))),
        None => (lower, 0),
    };
    let number: u64 = digits.parse().map_err(|_| "not a size such as 512m or 2g".to_owned())?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0).ok_or_else(|| "not a size a machine can have".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_after_the_command_are_the_commands() {
        let cli = Cli::parse_from(["kata", "run", "--rm", "-it", "-e", "A=b", "ls", "-l", "--rm"]);
        let Command::Run(run) = cli.command else { panic!("{cli:?}") };
        assert!(run.rm && run.tty && run.interactive);
        assert_eq!(run.command, ["ls", "-l", "--rm"]);
        let cli = Cli::parse_from(["kata", "exec", "-it", "x", "sh", "-c", "true"]);
        let Command::Exec(exec) = cli.command else { panic!("{cli:?}") };
        assert_eq!((exec.container.as_str(), exec.command.len()), ("x", 3));
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in
            [("1", 1), ("4k", 4096), ("512m", 512 << 20), ("1G", 1 << 30), ("2GiB", 2 << 30), ("3mb", 3 << 20)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "g", "0", "-1", "1.5g", "99999999999999999999", "18446744073709551615g", "1x"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn processors_are_more_than_none() {
        assert_eq!(cpus("0.5"), Ok(0.5));
        for bad in ["0", "-1", "NaN", "inf", "2000", ""] {
            assert!(cpus(bad).is_err(), "{bad}");
        }
    }
}
