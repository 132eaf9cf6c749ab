# Every target sets up what it needs on a Debian machine with Go, and works offline once that is there.
#
#   make test    everything that CI promises         make demo    the parameter server with three workers
#   make bench   side by side with grpc-go and UCX   make build   the programs, into bin/
#   make check   the quick part: build, lint, unit tests
#
# With STRICT=1, as in CI, a test that is skipped fails, unless for a reason of .ci/skips.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

GO       ?= go
FUZZTIME ?=
BENCHARGS ?=
export CGO_ENABLED := 0
# Programs that are measured are built along a profile (see pgo); for all else that would only be a second build. lint vets, so go test
# need not.
export GOFLAGS := -trimpath -pgo=off -vet=off $(GOFLAGS)
PROFILED := build -pgo=auto

stage = @printf '\n=== %s\n' "$(1)"

# Commands and examples, by folder name.
PROGRAMS = $(notdir $(patsubst %/,%,$(dir $(wildcard cmd/*/main.go examples/*/main.go))))

.PHONY: all test check build demo lint unit unit-packages unit-conformance udp emulated pyverbs race fuzz cross vm vm-6.12 vm-arm64 in-vm-rxe in-vm-siw in-vm-6.12 in-vm-arm64 conform-rxe conform-siw vm-conformance matrix pgo bench bench-vm bench-net bench-mlx5 bench-once bench-quick demo-check clean

all: build

test:
	@start=$$SECONDS
	.ci/setup go gcc infiniband/verbs.h
	for tool in ucx_perftest tshark ibv_rc_pingpong ib_write_bw rping ip; do
		.ci/setup $(if $(STRICT),,-optional) $$tool
	done
	for target in build lint cross unit udp emulated race fuzz bench-once demo-check bench-quick vm; do
		t=$$SECONDS
		$(MAKE) $$target
		printf -- '--- %s passed in %d s\n' $$target $$((SECONDS - t))
	done
	printf '\nAll of make test passed in %d s.\n' $$((SECONDS - start))

check: build lint unit

build:
	$(call stage,build: static programs into bin/)
	.ci/setup go
	mkdir -p bin
	$(GO) build ./...
	for d in $(sort $(patsubst %/,%,$(dir $(wildcard cmd/*/main.go examples/*/main.go)))); do
		$(GO) $(PROFILED) -o bin/ ./$$d
	done
	$(GO) -C bench $(PROFILED) -o ../bin/ringside-bench .

demo:
	@.ci/setup go
	mkdir -p bin
	$(GO) $(PROFILED) -o bin/ ./examples/paramserver
	./bin/paramserver -demo -workers 3

# The demo's last line is its result: check it as a reader would.
demo-check:
	$(call stage,demo: a digit classifier$(comma) trained by a server and three worker processes)
	out=bin/demo.log
	$(MAKE) demo | tee $$out
	tail -n 1 $$out | awk '{
		for (i = 1; i <= NF; i++) { split($$i, kv, "="); v[kv[1]] = kv[2] }
		if (v["accuracy"] + 0 < 0.93 || v["workers"] != 3 || v["path"] == "") {
			print "demo: expected accuracy >= 0.93, 3 workers and a path, got: " $$0; exit 1
		}
	}'

comma := ,

lint:
	$(call stage,lint: gofmt$(comma) go vet$(comma) staticcheck)
	.ci/setup go
	unformatted=$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go' | grep -v testdata/))
	if [ -n "$$unformatted" ]; then echo "gofmt would change:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(GO) -C bench vet ./...
	$(GO) tool -modfile=tools/go.mod staticcheck ./...
	(staticcheck=$$($(GO) tool -modfile=tools/go.mod -n staticcheck); cd bench; "$$staticcheck" ./...)

# checked LOG fails with STRICT if something was skipped that may not be. What it looks at are verbose logs.
checked = $(if $(STRICT),.ci/allowed $(1))
verbose = $(if $(STRICT),-v)

