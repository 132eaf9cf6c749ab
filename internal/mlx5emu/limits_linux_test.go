package mlx5emu

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What a client may have has an end, and what it gives back it may have again.
func TestLimits(t *testing.T) {
	c := connect(t, newDevice(t, Config{Manual: true}))
	ctx := c.dev.order[0]
	m := mapAt(t, 0, 4*pageSize)
	q := c.newCQ(16, -1)
	at := addrOf(m)
	cq := abi.Mlx5CreateCQ{BufAddr: at, DBAddr: at + 3*pageSize, CQESize: 64, Flags: abi.MLX5_IB_CREATE_CQ_FLAGS_UAR_PAGE_INDEX}
	makes := map[objectKind]func() (destroy func() error, err error){
		objectPD: func() (func() error, error) {
			h, err := c.f.AllocPD(make([]byte, 4))
			return func() error { return c.f.DeallocPD(h) }, err
		},
		objectMR: func() (func() error, error) {
			r, err := c.f.RegMR(c.pd, at, 64, at, everything, nil, nil)
			return func() error { return c.f.DeregMR(r.Handle) }, err
		},
		objectMW: func() (func() error, error) {
			h, _, err := c.f.AllocMW(c.pd)
			return func() error { return c.f.DeallocMW(h) }, err
		},
		objectAH: func() (func() error, error) {
			h, err := c.f.CreateAH(c.pd, &ib.AHAttr{DGID: c.dev.nic.GID(), HopLimit: 64, Port: 1}, ib.LinkEthernet, make([]byte, 16))
			return func() error { return c.f.DestroyAH(h) }, err
		},
		objectCQ: func() (func() error, error) {
			h, _, err := c.f.CreateCQ(15, -1, 1, uverbs.Bytes(&cq), make([]byte, 8))
			return func() error { return c.f.DestroyCQ(h) }, err
		},
		objectQP: func() (func() error, error) {
			p, err := c.tryQP(q, q, qpOptions{srq: -1, uidx: 1})
			if err != nil {
				return nil, err
			}
			return func() error { return c.f.DestroyQP(p.h) }, nil
		},
		objectSRQ: func() (func() error, error) {
			u := abi.Mlx5CreateSRQ{BufAddr: at, DBAddr: at + 3*pageSize}
			h, _, _, err := c.f.CreateSRQ(c.pd, 7, 2, 77, uverbs.Bytes(&u), make([]byte, 8))
			return func() error { return c.f.DestroySRQ(h) }, err
		},
	}
	set := func(k objectKind, n int) (was int) {
		c.dev.mu.Lock()
		defer c.dev.mu.Unlock()
		was, ctx.counts[k] = ctx.counts[k], n
		return was
	}
	for k, create := range makes {
		was := set(k, maxObjects[k]-1)
		destroy, err := create()
		if err != nil {
			t.Fatalf("the last of kind %d: %v", k, err)
		}
		if _, err := create(); errno(err) != unix.ENOMEM {
			t.Errorf("one more of kind %d: %v", k, err)
		}
		if err := destroy(); err != nil {
			t.Errorf("the end of kind %d: %v", k, err)
		}
		if n := set(k, was); n != maxObjects[k]-1 {
			t.Errorf("%d of kind %d are counted, want %d", n, k, maxObjects[k]-1)
		}
	}
	for _, k := range []objectKind{objectQP, objectSRQ} {
		c.dev.mu.Lock()
		was := ctx.recvMemory
		ctx.recvMemory = maxRecvMemory - 8
		c.dev.mu.Unlock()
		if _, err := makes[k](); errno(err) != unix.ENOMEM {
			t.Errorf("kind %d with more memory than there may be: %v", k, err)
		}
		if ctx.recvMemory != maxRecvMemory-8 || was != 0 {
			t.Errorf("what was refused counts: %d", ctx.recvMemory)
		}
		ctx.recvMemory = was
	}
}

func TestManyContexts(t *testing.T) {
	d := newDevice(t, Config{Manual: true})
	for range maxContexts {
		if _, err := d.OpenKernel(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.OpenKernel(); !errors.Is(err, ErrTooMany) {
		t.Errorf("one more: %v", err)
	}
}

// While a client's change of a queue pair is under way, which may take until a peer answers, others do not wait for it, also if the queue
// pair fails meanwhile. It is in ERR when the change is over.
func TestFailureWhileModified(t *testing.T) {
	d := newDevice(t, Config{Manual: true})
	c := connect(t, d)
	cq := c.newCQ(16, -1)
	q := c.newQP(cq, cq, qpOptions{srq: -1})
	q.toInit()
	m := &d.qps[q.qpn].modify
	m.Lock() // as MODIFY_QP does while it dials
	be.PutUint32(q.db, 0xffff)
	stepped := make(chan struct{})
	go func() {
		d.Step()
		close(stepped)
	}()
	select {
	case <-stepped:
	case <-time.After(testutil.Patience):
		m.Unlock()
		t.Fatal("the device waits")
	}
	other := newPairOf(t, d, ib.RC)
	other.a.send(opWrite, ceUpdate, 0, segRemote(addrOf(other.mb), other.kb), segInline([]byte("hello")))
	other.ca.expect(cqeRequester, 5)
	if s := q.state(); s != ib.Init {
		t.Errorf("the state is %v before the change is over", s)
	}
	m.Unlock()
	d.Step()
	if s := q.state(); s != ib.Err {
		t.Errorf("the state is %v after it", s)
	}
}

// Events that nobody reads cost neither more and more memory, nor time for each.
func TestUnreadEvents(t *testing.T) {
	fd := fixedFile(200)
	e, err := newEventFile(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(int(fd))
	defer e.close()
	record := make([]byte, 8)
	for range 2 * maxUnread {
		e.send(record, e)
	}
	if n := testing.AllocsPerRun(1000, func() { e.send(record, e) }); n > 0 {
		t.Errorf("%v allocations for each event", n)
	}
	if len(e.queued) != maxUnread || cap(e.queued) > 3*maxUnread {
		t.Errorf("%d events are kept, with room for %d", len(e.queued), cap(e.queued))
	}
}
