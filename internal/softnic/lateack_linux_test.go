package softnic

import (
	"slices"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What nobody waits for is acknowledged behind what is sent in the second half of the time that there is for it, or when that is over, with
// those of other connections whose second half it is.
func TestLateAcknowledgements(t *testing.T) {
	nx, ny := openNIC(t, true), openNIC(t, true)
	var x, y [3]*end
	var w [3]*wireQP
	for i := range x {
		x[i], y[i] = newEnd(t, nx, endConfig{typ: ib.RC}), newEnd(t, ny, endConfig{typ: ib.RC})
		joinUDP(t, x[i], y[i], 0)
		w[i] = y[i].q.(*QP).wire
		y[i].recv(1, y[i].sge(0, 64))
		y[i].recv(2, y[i].sge(0, 64))
	}
	p := w[0].port
	p.mu.Lock() // the port is this test's
	defer p.mu.Unlock()
	receive := func(i int) {
		t.Helper()
		for end := time.Now().Add(testutil.Patience); w[i].lateAt == 0; {
			if p.turn(true); time.Now().After(end) {
				t.Fatal("the message does not come")
			}
		}
		w[i].lateAt, p.lateAt = p.now+time.Hour, neverWake
	}
	for i := range x {
		x[i].send(ib.SendWR{Opcode: ib.OpSend, SGEs: x[i].sge(0, 64)})
		receive(i)
	}
	turn := func(what string, sent uint64, late ...*wireQP) {
		t.Helper()
		was := p.sock.Stats().Sent
		p.turn(false)
		if n := p.sock.Stats().Sent - was; n != sent || !slices.Equal(p.late, late) {
			t.Errorf("%s: %d packets are sent, not %d; %d acknowledgements wait", what, n, sent, len(p.late))
		}
	}
	reply := ib.SendWR{Opcode: ib.OpSend, SGEs: y[0].sge(0, 64)}
	y[0].send(reply)
	turn("the first half of the time", 1, w[0], w[1], w[2])
	w[0].lateAt = p.now + w[0].lateAck/2
	y[0].send(reply)
	turn("the second half", 2, w[0], w[1], w[2])
	y[0].send(reply)
	turn("afterwards", 1, w[0], w[1], w[2])
	p.lateAt = p.now
	turn("one has left, for the others it is too early", 0, w[1], w[2])
	if p.lateAt != w[1].lateAt || w[0].lateAt != 0 || w[0].resp.Late() {
		t.Errorf("%v, %v, %v", p.lateAt, w[0].lateAt, w[0].resp.Late())
	}

	// A window that opens because of what has come.
	w[1].lateAt = p.now + w[1].lateAck/2
	y[1].send(ib.SendWR{Opcode: ib.OpSend, SGEs: y[1].sge(0, 64)})
	was := p.sock.Stats().Sent
	w[1].pump(true)
	p.sock.Flush()
	if n := p.sock.Stats().Sent - was; n != 2 || len(p.owing) != 0 {
		t.Errorf("the second half, while it receives: %d packets are sent, not 2; %d acknowledgements wait for company", n, len(p.owing))
	}

	x[1].send(ib.SendWR{Opcode: ib.OpSend, SGEs: x[1].sge(0, 64)})
	receive(1)
	p.lateAt, w[1].lateAt = p.now, p.now+w[1].lateAck/2
	turn("the second half for another, as somebody's time is over", 1, w[2])
	p.acknowledge(true)
	turn("nobody polls", 1)
}
