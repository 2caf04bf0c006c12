//! What people are told: lines on standard error, which systemd keeps.
//!
//! Guards that nothing ends because nobody reads them any more: a terminal that was closed, a
//! disk that is full. Must never: panic, as eprintln does then.

use std::fmt::Arguments;
use std::io::{Write, stderr};

pub fn say(what: Arguments) {
    let _ = writeln!(stderr().lock(), "{what}");
}

/// Would miss: what systemd makes of a line.
#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_log_that_takes_no_more_ends_nothing() {
        const CHILD: &str = "PLATTER_9PFSD_SAYS";
        if std::env::var_os(CHILD).is_some() {
            return say(format_args!("to nobody"));
        }
        let full = OpenOptions::new().write(true).open("/dev/full").expect("it is always there");
        let itself = std::env::current_exe().expect("a test runs from a file");
        let mut child = Command::new(itself);
        child.args(["--exact", "log::tests::a_log_that_takes_no_more_ends_nothing"]);
        child.arg("--nocapture").env(CHILD, "1").stdout(Stdio::null()).stderr(full);
        assert!(child.status().expect("it runs").success());
    }
}
