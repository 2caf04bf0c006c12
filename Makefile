# The only door to everything that is built and run here.

CARGO ?= cargo
RIG := $(CARGO) run -q --release -p platter-rig --

.PHONY: all
all: kernel ninepfsd tool

# platter's story, on a machine with nothing but Rust: KEEP=1 leaves a dom0 shell at the end.
.PHONY: demo
demo: prerequisites kernel ninepfsd
	$(RIG) demo

# What CI runs: style, units and vectors, the simulator, foreign image tools, nested Xen.
.PHONY: test
test: prerequisites tidy unit kernels
	$(RIG) test

# Everything but nested Xen.
.PHONY: unit
unit: prerequisites readers
	$(CARGO) test --workspace

# Image readers of other authors, for second opinions on what platter writes. Without a network
# their comparisons are left out, and the tests say so.
READERS := build/venv-images
.PHONY: readers
readers:
	@[ -e $(READERS)/installed ] || { \
		mkdir -p build && python3 -m venv $(READERS) && \
		$(READERS)/bin/pip install -q --disable-pip-version-check \
			libvhdi-python libvmdk-python libqcow-python dissect.hypervisor && \
		touch $(READERS)/installed; } || \
	echo "readers of other authors could not be installed (pip needs python3-venv, a compiler" \
		"and a network): nothing is compared with them" >&2

# Only what is missing, and qemu-img, the oracle of the image tests.
.PHONY: prerequisites
prerequisites:
	@sh rig/prerequisites.sh

# Style is a test.
.PHONY: tidy
tidy:
	$(CARGO) fmt --all --check
	$(CARGO) run -q -p platter-tidy

.PHONY: kernels
kernels: kernel loadgen hostile probe ninepfsd build/fsx

# The 9p server for dom0: build/platter-9pfsd.
.PHONY: ninepfsd
ninepfsd:
	$(CARGO) build --release -p platter-9pfsd
	mkdir -p build
	cp target/release/platter-9pfsd ninepfsd/platter-9pfsd.service \
		ninepfsd/platter-9pfsd.sysusers build/

.PHONY: tool
tool:
	$(CARGO) build --release -p platter-tool

# Scenarios by name: make rig NAMES="filesystem read-only" SUITE=bookworm; all without names.
.PHONY: rig
rig: kernels
	$(RIG) test $(if $(NAMES),$(NAMES),--all)

# Side by side in one run, as ratios; the machine emulates.
.PHONY: bench
bench: kernels
	$(RIG) bench $(NAMES)

# The image engine beside qemu-img and other Rust engines, on the same files.
.PHONY: bench-image
bench-image: prerequisites tool
	$(CARGO) build --release --manifest-path tool/bench/peers/Cargo.toml --target-dir build/peers
	bash tool/bench/image.sh target/release/platter build/peers/release/platter-bench-peers

# Each fuzz target for SECONDS; needs a nightly toolchain and cargo-fuzz. Inputs may be longer than
# libFuzzer would make them. What parses images and disks has no unsafe code: without the address
# sanitizer and a call for each comparison it is tried ten times as often.
SECONDS ?= 60
.PHONY: fuzz
fuzz: prerequisites tool
	sh fuzz/corpus.sh
	for target in $$(ls fuzz/fuzz_targets | sed 's/\.rs$$//'); do \
		case $$target in image_*|disk_*) safe="-s none --no-trace-compares" ;; *) safe= ;; esac; \
		(cd fuzz && $(CARGO) +nightly fuzz run $$safe "$$target" -- \
			-max_total_time=$(SECONDS) -max_len=4194304 -len_control=0) || exit 1; \
	done

# Bare kernels. They link without any flags; these add frame pointers, so that crash reports have
# a trace, and addresses without indirection, for nothing relocates them. An explicit target keeps
# the flags away from build scripts.
KERNEL_TARGET := x86_64-unknown-linux-gnu
KERNEL_RUSTFLAGS := -Cforce-frame-pointers=yes -Crelocation-model=static

# $(call bare_kernel,PACKAGE,BINARY): build/BINARY.elf to boot, build/BINARY.debug for addr2line.
define bare_kernel
	RUSTFLAGS="$(KERNEL_RUSTFLAGS)" $(CARGO) build --profile bare --target $(KERNEL_TARGET) \
		--target-dir build/kernel -p $(1) --bin $(2) --features bare
	cp build/kernel/$(KERNEL_TARGET)/bare/$(2) build/$(2).debug
	objcopy --strip-all build/$(2).debug build/$(2).elf
	[ "$$(stat -c %s build/$(2).elf)" -lt 1048576 ] || { echo >&2 "$(2).elf exceeds 1 MiB"; exit 1; }
endef

.PHONY: kernel
kernel:
	$(call bare_kernel,platter-kernel,platter)

# A guest that floods its disks, for the rig's scenarios and benches.
.PHONY: loadgen
loadgen:
	$(call bare_kernel,platter-loadgen,loadgen)

# A guest that attacks the backend of its disks.
.PHONY: hostile
hostile:
	$(call bare_kernel,platter-hostile,hostile)

# A kernel that tests the machine under Xen, or crashes in the way its command line names.
.PHONY: probe
probe:
	$(call bare_kernel,platter-arch,probe)

# A file-system exerciser by others, for a guest: no release of Debian has one. Static, for either
# release's guest runs it. See DESIGN.md, section 7.
build/fsx:
	RUSTFLAGS="-Ctarget-feature=+crt-static -Cstrip=symbols" $(CARGO) install -q --locked \
		--target $(KERNEL_TARGET) --root build/outside --target-dir build/outside/target fsx@0.3.2
	cp build/outside/bin/fsx build/fsx

# Thousands of seeds of the simulator, then of power cuts in workloads on every kind of image:
# IMAGE_SEEDS for each kind, each with some 200 cuts. SEEDS and SEED choose the simulator's. A
# failing seed is printed with the command that runs it again.
SEEDS ?= 5000
SEED ?= 1
IMAGE_SEEDS ?= 40
.PHONY: sim
sim:
	$(CARGO) run --release -p platter-sim -- --seeds $(SEEDS) --seed $(SEED)
	PLATTER_SEEDS=$(IMAGE_SEEDS) $(CARGO) test --release -p platter-tool --test images -- _cut
