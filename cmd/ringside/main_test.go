package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/perf"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// asCommand makes the test binary behave as the command: --spawn starts its own executable.
const asCommand = "RINGSIDE_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		main()
	}
	os.Setenv(asCommand, "1")           // for every child: it must never run the tests
	os.Setenv(verbs.EnvDevice, "soft0") // also on machines that have better: outputs are compared
	testutil.Main(m)
}

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (go test -update rewrites it):\n%s", path, got)
	}
}

// ringside runs the command in this process.
func ringside(args ...string) (status int, stdout, stderr string) {
	var o, e bytes.Buffer
	status = run(args, strings.NewReader(""), &o, &e)
	return status, o.String(), e.String()
}

func TestMistakes(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"dvices", `no command "dvices": did you mean "devices"?`},
		{"perf wrte", `did you mean "write"?`},
		{"perf write latency", `has no command "latency"`},
		{"perf write lat", "Give HOST or HOST:PORT, or --spawn"},
		{"perf write lat a b", "2 arguments given, wanted the server's address"},
		{"perf write lat --spawn host", "choose one"},
		{"perf write lat host --server-cpu 1", "give --cpu to the server"},
		{"perf write lat host --server-device x", "give --device to the server"},
		{"perf write lat host --server-gid-index 0", "give --gid-index to the server"},
		{"perf write lat --spawn --size 0", "not a size"},
		{"perf write lat --spawn --size 5x", "not a size"},
		{"perf write lat --spawn --size 2G", "not a size"},
		{"perf write lat --spawn --size 8 --all", "choose one"},
		{"perf write lat --spawn --iters 5 --duration 1s", "choose one"},
		{"perf write lat --spawn --iters -5", "positive"},
		{"perf write lat --spawn --duration -5s", "positive"},
		{"perf write lat --spawn --warmup -7", "warmup is -7"},
		{"perf send lat --spawn --poll adaptive --spin 0", "or --poll event"},
		{"perf write lat --spawn --poll lazy", "busy adaptive event"},
		{"perf write lat --spawn --poll event", "measure send lat"},
		{"perf write lat --spawn --qps 2", "uses 1 QP"},
		{"perf write rate --spawn --qps 0", "--qps 0"},
		{"perf write rate --spawn --batch 200", "larger than depth"},
		{"perf write rate --spawn --signal-every 100", "more than half of depth"},
		{"perf write rate --spawn --inline 100000", "inline is 100000"},
		{"perf read lat --spawn --inline 8", "unknown flag: --inline"},
		{"perf atomic lat --spawn --op swap", "fadd cas"},
		{"perf rpc lat --spawn --clock sundial", "auto tsc mono"},
		{"perf write lat --spawn --cpu -3", "number of a processor"},
		{"perf write lat --spawn -o xml", "text json"},
		{"perf server x", "wanted none"},
		{"perf --listen", "flag needs an argument"},
		{"perf write lat --spawn --path pigeons", "auto memory udp tcp"},
		{"devices --path pigeons", "auto memory udp tcp"},
		{"version x", "wanted none"},
	} {
		t.Run(tt.args, func(t *testing.T) {
			status, stdout, stderr := ringside(strings.Fields(tt.args)...)
			if status != 2 || !strings.Contains(stderr, tt.want) || !strings.Contains(stderr, "--help") || stdout != "" {
				t.Errorf("status %d, stdout %q, stderr %q; want status 2 and %q", status, stdout, stderr, tt.want)
			}
		})
	}
}

func TestFailures(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"devices nosuch0", `no device is called "nosuch0"`},
		{"perf write lat 127.0.0.1:1", "ringside perf server"},
		{"perf write lat 127.0.0.1:1 --device nosuch0", "nosuch0"},
		{"perf server --device nosuch0", "nosuch0"},
		{"perf server --listen 192.0.2.1:1", "--listen"},
		{"perf write lat 127.0.0.1:1 --plot /nonexistent/x.svg", "--plot"},
	} {
		t.Run(tt.args, func(t *testing.T) {
			status, stdout, stderr := ringside(strings.Fields(tt.args)...)
			if status != 1 || !strings.Contains(stderr, tt.want) || stdout != "" {
				t.Errorf("status %d, stdout %q, stderr %q; want status 1 and %q", status, stdout, stderr, tt.want)
			}
		})
	}
}

func TestHelp(t *testing.T) {
	for _, a := range []string{"", "perf", "perf send", "perf send lat --help", "perf server --help", "devices --help", "completion bash"} {
		status, stdout, stderr := ringside(strings.Fields(a)...)
		if status != 0 || len(stdout) < 100 || stderr != "" {
			t.Errorf("%q: status %d, %d bytes of help, stderr %q", a, status, len(stdout), stderr)
		}
		if strings.Contains(stdout, "--child") {
			t.Errorf("%q shows an internal flag", a)
		}
	}
}

