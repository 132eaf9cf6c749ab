package mlx5emu

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// eachEngine runs a test on a device that the test steps, and on one with a goroutine.
func eachEngine(t *testing.T, f func(t *testing.T, cfg Config)) {
	for _, cfg := range []Config{{Manual: true}, {}} {
		t.Run(fmt.Sprintf("manual=%t", cfg.Manual), func(t *testing.T) { f(t, cfg) })
	}
}

func fill(b []byte, seed byte) {
	for i := range b {
		b[i] = seed + byte(i)
	}
}

// expect takes a CQE, and compares what matters of it.
func (q *cqueue) expect(op byte, n uint32) completion {
	q.c.t.Helper()
	e := q.wait()
	if e.op != op || e.n != n {
		q.c.t.Fatalf("CQE with opcode %d, %d bytes, syndrome %#x; want opcode %d, %d bytes", e.op, e.n, e.syndrome, op, n)
	}
	return e
}

func (q *cqueue) expectError(op byte, st ib.WCStatus) completion {
	q.c.t.Helper()
	e := q.wait()
	if e.op != op || e.syndrome != syndromes[st] {
		q.c.t.Fatalf("CQE with opcode %d and syndrome %#x; want opcode %d and %#x (%v)", e.op, e.syndrome, op, syndromes[st], st)
	}
	return e
}

func TestOperations(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg Config) {
		p := newPair(t, cfg, ib.RC)
		fill(p.ma, 1)
		// Two segments in, two out, over more than a basic block.
		p.b.recv(segData(addrOf(p.mb), 100, p.kb), segData(addrOf(p.mb)+1000, 400, p.kb))
		p.a.send(opSendImm, ceUpdate, 0x12345678, segData(addrOf(p.ma), 300, p.ka), segData(addrOf(p.ma)+2000, 50, p.ka), segData(addrOf(p.ma)+3000, 1, p.ka), segData(addrOf(p.ma)+3500, 2, p.ka))
		if e := p.ca.expect(cqeRequester, 353); e.send != opSendImm || e.qpn != p.a.qpn || e.user != 1 || e.index != 0 {
			t.Errorf("requester's CQE %+v", e)
		}
		if e := p.cb.expect(cqeRecvSendImm, 353); e.imm != 0x12345678 || e.qpn != p.b.qpn || e.user != 2 || e.index != 0 {
			t.Errorf("responder's CQE %+v", e)
		}
		sent := bytes.Join([][]byte{p.ma[:300], p.ma[2000:2050], p.ma[3000:3001], p.ma[3500:3502]}, nil)
		if got := append(bytes.Clone(p.mb[:100]), p.mb[1000:1253]...); !bytes.Equal(got, sent) {
			t.Error("what was received is not what was sent")
		}

		p.a.send(opWrite, ceUpdate, 0, segRemote(addrOf(p.mb)+64, p.kb), segInline([]byte("inline, across two basic blocks of the queue: longer than what one has room for")))
		p.ca.expect(cqeRequester, 79)
		if string(p.mb[64:70]) != "inline" {
			t.Errorf("inline data: %q", p.mb[64:80])
		}
		p.a.send(opRead, ceUpdate, 0, segRemote(addrOf(p.mb)+64, p.kb), segData(addrOf(p.ma)+5, 6, p.ka))
		p.ca.expect(cqeRequester, 6)
		if string(p.ma[5:11]) != "inline" {
			t.Errorf("read %q", p.ma[5:11])
		}

		le.PutUint64(p.mb[512:], 40)
		p.a.send(opFetchAdd, ceUpdate, 0, segRemote(addrOf(p.mb)+512, p.kb), segAtomic(2, 0), segData(addrOf(p.ma)+512, 8, p.ka))
		p.ca.expect(cqeRequester, 8)
		p.a.send(opCompSwap, ceUpdate, 0, segRemote(addrOf(p.mb)+512, p.kb), segAtomic(7, 42), segData(addrOf(p.ma)+520, 8, p.ka))
		p.ca.expect(cqeRequester, 8)
		if old, swapped, now := le.Uint64(p.ma[512:]), le.Uint64(p.ma[520:]), le.Uint64(p.mb[512:]); old != 40 || swapped != 42 || now != 7 {
			t.Errorf("atomics: %d, %d, and then %d", old, swapped, now)
		}

		p.b.recv()
		p.a.send(opWriteImm, ceUpdate, 5, segRemote(addrOf(p.mb), p.kb), segData(addrOf(p.ma), 16, p.ka))
		p.ca.expect(cqeRequester, 16)
		if e := p.cb.expect(cqeRecvWriteImm, 16); e.imm != 5 || e.index != 1 {
			t.Errorf("write with immediate: %+v", e)
		}

		// Only the last of these has a CQE.
		for range 5 {
			p.a.send(opWrite, 0, 0, segRemote(addrOf(p.mb), p.kb), segData(addrOf(p.ma), 16, p.ka))
		}
		p.a.send(opNop, ceUpdate, 0)
		if e := p.ca.expect(cqeRequester, 0); e.send != opNop {
			t.Errorf("CQE of a NOP: %+v", e)
		}
	})
}

