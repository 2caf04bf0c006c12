//! Which Debian release the nested machine runs, and where its parts lie on the host.
//!
//! A suite is a Xen version in the field: trixie has 4.20, bookworm 4.17. Package names that carry
//! a version come from here; nothing else in the rig names one.

use std::path::{Path, PathBuf};

/// A Debian release that the rig can boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Suite {
    /// Debian 13: Xen 4.20, Linux 6.12, QEMU 10.0.
    Trixie,
    /// Debian 12: Xen 4.17, Linux 6.1, QEMU 7.2.
    Bookworm,
}

impl Suite {
    /// The release's code name, as debootstrap and apt call it.
    pub fn name(self) -> &'static str {
        match self {
            Suite::Trixie => "trixie",
            Suite::Bookworm => "bookworm",
        }
    }

    /// The version in Debian's Xen package names.
    pub fn xen_version(self) -> &'static str {
        match self {
            Suite::Trixie => "4.20",
            Suite::Bookworm => "4.17",
        }
    }

    /// The packages of the dom0 root, beyond debootstrap's minbase.
    pub fn dom0_packages(self) -> String {
        format!(
            "xen-utils-{},xenstore-utils,qemu-system-xen,kmod,iproute2,fio,e2fsprogs,qemu-utils,\
             busybox-static,procps,util-linux,pciutils,gdisk,lvm2,udev,xz-utils,\
             grub-xen-host,drbd-utils,mdadm",
            self.xen_version()
        )
    }

    /// What Xen's command line says of QEMU's emulated IOMMU. With its defaults, Xen 4.20 has an
    /// interrupt storm once a device is passed through.
    pub fn iommu_arguments(self) -> &'static str {
        match self {
            Suite::Trixie => "iommu=no-qinval,no-intpost",
            Suite::Bookworm => "iommu=1",
        }
    }
}

/// Where the rig keeps what it builds; every path is below `build/rig` of the checkout.
pub struct Layout {
    repository: PathBuf,
}

impl Layout {
    /// The layout of the checkout whose root directory is `repository`.
    pub fn new(repository: PathBuf) -> Self {
        Layout { repository }
    }

    /// A file of the checkout, by its path from the root.
    pub fn source(&self, path: &str) -> PathBuf {
        self.repository.join(path)
    }

    /// `build/rig`.
    pub fn rig(&self) -> PathBuf {
        self.repository.join("build/rig")
    }

    /// The folder of one suite's parts.
    pub fn suite(&self, suite: Suite) -> PathBuf {
        self.rig().join(suite.name())
    }

    /// The Debian root that QEMU is run from. Each Xen has the QEMU of its own release: under a
    /// younger one a PVH guest of Xen 4.17 powers off before its first line.
    pub fn host_root(&self, suite: Suite) -> PathBuf {
        self.suite(suite).join("host")
    }

    /// The suite's dom0 root, unpacked.
    pub fn dom0_root(&self, suite: Suite) -> PathBuf {
        self.suite(suite).join("root")
    }

    /// The folder that guests boot from: kernel and initramfs, seen by dom0 over 9p.
    pub fn guest(&self, suite: Suite) -> PathBuf {
        self.suite(suite).join("guest")
    }
}

/// `path` as text for a command line; the rig's own paths are all UTF-8.
pub fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