func TestCompletion(t *testing.T) {
	for a, want := range map[string]string{
		"perf write ":            "lat\t",
		"perf send rate --flow ": "credit",
		"perf send lat --poll ":  "adaptive",
		"devices ":               "soft0",
		"devices -o ":            "json",
		"devices --path ":        "memory",
		"perf rpc lat --path ":   "memory",
	} {
		args := append([]string{"__complete"}, strings.Fields(a)...)
		_, stdout, _ := ringside(append(args, "")...)
		if !strings.Contains(stdout, want) {
			t.Errorf("%q completes to %q, without %q", a, stdout, want)
		}
	}
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int{"1": 1, "64": 64, "4k": 4096, "4K": 4096, "4KiB": 4096, "2kb": 2048, "1M": 1 << 20, "1G": 1 << 30, "1024m": 1 << 30,
		"": 0, "k": 0, "-1": 0, "1T": 0, "1kk": 0, "9999999999999999999": 0, "1025m": 0, "4 k": 0} {
		if got, err := parseSize(in); got != want || (err == nil) != (want > 0) {
			t.Errorf("parseSize(%q) = %d, %v", in, got, err)
		}
	}
	var s sizesValue
	if err := s.Set("64, 4k"); err != nil || s.String() != "64,4096" {
		t.Errorf("%v, %v", s.v, err)
	}
}

// sampleDevices is what `ringside devices` might find on a host with everything.
func sampleDevices() *deviceReport {
	a := ib.DeviceAttr{Firmware: "1.2.3", NodeGUID: 0x0002c90300abcdef, SysImageGUID: 0x0002c90300abcde0, VendorID: 0x2c9, VendorPartID: 4119,
		HWVersion: 1, Ports: 1, MaxMRSize: 1 << 40, PageSizeCap: 0xfffff000, MaxQP: 1000, MaxQPWR: 32768, MaxSGE: 30, MaxSGERead: 29, MaxCQ: 1 << 20,
		MaxCQE: 1 << 22, MaxMR: 1 << 20, MaxPD: 1 << 20, MaxQPRdAtomic: 16, MaxQPInitRdAtom: 16, MaxAH: 1 << 20, MaxInline: 220, Caps: ib.CapMW2 | ib.CapSRQ | ib.CapAtomic}
	v4 := ib.GID{10: 0xff, 11: 0xff, 12: 10, 15: 1}
	return &deviceReport{
		Schema: devicesSchema,
		Devices: []deviceJSON{
			{Name: "mlx5_0", Provider: "mlx5", Tier: "hardware", GUID: ib.GUID(0x0002c90300abcdef).String(), NetDevs: []string{"eth0"}, CharDevs: []string{"/dev/infiniband/rdma_cm", "/dev/infiniband/uverbs0"}, Error: "open /dev/infiniband/uverbs0: permission denied"},
			{Name: "rxe0", Provider: "rxe", Tier: "kernel software", GUID: ib.GUID(1).String(), NetDevs: []string{"eth1"}, CharDevs: []string{}, Chosen: true, Attr: attrOf(&a), Ports: []portJSON{{
				Port: 1, State: "ACTIVE", LinkLayer: "Ethernet", MaxMTU: 4096, ActiveMTU: 1024, MaxMessage: 1 << 31, GIDTable: 1024, PKeyTable: 1, GIDs: []gidJSON{
					{Index: 0, GID: ib.GID{0: 0xfe, 1: 0x80, 15: 1}.String(), Type: "RoCE v2", Addr: "fe80::1", NetDev: "eth1"},
					{Index: 1, GID: v4.String(), Type: "RoCE v2", Addr: v4.Addr().String(), NetDev: "eth1"},
				}}}},
			{Name: "ib0", Provider: "mlx5", Tier: "hardware", GUID: ib.GUID(2).String(), NetDevs: []string{}, CharDevs: []string{}, Attr: attrOf(&ib.DeviceAttr{}), Ports: []portJSON{{
				Port: 1, State: "DOWN", LinkLayer: "InfiniBand", LID: 4, SMLID: 1, GIDs: []gidJSON{}}}},
			{Name: "soft0", Provider: "soft", Tier: "software NIC", GUID: ib.GUID(3).String(), NetDevs: []string{}, CharDevs: []string{}, Attr: attrOf(&ib.DeviceAttr{}), Ports: []portJSON{{
				Port: 1, State: "ACTIVE", LinkLayer: "Ethernet", MaxMTU: 4096, ActiveMTU: 4096, GIDs: []gidJSON{
					{Index: 0, GID: ib.GID{15: 9}.String(), Type: "software NIC", Paths: []string{"memory"}},
					{Index: 1, GID: v4.String(), Type: "RoCE v2", Addr: v4.Addr().String(), NetDev: "eth1", Paths: []string{"udp", "tcp"}, UDPPort: 4791},
					{Index: 2, GID: v4.String(), Type: "RoCE v2", Addr: v4.Addr().String(), NetDev: "eth1", Paths: []string{"udp", "tcp"}, UDPPort: 50000},
					{Index: 3, GID: v4.String(), Type: "RoCE v2", Addr: v4.Addr().String(), NetDev: "eth1", Paths: []string{"tcp"}, Problem: "bind: no"},
				}}}},
		},
		Path: "udp",
		Choice: &choiceJSON{Device: "rxe0", Reason: "the best device that works", Passed: []verbs.Passed{
			{Tier: verbs.TierHardware, Provider: "mlx5", Device: "mlx5_0", Reason: "permission denied: add the user to the group rdma"}}},
		Problems: []string{"provider siw: rdma netlink is not available"},
	}
}