// The counters of WQEs and CQEs run through 16 bits, and around queues of other sizes.
func TestWrapAround(t *testing.T) {
	p := newPair(t, Config{Manual: true}, ib.RC)
	const rounds = 1<<16/18 + 300 // of 18 basic blocks in all
	for i := range rounds {
		p.b.recv(segData(addrOf(p.mb), 512, p.kb))
		p.ma[0] = byte(i)
		p.a.post(opWrite, 0, 0, segRemote(addrOf(p.mb)+600, p.kb), segInline(make([]byte, 970)))
		p.a.send(opSend, ceUpdate, 0, segData(addrOf(p.ma), 1, p.ka), segData(addrOf(p.ma), 1, p.ka), segData(addrOf(p.ma), 1, p.ka), segData(addrOf(p.ma), 1, p.ka))
		if e := p.ca.expect(cqeRequester, 4); e.index != uint16(p.a.cur-2) {
			t.Fatalf("round %d: CQE of WQE %d, want %d", i, e.index, uint16(p.a.cur-2))
		}
		if e := p.cb.expect(cqeRecvSend, 4); e.index != uint16(i) || p.mb[3] != byte(i) {
			t.Fatalf("round %d: received %+v", i, e)
		}
	}
	if p.a.cur < 1<<16 {
		t.Fatal("the counter has not wrapped")
	}
}

