package conformance

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"regexp"
	"strings"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Options say what the table runs on.
type Options struct {
	Device     string // of both sides
	PeerDevice string // of the second side, if it is another one
	Seed       uint64 // of the random cases; 0: a new one for each
	// Only runs the cases whose name it matches; nil: all.
	Only *regexp.Regexp
}

// options is what Run was called with, or the flags of the tests say. There is one run a process: the host of the second side, which
// knows nothing of it, is the same program.
var options = Options{Device: "soft0"}

// testCase is one row of the table.
type testCase struct {
	name    string
	feature string // row of the matrix; empty: none
	needs   ib.DeviceCaps
	// twoProcesses: the case ends the other process, and gets one of its own to do that.
	twoProcesses bool
	run          func(c *C)
}

// table is every case; the files cases_*.go add to it.
var table []testCase

func addCases(feature string, needs ib.DeviceCaps, cases ...testCase) bool {
	for _, tc := range cases {
		tc.feature = feature
		tc.needs |= needs
		table = append(table, tc)
	}
	return true
}

// A path is a way for two sides to meet.
type path struct {
	name         string
	twoProcesses bool
	remoteIsA    bool
	soft         string // what the software NIC calls it
	// Of two different devices: their names, where the software NIC among them meets the other and at which address it does, and the network
	// namespace of the process that it is in, the other side's.
	devices    [2]string
	net        netip.Addr
	kernelAddr netip.Addr
	namespace  string
	streams    bool     // QPs are connected by streams
	sim        *simPath // the sides meet on a network in virtual time
	// With parts, a case runs if its place in the table is the part's, or if it ends a process.
	part, parts int
}

var localhost = netip.AddrFrom4([4]byte{127, 0, 0, 1})

var (
	pathInProcess   = path{name: "in-process", soft: "inproc"}
	pathProcesses   = path{name: "processes", twoProcesses: true, soft: "shm"}
	pathUDP         = path{name: "udp", soft: "udp", net: localhost}
	pathUDPProcs    = path{name: "udp", twoProcesses: true, soft: "udp", net: localhost}
	pathTCP         = path{name: "tcp", soft: "tcp", streams: true}
	pathTCPProcs    = path{name: "tcp", twoProcesses: true, soft: "tcp", streams: true}
	pathProcessesBA = path{name: "processes", twoProcesses: true, remoteIsA: true, soft: "shm"}
)

// lossy is what makes the software NIC's network lose packets (softnic.EnvFaults).
var lossy = os.Getenv("RINGSIDE_SOFT_FAULTS")

// errNotConnected: the sides have not found each other.
var errNotConnected = errors.New("the sides do not connect: no case can run")

// eachCase runs the table on a path. run runs one case by its name, and reports whether it has passed; report is told how each ended.
// An error other than errNotConnected says how the process of the second side has failed behind the last case.
func eachCase(p path, run func(name string, f func(T)) bool, report func(Result)) (err error) {
	r := &runner{path: p, report: report}
	defer func() { err = errors.Join(err, r.stop()) }()
	// What a process or a NIC makes once and keeps is made here, before leaks are counted.
	if !run("warm-up", func(t T) { r.run(t, testCase{name: "warm-up", run: warmUp}) }) {
		return errNotConnected
	}
	for i, tc := range table {
		if p.parts > 1 && i%p.parts != p.part && !tc.twoProcesses {
			continue
		}
		if tc.twoProcesses && (!p.twoProcesses || p.remoteIsA) || options.Only != nil && !options.Only.MatchString(tc.name) {
			continue
		}
		run(tc.name, func(t T) { r.run(t, tc) })
	}
	return nil
}

func warmUp(c *C) {
	l := c.pair(ib.RC)
	l.alive(c)
	for _, e := range []*end{l.a, l.b} {
		if e.dev.Provider == "soft" {
			if got := e.query().Path; got != currentPath(c) {
				c.Fatalf("%s: path %q, want %q", e.name, got, currentPath(c))
			}
		}
	}
}

func currentPath(c *C) string {
	if c.net != nil {
		return "sim"
	}
	if c.streams {
		return pathTCP.soft
	}
	if c.A.dev.Net || c.B.dev.Net {
		return pathUDP.soft
	}
	if c.A.local != nil && c.B.local != nil {
		return pathInProcess.soft
	}
	return pathProcesses.soft
}

type runner struct {
	path
	shared   *peer
	provider string // of side A; known once the warm-up has opened it
	report   func(Result)
}

func (r *runner) stop() error {
	if r.shared == nil {
		return nil
	}
	return r.shared.stop()
}

// peerFor returns the process of the second side; own says that it is for one case only, which ends it.
func (r *runner) peerFor(t T, own bool) *peer {
	if !own && r.shared != nil {
		if !r.shared.hasEnded() {
			return r.shared
		}
		if err := r.shared.failure(); err != nil {
			t.Errorf("between two cases: %v", err)
		}
		r.shared = nil
	}
	p, err := startPeer(r.namespace)
	if err != nil {
		t.Fatal(err)
	}
	if !own {
		r.shared = p
	}
	return p
}