func TestDevicesGolden(t *testing.T) {
	r := sampleDevices()
	for name, verbose := range map[string]bool{"devices.txt": false, "devices_v.txt": true} {
		var b bytes.Buffer
		if err := r.writeText(&b, verbose); err != nil {
			t.Fatal(err)
		}
		golden(t, name, b.Bytes())
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	r.forced = transport.PathUDP
	gids := r.Devices[len(r.Devices)-1].Ports[0].GIDs
	gids[0].Paths, gids[0].Problem = nil, "peers are met through memory from here"
	gids[1].Paths, gids[2].Paths, gids[3].Paths = []string{"udp"}, []string{"udp"}, nil
	var forced, all bytes.Buffer
	if err := errors.Join(r.writeText(&forced, false), r.writeText(&all, true)); err != nil {
		t.Fatal(err)
	}
	golden(t, "devices_path.txt", forced.Bytes())
	for _, want := range []string{": no: peers are met through memory from here", ": no: bind: no"} {
		if !strings.Contains(all.String(), want) {
			t.Errorf("%q is missing from:\n%s", want, &all)
		}
	}
	golden(t, "devices.json", append(b, '\n'))
	var none bytes.Buffer
	if err := (&deviceReport{}).writeText(&none, false); err != nil || !strings.Contains(none.String(), "no devices") {
		t.Errorf("%q, %v", none.String(), err)
	}
}

func TestDevices(t *testing.T) {
	t.Setenv(verbs.EnvDevice, "")
	status, text, stderr := ringside("devices", "-v", "soft0")
	if status != 0 || stderr != "" {
		t.Fatalf("status %d, %s", status, stderr)
	}
	wants := []string{"software NIC", "ACTIVE", "GID 0", "max_qp_wr", "not provider mlx5 (hardware)"}
	if all, _ := verbs.Devices(); len(all) == 1 {
		wants = append(wants, "soft0  (chosen)", "programs that name no device get soft0", "not provider mlx5", "not provider rxe", "not provider siw")
	}
	for _, want := range wants {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing from:\n%s", want, text)
		}
	}
	t.Setenv("RINGSIDE_PATH", "tin cans")
	_, text, _ = ringside("devices", "-o", "json", "soft0")
	var paths struct {
		Path     string
		Problems []string
		Devices  []struct{ Ports []portJSON }
	}
	if err := json.Unmarshal([]byte(text), &paths); err != nil {
		t.Fatal(err)
	}
	if paths.Path != "tin cans" || !strings.Contains(strings.Join(paths.Problems, " "), "RINGSIDE_PATH") || len(paths.Devices) != 1 {
		t.Fatalf("%+v", paths)
	}
	for i, g := range paths.Devices[0].Ports[0].GIDs {
		switch {
		case i == 0 && slices.Equal(g.Paths, []string{"memory"}):
		case i > 0 && slices.Equal(g.Paths, []string{"udp", "tcp"}) && g.UDPPort != 0:
		case i > 0 && slices.Equal(g.Paths, []string{"tcp"}) && g.Problem != "":
		default:
			t.Errorf("GID %d: %+v", i, g)
		}
	}
	t.Setenv("RINGSIDE_PATH", "")
	_, text, _ = ringside("devices", "-o", "json")
	var loose struct {
		Devices []struct {
			Attributes struct {
				Limits map[string]uint64 `json:"limits"`
			} `json:"attributes"`
		} `json:"devices"`
	}
	if err := json.Unmarshal([]byte(text), &loose); err != nil {
		t.Fatal(err)
	}
	if n := len(loose.Devices); n == 0 || loose.Devices[n-1].Attributes.Limits["max_qp"] == 0 {
		t.Errorf("limits are missing from:\n%s", text)
	}
	t.Setenv(verbs.EnvDevice, "soft")
	if _, text, _ = ringside("devices"); !strings.Contains(text, verbs.EnvDevice+"=soft") {
		t.Errorf("the choice of the environment is not told:\n%s", text)
	}
	t.Setenv(verbs.EnvDevice, "nosuch0")
	if status, text, _ = ringside("devices"); status != 0 || !strings.Contains(text, "problem:") || !strings.Contains(text, "soft0") {
		t.Errorf("status %d:\n%s", status, text)
	}
}