# The conformance suite is one program that waits for much of its time: it runs beside the others, and what it prints comes behind theirs.
unit:
	$(call stage,unit: all tests$(comma) without cgo)
	.ci/setup go
	mkdir -p bin
	rm -f bin/vm/soft.json
	: >bin/packages.log >bin/conformance.log
	status=0
	$(MAKE) -j 2 unit-packages unit-conformance || status=1
	cat bin/conformance.log
	cat bin/packages.log bin/conformance.log | .ci/verdict
	[ $$status = 0 ]
	$(GO) -C bench test -count=1 ./...
	$(call checked,bin/packages.log bin/conformance.log)

unit-packages:
	$(GO) test -v -count=1 -timeout 15m $$($(GO) list ./... | grep -v '/internal/conformance$$') 2>&1 | tee bin/packages.log

unit-conformance:
	{ $(GO) test -v -count=1 -timeout 15m ./internal/conformance -skip '$(SOFTCONFORM)' && $(MAKE) bin/vm/soft.json; } >bin/conformance.log 2>&1

# The same programs where software NICs do not share memory, nor meet over UDP; then on a network that loses packets. What makes
# networks of its own, unit has run.
NETWORKS = TestBottleneck|TestUDPBlocked|TestNarrowLink|TestTCPWhereUDPIsBlocked
udp:
	$(call stage,udp: transport$(comma) rpc and the examples over RoCEv2 on UDP$(comma) and on TCP)
	.ci/setup go
	mkdir -p bin
	{ RINGSIDE_PATH=udp $(GO) test $(verbose) -skip '$(NETWORKS)' -count=1 ./transport ./rpc ./examples/... && \
		RINGSIDE_PATH=tcp $(GO) test $(verbose) -short -skip '$(NETWORKS)' -count=1 ./transport ./rpc && \
		RINGSIDE_PATH=udp RINGSIDE_SOFT_FAULTS=loss=0.5%,duplicate=0.5%,reorder=2% $(GO) test $(verbose) -short -skip 'Alloc|$(NETWORKS)' -count=1 \
			./transport ./rpc ./examples/kv; } 2>&1 | tee bin/udp.log
	$(call checked,bin/udp.log)

