//! What the two initramfs hold: dom0's, which only finds dom0's root, and the guests', which is
//! all of a guest.
//!
//! Module names are resolved through the kernel's own modules.dep; each group is a file in
//! /modules that lists paths in loading order, so that an init needs insmod and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::command::Run;
use crate::cpio::Archive;
use crate::suite::{Layout, Suite, text};

/// Modules that dom0 needs before it has its root.
const DOM0_MODULES: [(&str, &[&str]); 1] =
    [("base", &["virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "9pnet_virtio", "9p"])];

/// Modules of the guests; `base` is loaded always, the others when the kernel's command line
/// names them in `rig.modules=`.
const GUEST_MODULES: [(&str, &[&str]); 3] = [
    ("base", &["xen-blkfront", "ext4", "crc32c_generic"]),
    ("9p", &["9pnet_xen", "9p"]),
    ("pci", &["xen-pcifront", "nvme"]),
];

/// Scripts of a guest: their name in it and their place in the checkout.
const GUEST_SCRIPTS: [(&str, &str); 2] =
    [("init", "rig/guest/init.sh"), ("jobs.sh", "rig/guest/jobs.sh")];

/// Programs of the dom0 root that every guest carries, beside busybox, whose shell prefers its own
/// applets: only names that busybox does not have are of use.
const GUEST_PROGRAMS: [&str; 2] = ["/usr/sbin/mkfs.ext4", "/usr/sbin/fsck.ext4"];

/// fio and its libraries are ten times the rest, so they are an archive of their own, appended
/// for the guests that ask for it.
const FIO_PROGRAMS: [&str; 1] = ["/usr/bin/fio"];

/// The text that dom0's initramfs is made from, for its stamp.
///
/// # Errors
/// When a source file cannot be read.
pub fn dom0_sources(layout: &Layout) -> Result<String> {
    Ok(format!("{DOM0_MODULES:?}\n{}", read(&layout.source("rig/dom0/initrd-init.sh"))?))
}

/// The text that the guests' initramfs is made from, for its stamp.
///
/// # Errors
/// When a source file cannot be read.
pub fn guest_sources(layout: &Layout) -> Result<String> {
    let mut sources = format!("{GUEST_MODULES:?}{GUEST_PROGRAMS:?}{FIO_PROGRAMS:?}\n");
    for (_, path) in GUEST_SCRIPTS {
        sources.push_str(&read(&layout.source(path))?);
    }
    Ok(sources)
}

/// Writes dom0's initramfs.
///
/// # Errors
/// When a part is missing from the dom0 root.
pub fn dom0(layout: &Layout, suite: Suite, file: &Path) -> Result<()> {
    let root = layout.dom0_root(suite);
    let mut tree = Tree::with_busybox(&root)?;
    tree.add("init", read(&layout.source("rig/dom0/initrd-init.sh"))?.into_bytes());
    tree.add_modules(&root, &DOM0_MODULES)?;
    tree.write(file)
}

/// Writes the guests' initramfs, plain and with fio, into `folder`.
///
/// # Errors
/// When a part is missing from the dom0 root.
pub fn guest(layout: &Layout, suite: Suite, folder: &Path) -> Result<()> {
    let root = layout.dom0_root(suite);
    let mut tree = Tree::with_busybox(&root)?;
    for (name, path) in GUEST_SCRIPTS {
        tree.add(name, read(&layout.source(path))?.into_bytes());
    }
    tree.add_modules(&root, &GUEST_MODULES)?;
    tree.add_programs(&root, &GUEST_PROGRAMS)?;
    tree.write(&folder.join("initrd"))?;
    tree.add_programs(&root, &FIO_PROGRAMS)?;
    tree.write(&folder.join("initrd-fio"))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", text(path)))
}

/// Files of an initramfs by their path in it.
struct Tree {
    files: BTreeMap<String, Vec<u8>>,
}

impl Tree {
    fn with_busybox(root: &Path) -> Result<Self> {
        let mut tree = Tree { files: BTreeMap::new() };
        tree.add_from(root, "/usr/bin/busybox", "bin/busybox")?;
        Ok(tree)
    }

    fn add(&mut self, name: &str, body: Vec<u8>) {
        self.files.insert(name.to_owned(), body);
    }

    /// Adds a file of the root under another name; links in the root are followed.
    fn add_from(&mut self, root: &Path, source: &str, name: &str) -> Result<()> {
        let path = resolve(root, source)?;
        let body = fs::read(&path).with_context(|| format!("cannot read {}", text(&path)))?;
        self.add(name, body);
        Ok(())
    }

    /// Adds programs and every library that the root's own loader finds for them.
    fn add_programs(&mut self, root: &Path, programs: &[&str]) -> Result<()> {
        for program in programs {
            let name = program.rsplit('/').next().unwrap_or(program);
            self.add_from(root, program, &format!("bin/{name}"))?;
            let list = Run::new("chroot").path(root).arg("ldd").arg(*program).root().output()?;
            for library in list.split_whitespace().filter(|word| word.starts_with('/')) {
                let name = library.rsplit('/').next().unwrap_or(library);
                // All into one folder; the loader has its fixed place (psABI).
                let place = if name.starts_with("ld-linux") { "lib64" } else { "lib" };
                self.add_from(root, library, &format!("{place}/{name}"))?;
            }
        }
        Ok(())
    }

    fn add_modules(&mut self, root: &Path, groups: &[(&str, &[&str])]) -> Result<()> {
        let modules = Modules::of(root)?;
        for (group, names) in groups {
            let mut order = Vec::new();
            for name in *names {
                modules.resolve(name, &mut order)?;
            }
            let mut lines = String::new();
            for path in &order {
                let file = modules.folder.join(path);
                let name = path.rsplit('/').next().unwrap_or(path).trim_end_matches(".xz");
                let body = match path.ends_with(".xz") {
                    true => Run::new("xz -dc").path(&file).bytes()?,
                    false => fs::read(&file)?,
                };
                lines.push_str(&format!("/modules/{name}\n"));
                self.add(&format!("modules/{name}"), body);
            }
            self.add(&format!("modules/{group}"), lines.into_bytes());
        }
        Ok(())
    }

    fn write(&self, file: &Path) -> Result<()> {
        let partial = file.with_extension("partial");
        let output = BufWriter::new(File::create(&partial)?);
        let mut archive = Archive::new(output);
        let mut folders = BTreeSet::new();
        for name in self.files.keys() {
            for (end, _) in name.match_indices('/') {
                folders.insert(&name[..end]);
            }
        }
        for folder in folders {
            archive.directory(folder)?;
        }
        archive.link("bin/sh", "busybox")?;
        for (name, body) in &self.files {
            archive.file(name, body)?;
        }
        archive.finish()?.flush()?;
        fs::rename(&partial, file)?;
        Ok(())
    }
}

/// Follows links inside `root`, whose absolute targets mean the root and not the host.
fn resolve(root: &Path, source: &str) -> Result<PathBuf> {
    let mut path = root.join(source.trim_start_matches('/'));
    // As many links as the kernel would follow.
    for _ in 0..40 {
        let Ok(target) = fs::read_link(&path) else { return Ok(path) };
        path = match target.strip_prefix("/") {
            Ok(inside) => root.join(inside),
            Err(_) => path.with_file_name("").join(target),
        };
    }
    bail!("{source} is a chain of links without an end")
}

/// The kernel modules of a root.
struct Modules {
    folder: PathBuf,
    /// By name, with `-` for `_`: the path below `folder` and the paths it depends on.
    files: BTreeMap<String, (String, Vec<String>)>,
    built_in: BTreeSet<String>,
}

impl Modules {
    fn of(root: &Path) -> Result<Self> {
        let all = root.join("usr/lib/modules");
        let version = fs::read_dir(&all)?.next().context("the dom0 root has no modules")??;
        let folder = version.path();
        let mut files = BTreeMap::new();
        for line in read(&folder.join("modules.dep"))?.lines() {
            let Some((path, needs)) = line.split_once(':') else { continue };
            let needs = needs.split_whitespace().map(str::to_owned).collect();
            files.insert(module_name(path), (path.to_owned(), needs));
        }
        let built_in = read(&folder.join("modules.builtin"))?.lines().map(module_name).collect();
        Ok(Modules { folder, files, built_in })
    }

    /// Appends the paths of a module and of what it needs, in loading order, once each.
    fn resolve(&self, name: &str, order: &mut Vec<String>) -> Result<()> {
        let name = module_name(name);
        if self.built_in.contains(&name) {
            return Ok(());
        }
        let found = self.files.get(&name);
        let (path, needs) = found.with_context(|| format!("the kernel has no module {name}"))?;
        // modules.dep lists what a module needs directly and indirectly, the deepest last.
        for path in needs.iter().rev().chain([path]) {
            if !order.contains(path) {
                order.push(path.clone());
            }
        }
        Ok(())
    }
}

/// `kernel/fs/ext4/ext4.ko.xz` and `ext4` are both `ext4`; `_` and `-` are one.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    let name = file.split(".ko").next().unwrap_or(file);
    name.replace('_', "-")
}

#[cfg(test)]
mod tests {
    //! Would miss: a module that is missing from a suite's kernel; every set-up shows that.
    use super::*;

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let line = |path: &str, needs: &[&str]| {
            let needs = needs.iter().map(|need| need.to_string()).collect();
            (module_name(path), (path.to_owned(), needs))
        };
        let modules = Modules {
            folder: PathBuf::new(),
            files: BTreeMap::from([
                line("fs/ext4.ko.xz", &["fs/jbd2.ko.xz", "lib/crc16.ko.xz"]),
                line("fs/jbd2.ko.xz", &[]),
                line("lib/crc16.ko.xz", &[]),
            ]),
            built_in: BTreeSet::from(["xen-blkfront".to_owned()]),
        };
        let mut order = Vec::new();
        for name in ["xen_blkfront", "jbd2", "ext4"] {
            modules.resolve(name, &mut order).unwrap();
        }
        assert_eq!(order, ["fs/jbd2.ko.xz", "lib/crc16.ko.xz", "fs/ext4.ko.xz"]);
        assert!(modules.resolve("nosuch", &mut order).is_err());
    }
}
