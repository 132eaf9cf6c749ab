package conformance

import (
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var _ = addCases("UD", ib.CapUD,
	testCase{name: "ud/send", run: func(c *C) { udSizes(c, false) }},
	testCase{name: "ud/send-imm", run: func(c *C) { udSizes(c, true) }},
	testCase{name: "ud/slices", run: func(c *C) { udSizes(c, true, sliceMem) }},
	testCase{name: "ud/reply-to-source", run: udReply},
	testCase{name: "ud/many-to-one", run: udManyToOne},
	testCase{name: "ud/wrong-qkey", run: udWrongQKey},
	testCase{name: "ud/own-qkey", run: udOwnQKey},
	testCase{name: "ud/receive-too-small", run: udTooSmall},
	testCase{name: "ud/no-receive", run: udNoReceive},
	testCase{name: "ud/no-such-qp", run: udNoSuchQP},
	testCase{name: "ud/over-the-mtu", run: udOverMTU},
	testCase{name: "ud/opcodes-refused", run: udRefused},
	testCase{name: "ud/bad-address-handle", run: udBadAH},
)

func udWR(id uint64, ah ib.AHNum, to *end, qkey ib.QKey, sges ...ib.SGE) ib.SendWR {
	wr := wrSend(id, sges...)
	wr.AH, wr.RemoteQPN, wr.RemoteQKey = ah, to.QPN, qkey
	return wr
}

const qkeyOfB = 0x2222

func udSizes(c *C, imm bool, changes ...func(*linkOpts)) {
	l := c.pair(ib.UD, changes...)
	ah := c.A.ah(c.B)
	mtu := c.opts(ib.UD).mtu.Bytes()
	for i, n := range []int{0, 1, 8, 63, 64, 65, mtu - 1, mtu} {
		id := uint64(i + 1)
		l.a.mem.fill(0, n, id)
		l.b.mem.canary()
		l.b.recv(id, l.b.mem.sge(room, ib.GRHLen), l.b.mem.sge(room+ib.GRHLen, mtu))
		wr := udWR(id, ah, l.b, qkeyOfB, l.a.mem.sge(0, n))
		w := want{ID: id, Op: ib.WCRecv, Len: ib.GRHLen + n}
		if imm {
			wr.Opcode, wr.Imm = ib.OpSendWithImm, immediates[i%len(immediates)]
			w.Flags, w.Imm = ib.WCWithImm, wr.Imm
		}
		l.a.post(wr)
		l.a.sent(want{ID: id, Op: ib.WCSend, Len: anyLen})
		wc := l.b.received(w)[0]
		if wc.SrcQPN != l.a.QPN {
			c.Errorf("completion says that QP %#x sent, want %#x", wc.SrcQPN, l.a.QPN)
		}
		// Over Ethernet there is always a GRH; on InfiniBand within a subnet there may be none.
		if wc.Flags&ib.WCGRH == 0 && c.A.dev.Port.LinkLayer == ib.LinkEthernet {
			c.Error("completion without a GRH")
		}
		what := fmt.Sprintf("datagram of %d bytes", n)
		l.b.mem.has(what, room+ib.GRHLen, n, id)
		l.b.mem.intactAround(what, room, ib.GRHLen+n)
	}
}

// The GRH and SrcQPN are enough to answer (IBA 11.4.2.1): the source GID is bytes 8 to 23 of the GRH.
func udReply(c *C) {
	l := c.pair(ib.UD)
	l.b.recv(1, l.b.mem.sge(0, 1000))
	l.a.post(udWR(2, c.A.ah(c.B), l.b, qkeyOfB, l.a.mem.sge(0, 10)))
	wc := l.b.received(want{ID: 1, Op: ib.WCRecv, Len: ib.GRHLen + 10})[0]
	attr := c.B.ahTo(c.A)
	if wc.Flags&ib.WCGRH != 0 {
		grh := l.b.mem.read(0, ib.GRHLen)
		if c.A.dev.GID.Addr().Is4() {
			// RoCE v2 over IPv4 has an IPv4 header in the last 20 bytes; its source is at 12.
			copy(attr.DGID[12:], grh[32:36])
		} else {
			copy(attr.DGID[:], grh[8:24])
		}
		if attr.DGID != c.A.dev.GID {
			c.Errorf("the GRH says that %v sent, want %v", attr.DGID, c.A.dev.GID)
		}
	} else {
		c.note("datagrams have no GRH")
	}
	ah := do(c.B, opAH, ahArgs{c.B.pd, attr})
	l.a.recv(3, l.a.mem.sge(0, 1000))
	wr := wrSend(4, l.b.mem.sge(0, 20))
	wr.AH, wr.RemoteQPN, wr.RemoteQKey = ah.Num, wc.SrcQPN, 0x1111
	l.b.post(wr)
	l.a.received(want{ID: 3, Op: ib.WCRecv, Len: ib.GRHLen + 20})
}

func udManyToOne(c *C) {
	l := c.pair(ib.UD)
	others := []*end{l.a, c.pair(ib.UD).a, c.pairOn(c.B, c.B, c.opts(ib.UD)).a}
	for i := range 9 {
		l.b.recv(uint64(i), l.b.mem.sge(0, 1000))
	}
	got := map[ib.QPN]int{}
	for i := range 9 {
		from := others[i%3]
		from.post(udWR(1, from.Side.ah(c.B), l.b, qkeyOfB, from.mem.sge(0, i)))
		from.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
		wc := l.b.received(want{ID: uint64(i), Op: ib.WCRecv, Len: ib.GRHLen + i})[0]
		got[wc.SrcQPN]++
	}
	for _, e := range others {
		if got[e.QPN] != 3 {
			c.Errorf("messages by source: %v; want 3 of %#x", got, e.QPN)
		}
	}
}

// follow sends one more datagram and checks that the receive id is the next to be used: what was before it was dropped.
func (l link) follow(c *C, id uint64) {
	c.Helper()
	c.settle()
	l.b.rcq.empty("a datagram that must be dropped")
	l.a.mem.fill(0, 33, id)
	l.a.post(udWR(77, c.A.ah(c.B), l.b, qkeyOfB, l.a.mem.sge(0, 33)))
	l.a.sent(want{ID: 77, Op: ib.WCSend, Len: anyLen})
	l.b.received(want{ID: id, Op: ib.WCRecv, Len: ib.GRHLen + 33})
	l.b.mem.has("datagram after a dropped one", ib.GRHLen, 33, id)
}

// IBA 9.6.1.3.1: a datagram with another Q_Key than the receiver's is dropped silently.
func udWrongQKey(c *C) {
	l := c.pair(ib.UD)
	l.b.recv(5, l.b.mem.sge(0, 1000))
	l.b.mem.canary()
	l.a.post(udWR(1, c.A.ah(c.B), l.b, qkeyOfB+1, l.a.mem.sge(0, 10)))
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
	c.settle()
	l.b.mem.intact("datagram with a wrong Q_Key")
	l.follow(c, 5)
}

// IBA 10.2.5: with the top bit set in the request's Q_Key, the sending QP's own is sent.
func udOwnQKey(c *C) {
	l := c.pair(ib.UD, func(o *linkOpts) { o.qkeyA = qkeyOfB })
	l.b.recv(5, l.b.mem.sge(0, 1000))
	l.a.post(udWR(1, c.A.ah(c.B), l.b, 0x80000000, l.a.mem.sge(0, 10)))
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
	l.b.received(want{ID: 5, Op: ib.WCRecv, Len: ib.GRHLen + 10})
}

// A datagram that is longer than the receive: mlx5 ends the receive with a local length error, rxe drops the datagram.
func udTooSmall(c *C) {
	for _, n := range []int{ib.GRHLen + 9, ib.GRHLen, 10, 0} {
		l := c.pair(ib.UD)
		l.b.mem.canary()
		l.b.recv(5, l.b.mem.sge(room, n))
		l.a.post(udWR(1, c.A.ah(c.B), l.b, qkeyOfB, l.a.mem.sge(0, 10)))
		l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
		c.settle()
		l.b.mem.intactAround("receive that is too small", room, n)
		wcs := do(c.B, opPoll, pollArgs{l.b.rcq.H, 1, quiet})
		switch {
		case len(wcs) == 0:
			c.note("a datagram that is too long is dropped")
		case wcs[0].ID == 5 && (wcs[0].Status == ib.WCLocalLengthErr || c.B.instead(ib.WCLocalLengthErr, wcs[0].Status)):
			c.note("a datagram that is too long ends the receive with %q", wcs[0].Status)
		default:
			c.Fatalf("receive completion %s, want a local length error or none", showWC(wcs[0]))
		}
	}
}

func udNoReceive(c *C) {
	l := c.pair(ib.UD)
	for range 3 {
		l.a.post(udWR(1, c.A.ah(c.B), l.b, qkeyOfB, l.a.mem.sge(0, 10)))
		l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
	}
	c.settle()
	l.b.recv(5, l.b.mem.sge(0, 1000))
	l.follow(c, 5)
	l.a.staysIn(ib.RTS)
}

func udNoSuchQP(c *C) {
	l := c.pair(ib.UD)
	gone := c.pair(ib.UD)
	if err := gone.b.destroy(); err != nil {
		c.Fatal(err)
	}
	ah := c.A.ah(c.B)
	l.b.recv(5, l.b.mem.sge(0, 1000))
	l.a.post(udWR(1, ah, gone.b, qkeyOfB, l.a.mem.sge(0, 10)))
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
	// A QP of another type.
	rc := c.pair(ib.RC)
	rc.b.recv(6, rc.b.mem.sge(0, 1000))
	l.a.post(udWR(2, ah, rc.b, qkeyOfB, l.a.mem.sge(0, 10)))
	l.a.sent(want{ID: 2, Op: ib.WCSend, Len: anyLen})
	c.settle()
	rc.b.rcq.empty("a datagram to an RC QP")
	l.follow(c, 5)
	rc.alive2(c)
}

// alive2 is alive for a pair whose B has a receive posted already.
func (l link) alive2(c *C) {
	c.Helper()
	l.a.post(wrSend(1, l.a.mem.sge(0, 7)))
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
	l.b.received(want{ID: 6, Op: ib.WCRecv, Len: 7})
}

// A datagram is one packet. IBA C10-93.1.1 lets a device drop a longer one without an error, which rxe does; mlx5
// completes it with a local length error; a library can refuse it.
func udOverMTU(c *C) {
	l := c.pair(ib.UD)
	mtu := c.opts(ib.UD).mtu.Bytes()
	l.b.recv(5, l.b.mem.sge(0, 2*mtu))
	wr := udWR(1, c.A.ah(c.B), l.b, qkeyOfB, l.a.mem.sge(0, mtu+1))
	switch n, err := l.a.tryPost(wr); {
	case err != nil:
		if n != 0 || !errors.Is(err, verbs.ErrInvalidWR) {
			c.Fatalf("post_send: %d accepted, %v; want 0 and ErrInvalidWR", n, err)
		}
		c.note("a datagram over the MTU is refused by PostSend")
	default:
		wc := l.a.scq.wait(1)[0]
		if wc.Status != ib.WCSuccess && wc.Status != ib.WCLocalLengthErr {
			c.Fatalf("completion %s, want success or a local length error", showWC(wc))
		}
		c.note("a datagram over the MTU completes with %q and is not sent", wc.Status)
	}
	c.settle()
	l.b.rcq.empty("a datagram over the MTU")
}

func udRefused(c *C) {
	for _, op := range []ib.Opcode{ib.OpRDMAWrite, ib.OpRDMAWriteWithImm, ib.OpRDMARead, ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd, ib.OpSendWithInv} {
		l := c.pair(ib.UD)
		wr := udWR(5, c.A.ah(c.B), l.b, qkeyOfB, l.a.mem.sge(0, 8))
		wr.Opcode, wr.RemoteAddr, wr.RKey = op, l.b.mem.Addr, l.b.mem.RKey
		l.b.recv(1, l.b.mem.sge(100, 1000))
		l.b.mem.canary()
		c.refused(l.a.QP, wr, ib.WCLocalQPOpErr)
		l.b.mem.intact(op.String())
		l.b.rcq.empty(op.String())
	}
}

func udBadAH(c *C) {
	l := c.pair(ib.UD)
	if ah, err := call(c.A, opAH, ahArgs{c.A.pd, ib.AHAttr{DGID: c.B.dev.GID, SGIDIndex: c.A.dev.Port.GIDTable + 5, Port: 1}}); err == nil {
		c.Errorf("an address handle with a GID index that is not there: number %d", ah.Num)
	}
	if ah, err := call(c.A, opAH, ahArgs{c.A.pd, ib.AHAttr{DGID: c.B.dev.GID, SGIDIndex: c.A.dev.GIDIndex, Port: 9}}); err == nil {
		c.Errorf("an address handle of a port that is not there: number %d", ah.Num)
	}
	// One that was closed, or never was.
	ah := do(c.A, opAH, ahArgs{c.A.pd, c.A.ahTo(c.B)})
	c.A.mustClose(ah.H)
	l.b.recv(5, l.b.mem.sge(0, 1000))
	for _, num := range []ib.AHNum{ah.Num, 0x7fffffff} {
		n, err := l.a.tryPost(udWR(1, num, l.b, qkeyOfB, l.a.mem.sge(0, 10)))
		if err != nil {
			if n != 0 || !errors.Is(err, verbs.ErrInvalidWR) {
				c.Errorf("post_send with address handle %#x: %d accepted, %v; want 0 and ErrInvalidWR", num, n, err)
			}
			continue
		}
		if wc := l.a.scq.wait(1)[0]; wc.Status == ib.WCSuccess {
			c.note("a datagram with an address handle that is gone completes with success")
		} else {
			l = c.pair(ib.UD)
		}
		l.b.rcq.empty("a datagram with an address handle that is gone")
	}
}