// A request that fails, and what is behind it: at once and afterwards.
func TestErrors(t *testing.T) {
	for _, c := range []struct {
		name string
		want ib.WCStatus
		post func(p *pair)
	}{
		{"wrong rkey", ib.WCRemoteAccessErr, func(p *pair) {
			p.a.post(opWrite, 0, 0, segRemote(addrOf(p.mb), p.kb+1), segData(addrOf(p.ma), 16, p.ka))
		}},
		{"beyond the region", ib.WCRemoteAccessErr, func(p *pair) {
			p.a.post(opRead, 0, 0, segRemote(addrOf(p.mb)+uint64(len(p.mb))-8, p.kb), segData(addrOf(p.ma), 9, p.ka))
		}},
		{"around the end of addresses", ib.WCRemoteAccessErr, func(p *pair) {
			p.a.post(opWrite, 0, 0, segRemote(1<<64-8, p.kb), segData(addrOf(p.ma), 16, p.ka))
		}},
		{"wrong lkey", ib.WCLocalProtErr, func(p *pair) { p.a.post(opSend, 0, 0, segData(addrOf(p.ma), 16, p.ka+1)) }},
		{"beyond one's own region", ib.WCLocalProtErr, func(p *pair) { p.a.post(opSend, 0, 0, segData(addrOf(p.ma)+1, uint32(len(p.ma)), p.ka)) }},
		{"2 GiB", ib.WCLocalProtErr, func(p *pair) { p.a.post(opSend, 0, 0, segData(addrOf(p.ma), 0, p.ka)) }},
		{"unaligned atomic", ib.WCRemoteInvalidReqErr, func(p *pair) {
			p.a.post(opFetchAdd, 0, 0, segRemote(addrOf(p.mb)+4, p.kb), segAtomic(1, 0), segData(addrOf(p.ma), 8, p.ka))
		}},
		{"no such opcode", ib.WCLocalQPOpErr, func(p *pair) { p.a.post(0x3f, 0, 0) }},
		{"opcode modifier", ib.WCLocalQPOpErr, func(p *pair) { p.a.post(opSend, 0, 0); p.a.sq[0] = 1 }},
		{"of another queue pair", ib.WCLocalQPOpErr, func(p *pair) { at := p.a.post(opSend, 0, 0); p.a.sq[at*64+6] ^= 1 }},
		{"of another index", ib.WCLocalQPOpErr, func(p *pair) { at := p.a.post(opSend, 0, 0); p.a.sq[at*64+2] ^= 1 }},
		{"without segments", ib.WCLocalQPOpErr, func(p *pair) { at := p.a.post(opSend, 0, 0); p.a.sq[at*64+7] = 0 }},
		{"longer than what is posted", ib.WCLocalQPOpErr, func(p *pair) { at := p.a.post(opSend, 0, 0); p.a.sq[at*64+7] = 0x3f }},
		{"a write without its address", ib.WCLocalQPOpErr, func(p *pair) { p.a.post(opWrite, 0, 0) }},
		{"inline data longer than the WQE", ib.WCLocalQPOpErr, func(p *pair) {
			s := segInline([]byte("x"))
			be.PutUint32(s, inlineBit|500)
			p.a.post(opSend, 0, 0, s)
		}},
		{"a read into inline data", ib.WCLocalQPOpErr, func(p *pair) { p.a.post(opRead, 0, 0, segRemote(addrOf(p.mb), p.kb), segInline([]byte("x"))) }},
		{"an atomic of 4 bytes", ib.WCLocalQPOpErr, func(p *pair) {
			p.a.post(opFetchAdd, 0, 0, segRemote(addrOf(p.mb), p.kb), segAtomic(1, 0), segData(addrOf(p.ma), 4, p.ka))
		}},
		{"a window that is not there", ib.WCMWBindErr, func(p *pair) {
			at := p.a.post(opUMR, 0, 0x77700, make([]byte, umrCtrlSize+umrMkeySize+umrKLMSize))
			w := p.a.sq[at*64:]
			w[16], w[16+5] = umrCheckFree|umrInline, 4
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, Config{Manual: true}, ib.RC)
			p.b.recv(segData(addrOf(p.mb), 512, p.kb))
			p.b.recv(segData(addrOf(p.mb), 512, p.kb))
			c.post(p)
			p.a.send(opSend, 0, 0, segData(addrOf(p.ma), 16, p.ka)) // is flushed
			if e := p.ca.expectError(cqeRequesterErr, c.want); e.index != 0 || e.qpn != p.a.qpn || e.user != 1 {
				t.Errorf("CQE %+v", e)
			}
			if c.name != "longer than what is posted" && c.name != "without segments" { // else nobody knows where the next begins
				p.ca.expectError(cqeRequesterErr, ib.WCFlushErr)
			}
			p.until("the error state", func() bool { return p.a.state() == ib.Err })
			p.a.send(opSend, 0, 0, segData(addrOf(p.ma), 16, p.ka))
			if e := p.ca.expectError(cqeRequesterErr, ib.WCFlushErr); e.send != opSend {
				t.Errorf("CQE of a flushed request: %+v", e)
			}
		})
	}
}

// A receive that is too short, or that cannot be written to, ends both sides.
func TestReceiveErrors(t *testing.T) {
	for _, c := range []struct {
		name          string
		seg           func(p *pair) []byte
		local, remote ib.WCStatus
	}{
		{"too short", func(p *pair) []byte { return segData(addrOf(p.mb), 15, p.kb) }, ib.WCLocalLengthErr, ib.WCRemoteInvalidReqErr},
		{"wrong lkey", func(p *pair) []byte { return segData(addrOf(p.mb), 16, p.kb^0x10000) }, ib.WCLocalProtErr, ib.WCRemoteOpErr},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, Config{Manual: true}, ib.RC)
			p.b.recv(c.seg(p))
			p.b.recv(c.seg(p))
			p.a.send(opSend, ceUpdate, 0, segData(addrOf(p.ma), 16, p.ka))
			p.ca.expectError(cqeRequesterErr, c.remote)
			if e := p.cb.expectError(cqeResponderErr, c.local); e.index != 0 || e.qpn != p.b.qpn {
				t.Errorf("CQE %+v", e)
			}
			if e := p.cb.expectError(cqeResponderErr, ib.WCFlushErr); e.index != 1 {
				t.Errorf("CQE %+v", e)
			}
		})
	}
}

