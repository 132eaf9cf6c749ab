package softnic

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A QP that is reset while its link ends is not taken to ERR after it: what it is connected to then is something else.
func TestResetWhileLinkEnds(t *testing.T) {
	a, b := newEnd(t, openNIC(t, false), endConfig{typ: ib.RC}), newEnd(t, openNIC(t, false), endConfig{typ: ib.RC})
	a.connect(b)
	b.connect(a)
	q := a.q.(*QP)
	met := func() bool {
		q.sq.Lock()
		defer q.sq.Unlock()
		return q.pv != nil
	}
	testutil.Eventually(t, "the QP has met its peer", met)
	q.cfg.Lock()
	l := q.link
	done := make(chan struct{})
	go func() {
		q.linkDown(l, errPeerGone)
		close(done)
	}()
	testutil.Eventually(t, "the QP has let go of its peer", func() bool { return !met() })
	q.reset()
	q.state.Store(uint32(ib.Init))
	q.cfg.Unlock()
	<-done
	if s := ib.QPState(q.state.Load()); s != ib.Init {
		t.Errorf("after a reset and the step to INIT: %v", s)
	}
}

// A chunklessWriter cannot pass chunks on while it is told so, as when no file descriptor is left.
type chunklessWriter struct {
	ctlWriter
	fails atomic.Bool
}

var errNoChunk = errors.New("no descriptor is left")

func (w *chunklessWriter) send(m ctl) error {
	if m.kind == ctlChunk && w.fails.Load() {
		return errNoChunk
	}
	return w.ctlWriter.send(m)
}

// Memory that the peer could not be told of is not used: the QP that wanted it is not connected, and the next one is.
func TestChunkIsNotPassedOn(t *testing.T) {
	testutil.CheckLeaks(t)
	for _, viaDoor := range []bool{false, true} {
		t.Run(fmt.Sprintf("door=%v", viaDoor), func(t *testing.T) {
			na, nb := openNIC(t, viaDoor), openNIC(t, viaDoor)
			if viaDoor && na.sharedE != nil {
				testutil.Skip(t, na.sharedE.Error())
			}
			if _, err := na.CheckReach(t.Context(), nb.gid); err != nil {
				t.Fatal(err)
			}
			l := na.linkWith(nb)
			w := &chunklessWriter{ctlWriter: l.out}
			l.mu.Lock()
			l.out = w
			l.mu.Unlock()
			first, a, b := newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC})
			w.fails.Store(true)
			first.init()
			err := first.q.Modify(t.Context(), &ib.QPAttr{State: ib.RTR, AH: ib.AHAttr{DGID: nb.gid, Port: 1}, PathMTU: ib.MTU4096, DestQPN: b.q.QPN()},
				ib.AttrState|ib.AttrAV|ib.AttrPathMTU|ib.AttrDestQPN|ib.AttrRQPSN|ib.AttrMaxDestRdAtomic|ib.AttrMinRNRTimer)
			if !errors.Is(err, errNoChunk) {
				t.Fatalf("without a chunk: %v", err)
			}
			w.fails.Store(false)
			a.connect(b)
			b.connect(a)
			exchange(a, b)
			exchange(b, a)
			if err := l.reason(); err != nil {
				t.Error(err)
			}
		})
	}
}

// What a QP says of how long to wait for its receives counts for requests that are sent when it has said so.
func TestMinRNRTimerChanges(t *testing.T) {
	const timer = ib.RNRTimer(24) // 40.96 ms; connect says 10 us
	paths(t, func(t *testing.T, na, nb *NIC) {
		a, b := newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC})
		a.connect(b)
		b.connect(a)
		exchange(a, b)
		if err := b.q.Modify(context.Background(), &ib.QPAttr{State: ib.RTS, MinRNRTimer: timer}, ib.AttrState|ib.AttrMinRNRTimer); err != nil {
			t.Fatal(err)
		}
		if err := a.q.Modify(context.Background(), &ib.QPAttr{State: ib.RTS, RNRRetry: 2}, ib.AttrState|ib.AttrRNRRetry); err != nil {
			t.Fatal(err)
		}
		from := time.Now()
		a.send(ib.SendWR{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: a.sge(0, 64)})
		if wc := a.poll(); wc.Status != ib.WCRNRRetryExceeded {
			t.Errorf("%+v", wc)
		}
		if d := time.Since(from); d < 2*timer.Duration() {
			t.Errorf("given up after %v", d)
		}
	})
}

// QPs that have met do not wait: however many they are, others may.
func TestConnectedDoNotWait(t *testing.T) {
	na, nb := openNIC(t, false), openNIC(t, false)
	a, b := newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC})
	a.connect(b)
	b.connect(a)
	exchange(a, b)
	l := nb.linkWith(na)
	m := ctl{kind: ctlConnect, qpn: 1}
	a.q.(*QP).in.Load().connect.into(&m)
	for m.dst = uint32(ib.MaxQPN) - maxWaitingConnects + 1; m.dst <= uint32(ib.MaxQPN); m.dst++ {
		if err := l.handle(&m); err != nil {
			t.Fatalf("with %d who wait: %v", len(l.connects)-1, err)
		}
	}
	m.dst, m.qpn = 0, 2
	if err := l.handle(&m); err == nil {
		t.Errorf("%d may wait", len(l.connects)-1)
	}
}
