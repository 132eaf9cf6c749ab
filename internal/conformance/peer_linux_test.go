package conformance

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// What a process of the second side does when it fails.
var (
	opExit = newOp("exit", func(_ *host, status int) (none, error) {
		os.Exit(status)
		return none{}, nil
	})
	opPanic = newOp("panic", func(*host, none) (none, error) { panic("oh") })
	opSay   = newOp("say", func(_ *host, text string) (none, error) {
		fmt.Fprintln(os.Stderr, text)
		return none{}, nil
	})
	opRace = newOp("race", func(*host, none) (n int, err error) {
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() { n++ })
		}
		wg.Wait()
		return n, nil
	})
)

// A process of the second side that ends otherwise than it is made to fails the case, or, between two, the next one, or the whole, and
// what it has written is told; one that is killed on purpose does not.
func TestPeerFails(t *testing.T) {
	testutil.CheckLeaks(t)
	defer func(o Options, all []testCase) { options, table = o, all }(options, table)
	options = Options{Device: "soft0"}
	ends := func(p *peer, status int) {
		if err := p.roundTrip(opExit.name, status, &none{}); !errors.Is(err, errPeerGone) {
			t.Errorf("exit: %v, want errPeerGone", err)
		}
	}
	racing := "" // what must be told of a race; nothing is where no detector looks for it
	if raceEnabled {
		racing = "exit status 66"
	}
	type step struct {
		name string
		own  bool // it has a process of its own
		run  func(c *C)
		then func(p *peer) // behind the case
		want string        // in the log of the case, which fails; empty: it passes
	}
	steps := []step{
		{name: "exits", run: func(c *C) { ends(c.B.remote, 66) }, want: "exit status 66"},
		{name: "exits by itself", run: func(c *C) { ends(c.B.remote, 0) }, want: "exit status 0"},
		{name: "panics", run: func(c *C) { call(c.B, opPanic, none{}) }, want: "exit status 2; its output:\npanic: oh"},
		{name: "is interrupted", run: func(c *C) {
			if err := c.B.remote.cmd.Process.Signal(os.Interrupt); err != nil {
				c.Fatal(err)
			}
			do(c.B, opPD, none{})
		}},
		{name: "is killed", own: true, run: func(c *C) { c.B.kill() }},
		{name: "exits before it is killed", own: true, run: func(c *C) { ends(c.B.remote, 66); c.B.kill() }, want: "exit status 66"},
		{name: "races before it is killed", own: true, run: func(c *C) { do(c.B, opSay, raceFound); c.B.kill() }, want: raceFound},
		{name: "exits before it is replaced", own: true, run: func(c *C) { ends(c.B.remote, 3); c.restart() }, want: "exit status 3"},
		{name: "races", own: true, run: func(c *C) { do(c.B, opRace, none{}) }, want: racing},
		{name: "passes", run: func(c *C) {}, then: func(p *peer) { ends(p, 4) }},
		{name: "follows", run: func(c *C) {}, want: "between two cases: the other process has ended: exit status 4"},
		{name: "is last", run: func(c *C) {}, then: func(p *peer) { ends(p, 5) }},
	}
	table = nil
	var last *peer
	for _, s := range steps {
		addCases("feature", 0, testCase{name: s.name, twoProcesses: s.own, run: func(c *C) { last = c.B.remote; s.run(c) }})
	}
	i := 0
	err := eachCase(pathProcesses, func(name string, f func(T)) bool {
		s := newScript(name)
		s.play(f)
		if name == "warm-up" && s.Failed() {
			t.Error(s.Logged())
		}
		return !s.Failed()
	}, func(r Result) {
		s := steps[i]
		i++
		if want := s.want; r.Case != s.name || (r.Outcome == Failed) != (want != "") || !strings.Contains(r.Log, want) {
			t.Errorf("%+v; want in its log: %q", r, want)
		}
		if s.then != nil {
			s.then(last)
		}
	})
	if i != len(steps) {
		t.Errorf("%d of %d cases", i, len(steps))
	}
	if err == nil || errors.Is(err, errNotConnected) || !strings.Contains(err.Error(), "exit status 5") {
		t.Errorf("behind the last case: %v", err)
	}
}
