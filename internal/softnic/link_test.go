package softnic

import (
	"testing"

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