# The driver for ConnectX by the emulator's other front door, as for any program: the conformance suite, all of it in two minutes with
# make emulated EMULATED=., and some of what is built on it.
EMULATED ?= ^(rc|atomic|srq|mw)/
# One of these groups of cases, another one each time, is run between two devices: all that these devices have but random, which takes long, and kill.
EMULATED_REST = rc uc ud sge inline slice rnr length state order remote local queue cq life revoke concurrent
EMULATED_TRANSPORT = ^Test(Sizes|OneSided|Batch|SendRegion|ManyConnections|PostMore.*|Processes|PeerKilled)$$
EMULATED_RPC = ^Test(RawCalls|ConcurrentCalls|CancelStorm|Bulk.*|Queue.*|TwoProcesses|ServerKilled)$$
emulated:
	$(call stage,emulated: an emulated ConnectX below programs)
	.ci/setup go
	mkdir -p bin
	$(GO) build -o bin/ ./cmd/ringside
	./bin/ringside emulate -- ./bin/ringside doctor --selftest --device mlx5_0 --run '$(EMULATED)'
	rest=($(EMULATED_REST))
	group=$${rest[RANDOM % $${#rest[@]}]}
	./bin/ringside emulate --devices 2 -- ./bin/ringside doctor --selftest --device mlx5_0 --peer-device mlx5_1 --run "^$$group/"
	$(GO) test -c -o bin/transport.test ./transport
	$(GO) test -c -o bin/rpc.test ./rpc
	{ (cd transport; RINGSIDE_DEVICE=mlx5_0 ../bin/ringside emulate -- ../bin/transport.test $(verbose:-v=-test.v) -test.short -test.run '$(EMULATED_TRANSPORT)') && \
		(cd rpc; RINGSIDE_DEVICE=mlx5_0 ../bin/ringside emulate -- ../bin/rpc.test $(verbose:-v=-test.v) -test.short -test.run '$(EMULATED_RPC)'); } 2>&1 | tee bin/emulated.log
	$(call checked,bin/emulated.log)
	$(GO) build -o bin/ ./examples/quickstart ./examples/filecp ./examples/kv ./examples/paramserver
	RINGSIDE_DEVICE=mlx5_0 ./bin/ringside emulate -- ./bin/quickstart
	RINGSIDE_DEVICE=mlx5_0 ./bin/ringside emulate -- ./bin/kv
	RINGSIDE_DEVICE=mlx5_0 ./bin/ringside emulate -- ./bin/filecp bin/ringside bin/ringside.copy
	cmp bin/ringside bin/ringside.copy
	RINGSIDE_DEVICE=mlx5_0 ./bin/ringside emulate -- ./bin/paramserver -demo -workers 3 | tee bin/demo.log
	tail -n 1 bin/demo.log | grep 'workers=3 .* device=mlx5_0'
	./bin/ringside emulate --devices 2 -- ./bin/ringside perf rpc rate --spawn --poll event --iters 2000 --device mlx5_0 --server-device mlx5_1

# rdma-core's own tests on an emulated device, with Debian's packages python3-pyverbs and rdma-core: minutes, and no part of test.
pyverbs:
	$(call stage,pyverbs: the tests of rdma-core)
	.ci/setup go
	RINGSIDE_TEST_REQUIRE=1 $(GO) test -count=1 -timeout 30m -run Pyverbs ./internal/emulate -pyverbs

# The packages of one goroutine have nothing to race with, nor have programs that run others; of those left, the tests but for what is
# other processes, measures networks, counts allocations, is done a second time for IPv6, or takes long without anything side by side; with fewer
# seeds and rounds than in unit.
SEQUENTIAL = /internal/(abi|cmd/.*|mem|nldev|pcap|perf/cycles|procmem|roce|softnic/(cm|wire)|testutil/repotest)$$|/verbs/ib$$|/test/interop$$|/cmd/ringside$$
NORACE = TestGolden(Random|Many.*|InfiniBand|InlineHeaders|Libmlx5|Driver)|TestBottleneck|Test(UDP|TCP|ConnectX)Processes|TestProcessesSwapped|TestUDP6|TestLoopsAllocateNothing|TestDemo(Sync|Stale|Kill)
race:
	$(call stage,race: what runs side by side$(comma) under the race detector)
	.ci/setup go gcc
	CGO_ENABLED=1 $(GO) test -race -short -count=1 -timeout 25m -skip '$(NORACE)' $$($(GO) list ./... | grep -vE '$(SEQUENTIAL)')

# Seeds are part of unit; this looks beyond them for a moment. Longer: make fuzz FUZZTIME=10m
# The default is a count of inputs (fewer where each one makes a whole NIC): a run that ends by the clock fails now and
# then with "context deadline exceeded" and nothing found, in Go before 1.27 (golang.org/issue/75804).
# Making inputs that cover something new smaller would take most of so few executions: it is cut short.
fuzz:
	$(call stage,fuzz: each target for a moment)
	.ci/setup go
	mkdir -p bin
	for pkg in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -r -n1 dirname | sort -u); do
		case $$pkg in */softnic|*/mlx5emu) count=200x ;; */mlx5|*/rxe|*/siw) count=500x ;; *) count=1000x ;; esac
		$(GO) test -c -fuzz . -o bin/fuzz.test $$pkg # linked once for all targets; where go test keeps what is new, this does
		found=$$($(GO) env GOCACHE)/fuzz/$$($(GO) list $$pkg)
		for target in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' $$pkg/*_test.go); do
			echo "$$pkg $$target"
			(cd $$pkg; "$(CURDIR)/bin/fuzz.test" -test.run '^$$' -test.fuzz "^$$target\$$" -test.fuzztime $(or $(FUZZTIME),$$count) -test.fuzzminimizetime 10x \
				-test.fuzzcachedir "$$found" | grep -v 'gathering baseline')
		done
	done

