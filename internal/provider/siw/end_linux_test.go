package siw

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// The kernel is told also when the device is known to have gone: until then it uses the memory of what was posted.
func TestErrorAfterRemoval(t *testing.T) {
	b := connected(t, benchOpts{oneCQ: true})
	b.q.PostRecv([]ib.RecvWR{{ID: 1}})
	b.post(send(2, ib.SendSignaled))
	b.c.Remove()
	if err := b.q.Modify(t.Context(), &ib.QPAttr{State: ib.Err}, ib.AttrState); !errors.Is(err, driver.ErrDeviceRemoved) {
		t.Error(err)
	}
	if !slices.Equal(b.kq.states, []byte{1, 6}) {
		t.Errorf("the kernel has heard of the states %v", b.kq.states)
	}
	if wcs := b.poll(b.scq); len(wcs) != 2 || wcs[0].Status != ib.WCFlushErr || wcs[1].Status != ib.WCFlushErr {
		t.Errorf("%+v", wcs)
	}
	if n := b.scq.Poll(make([]ib.WC, 1)); n != -1 {
		t.Errorf("Poll: %d", n)
	}
}

// What the kernel was not told of it has, and it may be told again.
func TestErrorThatFails(t *testing.T) {
	for _, c := range []struct {
		errno   syscall.Errno
		flushed int // at once
	}{{unix.ENOMEM, 0}, {unix.EIO, 1}} {
		b := connected(t, benchOpts{})
		b.q.PostRecv([]ib.RecvWR{{ID: 1}})
		b.k.Errs[26] = c.errno
		b.q.Moved(ib.Err)
		wcs := b.poll(b.rcq)
		if len(wcs) != c.flushed {
			t.Errorf("%v: %+v", c.errno, wcs)
		}
		delete(b.k.Errs, 26)
		b.q.Moved(ib.Err)
		if wcs = append(wcs, b.poll(b.rcq)...); len(wcs) != 1 || wcs[0].Status != ib.WCFlushErr {
			t.Errorf("%v, and again: %+v", c.errno, wcs)
		}
	}
}

// The kernel may take minutes to destroy a queue pair, while it connects it. Nobody but who closes that one waits.
func TestCloseTakesLong(t *testing.T) {
	b := connected(t, benchOpts{oneCQ: true})
	cfg := driver.QPConfig{Type: ib.RC, SendCQ: b.scq, RecvCQ: b.scq, Cap: ib.QPCap{MaxSendWR: 4, MaxRecvWR: 4, MaxRecvSGE: 1}}
	b.q.PostRecv([]ib.RecvWR{{ID: 1}})
	begun, goOn, closed := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	var first atomic.Bool
	b.k.During[27] = func() {
		if !first.Swap(true) {
			close(begun)
			<-goOn
		}
	}
	go func() { closed <- b.q.Close() }()
	<-begun
	e := b.kq.rq.take() // what destroying flushes
	b.kr.complete(le.Uint64(e), 8, 4, 0, b.kq.num)
	others := make(chan error, 1)
	go func() {
		q, err := b.pd.CreateQP(cfg)
		if err == nil {
			err = q.Close()
		}
		if wcs := b.poll(b.scq); len(wcs) != 1 || wcs[0].ID != 1 {
			err = errors.Join(err, fmt.Errorf("polled %+v", wcs))
		}
		others <- errors.Join(err, b.scq.Arm(false))
	}()
	select {
	case err := <-others:
		if err != nil {
			t.Error(err)
		}
		close(goOn)
	case <-time.After(testutil.Patience):
		t.Error("the others wait as well")
		close(goOn)
		<-others
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

// A Close that the kernel refuses makes up for what was not done about the queue pair's failure beside it.
func TestFailureBesideARefusedClose(t *testing.T) {
	b := connected(t, benchOpts{})
	b.q.PostRecv([]ib.RecvWR{{ID: 1}})
	b.k.Errs[27] = unix.EBUSY
	b.k.During[27] = func() {
		b.q.Moved(ib.Err)
		if len(b.kq.states) != 1 {
			t.Errorf("states %v", b.kq.states)
		}
	}
	if err := b.q.Close(); !errors.Is(err, driver.ErrBusy) {
		t.Error(err)
	}
	delete(b.k.Errs, 27)
	delete(b.k.During, 27)
	if wcs := b.poll(b.rcq); len(wcs) != 1 || wcs[0].Status != ib.WCFlushErr || !slices.Equal(b.kq.states, []byte{1, 6}) {
		t.Errorf("%+v, states %v", wcs, b.kq.states)
	}
}

// The kernel gives a number away when it has destroyed its queue pair; the next one's completions count from when the old ones are gone.
func TestNumberIsReusedEarly(t *testing.T) {
	b := connected(t, benchOpts{})
	b.q.PostRecv([]ib.RecvWR{{ID: 1}})
	e := b.kq.rq.take()
	b.kr.complete(le.Uint64(e), 8, 0, 5, b.kq.num)
	closed, made := make(chan error, 1), make(chan driver.QP, 1)
	b.scq.mu.Lock() // Close comes as far as this when the kernel is done
	go func() { closed <- b.q.Close() }()
	testutil.Eventually(t, "the kernel has destroyed it", func() bool { return b.k.Count(27) == 1 })
	go func() {
		q, err := b.pd.CreateQP(driver.QPConfig{Type: ib.RC, SendCQ: b.rcq, RecvCQ: b.rcq, Cap: ib.QPCap{MaxSendWR: 4, MaxRecvWR: 4, MaxRecvSGE: 1}})
		if err != nil {
			t.Error(err)
		}
		made <- q
	}()
	testutil.Eventually(t, "the kernel has made another", func() bool { return b.k.Count(24) == 2 })
	for range 100 {
		runtime.Gosched()
	}
	select {
	case q := <-made:
		t.Error("there are two of one number")
		made <- q
	default:
	}
	b.scq.mu.Unlock()
	if err := <-closed; err != nil {
		t.Error(err)
	}
	q := (<-made).(*qp)
	q.PostRecv([]ib.RecvWR{{ID: 2}}) // also the first
	if wcs := b.poll(b.rcq); len(wcs) != 0 || q.QPN() != b.q.QPN() {
		t.Errorf("number %v, %+v", q.QPN(), wcs)
	}
	if err := q.Close(); err != nil {
		t.Error(err)
	}
}
