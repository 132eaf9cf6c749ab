package rxe

import (
	"testing"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// looks has the send queue looked at, as often as that, and not by the timer; it returns after how many looks the queue pair was in Err, or -1.
func (b *bench) looks(n int) int {
	for i := range n {
		b.qp.watch.timer.Stop()
		if b.qp.look(); b.qp.State() == ib.Err {
			return i + 1
		}
	}
	return -1
}

// What the driver has noted of three requests, by how it calls the states: posted 0, pending 2, done 3, error 4. The port has lost its
// address, or gone down.
func TestRequestsWithoutAWay(t *testing.T) {
	for name, c := range map[string]struct {
		states   []byte
		up, down int // looks until the queue pair is ended
	}{
		"a failure behind one that was sent":     {[]byte{2, 4, 0}, 2, 2},
		"the last one failed":                    {[]byte{2, 2, 4}, 2, 2},
		"behind one that is done, but not first": {[]byte{2, 3, 4}, 2, 2},
		"the first has failed: that completes":   {[]byte{4, 4, 4}, -1, 5},
		"all are on their way":                   {[]byte{2, 2, 2}, -1, 5},
		"none was begun":                         {[]byte{0, 0, 0}, -1, 5},
		"there is none":                          {nil, -1, -1},
	} {
		for e, want := range map[ib.EventType]int{ib.EventGIDChange: c.up, ib.EventPortErr: c.down} {
			t.Run(name+", "+e.String(), func(t *testing.T) {
				b := newBench(t, ib.RC)
				for range 30 { // so that they lie at the end of the ring, and the beginning
					b.post(ib.SendWR{Opcode: ib.OpSend})
					b.kq.sq.take()
				}
				b.qp.PortEvent(e)
				if len(c.states) > 0 {
					b.post(make([]ib.SendWR, len(c.states))...)
				}
				for i, s := range c.states {
					b.kq.sq.slot(30 + uint32(i))[148] = s
				}
				b.kq.modified = nil
				if got := b.looks(mostLooks + 10); got != want || (string(b.kq.modified) == "\x06") != (want > 0) {
					t.Errorf("ended after %d looks, want %d; the kernel was told %v", got, want, b.kq.modified)
				}
			})
		}
	}
}

// Requests that go on are left alone, and those of a port that is up again; looking ends.
func TestPortWatchEnds(t *testing.T) {
	b := newBench(t, ib.RC)
	b.qp.PortEvent(ib.EventPortErr)
	b.post(make([]ib.SendWR, 20)...)
	for range 15 {
		if b.looks(downLooks-1) > 0 {
			t.Fatal("requests complete, and it was ended")
		}
		b.kq.sq.take()
	}
	b.looks(downLooks - 2)
	b.qp.PortEvent(ib.EventPortActive)
	for i := range mostLooks {
		if b.looks(1) > 0 {
			t.Fatal("the port is up, and it was ended")
		}
		if more := b.qp.watch.timer.Stop(); more != (i+1 < mostLooks) {
			t.Errorf("after %d looks, there are more: %v", i+1, more)
		}
	}
	b.qp.PortEvent(ib.EventSMChange)
	if b.qp.watch.timer.Stop() {
		t.Error("it is looked at since something else has happened")
	}
	b.qp.PortEvent(ib.EventPortErr)
	for range 3 * mostLooks { // nothing waits, and something may come
		if b.kq.sq.posted() > 0 {
			b.kq.sq.take()
		}
		if b.looks(1) > 0 {
			t.Fatal("nothing waits, and it was ended")
		}
	}
	if !b.qp.watch.timer.Stop() {
		t.Error("it is not looked at although the port is down")
	}
	u := newBench(t, ib.UD)
	u.qp.PortEvent(ib.EventPortErr)
	if u.qp.watch.timer != nil {
		t.Error("of a UD queue pair, nothing is acknowledged")
	}
}
