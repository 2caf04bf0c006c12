//! Running the host's commands: as root where needed, their output kept in a log, and an error
//! that names the command and shows the log's end.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// How many last lines of a failed command's log its error shows.
const LOG_TAIL_LINES: usize = 12;

/// A command line under construction.
pub struct Run {
    words: Vec<String>,
    environment: Vec<(String, String)>,
    as_root: bool,
    log: Option<PathBuf>,
}

impl Run {
    /// The words of a command, split at blanks: for fixed text, not for paths.
    pub fn new(words: &str) -> Self {
        Run {
            words: words.split_whitespace().map(str::to_owned).collect(),
            environment: Vec::new(),
            as_root: false,
            log: None,
        }
    }

    /// The same command with one more argument, taken whole.
    pub fn arg(mut self, word: impl Into<String>) -> Self {
        self.words.push(word.into());
        self
    }

    /// The same command with a path as one more argument.
    pub fn path(self, path: &Path) -> Self {
        let word = crate::suite::text(path);
        self.arg(word)
    }

    /// Runs the command as root, by sudo where the user is not root.
    pub fn root(mut self) -> Self {
        self.as_root = true;
        self
    }

    /// Sets a variable of the command's environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Appends the command's output to `path` instead of keeping it from view.
    pub fn log(mut self, path: &Path) -> Self {
        self.log = Some(path.to_owned());
        self
    }

    fn command(&self) -> Result<Command> {
        let mut words = Vec::new();
        if self.as_root && !is_root()? {
            words.push("sudo".to_owned());
        }
        // env(1) carries the variables through sudo, which drops those of its caller.
        if !self.environment.is_empty() {
            words.push("env".to_owned());
            words.extend(self.environment.iter().map(|(name, value)| format!("{name}={value}")));
        }
        words.extend(self.words.iter().cloned());
        let (program, arguments) = words.split_first().context("an empty command")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        Ok(command)
    }

    /// Runs the command to its end.
    ///
    /// # Errors
    /// When it cannot be started or exits non-zero; the message shows the end of its output.
    pub fn run(self) -> Result<()> {
        let log = self.log.clone().unwrap_or_else(|| PathBuf::from("/dev/null"));
        let output = OpenOptions::new().append(true).create(true).open(&log);
        let output = output.with_context(|| format!("cannot write {}", log.display()))?;
        let errors: File = output.try_clone()?;
        let status = self.command()?.stdout(output).stderr(errors).status();
        let status = status.with_context(|| format!("cannot run {}", self.words.join(" ")))?;
        if status.success() {
            return Ok(());
        }
        bail!("`{}` failed ({status}){}", self.words.join(" "), tail(&log))
    }

    /// Runs the command and hands back what it wrote to its standard output.
    ///
    /// # Errors
    /// When it cannot be started or exits non-zero; the message holds what it said.
    pub fn output(self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.bytes()?).into_owned())
    }

    /// As `output`, for a command that writes bytes rather than text.
    ///
    /// # Errors
    /// As `output`.
    pub fn bytes(self) -> Result<Vec<u8>> {
        let done = self.command()?.output();
        let done = done.with_context(|| format!("cannot run {}", self.words.join(" ")))?;
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stderr);
            bail!("`{}` failed ({}): {}", self.words.join(" "), done.status, said.trim());
        }
        Ok(done.stdout)
    }
}

/// Whether this process may do everything itself.
fn is_root() -> Result<bool> {
    let id = Command::new("id").arg("-u").output().context("cannot run id")?;
    Ok(id.stdout.starts_with(b"0\n"))
}

/// Whether a command of this name can be found, the administrator's folders included.
pub fn exists(name: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin"])
        .any(|folder| Path::new(folder).join(name).exists())
}

/// The last lines of a log, indented, with a line of introduction; empty when there is no log.
pub fn tail(log: &Path) -> String {
    let Ok(bytes) = fs::read(log) else { return String::new() };
    let said = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return String::new();
    }
    let first = lines.len().saturating_sub(LOG_TAIL_LINES);
    let shown: String = lines[first..].iter().map(|line| format!("\n    {line}")).collect();
    format!("; the end of {}:{shown}", log.display())
}