// With --path, a software NIC's GIDs have that path or none, whatever the environment says.
func TestDevicesPath(t *testing.T) {
	t.Setenv("RINGSIDE_PATH", "tin cans")
	for _, path := range []string{"memory", "udp", "tcp"} {
		status, text, stderr := ringside("devices", "--path", path, "-o", "json", "soft0")
		var r struct {
			Path     string
			Problems []string
			Devices  []struct{ Ports []portJSON }
		}
		if err := json.Unmarshal([]byte(text), &r); status != 0 || err != nil || len(r.Devices) != 1 {
			t.Fatalf("%s: status %d, %v, %s\n%s", path, status, err, stderr, text)
		}
		if r.Path != path || len(r.Problems) > 0 {
			t.Errorf("path is %q instead of %s; problems %q", r.Path, path, r.Problems)
		}
		for i, g := range r.Devices[0].Ports[0].GIDs {
			there := (g.Addr == "") == (path == "memory")
			switch {
			case there && slices.Equal(g.Paths, []string{path}) && g.Problem == "" && (g.UDPPort != 0) == (path == "udp"):
			case len(g.Paths) == 0 && g.Problem != "" && g.UDPPort == 0 && (!there || path == "udp"): // it may be that no port is free
			default:
				t.Errorf("%s: GID %d: %+v", path, i, g)
			}
		}
	}
	if _, text, _ := ringside("devices", "--path", "memory", "soft0"); !strings.Contains(text, "only memory\n") || strings.Contains(text, "tin cans") ||
		!strings.Contains(text, ": through memory") || strings.Contains(text, "UDP") || strings.Contains(text, "TCP") {
		t.Errorf("--path memory says:\n%s", text)
	}
}

// In the Soft-RoCE machine the kernel's devices come first.
func TestKernelDevices(t *testing.T) {
	if os.Getenv("RINGSIDE_SOFT_ROCE") == "" {
		testutil.Skip(t, "there are no devices of the kernel: go run ./test/soft-roce -- go test ./cmd/ringside has some")
	}
	t.Setenv(verbs.EnvDevice, "")
	status, text, stderr := ringside("devices", "-v")
	if status != 0 || stderr != "" {
		t.Fatalf("status %d, %s", status, stderr)
	}
	for _, want := range []string{"rxe0  (chosen)", "rxe1", "siw0", "siw1", "soft0", "kernel software", "veth0", "/dev/infiniband/uverbs", "10.77.0.1",
		"programs that name no device get rxe0", "not provider mlx5 (hardware)"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing from:\n%s", want, text)
		}
	}
}

func TestVersion(t *testing.T) {
	bi := &debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}, Settings: []debug.BuildSetting{
		{Key: "vcs.revision", Value: "0123456789abcdef"}, {Key: "vcs.time", Value: "2026-01-02T03:04:05Z"}, {Key: "vcs.modified", Value: "true"}, {Key: "CGO_ENABLED", Value: "0"}}}
	v := versionOf(bi)
	v.Go, v.OS, v.Arch = "go1.26.0", "linux", "arm64"
	var b bytes.Buffer
	for _, form := range []string{"text", "json"} {
		if err := printVersion(&b, v, form); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "version.txt", b.Bytes())
	if status, text, _ := ringside("version"); status != 0 || !strings.HasPrefix(text, "ringside ") {
		t.Errorf("status %d: %s", status, text)
	}
}

