package softnic

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// lazyEnd is an end whose receives are posted when a message comes for them, as far as there are some.
type lazyEnd struct {
	*end
	left  atomic.Int32 // receives that are not posted yet
	looks atomic.Int32
	block atomic.Pointer[chan struct{}] // nil, or what a look waits for
}

func newLazyEnd(t *testing.T, n *NIC, typ ib.QPType) *lazyEnd {
	t.Helper()
	e := &lazyEnd{end: newEnd(t, n, endConfig{typ: typ})}
	e.q.(*QP).OnEmpty(func() {
		e.looks.Add(1)
		if c := e.block.Load(); c != nil {
			<-*c
		}
		if e.left.Load() > 0 && e.left.Add(-1) >= 0 {
			e.q.PostRecv([]ib.RecvWR{{ID: 7, SGEs: e.sge(0, 1000)}})
		}
	})
	return e
}

// A sender sends to a lazyEnd, once for each receive that the latter is told of.
type lazyPair struct {
	to   *lazyEnd
	from *end
	send func(flags ib.SendFlags, op ib.Opcode)
}

func newLazyPair(t *testing.T, a, b *NIC, typ ib.QPType, udp bool) *lazyPair {
	t.Helper()
	x := &lazyPair{to: newLazyEnd(t, b, typ), from: newEnd(t, a, endConfig{typ: typ})}
	wr := ib.SendWR{ID: 1, SGEs: x.from.sge(0, 100)}
	switch {
	case typ == ib.UD:
		attr := ib.AHAttr{DGID: b.GID(), Port: 1}
		if udp {
			attr.DGID, attr.SGIDIndex, _ = a.overUDP(t)
			_, _, attr.UDPPort = b.overUDP(t)
		}
		x.from.ready()
		x.to.ready()
		ah, err := x.from.pd.CreateAH(attr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ah.Close() })
		wr.AH, wr.RemoteQPN, wr.RemoteQKey = ah.Num(), x.to.q.QPN(), testQKey
	case udp:
		joinUDP(t, x.from, x.to.end, 0)
	default:
		x.from.connect(x.to.end)
		x.to.connect(x.from)
	}
	x.send = func(flags ib.SendFlags, op ib.Opcode) {
		wr.Flags, wr.Opcode = ib.SendSignaled|flags, op
		x.from.send(wr)
	}
	return x
}

// A message that finds no receive has the receiver look for some, in another process and over UDP; it is lost, or refused, only if there
// is none then either.
func TestReceivesAreLookedFor(t *testing.T) {
	testutil.CheckLeaks(t)
	run := func(t *testing.T, typ ib.QPType, udp bool) {
		a, b := openNIC(t, !udp), openNIC(t, !udp)
		if a.sharedE != nil && !udp {
			t.Skip(a.sharedE)
		}
		x := newLazyPair(t, a, b, typ, udp)
		arrives := func(op ib.Opcode) {
			t.Helper()
			before := x.to.looks.Load()
			x.to.left.Store(1)
			x.send(0, op)
			if wc := x.from.poll(); wc.Status != ib.WCSuccess {
				t.Fatalf("%v: %+v", op, wc)
			}
			if wc := x.to.poll(); wc.Status != ib.WCSuccess || wc.ID != 7 {
				t.Fatalf("%v: %+v", op, wc)
			}
			if n := x.to.looks.Load() - before; n != 1 {
				t.Errorf("%v: looked %d times", op, n)
			}
		}
		for range 20 {
			arrives(ib.OpSend)
		}
		arrives(ib.OpSendWithImm)
		if typ == ib.RC {
			return
		}
		// Without a receive it is dropped, and the next one, for which there is one, arrives.
		before := x.to.looks.Load()
		x.send(0, ib.OpSend)
		if wc := x.from.poll(); wc.Status != ib.WCSuccess {
			t.Fatalf("without a receive: %+v", wc)
		}
		for x.to.looks.Load() == before { // over UDP, it may be on its way
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Millisecond) // for the look
		arrives(ib.OpSend)
		var wcs [1]ib.WC
		if n := x.to.cq.Poll(wcs[:]); n != 0 {
			t.Errorf("%+v", wcs)
		}
	}
	for _, typ := range []ib.QPType{ib.RC, ib.UC, ib.UD} {
		t.Run(typ.String(), func(t *testing.T) {
			t.Run("shm", func(t *testing.T) { run(t, typ, false) })
			t.Run("udp", func(t *testing.T) { run(t, typ, true) })
		})
	}
}

// With RC, an attempt counts once the receiver has looked.
func TestRNRAfterLook(t *testing.T) {
	a, b := openNIC(t, true), openNIC(t, true)
	if a.sharedE != nil {
		t.Skip(a.sharedE)
	}
	x := newLazyPair(t, a, b, ib.RC, false)
	for retries := range uint8(3) {
		if err := x.from.q.Modify(t.Context(), &ib.QPAttr{State: ib.Reset}, ib.AttrState); err != nil {
			t.Fatal(err)
		}
		if err := x.to.q.Modify(t.Context(), &ib.QPAttr{State: ib.Reset}, ib.AttrState); err != nil {
			t.Fatal(err)
		}
		x.to.connect(x.from)
		x.from.connect(x.to.end)
		q := x.from.q.(*QP)
		q.sq.Lock()
		q.attr.RNRRetry = retries
		q.sq.Unlock()
		x.to.looks.Store(0)
		x.to.left.Store(1)
		x.send(0, ib.OpSend)
		if wc := x.from.poll(); wc.Status != ib.WCSuccess {
			t.Fatalf("%d retries, with a receive: %+v", retries, wc)
		}
		x.to.looks.Store(0)
		x.send(0, ib.OpSend)
		if wc := x.from.poll(); wc.Status != ib.WCRNRRetryExceeded {
			t.Fatalf("%d retries, without a receive: %+v", retries, wc)
		}
		if n := x.to.looks.Load(); n != int32(retries)+1 {
			t.Errorf("%d retries: looked %d times", retries, n)
		}
	}
}

// A receiver that does not answer holds a sender up once.
func TestNoAnswerToQuestion(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for the limit")
	}
	a, b := openNIC(t, true), openNIC(t, true)
	if a.sharedE != nil {
		t.Skip(a.sharedE)
	}
	x := newLazyPair(t, a, b, ib.UC, false)
	x.to.left.Store(1)
	x.send(0, ib.OpSend) // so that both are there
	x.from.poll()
	x.to.poll()
	block := make(chan struct{})
	x.to.block.Store(&block)
	for i := range 10 {
		began := time.Now()
		x.send(0, ib.OpSend)
		wc := x.from.poll()
		if d := time.Since(began); wc.Status != ib.WCSuccess || i == 0 && d < linkTimeout || i > 0 && d >= linkTimeout {
			t.Errorf("message %d: %+v after %v", i, wc, d)
		}
	}
	close(block)
	for end := time.Now().Add(10 * time.Second); a.linkWith(b).deaf.Load(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the answer has not come")
		}
	}
	x.to.left.Store(1)
	x.send(0, ib.OpSend)
	x.from.poll()
	x.to.poll()
}
