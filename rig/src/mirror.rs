//! Where Debian's packages come from: the host's own apt configuration, never an address of ours.

use std::fs;

use anyhow::{Result, bail};

use crate::command::Run;

/// Suites of Debian's own archive, besides the host's code name, that prove an apt source to be
/// one: its mirror carries every release.
const DEBIAN_SUITES: [&str; 8] =
    ["bookworm", "trixie", "forky", "sid", "oldstable", "stable", "testing", "unstable"];

/// What debootstrap is told: the address of a Debian mirror and the proxy to reach it by.
#[derive(Debug, Clone)]
pub struct Mirror {
    /// Empty where the host names none; debootstrap then uses Debian's default.
    pub address: String,
    /// Value for `http_proxy`, where apt has one.
    pub proxy: Option<String>,
}

impl Mirror {
    /// Asks the environment (`DEBIAN_MIRROR`), then the host's apt.
    ///
    /// # Errors
    /// When the host's mirror has a form that debootstrap cannot use.
    pub fn of_host() -> Result<Self> {
        let proxy = Run::new("apt-config shell PROXY Acquire::http::Proxy").output();
        let proxy = proxy.ok().and_then(|line| proxy_of(&line));
        if let Ok(address) = std::env::var("DEBIAN_MIRROR") {
            return Ok(Mirror { address, proxy });
        }
        // apt reads both forms of sources, its own options included, so no parser is needed here.
        let targets = Run::new("apt-get indextargets --format")
            .arg("$(REPO_URI) $(RELEASE) $(COMPONENT)")
            .arg("Created-By: Packages")
            .output()
            .unwrap_or_default();
        let address = match debian_source(&targets) {
            None => String::new(),
            Some(source) => resolve(source)?,
        };
        Ok(Mirror { address, proxy })
    }
}

/// The first source in apt's list that is Debian's main archive.
fn debian_source(targets: &str) -> Option<&str> {
    targets.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (source, suite, component) = (words.next()?, words.next()?, words.next()?);
        (DEBIAN_SUITES.contains(&suite) && component == "main").then_some(source)
    })
}

/// A mirror list on disk stands for its first entry; other schemes pass through.
fn resolve(source: &str) -> Result<String> {
    let Some(list) = source.strip_prefix("mirror+file:") else {
        return Ok(source.to_owned());
    };
    let list = list.trim_end_matches('/');
    let entries = fs::read_to_string(list).unwrap_or_default();
    match entries.lines().find_map(|line| line.split_whitespace().next()) {
        Some(entry) => Ok(entry.to_owned()),
        None => bail!("apt's mirror list {list} names no mirror; set DEBIAN_MIRROR to one"),
    }
}

/// The value in a line such as `PROXY='http://proxy:3142'`.
fn proxy_of(line: &str) -> Option<String> {
    let value = line.trim().strip_prefix("PROXY='")?.strip_suffix('\'')?;
    (!value.is_empty() && value != "DIRECT").then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    //! Would miss: a mirror that apt reaches by a method which debootstrap lacks.
    use super::*;

    #[test]
    fn the_main_archive_is_told_from_security_and_from_other_vendors() {
        let targets = "http://x.example/security/ bookworm-security main\n\
                       http://x.example/tools/ nodistro main\n\
                       http://x.example/debian/ bookworm non-free\n\
                       http://x.example/debian/ bookworm main\n";
        assert_eq!(debian_source(targets), Some("http://x.example/debian/"));
        assert_eq!(debian_source("http://x.example/ubuntu/ noble main\n"), None);
    }

    #[test]
    fn a_proxy_is_taken_from_apt_unless_it_says_direct() {
        assert_eq!(proxy_of("PROXY='http://p:1'\n").as_deref(), Some("http://p:1"));
        assert_eq!(proxy_of("PROXY='DIRECT'\n"), None);
        assert_eq!(proxy_of(""), None);
    }
}
