# The only door to everything that is built and run here.

CARGO ?= cargo

# Bare kernels. They link without any flags; these add frame pointers, so that crash reports have
# a trace, and addresses without indirection, for nothing relocates them. An explicit target keeps
# the flags away from build scripts.
KERNEL_TARGET := x86_64-unknown-linux-gnu
KERNEL_RUSTFLAGS := -Cforce-frame-pointers=yes -Crelocation-model=static

# $(call bare_kernel,PACKAGE,BINARY): build/BINARY.elf to boot, build/BINARY.debug for addr2line.
define bare_kernel
	RUSTFLAGS="$(KERNEL_RUSTFLAGS)" $(CARGO) build --release --target $(KERNEL_TARGET) \
		--target-dir build/kernel -p $(1) --bin $(2) --features bare
	cp build/kernel/$(KERNEL_TARGET)/release/$(2) build/$(2).debug
	objcopy --strip-debug build/$(2).debug build/$(2).elf
	[ "$$(stat -c %s build/$(2).elf)" -lt 1048576 ] || { echo >&2 "$(2).elf exceeds 1 MiB"; exit 1; }
endef

.PHONY: kernel
kernel:
	$(call bare_kernel,platter-kernel,platter)

# A kernel that tests the machine under Xen, or crashes in the way its command line names.
.PHONY: probe
probe:
	$(call bare_kernel,platter-arch,probe)