// endPeers tells t of the processes of a case that have ended otherwise than they were to, and, if the case has failed, what the others
// have written. Those that are its own end here.
func (r *runner) endPeers(t T, peers []*peer) {
	for _, p := range peers {
		var err error
		switch shared := p == r.shared; {
		case p.hasEnded():
			err = p.failure()
			if shared {
				r.shared = nil
			}
		case shared:
		case t.Failed():
			p.kill() // it may hang
		default:
			err = p.stop()
		}
		if err != nil {
			t.Errorf("%v", err)
		} else if out := p.log.String(); t.Failed() && out != "" {
			t.Logf("output of the other process:\n%s", out)
		}
	}
}

func (r *runner) run(t T, tc testCase) {
	res := &Result{Case: tc.name, Feature: tc.feature, Path: r.name}
	c := &C{T: t, result: res, streams: r.streams}
	warm := tc.name != "warm-up"
	// First of the cleanups, so the last to run: it tells of what failed before the case began, and of all that was logged behind it.
	t.Cleanup(func() {
		res.Column = columnOf(r.provider, r.name)
		switch {
		case t.Failed():
			res.Outcome = Failed
			if l, ok := t.(interface{ Logged() string }); ok {
				res.Log = l.Logged()
			}
		case t.Skipped():
			res.Outcome = Skipped
		default:
			res.Outcome = Passed
		}
		if warm {
			r.report(*res)
		}
	})
	here := newHost()
	c.A = &Side{c: c, name: "A", local: here}
	c.B = &Side{c: c, name: "B", local: newHost()}
	if r.sim != nil {
		r.sim.join(c, tc.name)
	}
	if r.twoProcesses {
		remote := c.B
		if r.remoteIsA {
			remote = c.A
		}
		remote.local, remote.remote = nil, r.peerFor(t, tc.twoProcesses)
		c.peers = append(c.peers, remote.remote)
		t.Cleanup(func() { r.endPeers(t, c.peers) })
	}
	t.Cleanup(func() { c.finish(warm && c.net == nil) })
	sides := []*Side{c.A, c.B}
	for i, s := range sides {
		if warm && c.net == nil && !c.counted(s) {
			do(s, opSnapshot, none{})
		}
		name, net := options.Device, r.net
		if r.sim != nil {
			net = simAddrs[i]
		}
		switch {
		case r.devices[i] != "":
			name = r.devices[i]
		case i == 1 && options.PeerDevice != "":
			name = options.PeerDevice
		}
		s.opened = openArgs{Device: name, Net: net}
		if name != "soft0" {
			s.opened.Net, s.opened.At = netip.Addr{}, r.kernelAddr
		}
		s.dev = do(s, opOpen, s.opened)
	}
	r.provider = c.A.dev.Provider
	if missing := tc.needs &^ (c.A.dev.Attr.Caps & c.B.dev.Attr.Caps); missing != 0 {
		c.Skip(fmt.Sprintf("the device does not have %v", missing))
	}
	for _, s := range sides {
		target := s == c.B && c.A.dev.Provider != s.dev.Provider
		if reason := gapOf(s.dev.Provider, tc.name, target); reason != "" {
			c.Skip(reason)
		}
	}
	for _, s := range sides {
		s.pd = do(s, opPD, none{})
	}
	tc.run(c)
}

// finish closes what the case left open and counts leaks.
func (c *C) finish(countLeaks bool) {
	for _, s := range []*Side{c.A, c.B} {
		if s.gone() {
			continue
		}
		if _, err := call(s, opCloseAll, none{}); err != nil && !c.Failed() {
			c.Errorf("%s: closing everything: %v", s.name, err)
		}
	}
	if !countLeaks || c.Failed() || c.Skipped() {
		return
	}
	for _, s := range []*Side{c.A, c.B} {
		if s.gone() || c.counted(s) {
			continue
		}
		if left, err := call(s, opLeaks, none{}); err != nil || left != "" {
			c.Errorf("%s: left over after Close: %v\n%s", s.name, err, left)
		}
	}
}

// counted reports whether the leaks of the side's process are counted with those of side A.
func (c *C) counted(s *Side) bool { return s == c.B && c.A.local != nil && c.B.local != nil }

func (s *Side) gone() bool { return s.remote != nil && s.remote.hasEnded() }

// seed returns the seed of a random case, and says on failure how to use it again.
func (c *C) seed() uint64 {
	if c.net != nil {
		return uint64(c.net.Uint32()) + 1
	}
	seed := options.Seed
	if seed == 0 {
		seed = rand.Uint64()>>32 + 1
	}
	c.Cleanup(func() {
		if c.Failed() {
			if _, ok := c.T.(*script); ok {
				c.Logf("to repeat: --run '^%s$' --seed %d", c.Name(), seed)
				return
			}
			c.Logf("to repeat: -run '^%s$' -seed %d", strings.ReplaceAll(c.Name(), "/", "$/^"), seed)
		}
	})
	return seed
}

func (c *C) rand() *rand.Rand { return rand.New(rand.NewPCG(c.seed(), 7)) }
