package mlx5emu

import (
	"testing"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A sharedQueue is a shared receive queue, as its owner has it: a list of slots.
type sharedQueue struct {
	h          uint32
	buf, db    []byte
	head, tail int // slots
	posted     int
}

const sharedStride = 64 // of a sharedQueue's slots, bytes

// newSRQ makes a queue for n receives, one less than a power of two, of two elements.
func (c *client) newSRQ(n int) *sharedQueue {
	c.t.Helper()
	s := &sharedQueue{buf: mapAt(c.t, 0, max((n+1)*sharedStride, pageSize)), db: mapAt(c.t, 0, pageSize), tail: n}
	for i := range n {
		be.PutUint16(s.buf[i*sharedStride+2:], uint16(i+1))
	}
	u := abi.Mlx5CreateSRQ{BufAddr: addrOf(s.buf), DBAddr: addrOf(s.db)}
	h, wr, _, err := c.f.CreateSRQ(c.pd, n, 2, 77, uverbs.Bytes(&u), make([]byte, 8))
	if err != nil || wr != n {
		c.t.Fatalf("SRQ of %d: %v", wr, err)
	}
	s.h = h
	return s
}

// post posts a receive.
func (s *sharedQueue) post(segs ...[]byte) {
	b := s.buf[s.head*sharedStride:][:sharedStride]
	s.head = int(be.Uint16(b[2:]))
	at := 16
	for _, seg := range append(segs, dataEnd) {
		at += copy(b[at:], seg)
	}
	s.posted++
	be.PutUint32(s.db, uint32(s.posted)&0xffff)
}

// free gives a slot back whose receive has completed.
func (s *sharedQueue) free(slot int) {
	be.PutUint16(s.buf[s.tail*sharedStride+2:], uint16(slot))
	s.tail = slot
}

// A shared receive queue is a list of slots, which two queue pairs share.
func TestSRQ(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg Config) {
		c := connect(t, newDevice(t, cfg))
		m := mapAt(t, 0, 4*pageSize)
		k := uint32(c.reg(m, everything).LKey)
		const receives = 7
		srq := c.newSRQ(receives)
		ca, cb := c.newCQ(64, -1), c.newCQ(64, -1)
		a, b := c.newQP(ca, ca, qpOptions{srq: -1, uidx: 1}), c.newQP(cb, cb, qpOptions{srq: int(srq.h), uidx: 2})
		a.connectTo(b.qpn)
		b.connectTo(a.qpn)
		for range 3 {
			srq.post(segData(addrOf(m), 256, k))
		}
		for i := range 100 {
			a.send(opSendImm, ceUpdate, uint32(i), segInline([]byte{byte(i)}))
			ca.expect(cqeRequester, 1)
			e := cb.expect(cqeRecvSendImm, 1)
			if e.imm != uint32(i) || e.index > receives || m[0] != byte(i) {
				t.Fatalf("message %d: %+v, content %d", i, e, m[0])
			}
			srq.free(int(e.index))
			srq.post(segData(addrOf(m), 256, k))
		}
		if err := c.f.DestroySRQ(srq.h); errno(err) != 16 {
			t.Errorf("destroying an SRQ in use: %v", err)
		}
	})
}

// A receive of more than 2 GiB, as libmlx5 makes it of an element of no bytes in front of another one, does not keep those behind it from
// being used. It fails, as the client's memory is not that long, and with it its queue pair.
func TestReceivesOverTwoGiB(t *testing.T) {
	c := connect(t, newDevice(t, Config{Manual: true}))
	m := mapAt(t, 0, pageSize)
	key := uint32(c.reg(m, everything).LKey)
	srq, ca, cb := c.newSRQ(3), c.newCQ(16, -1), c.newCQ(16, -1)
	send := func(o qpOptions) *queuePair {
		t.Helper()
		a, b := c.newQP(ca, ca, qpOptions{srq: -1}), c.newQP(cb, cb, o)
		a.connectTo(b.qpn)
		b.connectTo(a.qpn)
		a.send(opSend, ceUpdate, 0, segInline([]byte("hello")))
		return b
	}
	post := func(recv func(...[]byte)) {
		recv(segData(addrOf(m), 0, key), segData(addrOf(m)+64, 64, key))
		recv(segData(addrOf(m), 64, key))
	}
	post(srq.post)
	send(qpOptions{srq: int(srq.h)})
	cb.expectError(cqeResponderErr, ib.WCLocalProtErr)
	send(qpOptions{srq: int(srq.h)})
	if e := cb.expect(cqeRecvSend, 5); e.index != 1 {
		t.Errorf("CQE %+v", e)
	}
	post(send(qpOptions{srq: -1}).recv)
	cb.expectError(cqeResponderErr, ib.WCLocalProtErr)
	cb.expectError(cqeResponderErr, ib.WCFlushErr)
}