// TestSpawn measures between two processes.
func TestSpawn(t *testing.T) {
	for _, a := range []string{
		"perf send lat --spawn --size 8,4k --iters 200 --warmup 20 -o json",
		"perf send rate --spawn --iters 2000 --qps 2 --poll adaptive -o json",
		"perf write lat --spawn --iters 200 --warmup 0 -o json",
		"perf write bw --spawn --iters 50 -o json",
		"perf read lat --spawn --iters 200 --poll event -o json",
		"perf atomic rate --spawn --iters 500 -o json",
		"perf rpc lat --spawn --iters 200 --poll adaptive -o json",
		"perf rpc rate --spawn --iters 1000 --inflight 16 -o json",
	} {
		t.Run(a, func(t *testing.T) {
			status, stdout, stderr := ringside(strings.Fields(a)...)
			if status != 0 {
				t.Fatalf("status %d: %s", status, stderr)
			}
			var r struct {
				Schema  string
				Path    string
				Spawned bool
				Client  perf.Host
				Server  perf.Host
				Results []struct {
					Messages uint64
				}
			}
			if err := json.Unmarshal([]byte(stdout), &r); err != nil {
				t.Fatalf("%v in %s", err, stdout)
			}
			if r.Schema != perf.Schema || !r.Spawned || r.Path != "shm" || len(r.Results) == 0 || r.Results[0].Messages == 0 {
				t.Errorf("got %s", stdout)
			}
			if stderr != "" {
				t.Errorf("stderr is no terminal, but has %q", stderr)
			}
		})
	}
}

func TestSpawnPlot(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.svg")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o644); err != nil { // a longer one
		t.Fatal(err)
	}
	status, stdout, stderr := ringside("perf", "read", "lat", "--spawn", "--size", "8,64", "--iters", "100", "--plot", file)
	if status != 0 {
		t.Fatalf("status %d: %s", status, stderr)
	}
	lines := strings.Split(stdout, "\n")
	if !slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, "p99.9") }) || !strings.Contains(stdout, "server started by this command") {
		t.Errorf("got %s", stdout)
	}
	b, err := os.ReadFile(file)
	if err != nil || !bytes.HasPrefix(b, []byte("<svg")) || !bytes.HasSuffix(b, []byte("</svg>\n")) {
		t.Errorf("%v, %s", err, b)
	}
}

// A run without results leaves what there was in place of a picture, and nothing where there was nothing.
func TestPlotOfFailure(t *testing.T) {
	dir := t.TempDir()
	old, none, device := filepath.Join(dir, "old.svg"), filepath.Join(dir, "none.svg"), filepath.Join(dir, "device")
	if err := os.WriteFile(old, []byte("earlier"), 0o644); err != nil {
		t.Fatal(err)
	}
	files := []string{old, none}
	if os.Symlink(os.DevNull, device) == nil { // rather than the device itself, which must not go if this fails
		files = append(files, device)
	}
	for _, server := range []string{"127.0.0.1:1", "--spawn --server-device nosuch0"} {
		for _, file := range files {
			if status, _, stderr := ringside(append([]string{"perf", "read", "lat", "--plot", file}, strings.Fields(server)...)...); status != 1 {
				t.Errorf("%s, %s: status %d: %s", server, file, status, stderr)
			}
		}
		if b, err := os.ReadFile(old); err != nil || string(b) != "earlier" {
			t.Errorf("%s: %v, the earlier picture is %q", server, err, b)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != len(files)-1 {
			t.Errorf("%s: %v, %v are left", server, err, left)
		}
	}
	if len(files) == 3 {
		if status, _, stderr := ringside("perf", "read", "lat", "--spawn", "--iters", "100", "--plot", device); status != 0 {
			t.Errorf("status %d: %s", status, stderr)
		}
	}
}

// TestSpawnFails: what the server says about its failure is shown. It has the client's port, on the client's device.
func TestSpawnFails(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"--server-device nosuch0", "nosuch0"},
		{"--ib-port 99", "--ib-port 99 does not exist"},
		{"--ib-port 99 --device soft0 --server-device soft0", "--ib-port 99 does not exist"},
	} {
		status, _, stderr := ringside(append([]string{"perf", "read", "lat", "--spawn"}, strings.Fields(tt.args)...)...)
		if status != 1 || !strings.Contains(stderr, "--spawn") || !strings.Contains(stderr, tt.want) {
			t.Errorf("%s: status %d: %s", tt.args, status, stderr)
		}
	}
	// Another device may have fewer ports: here it is the client that fails.
	status, _, stderr := ringside("perf", "read", "lat", "--spawn", "--ib-port", "99", "--server-device", "soft0")
	if status != 1 || strings.Contains(stderr, "--spawn") || !strings.Contains(stderr, "--ib-port 99 does not exist") {
		t.Errorf("status %d: %s", status, stderr)
	}
}
