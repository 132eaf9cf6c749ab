package siw

import (
	"context"
	"errors"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A queue pair may be closed between the poll that finds it failed and what that does about it: nothing of it may come back.
func TestClosedBesideFailure(t *testing.T) {
	for _, oneCQ := range []bool{false, true} {
		b := connected(t, benchOpts{oneCQ: oneCQ})
		b.q.PostRecv([]ib.RecvWR{{ID: 1}, {ID: 2}})
		b.post(send(3, 0), send(4, 0))
		e := b.kq.rq.take()
		b.kr.complete(le.Uint64(e), 8, 4, 0, b.kq.num)
		var wcs [8]ib.WC
		b.rcq.mu.Lock()
		b.rcq.poll(wcs[:])
		bad, wake := b.rcq.toDo()
		b.rcq.mu.Unlock()
		if len(bad) != 1 {
			t.Fatalf("%d have failed", len(bad))
		}
		if err := b.q.Close(); err != nil {
			t.Fatal(err)
		}
		next, err := b.pd.CreateQP(driver.QPConfig{Type: ib.RC, SendCQ: b.scq, RecvCQ: b.rcq, Cap: ib.QPCap{MaxSendWR: 4, MaxRecvWR: 4, MaxRecvSGE: 1}})
		if err != nil {
			t.Fatal(err)
		}
		finish(bad, wake)
		if next.QPN() != b.q.QPN() {
			t.Errorf("the next has the number %v", next.QPN())
		}
		for _, q := range []*cq{b.rcq, b.scq} {
			if len(q.flushing) > 0 {
				t.Fatalf("one CQ %v: what was posted to a closed queue pair is to be flushed", oneCQ)
			}
			if got := b.poll(q); len(got) != 0 {
				t.Errorf("one CQ %v: %+v", oneCQ, got)
			}
		}
		if err := b.q.Close(); err != nil { // again
			t.Error(err)
		}
		if b.scq.qps[uint32(next.QPN())] != next {
			t.Error("a second Close has taken the next one's number")
		}
		next.Close()
	}
}

// The caller's attributes are the caller's again when Modify returns, also if that is before the kernel has answered.
func TestModifyKeepsNoAttributes(t *testing.T) {
	b := newBench(t, benchOpts{})
	before := b.q.access.Load()
	ctx, cancel := context.WithCancel(t.Context())
	returned := make(chan struct{})
	b.k.During[26] = func() { cancel(); <-returned }
	attr := &ib.QPAttr{Access: ib.AccessLocalWrite, AH: ib.AHAttr{Port: 1}}
	if err := b.q.Modify(ctx, attr, ib.AttrAccess|ib.AttrAV); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	attr.Access = ib.AccessRemoteRead
	close(returned)
	testutil.Eventually(t, "the kernel's answer", func() bool { return b.q.access.Load() != before })
	if a := b.q.access.Load(); a != uint32(ib.AccessLocalWrite) {
		t.Errorf("the access is %v", ib.Access(a))
	}
}

// What the kernel says before it gets quiet is taken before the rest is flushed, also if Poll had looked before.
func TestLastWord(t *testing.T) {
	b := connected(t, benchOpts{})
	b.post(send(1, ib.SendSignaled), send(2, ib.SendSignaled))
	e := b.kq.sq.take()
	b.k.onErr = func(*fakeQP) { b.complete(e, 0) }
	b.q.Moved(ib.Err)
	b.scq.mu.Lock() // as Poll goes on when it has found nothing
	more := b.scq.flush()
	b.scq.mu.Unlock()
	wcs := b.poll(b.scq)
	if !more || len(wcs) != 2 || wcs[0].ID != 1 || wcs[0].Status != ib.WCSuccess || wcs[1].ID != 2 || wcs[1].Status != ib.WCFlushErr {
		t.Errorf("more: %v, %+v", more, wcs)
	}
}