// A limit is armed by MODIFY_SRQ only, and what is posted then counts, all of it, whether or not the engine has looked.
func TestSRQLimit(t *testing.T) {
	c := connect(t, newDevice(t, Config{Manual: true}))
	limit := func(h uint32, want int) {
		t.Helper()
		c.dev.Step()
		if ev := readEvent(t, c.async); ev != nil {
			t.Errorf("event %v", ib.EventType(le.Uint32(ev[8:])))
		}
		if n, err := c.f.SRQLimit(h); err != nil || n != want {
			t.Errorf("the limit is %d, want %d: %v", n, want, err)
		}
	}
	s := c.newSRQ(1023)
	for range 1000 {
		s.post()
	}
	if err := c.f.SetSRQLimit(s.h, 500, nil); err != nil {
		t.Fatal(err)
	}
	limit(s.h, 500)

	u := abi.Mlx5CreateSRQ{BufAddr: addrOf(s.buf), DBAddr: addrOf(s.db) + 64}
	cmd := abi.CreateSRQ{PDHandle: c.pd, MaxWR: 7, MaxSGE: 2, SRQLimit: 1}
	var resp abi.CreateSRQResp
	if err := c.f.Write("create_srq", &uverbs.WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_CREATE_SRQ, In: uverbs.Bytes(&cmd), Out: uverbs.Bytes(&resp),
		UHWIn: uverbs.Bytes(&u), UHWOut: make([]byte, 8)}); err != nil {
		t.Fatal(err)
	}
	limit(resp.SRQHandle, 0)
}

// lastWQEs counts the events that say of a queue pair that it takes nothing from its shared receive queue any more.
func (c *client) lastWQEs() (n int) {
	c.t.Helper()
	c.dev.Step()
	for ev := readEvent(c.t, c.async); ev != nil; ev = readEvent(c.t, c.async) {
		if ib.EventType(le.Uint32(ev[8:])) == ib.EventLastWQEReached {
			n++
		}
	}
	return n
}

// That a queue pair in ERR takes nothing any more is said once, also if it is reset before the engine has looked; of one that is reset
// otherwise, it is not said.
func TestLastWQE(t *testing.T) {
	c := connect(t, newDevice(t, Config{Manual: true}))
	cq := c.newCQ(16, -1)
	q := c.newQP(cq, cq, qpOptions{srq: int(c.newSRQ(3).h), uidx: 1})
	for want := range 2 {
		q.connectTo(q.qpn)
		if want == 1 {
			q.modify(ib.QPAttr{State: ib.Err}, ib.AttrState)
		}
		q.modify(ib.QPAttr{State: ib.Reset}, ib.AttrState)
		if n := c.lastWQEs(); n != want {
			t.Errorf("%d events, want %d", n, want)
		}
	}
}

// What a queue pair has received from a shared receive queue completes before it is destroyed or reset, also if the engine has not looked
// since: else the slot would be nobody's.
func TestSlotsOfQueuePairsThatGo(t *testing.T) {
	for name, end := range map[string]func(*queuePair) error{
		"destroyed": func(q *queuePair) error { return q.c.f.DestroyQP(q.h) },
		"reset": func(q *queuePair) error {
			return q.c.f.ModifyQP(q.h, &ib.QPAttr{State: ib.Reset}, ib.AttrState, ib.LinkEthernet)
		},
	} {
		t.Run(name, func(t *testing.T) {
			from, to := connect(t, newDevice(t, Config{Manual: true})), connect(t, newDevice(t, Config{Manual: true}))
			m := mapAt(t, 0, pageSize)
			key := uint32(to.reg(m, everything).LKey)
			srq := to.newSRQ(3)
			for range 3 {
				srq.post(segData(addrOf(m), 64, key))
			}
			cf, ct := from.newCQ(16, -1), to.newCQ(16, -1)
			for i := range 3 {
				a, b := from.newQP(cf, cf, qpOptions{srq: -1, uidx: uint32(i)}), to.newQP(ct, ct, qpOptions{srq: int(srq.h), uidx: uint32(i)})
				a.connectAt(to.dev, b.qpn)
				b.connectAt(from.dev, a.qpn)
				to.dev.Step()
				a.send(opSend, ceUpdate, 0, segInline([]byte("hello")))
				cf.expect(cqeRequester, 5)
				if err := end(b); err != nil {
					t.Fatal(err)
				}
				if e, ok := ct.poll(); !ok || e.op != cqeRecvSend || e.qpn != b.qpn || int(e.index) != i {
					t.Errorf("queue pair %d has completed %v, %+v", i, ok, e)
				}
			}
			if n := to.lastWQEs(); n != 0 {
				t.Errorf("%d events say that a queue pair has taken its last receive", n)
			}
		})
	}
}
