package softnic

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/cm"
	"github.com/ringside-rdma/ringside/internal/softnic/simnet"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A connection whose end comes with the peer's reply to it is not dialled, and its queue pair not left in RTS, whichever of them is seen first.
func TestDialEndsWithReply(t *testing.T) {
	addrs := [2]netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}
	n, err := OpenSim(simnet.New(1, simnet.Faults{}), addrs[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	port, gid, err := n.cmPort(addrs[0])
	if err != nil {
		t.Fatal(err)
	}
	failed := 0
	for range 40 { // which of both is seen first is chance
		e := makeEnd(t, n, endConfig{typ: ib.RC, size: 4096})
		conn := newCMConn(n, port)
		conn.Replied(&roce.REP{QPN: 77})
		conn.Ended(cm.ErrGivenUp)
		n.catchUp() // its end is over before there is a queue pair to fail
		<-conn.done
		err := conn.dial(t.Context(), e.q.(*QP), gid, 0, netip.AddrPortFrom(addrs[1], 7471), &driver.CMParam{})
		a, _ := e.q.Query()
		if !errors.Is(err, cm.ErrGivenUp) || a.State != ib.Init && a.State != ib.Err {
			t.Errorf("dialled: %v, and the queue pair is in %v", err, a.State)
		}
		if a.State == ib.Err {
			failed++
		}
		e.close()
	}
	if failed == 0 {
		t.Error("the reply was never seen first")
	}
}

// What has ended by the time its dial returns: a connection that the peer knew was one.
func TestDialOfWhatHasEnded(t *testing.T) {
	addr := netip.MustParseAddr("10.0.0.1")
	n, err := OpenSim(simnet.New(1, simnet.Faults{}), addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	port, _, err := n.cmPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		ready bool
		end   error
		want  error
	}{
		{"goes on", true, nil, nil},
		{"ended by the peer", true, cm.ErrDisconnected, nil},
		{"ended before this side was ready", false, cm.ErrDisconnected, cm.ErrDisconnected},
		{"the confirmation came too late", true, cm.ErrGivenUp, cm.ErrGivenUp},
	} {
		conn := newCMConn(n, port)
		if c.end != nil {
			conn.Ended(c.end)
		}
		if err := conn.overBefore(c.ready); err != c.want {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}
