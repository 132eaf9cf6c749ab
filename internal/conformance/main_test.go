package conformance

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

var (
	matrixFile  = flag.String("matrix", "", "write the matrix of features to this `file`: .json, or .md, of which only what is between two marks is replaced")
	matrixCheck = flag.Bool("matrix-check", false, "with -matrix FILE.md: fail if the file does not have the table already, and write nothing")
	matrixWith  = flag.String("matrix-with", "", "comma-separated .json `files` of other runs, whose columns are added to the matrix")
)

func init() {
	flag.StringVar(&options.Device, "device", options.Device, "device that the cases run on")
	flag.StringVar(&options.PeerDevice, "peer-device", "", "device of the second side (default: the same)")
	flag.Uint64Var(&options.Seed, "seed", 0, "seed of the random cases (default: a new one each run)")
}

func TestMain(m *testing.M) {
	ServePeer()
	testutil.Main(m)
}

// TestInProcess runs the table between two contexts of this process.
func TestInProcess(t *testing.T) { runTable(t, pathInProcess) }

// TestProcesses runs the table between this process and another one; side A is here.
func TestProcesses(t *testing.T) { runTable(t, pathProcesses) }

// TestProcessesSwapped is TestProcesses with the sides exchanged.
func TestProcessesSwapped(t *testing.T) { runTable(t, pathProcessesBA.share(t, unlessBrief(5))) }

// TestUDP runs the table between two software NICs that meet on a network.
func TestUDP(t *testing.T) { runUDP(t, pathUDP) }

// TestUDPLossy is TestUDP on networks that lose packets, deliver them twice, and out of order; SEEDS says on how many.
func TestUDPLossy(t *testing.T) {
	if testing.Short() {
		t.Skip("short")
	}
	seeds := 1
	if n, err := strconv.Atoi(os.Getenv("SEEDS")); err == nil {
		seeds = n
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			before := lossy
			t.Cleanup(func() { lossy = before })
			lossy = fmt.Sprintf("loss=2%%,duplicate=2%%,reorder=5%%,seed=%d", seed)
			t.Setenv("RINGSIDE_SOFT_FAULTS", lossy)
			runUDP(t, pathUDP)
		})
	}
}

// TestUDPProcesses is TestUDP with a process for each.
func TestUDPProcesses(t *testing.T) { runUDP(t, pathUDPProcs.share(t, unlessBrief(5))) }

// TestUDP6 runs a part of the table over IPv6; PARTS=1, all of it.
func TestUDP6(t *testing.T) {
	local := netip.IPv6Loopback()
	n, err := net.Listen("tcp", netip.AddrPortFrom(local, 0).String())
	if err != nil {
		testutil.Skip(t, "this host has no IPv6")
	}
	n.Close()
	runUDP(t, path{name: "udp", soft: "udp", net: local}.share(t, 5))
}

// TestTCP runs the table between two software NICs whose queue pairs are connected by streams.
func TestTCP(t *testing.T) { runUDP(t, pathTCP.share(t, unlessBrief(5))) }

// TestTCPProcesses is TestTCP with a process for each: a part, and what ends a process.
func TestTCPProcesses(t *testing.T) { runUDP(t, pathTCPProcs.share(t, 5)) }

// unlessBrief is how many parts a table is shared out in: the given number where runs are to be brief, else one.
func unlessBrief(parts int) int {
	if testing.Short() || raceEnabled {
		return parts
	}
	return 1
}

// share is the path with one of so many parts of the table (PARTS says otherwise): a different one each time, which -seed decides.
func (p path) share(t *testing.T, parts int) path {
	if n, err := strconv.Atoi(os.Getenv("PARTS")); err == nil && n > 0 {
		parts = n
	}
	seed := options.Seed
	if seed == 0 {
		seed = rand.Uint64()>>32 + 1
	}
	p.part, p.parts = int(seed%uint64(parts)), parts
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("to repeat this part of the table: -seed %d", seed)
		}
	})
	return p
}

func runUDP(t *testing.T, p path) {
	if options.Device != "soft0" || options.PeerDevice != "" {
		t.Skip("only the software NIC has more than one path")
	}
	runTable(t, p)
}

// results are of the tests that have ended, for TestZMatrix.
var results []Result

func runTable(t *testing.T, p path) {
	if p.twoProcesses && runtime.GOOS != "linux" && options.Device == "soft0" {
		t.Skip("the software NIC reaches other processes on Linux only")
	}
	run := func(name string, f func(T)) bool { return t.Run(name, func(t *testing.T) { f(t) }) }
	report := func(r Result) {
		if p.sim == nil {
			results = append(results, r)
		}
	}
	if err := eachCase(p, run, report); err != nil {
		t.Fatal(err)
	}
}
