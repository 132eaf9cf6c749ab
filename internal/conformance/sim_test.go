package conformance

import (
	"context"
	"fmt"
	"hash/fnv"
	"iter"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/internal/softnic/simnet"
	"github.com/ringside-rdma/ringside/verbs"
)

// simAddrs are the addresses of the sides on a network in virtual time.
var simAddrs = [2]netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, 1}), netip.AddrFrom4([4]byte{10, 0, 0, 2})}

// simPath makes a network for each case.
type simPath struct {
	seed    uint64
	profile simProfile
	// A case runs if its place in the table is the part's, of so many parts.
	part, parts int
	traces      map[string]string // of the cases that have ended, by name
}

type simProfile struct {
	name   string
	faults simnet.Faults
}

// simProfiles are tried in turn, seed by seed. Acknowledgements are waited for 67 ms, seven times more.
var simProfiles = []simProfile{
	{"clean", simnet.Faults{Delay: 5 * time.Microsecond, Jitter: 20 * time.Microsecond}},
	{"lossy", simnet.Faults{Delay: 5 * time.Microsecond, Jitter: 10 * time.Microsecond, Loss: 0.02, Duplicate: 0.02, Corrupt: 0.01,
		Reorder: 0.05, ReorderBy: 200 * time.Microsecond, KeepRefusals: true}},
	{"partition", simnet.Faults{Delay: 50 * time.Microsecond, Jitter: 50 * time.Microsecond, Loss: 0.005, Every: 5 * time.Millisecond,
		For: 2 * time.Millisecond, KeepRefusals: true}},
}

// join puts the sides of a case on a network of its own. What it does follows from the seed and the case's name.
func (p *simPath) join(c *C, name string) {
	h := fnv.New64a()
	fmt.Fprint(h, p.seed, name)
	c.net = simnet.New(h.Sum64(), p.profile.faults)
	c.lossy = p.profile.faults.Lossy()
	c.A.local.sim, c.B.local.sim = c.net, c.net
	c.Cleanup(func() {
		p.traces[name] = c.net.Trace()
		if c.Failed() {
			c.Logf("network %+v, trace %s after %v; to repeat: SEED=%d go test ./internal/conformance -run '^%s$'",
				c.net.Counters(), c.net.Trace(), c.net.Now(), p.seed, strings.ReplaceAll(c.Name(), "/", "$/^"))
		}
	})
}

// simDevice is a software NIC on a simulated network.
type simDevice struct {
	net  *simnet.Network
	addr netip.Addr
}

func (simDevice) Info() driver.DeviceInfo {
	return driver.DeviceInfo{Name: "soft0", Provider: "soft", Tier: driver.TierSoft}
}

func (d simDevice) Open() (driver.Context, error) { return softnic.OpenSim(d.net, d.addr) }

func (h *host) open(a openArgs) (*verbs.Context, error) {
	if h.sim != nil {
		return verbs.OpenDriver(simDevice{h.sim, a.Net})
	}
	return verbs.Open(a.Device)
}

// timeout, sleep and intN are what the real world has: time, and chance.
func (h *host) timeout(d time.Duration) (context.Context, context.CancelFunc) {
	if h.sim != nil {
		return h.sim.Timeout(d)
	}
	return context.WithTimeout(context.Background(), d)
}

func (h *host) sleep(d time.Duration) {
	if h.sim != nil {
		h.sim.Advance(d)
		return
	}
	time.Sleep(d)
}

func (h *host) intN(n int) int {
	if h.sim != nil {
		return int(h.sim.Uint32() % uint32(n))
	}
	return rand.IntN(n)
}

// sleep and waitFor are for cases, whose sides may be in other processes.
func (c *C) sleep(d time.Duration) { (&host{sim: c.net}).sleep(d) }

func (c *C) waitFor(d time.Duration, f func() bool) bool { return (&host{sim: c.net}).waitFor(d, f) }

// beside runs f beside the case; in virtual time, before it goes on.
func (c *C) beside(f func()) {
	if c.net != nil {
		f()
		return
	}
	go f()
}

// inOrder ranges over a map by the order of its keys, so that a case is the same each time.
func inOrder[T any](m map[string]T) iter.Seq2[string, T] {
	return func(yield func(string, T) bool) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}

// severalGoroutines skips a case in virtual time whose goroutines would run in no certain order.
func (c *C) severalGoroutines() {
	if c.net != nil {
		c.Skip("several goroutines: two runs would not be the same")
	}
}

// TestSim runs the table between two software NICs on networks in virtual time, which lose, repeat, reorder and change packets, or
// are cut off: each seed is another one. SEEDS says how many, SEED which one only; without either, each of a hundred runs a fifth of
// the table.
func TestSim(t *testing.T) {
	first, seeds, parts := 0, 100, 5
	if testing.Short() || raceEnabled {
		seeds = 15
	}
	if n, err := strconv.Atoi(os.Getenv("SEEDS")); err == nil {
		seeds, parts = n, 1
	}
	if n, err := strconv.Atoi(os.Getenv("SEED")); err == nil {
		first, seeds, parts = n, 1, 1
	}
	for seed := first; seed < first+seeds; seed++ {
		runSim(t, uint64(seed), parts)
	}
}

// runSim runs one of the parts of the table, and returns the traces of its cases.
func runSim(t *testing.T, seed uint64, parts int) map[string]string {
	n := uint64(len(simProfiles))
	p := &simPath{seed: seed, profile: simProfiles[seed%n], part: int(seed / n % uint64(parts)), parts: parts, traces: map[string]string{}}
	t.Run(fmt.Sprintf("%d-%s", seed, p.profile.name), func(t *testing.T) { runUDP(t, path{name: "sim", sim: p}) })
	return p.traces
}

// Two runs from one seed are the same, packet by packet; from another seed, they are not.
func TestSimReplays(t *testing.T) {
	parts := 4
	if os.Getenv("SEEDS") != "" {
		parts = 1
	}
	for i, profile := range simProfiles {
		seed := uint64(i)
		once := runSim(t, seed, parts)
		again := runSim(t, seed, parts)
		other := runSim(t, seed+uint64(len(simProfiles)*parts), parts) // the same part
		if len(once) < 30 {
			t.Errorf("%s: %d cases", profile.name, len(once))
		}
		differ := 0
		for name, trace := range once {
			if again[name] != trace {
				t.Errorf("%s, seed %d, %s: trace %s, and %s when it is run again", profile.name, seed, name, trace, again[name])
			}
			if other[name] != trace {
				differ++
			}
		}
		if differ < 15 {
			t.Errorf("%s: with another seed, only %d of %d cases send other packets", profile.name, differ, len(once))
		}
	}
}
