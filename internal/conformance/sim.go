package conformance

import (
	"context"
	"fmt"
	"hash/fnv"
	"iter"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
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
	traces  map[string]string // of the cases that have ended, by name
}

type simProfile struct {
	name   string
	faults simnet.Faults
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

// brought are devices that tests bring, by name.
var brought = map[string]func() (*verbs.Context, error){}

func (h *host) open(a openArgs) (*verbs.Context, error) {
	if h.sim != nil {
		return verbs.OpenDriver(simDevice{h.sim, a.Net})
	}
	if f := brought[a.Device]; f != nil {
		return f()
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

// stopwatch returns how long ago it was called.
func (c *C) stopwatch() func() time.Duration {
	if c.net != nil {
		from := c.net.Now()
		return func() time.Duration { return c.net.Now() - from }
	}
	from := time.Now()
	return func() time.Duration { return time.Since(from) }
}

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