// After RESET a queue pair begins anew, and nothing of before completes.
func TestReset(t *testing.T) {
	p := newPair(t, Config{Manual: true}, ib.RC)
	p.a.send(opSend, ceUpdate, 0, segData(addrOf(p.ma), 16, p.ka)) // nobody receives it
	p.dev.Step()
	for _, q := range []*queuePair{p.a, p.b} {
		q.modify(ib.QPAttr{State: ib.Reset}, ib.AttrState)
		clear(q.db)
		q.cur, q.rhead = 0, 0
	}
	p.a.connectTo(p.b.qpn)
	p.b.connectTo(p.a.qpn)
	p.b.recv(segData(addrOf(p.mb), 16, p.kb))
	p.a.send(opSendImm, ceUpdate, 9, segData(addrOf(p.ma), 16, p.ka))
	if e := p.ca.expect(cqeRequester, 16); e.send != opSendImm || e.index != 0 {
		t.Errorf("CQE %+v", e)
	}
	p.cb.expect(cqeRecvSendImm, 16)
	if e, ok := p.ca.poll(); ok {
		t.Errorf("one more CQE: %+v", e)
	}
}

// What has been read, but has no CQE, may not be written over: a driver that counts wrong is told by the event. One that fills its queues
// to the last block is right.
func TestQueuesThatAreOverfilled(t *testing.T) {
	for name, post := range map[string]func(*pair, *queuePair){
		"receives": func(p *pair, q *queuePair) { q.recv(segData(addrOf(p.ma), 16, p.ka)) },
		"sends":    func(p *pair, q *queuePair) { q.send(opSend, ceUpdate, 0, segData(addrOf(p.ma), 16, p.ka)) },
		"sends that are not signalled": func(p *pair, q *queuePair) {
			q.send(opWrite, 0, 0, segRemote(addrOf(p.mb), p.kb), segData(addrOf(p.ma), 16, p.ka))
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, Config{Manual: true}, ib.RC)
			const depth = 16
			a, b := p.newQP(p.ca, p.ca, qpOptions{srq: -1, rqn: depth, shift: 5, sqn: depth}), p.newQP(p.cb, p.cb, qpOptions{srq: -1})
			a.connectTo(b.qpn)
			b.connectTo(a.qpn)
			settle := func(want bool) {
				t.Helper()
				for p.dev.Step() {
				}
				ev := readEvent(t, p.async)
				if (ev != nil) != want || want && ib.EventType(le.Uint32(ev[8:])) != ib.EventQPFatal {
					t.Errorf("event % x, want one: %t", ev, want)
				}
			}
			for range depth {
				post(p, a)
			}
			settle(false)
			post(p, a)
			settle(true)
			if s := a.state(); s != ib.Err {
				t.Errorf("the state is %v", s)
			}
		})
	}
}

// Of requests of which a few are signalled, a CQE frees all in front of it, however long these are; and a reset frees all.
func TestQueuesThatAreFilled(t *testing.T) {
	p := newPair(t, Config{Manual: true}, ib.RC)
	const depth = 16
	a, b := p.newQP(p.ca, p.ca, qpOptions{srq: -1, sqn: depth}), p.newQP(p.cb, p.cb, qpOptions{srq: -1, rqn: depth, shift: 5})
	for range 3 {
		a.connectTo(b.qpn)
		b.connectTo(a.qpn)
		for range depth {
			b.recv(segData(addrOf(p.mb), 16, p.kb))
		}
		p.dev.Step()
		for range 5 {
			a.send(opWrite, 0, 0, segRemote(addrOf(p.mb)+600, p.kb), segInline(make([]byte, 15*64-48)))
			a.send(opSend, ceUpdate, 0, segData(addrOf(p.ma), 16, p.ka))
			p.ca.expect(cqeRequester, 16)
			p.cb.expect(cqeRecvSend, 16)
			b.recv(segData(addrOf(p.mb), 16, p.kb))
		}
		for _, q := range []*queuePair{a, b} {
			q.modify(ib.QPAttr{State: ib.Reset}, ib.AttrState)
			clear(q.db)
			q.cur, q.rhead = 0, 0
		}
	}
	if ev := readEvent(t, p.async); ev != nil {
		t.Errorf("event % x", ev)
	}
}