cross:
	$(call stage,cross: other systems and byte orders build)
	.ci/setup go
	check() { # OS/ARCHITECTURE COMMAND PACKAGES
		echo "$$1: go $$2 $$3"
		GOOS=$${1%/*} GOARCH=$${1#*/} $(GO) "$$2" "$$3"
	}
	for target in linux/arm64 darwin/arm64 windows/amd64; do
		check $$target build ./...
	done
	for target in linux/arm64 windows/amd64; do # what is not for Linux is alike for the others
		check $$target vet ./...
	done
	check linux/s390x build ./verbs # big-endian, and without a driver for ConnectX

# What the kernel's devices must do, in a machine whose kernel has some (docs/ci.md). There, what would be skipped for want
# of something fails, and so does a line that selects no test; what is skipped for other reasons is printed with them. One machine
# serves all: it starts the in-vm targets, whose tests run in it. Most tests on rxe and those on siw go on side by side, since either wait
# for much of their time; they have devices and names of their own.
VM = $(GO) run ./test/soft-roce -timeout 60m -out $(CURDIR)/bin/vm -host -- $(MAKE) -j 2
VMTEST = RINGSIDE_TEST_REQUIRE=1 .ci/verdict $(GO) test -v -count=1 -p 1 -timeout 9m
# What of test/interop needs no kernel device: unit has run it.
SOFTONLY = OnSoftwareNIC|CommandsBetweenProcesses|NoSense
EXAMPLES = ./examples/quickstart ./examples/pingpong ./examples/kv ./examples/filecp

