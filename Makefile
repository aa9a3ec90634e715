# The chores of this repository. `make help` lists them; CI runs the same ones.

# Where an installation goes; everything lies below it.
PREFIX ?= /opt/kata
# Where `make run` and `make test` install for themselves, touching nothing else on the machine.
STAGE := $(CURDIR)/build/prefix
TARGET := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),$(CURDIR)/target)
ARCH := $(shell uname -m)
GUEST_TARGET := $(ARCH)-unknown-linux-gnu
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
export PATH := $(HOME)/.cargo/bin:$(PATH)

# What building and running need, and what only the tests need.
PACKAGES := gcc libc6-dev make ca-certificates libcap-ng-dev qemu-system-x86 seabios busybox-static erofs-utils
TEST_PACKAGES := containerd runc iproute2 bsdutils procps

KATA := $(TARGET)/release/kata
AGENT := $(TARGET)/$(GUEST_TARGET)/release/kata-agent
GUEST := $(CURDIR)/build/guest

say = @printf '\033[1m==> %s\033[0m\n' "$(1)"

.PHONY: help run test deps test-deps rust build guest kernel install uninstall stage unit e2e check fmt clippy deny doc bench clean

help: ## What can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

run: deps stage ## Set everything up and run a container in a virtual machine
	$(call say,Running a container in a virtual machine)
	@$(SUDO) $(STAGE)/bin/kata run --rm -- sh /etc/glance "$$(uname -r)" "$$(uname -n)" "$$(nproc)"

test: deps test-deps stage unit e2e ## Set everything up and pass all the tests
	@if [ -s $(CURDIR)/build/not-run ]; then echo 'Could not run here:'; cat $(CURDIR)/build/not-run; fi

deps: rust ## Install what building and running need
	@./tools/packages $(PACKAGES)

test-deps: ## Install what the tests need besides
	@./tools/packages $(TEST_PACKAGES)

rust: ## Install Rust, where it is missing or too old
	@./tools/rust

build: $(KATA) $(AGENT) ## Build the programs

# Cargo knows better than make what is out of date.
.PHONY: $(KATA) $(AGENT)
$(KATA):
	$(call say,Building kata)
	@cargo build --release --locked -p kata

# Static, because it is the first process of a guest that has no libraries. The flag is for this target alone, so that
# the host's programs, build scripts among them, stay as they are.
$(AGENT):
	$(call say,Building kata-agent)
	@cargo build --release --locked -p agent --target $(GUEST_TARGET) \
		--config 'target.$(GUEST_TARGET).rustflags=["-Ctarget-feature=+crt-static"]'

guest: build ## Make the guest's kernel and initrd
	$(call say,Making the guest)
	@$(KATA) image build --agent $(AGENT) --busybox /bin/busybox --out $(GUEST)

kernel: build ## Build the small kernel that boots about twice as fast (takes a while)
	@./tools/packages flex bison bc libelf-dev libssl-dev xz-utils
	$(call say,Building the small kernel)
	@$(KATA) kernel build --out $(GUEST)

stage: guest
	@$(MAKE) --no-print-directory copy DEST=$(STAGE)

install: guest ## Install below PREFIX (default /opt/kata)
	@$(SUDO) $(MAKE) --no-print-directory copy DEST=$(PREFIX)
	$(call say,Installed below $(PREFIX). Put $(PREFIX)/bin on the path of containerd to use the runtime type io.containerd.kata.v2)

.PHONY: copy
copy:
	@install -d $(DEST)/bin $(DEST)/libexec $(DEST)/share/kata
	@install -m 755 $(KATA) $(DEST)/bin/kata
	@ln -sf kata $(DEST)/bin/containerd-shim-kata-v2
	@install -m 755 $(AGENT) $(DEST)/libexec/kata-agent
	@install -m 755 /bin/busybox $(DEST)/share/kata/busybox
	@install -m 644 $(GUEST)/vmlinuz $(GUEST)/initrd.img $(DEST)/share/kata/
	@if [ -f $(GUEST)/vmlinux-small ]; then install -m 644 $(GUEST)/vmlinux-small $(DEST)/share/kata/; fi

uninstall: ## Remove what `make install` put below PREFIX
	@$(SUDO) rm -f $(PREFIX)/bin/kata $(PREFIX)/bin/containerd-shim-kata-v2 $(PREFIX)/libexec/kata-agent \
		$(addprefix $(PREFIX)/share/kata/,busybox vmlinuz vmlinux-small initrd.img)
	@$(SUDO) rmdir --ignore-fail-on-non-empty -p $(PREFIX)/bin $(PREFIX)/libexec $(PREFIX)/share/kata 2>/dev/null || true

unit: ## The tests beside the code
	$(call say,Unit tests)
	@$(SUDO) env PATH="$(PATH)" HOME="$(HOME)" CARGO_TARGET_DIR=$(TARGET) cargo test --locked --workspace --exclude e2e

e2e: ## The end-to-end tests: real engines, real virtual machines
	$(call say,End-to-end tests)
	@rm -f $(CURDIR)/build/not-run
	@$(SUDO) env PATH="$(PATH)" HOME="$(HOME)" CARGO_TARGET_DIR=$(TARGET) KATA_PREFIX=$(STAGE) \
		KATA_NOT_RUN=$(CURDIR)/build/not-run cargo test --locked -p e2e -- --test-threads=1

check: fmt clippy deny doc ## What CI checks besides the tests

fmt:
	$(call say,Formatting)
	@cargo fmt --all --check

clippy:
	$(call say,Lints)
	@cargo clippy --locked --workspace --all-targets -- -D warnings

deny:
	$(call say,Dependencies)
	@command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	@cargo deny --all-features check bans licenses sources

doc:
	$(call say,Documentation)
	@RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps --document-private-items --quiet

bench: deps test-deps stage ## Figures and ratios against runc
	@$(SUDO) env PATH="$(PATH)" HOME="$(HOME)" CARGO_TARGET_DIR=$(TARGET) KATA_PREFIX=$(STAGE) \
		cargo run --locked --release -p benches

clean: ## Remove what was built
	@rm -rf $(CURDIR)/build
	@cargo clean
