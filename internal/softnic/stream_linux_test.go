package softnic

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/softnic/stream"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A stream that the system of this side gives up is not called the peer's end.
func TestStreamGivenUp(t *testing.T) {
	n := openNIC(t, false)
	c, d := tcpPair(t)
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 10) })
	if err != nil {
		t.Fatal(err)
	}
	v := newStreamVictimOn(t, n, c, d)
	for i := range 64 { // more than both sockets hold, and nobody reads
		v.send(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: v.sge(0, victimSize)})
	}
	if wc := v.poll(); wc.ID != 0 || wc.Status != ib.WCRetryExceeded {
		t.Errorf("the oldest request: %+v", wc)
	}
	v.ended(stream.ErrLost, unix.ETIMEDOUT.Error())
	if err := v.q.(*QP).StreamErr(); errors.Is(err, errPeerGone) || strings.Contains(err.Error(), "peer") {
		t.Error(err)
	}
	ended(t, n, map[string]uint64{observe.EndedLost: 1})
	if p := n.Counters().Ports[0]; !strings.Contains(p.Refusal, unix.ETIMEDOUT.Error()) {
		t.Errorf("the port says %q", p.Refusal)
	}
}
