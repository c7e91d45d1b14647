# dsv4_compressor.h: `make run` shows it at work, `make check` tests it, `make help` lists the rest.
# Both need cc and make alone. CC and CFLAGS are yours to set: make check CC=clang CFLAGS='-O3 -march=native'

CFLAGS  ?= -O2
PREFIX  ?= /usr/local
PYTHON  ?= python3
BUILD   ?= build
JOBS    ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
LDLIBS  += -lm
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(JOBS)
endif
FUZZ_SECONDS ?= 60
SOAK_SECONDS ?= 600
unexport SOAK_SECONDS # make check soaks for its own second

# SIMDE=-DDSV4_COMPRESSOR_SIMDE=1 (Debian: libsimde-dev): the tests also run the kernels for CPUs that have none of their
# own, as make check-all, coverage and check-san do where it is found.
SIMDE ?=
WARN  := -Wall -Wextra -Wpedantic -Wconversion -Wshadow
FLAGS  = -std=c99 $(WARN) -I. -Iexamples -Itests/support -pthread $(CPPFLAGS) $(CFLAGS)
BUILT_WITH = $(CC) $(FLAGS) $(SIMDE) $(HEADER_FLAGS) $(LDFLAGS) $(LDLIBS)
export CC BUILD FLAGS BUILT_WITH

