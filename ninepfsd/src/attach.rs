//! Giving a share to a running domain by hand, for Xen releases whose libxl would start QEMU
//! for a `p9=` line (4.17), and for domains that were created without one.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use platter_xen::xenbus::XenbusState;

use crate::backends::state;
use crate::log::say;
use crate::xenstore::Xenstore;

/// How long a server that runs may take to say whether it serves a share.
const ANSWER_PATIENCE: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(50);

/// Writes both ends' nodes as libxl would, and the note by which libxl takes them away with the
/// domain.
pub fn attach(
    xs: &mut Xenstore,
    home: &str,
    domain: &str,
    tag: &str,
    (path, max_space_mib): (&str, u32),
) -> Result<()> {
    if !Path::new(path).is_absolute() {
        bail!("a share is an absolute path, not '{path}'");
    }
    let domid = domain_id(xs, domain)?;
    if xs.read(&format!("/local/domain/{domid}"))?.is_none() {
        bail!("there is no domain {domid}");
    }
    let shares = format!("/local/domain/{domid}/device/9pfs");
    let taken = xs.list(&shares)?;
    let Some(number) = (0..).find(|number: &u32| !taken.contains(&number.to_string())) else {
        bail!("domain {domid} has no number left for a share");
    };
    let fe = format!("{shares}/{number}");
    let be = format!("{home}/backend/9pfs/{domid}/{number}");
    let own = home.rsplit('/').next().unwrap_or("0").to_string();
    // What is made below a directory inherits who may read it, and a daemon that is at work adds
    // its own nodes as soon as it finds the state.
    xs.write(&be, "")?;
    xs.set_perms(&be, &[format!("n{own}"), format!("r{domid}")])?;
    for (key, value) in [
        ("frontend", fe.as_str()),
        ("frontend-id", &domid.to_string()),
        ("online", "1"),
        ("path", path),
        ("security_model", "none"),
        ("max-space", &max_space_mib.to_string()),
        ("state", "1"),
    ] {
        xs.write(&format!("{be}/{key}"), value)?;
    }
    let note = format!("/libxl/{domid}/device/9pfs/{number}");
    xs.write(&format!("{note}/frontend"), &fe)?;
    xs.write(&format!("{note}/backend"), &be)?;
    // The directory belongs to the domain before it finds a complete share in it: a Linux guest
    // that runs looks at once when there is a state, and once only.
    let owner = [format!("n{domid}"), format!("r{own}")];
    for (key, value) in
        [("tag", tag), ("backend-id", own.as_str()), ("backend", be.as_str()), ("state", "1")]
    {
        xs.write(&format!("{fe}/{key}"), value)?;
        xs.set_perms(&format!("{fe}/{key}"), &owner)?;
        xs.set_perms(&fe, &owner)?;
    }
    hear(xs, &be)
}

/// What the server makes of it. One that is not there yet takes the share up later.
fn hear(xs: &mut Xenstore, be: &str) -> Result<()> {
    for _ in 0..ANSWER_PATIENCE.as_millis() / LOOK.as_millis() {
        match state(xs, be)? {
            XenbusState::Initialising => std::thread::sleep(LOOK),
            XenbusState::Closed => bail!("the server refuses this share; its log says why"),
            _ => return Ok(()),
        }
    }
    say(format_args!("written; no platter-9pfsd has taken it up yet: does one run?"));
    Ok(())
}

/// A domain's number, given that or its name.
fn domain_id(xs: &mut Xenstore, domain: &str) -> Result<u16> {
    if let Ok(domid) = domain.parse() {
        return Ok(domid);
    }
    for domid in xs.list("/local/domain")? {
        if xs.read_text(&format!("/local/domain/{domid}/name"))?.as_deref() == Some(domain) {
            return Ok(domid.parse()?);
        }
    }
    bail!("there is no domain called '{domain}'");
}
