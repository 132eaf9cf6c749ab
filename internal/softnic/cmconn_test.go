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
