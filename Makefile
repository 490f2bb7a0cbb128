# Everything a fresh machine needs is set up in .venv by the targets themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BACKENDS ?= jax torch tensorflow
JOBS ?= 2
# Its models need nothing that requirements-dev.txt does not bring; its tokenizers and downloads
# would bring tensorflow-text, kagglehub and more.
WITHOUT_DEPENDENCIES := keras-hub==0.32.0
TOOLS := $(VENV)/.tools
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
# The kernels compile and Debian's packages arrive while pip unpacks.
MAKEFLAGS += --jobs=4
unexport MAKEFLAGS
# Some containers set it; every process of the tests would compile all that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check format bench clean emulator browser

# --no-compile: of these gigabytes little is ever imported, and that Python compiles then.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile

$(TOOLS):
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) cmake ninja
	touch $@

$(INSTALLED): $(TOOLS) pyproject.toml requirements-dev.txt
	$(PIP_INSTALL) -r requirements-dev.txt
	$(PIP_INSTALL) --no-deps $(WITHOUT_DEPENDENCIES)
	KERAS_BITNET_NO_NATIVE=1 $(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

# The native kernels, built into the source tree.
$(VENV)/.kernels: $(TOOLS) CMakeLists.txt $(wildcard keras_bitnet/kernels/native/src/*)
	$(BIN)/cmake -S . -B build/native -G Ninja -D CMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build build/native
	$(BIN)/cmake --install build/native --prefix .
	touch $@

$(READY): $(INSTALLED) $(VENV)/.kernels
	touch $@

## demo: train, pack and run a ternary network on MNIST; prints a table, saves a plot.
demo: $(READY)
	$(BIN)/python examples/mnist.py

# What the test of the NEON kernels needs on another processor. Only where Debian's packages can be
# installed (as root, in CI); the test says so where they are missing.
emulator:
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && ! { \
		command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null; then \
		timeout 80 sh -c 'install="apt-get install -qq -y --no-install-recommends \
			g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"; \
			export DEBIAN_FRONTEND=noninteractive; \
			$$install || { apt-get update -qq && $$install; }' >/dev/null 2>&1 \
			|| echo "no emulator for ARM: its test is skipped"; \
	fi

# What the test of the report's page needs; the same holds for it. One apt-get at a time.
browser: emulator
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && ! { command -v chromium \
		|| command -v chromium-browser || command -v google-chrome; } >/dev/null; then \
		timeout 120 sh -c 'install="apt-get install -qq -y --no-install-recommends chromium"; \
			export DEBIAN_FRONTEND=noninteractive; \
			$$install || { apt-get update -qq && $$install; }' >/dev/null 2>&1 \
			|| echo "no browser: the test of the report in one is skipped"; \
	fi

## test: the whole suite, once per backend, in JOBS processes. Files go in the order of their names:
# the reordering of xdist would leave the longest, which have few tests, for the end.
test: $(READY) emulator browser
	@for backend in $(BACKENDS); do \
		echo "== $$backend"; \
		PATH="$(abspath $(BIN)):$$PATH" KERAS_BACKEND=$$backend \
			$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
			--durations=15 tests || exit 1; \
	done

## check: formatting, lint and types.
check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

## format: rewrite the files as `check` wants them.
format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

## bench: accuracy and speed on a CPU, some hours; results go to benchmarks/results. The other
# benchmarks need a GPU, a download or a day, as each says at its top.
bench: $(READY)
	$(BIN)/python benchmarks/accuracy.py
	@for backend in $(BACKENDS); do \
		for name in training_step call_costs cpu_matmul generation; do \
			KERAS_BACKEND=$$backend $(BIN)/python benchmarks/$$name.py || exit 1; \
		done; \
	done

clean:
	rm -rf $(VENV) build dist