// QUERY_QP says of a queue pair in SQD whether a request is under way. Those that wait behind it are not.
func TestQueryDraining(t *testing.T) {
	p := newPair(t, Config{Manual: true}, ib.RC)
	for range 3 {
		p.a.send(opSend, ceUpdate, 0, segData(addrOf(p.ma), 16, p.ka))
	}
	for p.dev.Step() { // the first one finds no receive
	}
	draining := func() uint8 {
		t.Helper()
		var r abi.QueryQPResp
		if err := p.f.Write("query_qp", &uverbs.WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_QUERY_QP, In: uverbs.Bytes(&abi.QueryQP{QPHandle: p.a.h}), Out: uverbs.Bytes(&r)}); err != nil {
			t.Fatal(err)
		}
		return r.SQDraining
	}
	p.a.modify(ib.QPAttr{State: ib.SQD, SQDNotify: true}, ib.AttrState|ib.AttrSQDNotify)
	if draining() != 1 {
		t.Error("no request is under way")
	}
	for range 3 {
		p.b.recv(segData(addrOf(p.mb), 16, p.kb))
	}
	p.until("the end of the request", func() bool {
		ev := readEvent(t, p.async)
		return ev != nil && ib.EventType(le.Uint32(ev[8:])) == ib.EventSQDrained
	})
	if draining() != 0 {
		t.Error("a request is under way after the event that says that none is")
	}
	p.a.modify(ib.QPAttr{State: ib.RTS}, ib.AttrState)
	for range 3 {
		p.ca.expect(cqeRequester, 16)
	}
}

// UC loses what nobody receives, and has no reads.
func TestUC(t *testing.T) {
	p := newPair(t, Config{Manual: true}, ib.UC)
	p.a.send(opSend, ceUpdate, 0, segData(addrOf(p.ma), 16, p.ka))
	p.ca.expect(cqeRequester, 16)
	p.b.recv(segData(addrOf(p.mb), 16, p.kb))
	p.a.send(opSendImm, ceUpdate, 3, segData(addrOf(p.ma), 16, p.ka))
	p.ca.expect(cqeRequester, 16)
	if e := p.cb.expect(cqeRecvSendImm, 16); e.imm != 3 {
		t.Errorf("received %+v", e)
	}
	p.a.send(opRead, ceUpdate, 0, segRemote(addrOf(p.mb), p.kb), segData(addrOf(p.ma), 16, p.ka))
	p.ca.expectError(cqeRequesterErr, ib.WCLocalQPOpErr)
}

func segAddress(p *pair, qpn, qkey uint32) []byte {
	b := make([]byte, avSize)
	be.PutUint32(b, qkey)
	be.PutUint32(b[8:], 1<<31|qpn)
	b[27] = 64
	gid := p.dev.nic.GID()
	copy(b[32:], gid[:])
	return b
}