HEADER   := dsv4_compressor.h
MPICC    := $(shell command -v mpicc 2>/dev/null)
OPENMP   := $(shell echo 'int main(void) { return 0; }' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo yes)
SKIPPED  := $(if $(MPICC),,examples/mpi.c) $(if $(OPENMP),,examples/openmp.c)
EXAMPLES := $(patsubst examples/%.c,$(BUILD)/%,$(filter-out $(SKIPPED),$(wildcard examples/*.c))) $(BUILD)/bench
TESTS    := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_*.c))
# What needs the tests' object comes first, as that takes longest; what is left at the end keeps every core busy.
SCRIPTS  := python bits headers cli examples corpus
LOGS      = $(SCRIPTS:%=$(BUILD)/tests/%.sh.log) $(TESTS:%=%.log)

# What install writes beside the header, below $(ROOT).
ROOT      = $(DESTDIR)$(PREFIX)
CMAKE    := share/cmake/dsv4_compressor
PACKAGES := share/pkgconfig/dsv4_compressor.pc \
            $(CMAKE)/dsv4_compressor-config.cmake $(CMAKE)/dsv4_compressor-config-version.cmake

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run check examples bench bench-peers run-train run-mpi install uninstall clean tests \
        check-cross check-pytorch check-san check-all coverage lint fuzz soak mutate \
        prove prove-mutants FORCE

## For a start
help: ## this list
	@awk -F ' *: *[^#]*## *' '/^## /{print "\n" substr($$0, 4) ":"} /^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' \
	    Makefile

run: $(BUILD)/sample $(BUILD)/compress ## compress a bundled sample through files, and say what came out
	@$(BUILD)/sample $(BUILD)/sample.safetensors
	@$(BUILD)/compress --weights $(BUILD)/sample.safetensors --input $(BUILD)/sample.safetensors \
	    --output $(BUILD)/entries.safetensors --plot $(BUILD)/gates.svg --threads $(JOBS)

check: $(LOGS) ## all tests, in about a minute on two cores; the last line is "N passed, N failed"
	@sh tests/checks/summary.sh $^

examples: $(EXAMPLES) ## every program in examples/, into build/
	$(if $(strip $(SKIPPED)),@echo 'no compiler here for $(SKIPPED)')

install: ## the header, a pkg-config file and a CMake package, below DESTDIR/PREFIX
	install -d "$(ROOT)/include" "$(ROOT)/share/pkgconfig" "$(ROOT)/$(CMAKE)"
	install -m 644 $(HEADER) "$(ROOT)/include/"
	version=$$(sed -n 's/^#define DSV4_COMPRESSOR_VERSION "\(.*\)"/\1/p' $(HEADER)); for file in $(PACKAGES); do \
	    sed "s/@VERSION@/$$version/" "examples/packages/$${file##*/}" >"$(ROOT)/$$file" && \
	    chmod 644 "$(ROOT)/$$file" || exit; done

uninstall: ## what install wrote there, and nothing else
	rm -f "$(ROOT)/include/$(HEADER)" $(PACKAGES:%="$(ROOT)/%")
	rmdir "$(ROOT)/$(CMAKE)" 2>/dev/null || true

clean: ## remove build/
	rm -rf $(BUILD)

## To see more of it
bench: $(BUILD)/bench ## speed of each case as a share of this machine's own limit; BENCH='--only NAME --threads 2'
	@$(BUILD)/bench --svg $(BUILD)/bench.svg $(BENCH)

bench-peers: $(BUILD)/bench ## the same beside PyTorch and oneDNN, where these are installed
	@python3 examples/bench/bench_peers.py $(BUILD)

run-train: $(BUILD)/train ## a small compressor learns a task; loss curve and gate maps as a picture
	@$(BUILD)/train $(BUILD)

run-mpi: $(filter $(BUILD)/mpi,$(EXAMPLES)) ## one sequence split over 2 and 4 processes: the same bits
	@sh tests/checks/run_mpi.sh $(BUILD)

## For whoever changes the header
check-all: ## all of these, the programs, valgrind; FUZZ_SECONDS (60) for each fuzzer, SOAK_SECONDS (600)
	+@SOAK_SECONDS=$(SOAK_SECONDS) sh tests/checks/all.sh $(BUILD)/all

check-cross: ## the same bits on other CPUs, under emulation; says which Debian packages it lacks
	@sh tests/checks/cross.sh $(BUILD)/cross

check-pytorch: $(BUILD)/compress $(BUILD)/tests/init ## random cases beside PyTorch; PYTHON=venv/bin/python, PYTORCH='--seed 7'
	@$(PYTHON) tests/pytorch/check.py --build $(BUILD) $(PYTORCH)

check-san: ## the tests under address, undefined, memory and thread sanitizers
	+@sh tests/checks/sanitize.sh $(BUILD)/san

coverage: ## lines and branches of the header that the tests reach (gcc)
	+@sh tests/checks/coverage.sh $(BUILD)/coverage

lint: ## gcc -fanalyzer, clang-tidy, cppcheck
	@sh tests/checks/lint.sh $(BUILD)/lint

fuzz: ## every harness of tests/fuzz for FUZZ_SECONDS (60) each (clang)
	@sh tests/fuzz/fuzz.sh $(BUILD)/fuzz $(FUZZ_SECONDS)

soak: $(BUILD)/tests/test_soak ## a random serving workload for SOAK_SECONDS (600): the same bits, constant memory
	@SOAK_SECONDS=$(SOAK_SECONDS) $<

mutate: ## change the header in hundreds of places, one at a time: do the tests notice? MUTATE='--count 99'
	@python3 tests/checks/mutation.py --build $(BUILD)/mutation $(MUTATE)

prove: ## Frama-C's Eva: no undefined behaviour in checks, sizes and conversions, for all inputs (Debian: frama-c-base)
	@sh tests/checks/prove.sh $(BUILD)/proofs

prove-mutants: ## and whether each of these proofs fails where the header is at fault
	@sh tests/checks/prove.sh $(BUILD)/proofs mutants

# Everything built depends on this file, which changes with the compiler and its flags alone.
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD)/tests
	@printf '%s\n' "$$BUILT_WITH" | cmp -s - $@ || printf '%s\n' "$$BUILT_WITH" >$@

# The implementation is compiled once for all tests; each example is the single file that a user would write.
$(BUILD)/dsv4.o: tests/support/implementation.c tests/support/implementation.h tests/support/tile_model.h $(HEADER) $(BUILD)/flags
	$(CC) $(FLAGS) $(SIMDE) $(HEADER_FLAGS) -c $< -o $@

# The tests' own code, unless CFLAGS says how: in half the time. One of them has a copy of the library of its own: not
# optimised, which is to give the same bits too.
ifeq ($(CFLAGS),-O2)
$(TESTS): private CFLAGS = -O1
$(BUILD)/tests/test_header: private CFLAGS = -O0
endif
$(BUILD)/tests/%: tests/%.c $(BUILD)/dsv4.o $(wildcard tests/support/*.h examples/*.h)
	$(CC) $(FLAGS) $(SIMDE) $(LDFLAGS) $< $(BUILD)/dsv4.o $(LDLIBS) -o $@

# The command line around the tests' object, which is there already.
$(BUILD)/tests/compress: examples/compress.c $(BUILD)/dsv4.o $(wildcard examples/*.h)
	$(CC) $(FLAGS) $(SIMDE) $(LDFLAGS) -DDSV4__IMPLEMENTED=1 $< $(BUILD)/dsv4.o $(LDLIBS) -o $@

# Parameters from a seed, for tests/pytorch.
$(BUILD)/tests/init: tests/pytorch/init.c $(BUILD)/dsv4.o $(wildcard examples/*.h)
	$(CC) $(FLAGS) $(SIMDE) $(LDFLAGS) $< $(BUILD)/dsv4.o $(LDLIBS) -o $@

$(BUILD)/openmp: private CFLAGS += -fopenmp
$(BUILD)/mpi: private CC = mpicc
$(BUILD)/%: examples/%.c $(HEADER) $(wildcard examples/*.h) $(BUILD)/flags
	$(CC) $(FLAGS) $(LDFLAGS) $< $(LDLIBS) -o $@
$(BUILD)/bench: examples/bench/bench.c $(HEADER) $(wildcard examples/*.h examples/bench/*.h) $(BUILD)/flags
	$(CC) $(FLAGS) $(LDFLAGS) $< $(LDLIBS) -o $@

tests: $(TESTS)

# A test's output and exit status; tests/checks/summary.sh adds them up.
log = @$1 >$@ 2>&1; echo "exit status $$?" >>$@
$(BUILD)/tests/cli.sh.log $(BUILD)/tests/python.sh.log: $(BUILD)/tests/compress
$(BUILD)/tests/examples.sh.log $(BUILD)/tests/corpus.sh.log: $(BUILD)/dsv4.o
$(BUILD)/tests/%.sh.log: tests/checks/%.sh FORCE | $(BUILD)/flags
	$(call log,sh $<)
$(BUILD)/tests/%.log: $(BUILD)/tests/% FORCE
	$(call log,$<)
