package simnet

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
)

// run sends packets from one host to another, and returns the network when all is over, and how many arrived.
func run(t *testing.T, seed uint64, f Faults) (n *Network, got int) {
	t.Helper()
	n = New(seed, f)
	var b *Host
	none := func() bool { return false }
	a, err := n.Attach(netip.MustParseAddr("10.0.0.1"), func() {}, none)
	if err != nil {
		t.Fatal(err)
	}
	b, err = n.Attach(netip.MustParseAddr("10.0.0.2"), func() {
		b.Receive(func(_ netip.AddrPort, p *roce.Packet) { got++ })
	}, none)
	if err != nil {
		t.Fatal(err)
	}
	out, err := a.Peer(b.Local())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2000 {
		p := roce.Packet{Opcode: roce.Op(roce.UC, roce.SendOnly), PKey: roce.DefaultPKey}
		body, ok := out.Packet(&p, 64+i%900)
		if !ok {
			t.Fatal("no room")
		}
		clear(body)
		out.Commit()
		a.Flush()
		n.Advance(10 * time.Microsecond)
	}
	for n.Step() {
	}
	return n, got
}

// What arrives is what was sent, less what the faults have taken: every packet that was changed is refused.
func TestFaultsAreCounted(t *testing.T) {
	f := Faults{Delay: 5 * time.Microsecond, Loss: 0.05, Duplicate: 0.05, Corrupt: 0.1, Reorder: 0.1, ReorderBy: time.Millisecond}
	n, got := run(t, 1, f)
	c := n.Counters()
	if c.Lost == 0 || c.Repeated == 0 || c.Corrupted == 0 || c.Reordered == 0 || c.Refused != c.Corrupted ||
		uint64(got) != c.Sent-c.Lost+c.Repeated-c.Refused {
		t.Errorf("%d arrived, %+v", got, c)
	}
	if again, _ := run(t, 1, f); again.Trace() != n.Trace() {
		t.Error("one seed, two traces")
	}
	if other, _ := run(t, 2, f); other.Trace() == n.Trace() {
		t.Error("two seeds, one trace")
	}
}

func TestPartition(t *testing.T) {
	n, got := run(t, 1, Faults{Every: 2 * time.Millisecond, For: time.Millisecond})
	if c := n.Counters(); c.CutOff < 800 || c.CutOff > 1200 || uint64(got) != c.Sent-c.CutOff {
		t.Errorf("%d arrived, %+v", got, c)
	}
}

// A sleeper with nothing to wait for wakes when there is, and ends with its context, in virtual time, too.
func TestSleep(t *testing.T) {
	n := New(1, Faults{})
	ctx, cancel := n.Timeout(time.Hour)
	defer cancel()
	if err := n.Sleep(ctx, nil); !errors.Is(err, context.DeadlineExceeded) || n.Now() != time.Hour {
		t.Errorf("%v at %v", err, n.Now())
	}
	c := make(chan struct{}, 1)
	done := make(chan error)
	go func() { done <- n.Sleep(t.Context(), c) }()
	c <- struct{}{}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