// Datagrams are addressed by their WQEs, and come with a GRH and the sender's number.
func TestUD(t *testing.T) {
	eachEngine(t, func(t *testing.T, cfg Config) {
		p := newPair(t, cfg, ib.UD)
		fill(p.ma, 7)
		h, err := p.f.CreateAH(p.pd, &ib.AHAttr{DGID: p.dev.nic.GID(), HopLimit: 64, Port: 1}, ib.LinkEthernet, make([]byte, 16))
		if err != nil {
			t.Fatal(err)
		}
		p.b.recv(segData(addrOf(p.mb), 200, p.kb))
		p.a.send(opSendImm, ceUpdate, 4, segAddress(p, p.b.qpn, 0x1111), segData(addrOf(p.ma), 60, p.ka))
		p.ca.expect(cqeRequester, 60)
		e := p.cb.expect(cqeRecvSendImm, 100)
		if rqpn := be32(e.cqe[cqeRemoteQPN:]); rqpn&0xffffff != p.a.qpn || rqpn>>28&3 == 0 || e.imm != 4 {
			t.Errorf("received %+v, from %#x", e, rqpn)
		}
		if !bytes.Equal(p.mb[40:100], p.ma[:60]) {
			t.Error("what was received is not what was sent")
		}
		if err := p.f.DestroyAH(h); err != nil {
			t.Error(err)
		}
		// Without a handle, too; and a wrong Q_Key is dropped by the receiver.
		p.a.send(opSend, ceUpdate, 0, segAddress(p, p.b.qpn, 0x2222), segData(addrOf(p.ma), 60, p.ka))
		p.ca.expect(cqeRequester, 60)
		p.b.recv(segData(addrOf(p.mb), 200, p.kb))
		p.a.send(opSend, ceUpdate, 0, segAddress(p, p.b.qpn, 0x1111), segData(addrOf(p.ma), 20, p.ka))
		p.ca.expect(cqeRequester, 20)
		if e := p.cb.expect(cqeRecvSend, 60); e.index != 1 {
			t.Errorf("received %+v", e)
		}
		// A datagram is one packet, of the port's active MTU, through memory too.
		mtu := uint32(p.dev.activeMTU().Bytes())
		p.b.recv(segData(addrOf(p.mb), 3*pageSize, p.kb))
		p.a.send(opSend, ceUpdate, 0, segAddress(p, p.b.qpn, 0x1111), segData(addrOf(p.ma), mtu, p.ka))
		p.ca.expect(cqeRequester, mtu)
		p.cb.expect(cqeRecvSend, 40+mtu)
		p.a.send(opSend, ceUpdate, 0, segAddress(p, p.b.qpn, 0x1111), segData(addrOf(p.ma), mtu-10, p.ka), segData(addrOf(p.ma), 11, p.ka))
		p.ca.expectError(cqeRequesterErr, ib.WCLocalLengthErr)
	})
}

// All CQs at a register are looked at when one of them has written to it, also if that one goes before the engine has looked; but not for
// the number of a CQ that is not there.
func TestArmRegister(t *testing.T) {
	c := connect(t, newDevice(t, Config{Manual: true}))
	a, b := c.newCQ(16, -1), c.newCQ(16, -1)
	expect := func(armed uint32) { // the sequence number by which a is
		t.Helper()
		c.dev.Step()
		for _, n := range c.dev.order[0].cqs {
			if n.cqn == a.cqn && n.arm>>armSequence != armed {
				t.Errorf("armed with %d, not %d", n.arm>>armSequence, armed)
			}
		}
	}
	expect(neverArmed >> armSequence)
	a.arm(false)
	(&cqueue{c: c, cqn: b.cqn + 1, db: b.db}).arm(false)
	expect(neverArmed >> armSequence)
	b.arm(false)
	expect(0)
	a.sn++
	a.arm(false)
	b.arm(false)
	if err := c.f.DestroyCQ(b.h); err != nil {
		t.Fatal(err)
	}
	expect(1)
}

