package rxe

import (
	"testing"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What the driver has noted of three requests, by how it calls the states: posted 0, pending 2, done 3, error 4.
func TestStuck(t *testing.T) {
	for name, c := range map[string]struct {
		states []byte
		stuck  bool
	}{
		"a failure behind one that was sent":     {[]byte{2, 4, 0}, true},
		"the last one failed":                    {[]byte{2, 2, 4}, true},
		"behind one that is done, but not first": {[]byte{2, 3, 4}, true},
		"the first has failed: that completes":   {[]byte{4, 4, 4}, false},
		"all are on their way":                   {[]byte{2, 2, 2}, false},
		"none was begun":                         {[]byte{0, 0, 0}, false},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, ib.RC)
			for range 30 { // so that they lie at the end of the ring, and the beginning
				b.post(ib.SendWR{Opcode: ib.OpSend})
				b.kq.sq.take()
			}
			b.qp.PortEvent(ib.EventPortErr)
			b.post(make([]ib.SendWR, 3)...)
			for i, s := range c.states {
				b.kq.sq.slot(30 + uint32(i))[148] = s
			}
			b.kq.modified = nil
			b.qp.look()
			if b.qp.State() != ib.RTS {
				t.Error("a single look ended it")
			}
			b.qp.look()
			want := map[bool]ib.QPState{false: ib.RTS, true: ib.Err}[c.stuck]
			if got := b.qp.State(); got != want || (string(b.kq.modified) == "\x06") != c.stuck {
				t.Errorf("%v, want %v; the kernel was told %v", got, want, b.kq.modified)
			}
		})
	}
}

// One that goes on is not stuck, nor are queue pairs whose requests nobody acknowledges; and an end comes to all looking.
func TestNotStuck(t *testing.T) {
	b := newBench(t, ib.RC)
	b.qp.PortEvent(ib.EventPortErr)
	b.post(make([]ib.SendWR, 3)...)
	b.kq.sq.slot(2)[148] = 4
	b.qp.look()
	b.kq.sq.take()
	b.qp.look()
	if b.qp.State() != ib.RTS {
		t.Error("requests completed meanwhile, and it was ended")
	}
	b.kq.sq.slot(2)[148] = 0
	for i := range stuckLooks {
		b.qp.watch.timer.Stop()
		b.qp.look()
		if more := b.qp.watch.timer.Stop(); more != (i+3 < stuckLooks) {
			t.Errorf("after %d looks, there are more: %v", i+3, more)
		}
	}
	b.qp.PortEvent(ib.EventPortActive)
	if b.qp.watch.timer.Stop() {
		t.Error("it is looked at since the port is up")
	}
	b.qp.PortEvent(ib.EventGIDChange)
	if !b.qp.watch.timer.Stop() {
		t.Error("it is not looked at although an address may have gone")
	}
	u := newBench(t, ib.UD)
	u.qp.PortEvent(ib.EventPortErr)
	if u.qp.watch.timer != nil {
		t.Error("of a UD queue pair, nothing is acknowledged")
	}
}

// To the driver, 7 retries are retries without end.
func TestRetryCount(t *testing.T) {
	for _, n := range []uint8{0, 1, 6, 7} {
		b := newBench(t, ib.RC)
		q := b.newQP(ib.RC)
		kq := b.k.qps[q.Handle]
		attr := ib.QPAttr{State: ib.SQD}
		if err := q.Modify(t.Context(), &attr, ib.AttrState); err != nil {
			t.Fatal(err)
		}
		attr.RetryCount = n
		if err := q.Modify(t.Context(), &attr, ib.AttrState|ib.AttrRetryCount); err != nil || attr.RetryCount != n {
			t.Fatal(err, attr.RetryCount)
		}
		if want := min(n, 6); kq.retries != want {
			t.Errorf("%d retries are %d to the driver, want %d", n, kq.retries, want)
		}
		if got, err := q.Query(); err != nil || got.RetryCount != n {
			t.Errorf("%d retries are told as %d, %v", n, got.RetryCount, err)
		}
		b.close(q)
	}
}