vm: bin/vm/soft.json
	$(call stage,vm: the kernel's software RDMA devices)
	.ci/setup go gcc infiniband/verbs.h
	rm -f bin/vm/rxe-*.pcap
	$(VM) in-vm-rxe in-vm-siw
	$(if $(STRICT),RINGSIDE_TEST_REQUIRE=1) $(GO) test -count=1 -run TestTsharkRXE ./internal/roce -captures '$(CURDIR)/bin/vm/rxe-*.pcap'
	$(GO) test -count=1 -run TestZMatrix ./internal/conformance -matrix $(CURDIR)/README.md -matrix-check \
		-matrix-with $(MATRICES)
	# As other projects use it: each has a machine of its own. What remains of these is left to RINGSIDE_VM=1 go test ./test/soft-roce
	RINGSIDE_VM=1 .ci/verdict $(GO) test -v -count=1 -run 'TestMachine$$/(go_test|native)' ./test/soft-roce

# Packages that list devices come first on one side, those that add and remove some later on the other.
in-vm-rxe: conform-rxe
	RINGSIDE_DEVICE=rxe0 $(VMTEST) -short ./transport
	$(VMTEST) ./internal/conformance -run 'TestProcesses$$/kill' -device rxe0 -peer-device rxe1
	$(VMTEST) ./internal/conformance -run TestSoftAndRXE -skip //kill
	$(VMTEST) ./internal/softnic/udp
	$(VMTEST) -short -skip '$(SOFTONLY)' ./test/interop
	RINGSIDE_DEVICE=rxe0 $(VMTEST) -short ./rpc

# While the kernel gives each RDMA device to one network namespace, there may be no second one: that comes before all that makes some.
in-vm-siw:
	$(VMTEST) -run TestNetNSExclusive ./internal/provider
	$(VMTEST) -skip TestNetNSExclusive ./internal/nldev ./internal/uverbs ./internal/rdmacm ./internal/provider ./internal/provider/rxe ./internal/provider/siw ./mr ./qp
	$(VMTEST) -run TestKernelDevices ./internal/rdmacm -devices
	$(VMTEST) -run 'TestKernelDevices' ./cmd/ringside ./internal/perf
	RINGSIDE_DEVICE=siw0 $(VMTEST) -short ./transport ./rpc $(EXAMPLES)
	RINGSIDE_DEVICE=siw0 $(VMTEST) -run 'TestDemo(Sync|Kill)' ./examples/paramserver
	$(MAKE) conform-siw
	# On rxe, but here, since this side would end first:
	RINGSIDE_DEVICE=rxe0 $(VMTEST) -short $(EXAMPLES)
	RINGSIDE_DEVICE=rxe0 $(VMTEST) -run TestDemoSync ./examples/paramserver

# FLUSH and ATOMIC WRITE, which the kernel's rxe has in 6.12: with itself, and with the software NIC in both roles. That takes a machine of its
# own, and at first the making of its image, and so is no part of test.
vm-6.12:
	$(call stage,vm-6.12: FLUSH and ATOMIC WRITE with rxe)
	.ci/setup go gcc
	$(GO) run ./test/soft-roce -kernel 6.12 -timeout 30m -host -- $(MAKE) in-vm-6.12

in-vm-6.12:
	$(VMTEST) ./internal/conformance -run 'TestInProcess/(warm-up|placement)' -device rxe0 -peer-device rxe1
	PARTS=1 $(VMTEST) ./internal/conformance -run 'TestSoftAndRXE$$/.*/(warm-up|placement)'

# What an arm64 processor and its kernel have to do with: assembly, layouts, system calls, rings, and what is on top of these, with the
# software NIC, the kernel's devices and the emulated ConnectX. All of it is emulated, which takes long, and is no part of test.
vm-arm64:
	$(call stage,vm-arm64: an arm64 machine)
	.ci/setup go gcc
	$(GO) run ./test/soft-roce -arch arm64 -timeout 90m -host -- $(MAKE) in-vm-arm64

ARMTEST = .ci/verdict $(GO) test -v -count=1 -p 1 -timeout 30m
in-vm-arm64:
	$(ARMTEST) ./internal/abi ./internal/ring ./internal/roce ./internal/mem ./internal/procmem ./internal/seccomp ./internal/netlink
	$(ARMTEST) ./internal/mlx5emu ./internal/provider/mlx5
	$(ARMTEST) -short ./internal/softnic ./internal/softnic/udp
	$(ARMTEST) -short ./internal/conformance -run 'TestInProcess|TestProcesses$$|TestConnectX' -device soft0
	$(ARMTEST) ./internal/conformance -run 'TestInProcess' -device rxe0 -peer-device rxe1
	$(ARMTEST) ./internal/conformance -run 'TestInProcess' -device siw0 -peer-device siw1
	$(ARMTEST) ./internal/nldev ./internal/uverbs ./internal/rdmacm ./internal/provider ./internal/provider/rxe ./internal/provider/siw ./mr ./qp
	RINGSIDE_DEVICE=soft0 $(ARMTEST) -short ./transport ./rpc
	RINGSIDE_DEVICE=rxe0 $(ARMTEST) -short ./transport ./rpc
	$(ARMTEST) -short ./internal/emulate
	$(ARMTEST) -run 'Emulate|TestKernelDevices' ./cmd/ringside
	$(GO) run ./cmd/ringside emulate -- /proc/self/exe doctor --selftest --device mlx5_0 --run '$(EMULATED)'

CONFORM = ./internal/conformance -run 'TestInProcess|TestZMatrix'
space := $(subst ,, )
MATRICES = $(subst $(space),$(comma),$(foreach d,soft rxe siw,$(CURDIR)/bin/vm/$(d).json))

# The columns of the software NIC; unit has made them, unless something has changed since.
SOFTCONFORM = TestInProcess|TestProcesses$$|TestUDP$$|TestTCP$$
bin/vm/soft.json: $(shell git ls-files '*.go')
	mkdir -p bin/vm
	$(GO) test -v -count=1 -timeout 15m ./internal/conformance -run '$(SOFTCONFORM)|TestZMatrix' -matrix $(CURDIR)/bin/vm/soft.json

conform-rxe:
	$(VMTEST) $(CONFORM) -device rxe0 -peer-device rxe1 -matrix /out/rxe.json

conform-siw:
	$(VMTEST) $(CONFORM) -device siw0 -peer-device siw1 -matrix /out/siw.json

vm-conformance: bin/vm/soft.json
	$(VM) conform-rxe conform-siw

# The README's table of what each device can do, from what the conformance suite finds.
matrix: vm-conformance
	$(GO) test -count=1 -run TestZMatrix ./internal/conformance -matrix $(CURDIR)/README.md -matrix-with $(MATRICES)

# Benchmarks cannot rot: each runs once.
bench-once:
	$(call stage,bench-once: every Go benchmark$(comma) one iteration)
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 10m ./... | grep -v 'no test files'

bench:
	@.ci/setup go
	.ci/setup -optional ucx_perftest
	mkdir -p bin
	$(GO) $(PROFILED) -o bin/ ./cmd/ringside
	$(GO) -C bench $(PROFILED) -o ../bin/ringside-bench .
	./bin/ringside-bench -ringside bin/ringside -results bench/RESULTS.md $(BENCHARGS)

# Side by side with perftest, in a machine whose kernel has software RDMA devices. That it works: BENCHARGS=-quick
bench-vm:
	$(call stage,bench-vm: ringside perf and perftest on the kernel's software RDMA devices)
	.ci/setup go gcc
	mkdir -p bin
	$(GO) $(PROFILED) -o bin/ ./cmd/ringside
	$(GO) build -o bin/ ./test/soft-roce
	$(GO) -C bench $(PROFILED) -o ../bin/ringside-bench .
	./bin/ringside-bench perftest -ringside bin/ringside -soft-roce bin/soft-roce -results bench/RESULTS.md $(BENCHARGS)

# The driver for ConnectX side by side with stock libmlx5, on an emulated device. That it works: BENCHARGS=-quick
bench-mlx5:
	$(call stage,bench-mlx5: the driver for ConnectX and libmlx5 on an emulated device)
	.ci/setup go gcc infiniband/verbs.h
	mkdir -p bin
	$(GO) -C bench $(PROFILED) -o ../bin/ringside-bench .
	$(GO) test -c -o bin/mlx5.test ./internal/provider/mlx5
	./bin/ringside-bench mlx5 -driver bin/mlx5.test -results bench/RESULTS.md $(BENCHARGS)

# Side by side with UCX and grpc-go over TCP, between network namespaces; takes root. That it works: BENCHARGS=-quick
bench-net:
	$(call stage,bench-net: the software NIC over UDP)
	.ci/setup go
	.ci/setup -optional ucx_perftest
	mkdir -p bin
	$(GO) $(PROFILED) -o bin/ ./cmd/ringside
	$(GO) -C bench $(PROFILED) -o ../bin/ringside-bench .
	./bin/ringside-bench net -ringside bin/ringside -results bench/RESULTS.md $(BENCHARGS)

# The compiler inlines along the calls that these profiles show: go build takes a default.pgo by itself. What is compared
# is profiled alike.
pgo:
	@.ci/setup go
	dir=$$(mktemp -d)
	mkdir -p bin
	$(GO) -C bench build -o ../bin/ringside-bench .
	./bin/ringside-bench -rounds 1 -profile $$dir -only '^(grpc|rpc)' > /dev/null
	$(GO) tool pprof -proto $$dir/*.pprof > cmd/ringside/default.pgo
	cp cmd/ringside/default.pgo bench/default.pgo
	rm -r $$dir

bench-quick:
	$(call stage,bench-quick: every comparison once$(comma) small; its numbers mean nothing)
	mkdir -p bin
	$(GO) $(PROFILED) -o bin/ ./cmd/ringside
	$(GO) -C bench $(PROFILED) -o ../bin/ringside-bench .
	$(GO) test -c -o bin/mlx5.test ./internal/provider/mlx5
	./bin/ringside-bench -quick -ringside bin/ringside -results bin/RESULTS-quick.md $(BENCHARGS)
	./bin/ringside-bench mlx5 -quick -driver bin/mlx5.test $(BENCHARGS)

clean:
	rm -rf bin