// A page tells how times of completions become the host's.
func TestClock(t *testing.T) {
	p := newPair(t, Config{Manual: true}, ib.RC)
	page, err := p.f.Mmap((abi.MLX5_IB_MMAP_CLOCK_INFO<<8|abi.MLX5_IB_CLOCK_INFO_V1)*pageSize, pageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer p.f.Munmap(page)
	i := structOf[abi.Mlx5ClockInfo](page)
	from := time.Now()
	p.a.send(opWrite, ceUpdate, 0, segRemote(addrOf(p.mb), p.kb), segData(addrOf(p.ma), 8, p.ka))
	e := p.ca.expect(cqeRequester, 8)
	if at := i.Nsec + ((be.Uint64(e.cqe[cqeTime:])-i.Cycles)&i.Mask*uint64(i.Mult)+i.Frac)>>i.Shift; i.Sign != 0 ||
		at < uint64(from.Add(-time.Second).UnixNano()) || at > uint64(time.Now().Add(time.Second).UnixNano()) { // the host's clock may be set
		t.Errorf("a completion at %v, by %+v; now it is %v", time.Unix(0, int64(at)), i, from)
	}
}

// A window opens a part of a region to the peer, until its binding ends.
func TestWindow(t *testing.T) {
	p := newPair(t, Config{Manual: true}, ib.RC)
	region := p.reg(p.ma, everything|ib.AccessMWBind)
	h, rkey, err := p.f.AllocMW(p.pd)
	if err != nil {
		t.Fatal(err)
	}
	key := uint32(rkey)
	bind := func(q *queuePair, now, next uint32, addr uint64, n uint32) []byte {
		b := make([]byte, umrCtrlSize+umrMkeySize+umrKLMSize)
		b[0], b[5] = 1<<4|umrInline|umrCheckFree, 4
		m := b[umrCtrlSize:]
		m[2] = 1<<2 | 1<<4 | 1<<5
		be.PutUint32(m[4:], q.qpn<<8|next&0xff)
		be.PutUint64(m[16:], addr)
		be.PutUint64(m[24:], uint64(n))
		k := m[umrMkeySize:]
		be.PutUint32(k, n)
		be.PutUint32(k[4:], uint32(region.LKey))
		be.PutUint64(k[8:], addr)
		return b
	}
	next := key&^0xff | 0x55
	p.a.send(opUMR, ceUpdate, key, bind(p.a, key, next, addrOf(p.ma)+100, 50))
	if e := p.ca.expect(cqeRequester, 0); e.send != opUMR {
		t.Errorf("CQE of a bind: %+v", e)
	}
	p.b.send(opWrite, ceUpdate, 0, segRemote(addrOf(p.ma)+100, next), segInline([]byte("through the window")))
	p.cb.expect(cqeRequester, 18)
	if string(p.ma[100:107]) != "through" {
		t.Errorf("the region has %q", p.ma[100:120])
	}
	if err := p.f.DeregMR(region.Handle); errno(err) != 16 { // EBUSY
		t.Errorf("deregistering a region with a window: %v", err)
	}
	unbind := make([]byte, umrCtrlSize+umrMkeySize)
	unbind[0] = 1<<4 | umrInline | umrCheckQPN
	unbind[umrCtrlSize] = mkeyFree
	p.a.send(opUMR, ceUpdate, next, unbind)
	p.ca.expect(cqeRequester, 0)
	p.b.send(opWrite, ceUpdate, 0, segRemote(addrOf(p.ma)+100, next), segInline([]byte("x")))
	p.cb.expectError(cqeRequesterErr, ib.WCRemoteAccessErr)
	if err := p.f.DeallocMW(h); err != nil {
		t.Error(err)
	}
	if err := p.f.DeregMR(region.Handle); err != nil {
		t.Error(err)
	}
}

// A message that would be lost finds a receive that another context has posted before, whichever was opened first.
func TestReceivesOfOtherContexts(t *testing.T) {
	d := newDevice(t, Config{Manual: true})
	both := []*client{connect(t, d), connect(t, d)}
	for i := range both {
		from, to := both[i], both[1-i]
		m := mapAt(t, 0, pageSize)
		cf, ct := from.newCQ(16, -1), to.newCQ(16, -1)
		a, b := from.newQP(cf, cf, qpOptions{typ: ib.UC, srq: -1, uidx: 1}), to.newQP(ct, ct, qpOptions{typ: ib.UC, srq: -1, uidx: 2})
		a.connectTo(b.qpn)
		b.connectTo(a.qpn)
		for d.Step() {
		}
		b.recv(segData(addrOf(m), 100, uint32(to.reg(m, everything).LKey)))
		a.send(opSend, ceUpdate, 0, segInline([]byte("hello")))
		cf.wait()
		if e, ok := ct.poll(); !ok || e.n != 5 {
			t.Errorf("from context %d: %v, %+v", i, ok, e)
		}
	}
}
