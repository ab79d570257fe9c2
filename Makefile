# `make help` lists the targets.

PREFIX ?= /usr/local
release := target/x86_64-unknown-linux-gnu/release/vireo

.NOTPARALLEL:
.PHONY: help build setup images rareimages demo shell test bench soak fuzz install dist clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST)

build: ## build the static binary
	cargo build --release

setup: ## install what the guests need, fetch kernels, create images
	tests/host/setup test

images:
	tests/host/setup

demo: images build ## boot Debian's kernels: one, two, four CPUs
	tests/host/with-host tests/host/demo

shell: images build ## a shell in a guest
	tests/host/with-host tests/host/demo shell

test: setup build ## run all tests; Linux guests run in emulated hosts where KVM here cannot run them
	tests/host/with-host cargo test

bench: images build ## measure the inner loops, then boots, exec and devices against QEMU
	cargo bench --bench micro
	tests/host/with-host cargo bench --bench boot --bench exec --bench devices

rareimages:
	tests/host/setup soak

soak: rareimages build ## the long tests, boots for SOAK_MINUTES (60) or until one fails, the tests on Linux 6.12
	cargo build --examples
	tests/host/with-host sh -c 'cargo test --test soak --test soak_disks --test soak_net --test soak_kernels && NET_MIB=100 cargo test --test all -- net::a_tap net::user_networking vhost::the_kernel_moves && tests/host/soak'
	VIREO_HOST_KERNEL=full-6.12 tests/host/with-host cargo test --test all -- boot:: endings:: exec:: kernels:: net:: shares:: vhost:: virtio::

fuzz: ## run each fuzz target for FUZZ_SECONDS (60); needs a nightly toolchain
	fuzz/run $(FUZZ_SECONDS)

install: build ## install to $(DESTDIR)$(PREFIX)
	install -Dm755 $(release) "$(DESTDIR)$(PREFIX)/bin/vireo"

dist: build ## the binary and its checksum in target/dist
	install -Dm755 $(release) target/dist/vireo
	cd target/dist && sha256sum vireo >vireo.sha256

clean: ## remove everything that was built or fetched
	tests/host/down
	cargo clean
