package conformance

import (
	"fmt"
	"math"
	"slices"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

var _ = addCases("remote protection", 0,
	testCase{name: "remote/wrong-rkey", run: remoteCases(func(c *C, l link) (*Mem, uint64, ib.RKey) {
		return l.b.mem, l.b.mem.Addr, l.b.mem.RKey ^ 0x40
	})},
	testCase{name: "remote/wrong-rkey-index", run: remoteCases(func(c *C, l link) (*Mem, uint64, ib.RKey) {
		return l.b.mem, l.b.mem.Addr, l.b.mem.RKey ^ 0x00ffff00
	})},
	testCase{name: "remote/zero-rkey", run: remoteCases(func(c *C, l link) (*Mem, uint64, ib.RKey) {
		return l.b.mem, l.b.mem.Addr, 0
	})},
	testCase{name: "remote/before-the-region", run: remoteCases(func(c *C, l link) (*Mem, uint64, ib.RKey) {
		return l.b.mem, l.b.mem.Addr - 8, l.b.mem.RKey
	})},
	testCase{name: "remote/over-the-end", run: remoteCases(func(c *C, l link) (*Mem, uint64, ib.RKey) {
		return l.b.mem, l.b.mem.Addr + uint64(l.b.mem.n) - 8, l.b.mem.RKey
	})},
	testCase{name: "remote/far-outside", run: remoteCases(func(c *C, l link) (*Mem, uint64, ib.RKey) {
		return l.b.mem, l.b.mem.Addr + 1<<40, l.b.mem.RKey
	})},
	testCase{name: "remote/address-wraps", run: remoteCases(func(c *C, l link) (*Mem, uint64, ib.RKey) {
		return l.b.mem, math.MaxUint64 - 7, l.b.mem.RKey
	})},
	testCase{name: "remote/revoked", run: remoteCases(func(c *C, l link) (*Mem, uint64, ib.RKey) {
		m := c.B.mem(c.B.pd, 4096, accessAll)
		l.a.post(wrWrite(100, l.a.mem.sges(0, 64), m, 0)) // it is in use
		l.a.sent(want{ID: 100, Op: ib.WCRDMAWrite, Len: anyLen})
		if err := m.close(); err != nil {
			c.Fatal(err)
		}
		return l.b.mem, m.Addr, m.RKey // its own memory has gone with it
	})},
	testCase{name: "remote/revoked-slice", run: remoteCases(func(c *C, l link) (*Mem, uint64, ib.RKey) {
		m := c.B.slice(c.B.pd, 4096, accessAll)
		l.a.post(wrWrite(100, l.a.mem.sges(0, 64), m, 0))
		l.a.sent(want{ID: 100, Op: ib.WCRDMAWrite, Len: anyLen})
		if err := m.close(); err != nil {
			c.Fatal(err)
		}
		return m, m.Addr, m.RKey
	})},
	testCase{name: "remote/revoked-key-not-reused", run: keysNotReused},
	testCase{name: "remote/other-domain", run: remoteCases(func(c *C, l link) (*Mem, uint64, ib.RKey) {
		m := c.B.mem(do(c.B, opPD, none{}), 4096, accessAll)
		return m, m.Addr, m.RKey
	})},
	testCase{name: "remote/region-without-right", run: regionWithoutRight},
	testCase{name: "remote/qp-without-right", run: qpWithoutRight},
	testCase{name: "remote/long-write-half-outside", run: halfOutside},
	testCase{name: "remote/zero-based-region", run: zeroBased},
	testCase{name: "remote/read-only-region-is-not-written", run: readOnlyRegion},
)

var _ = addCases("local protection", 0,
	testCase{name: "local/send-bad-lkey", run: localSource(func(c *C, l link) ib.SGE { s := l.a.mem.sge(0, 64); s.LKey ^= 0x5500; return s })},
	testCase{name: "local/send-out-of-range", run: localSource(func(c *C, l link) ib.SGE {
		s := l.a.mem.sge(0, 64)
		s.Addr += uint64(l.a.mem.n) - 63
		return s
	})},
	testCase{name: "local/send-before-the-region", run: localSource(func(c *C, l link) ib.SGE { s := l.a.mem.sge(0, 64); s.Addr--; return s })},
	testCase{name: "local/send-address-wraps", run: localSource(func(c *C, l link) ib.SGE { s := l.a.mem.sge(0, 64); s.Addr = math.MaxUint64 - 8; return s })},
	testCase{name: "local/send-from-revoked", run: localSource(func(c *C, l link) ib.SGE {
		m := c.A.mem(c.A.pd, 4096, accessAll)
		if err := m.close(); err != nil {
			c.Fatal(err)
		}
		return m.sge(0, 64)
	})},
	testCase{name: "local/send-from-other-domain", run: localSource(func(c *C, l link) ib.SGE {
		return c.A.mem(do(c.A, opPD, none{}), 4096, accessAll).sge(0, 64)
	})},
	testCase{name: "local/read-into-read-only", run: readIntoReadOnly},
	testCase{name: "local/second-element-bad", run: secondElementBad},
	testCase{name: "local/receive-bad", run: receiveBad},
	testCase{name: "local/access-flags-checked", run: accessFlagsChecked},
)

var remoteOps = []ib.Opcode{ib.OpRDMAWrite, ib.OpRDMAWriteWithImm, ib.OpRDMARead, ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd}

func isAtomic(o ib.Opcode) bool { return o == ib.OpAtomicCmpSwap || o == ib.OpAtomicFetchAdd }

// hasOp reports whether the device has an operation.
func (c *C) hasOp(o ib.Opcode) bool {
	var needs ib.DeviceCaps
	switch o {
	case ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd:
		needs = ib.CapAtomic
	case ib.OpSendWithImm, ib.OpRDMAWriteWithImm:
		needs = ib.CapImm
	}
	return c.A.dev.Attr.Caps.Has(needs)
}

// remoteReq is a request of 16 bytes, 8 for atomics.
func remoteReq(id uint64, o ib.Opcode, local *Mem, addr uint64, key ib.RKey) ib.SendWR {
	n := 16
	if isAtomic(o) {
		n = 8
	}
	wr := wrOneSided(id, o, local.sges(0, n), addr, key)
	wr.CompareAdd, wr.Swap = 0xc5c5c5c5c5c5c5c5, 1 // it would swap what the canary has
	return wr
}

// remoteCases does every remote operation with the address and key that target makes, each on a new pair. Each must end
// with a remote access error, change nothing, and leave both QPs in error with everything behind it flushed. The memory that
// target returns is what must not change besides: that which the address is of, or which is near.
func remoteCases(target func(*C, link) (*Mem, uint64, ib.RKey)) func(*C) {
	return func(c *C) {
		for _, o := range remoteOps {
			if !c.hasOp(o) {
				continue
			}
			l := c.pair(ib.RC)
			m, addr, key := target(c, l)
			if isAtomic(o) && addr == l.b.mem.Addr+uint64(l.b.mem.n)-8 {
				addr += 8 // the word behind the last one
			}
			m.canary()
			l.remoteAccessError(c, o, addr, key, ib.WCRemoteAccessErr)
			if m != l.b.mem { // which has been looked at, and takes what is sent behind
				m.intact(fmt.Sprint("the memory that the address is of, ", o))
			}
		}
	}
}

// remoteAccessError posts o and checks everything that must follow from its refusal.
func (l link) remoteAccessError(c *C, o ib.Opcode, addr uint64, key ib.RKey, status ...ib.WCStatus) {
	c.Helper()
	l.a.mem.canary()
	l.b.mem.canary()
	l.b.recv(11, l.b.mem.sge(0, 64))
	l.b.recv(12, l.b.mem.sge(64, 64))
	l.a.recv(13, l.a.mem.sge(0, 64))
	l.a.post(remoteReq(1, o, l.a.mem, addr, key), wrSend(2, l.a.mem.sge(0, 8)), ib.SendWR{ID: 3, Opcode: ib.OpSend})
	if c.cmOnly() {
		l.connectionEnded(c, o)
		return
	}
	l.a.sentOneOf(1, status...)
	// Everything behind the failed request is flushed, the unsignalled one too (IBA 10.8.6), and so are the receives.
	l.a.flushed(l.a.scq, 2, 3)
	l.a.flushed(l.a.rcq, 13)
	l.a.inState(ib.Err)
	l.a.mem.intact(fmt.Sprint("initiator's memory, ", o))
	l.b.mem.intact(fmt.Sprint("target memory, ", o))
	// An R_Key violation is a class C error of the responder (IBA 9.9.3): its QP goes to the error state.
	l.b.inState(ib.Err)
	if o == ib.OpRDMAWriteWithImm {
		// Whether the refused request has taken the first receive is the device's choice.
		wcs := l.b.rcq.wait(2)
		if wcs[0].ID != 11 || wcs[0].Status == ib.WCSuccess || wcs[1].ID != 12 || wcs[1].Status != ib.WCFlushErr {
			c.Fatalf("receives after a refused %v: %s %s; want 11 and 12, both in error", o, showWC(wcs[0]), showWC(wcs[1]))
		}
	} else {
		l.b.flushed(l.b.rcq, 11, 12)
	}
	if c.B.dev.Provider == "rxe" || c.B.dev.Provider == "siw" {
		c.note("no event tells of an access error at the responder")
		return
	}
	if ev := c.B.eventOf(l.b.QPN, ib.EventQPAccessErr, ib.EventQPReqErr, ib.EventQPFatal); ev != ib.EventQPAccessErr {
		c.note("the responder's event is %q", ev)
	}
}

// connectionEnded checks what follows the refusal of request 1 of remoteAccessError over iWARP. The target ends the connection
// (siw_init_terminate in siw_qp_rx.c), and the initiator's kernel does not look which request that is about (siw_proc_terminate):
// those that had been sent have succeeded by then, the others are flushed.
func (l link) connectionEnded(c *C, o ib.Opcode) {
	c.Helper()
	l.a.inState(ib.Err)
	l.b.inState(ib.Err)
	// Those that are signalled complete in any case; the third need not, if it had been sent.
	wcs := l.a.scq.wait(2)
	for i, wc := range append(wcs, do(l.a.Side, opPoll, pollArgs{l.a.scq.H, 2, quiet})...) {
		switch {
		case wc.ID == 1 && wc.Status == ib.WCSuccess && o == ib.OpRDMARead:
			c.Errorf("a READ that was refused has succeeded")
		case wc.ID != uint64(i+1) || !slices.Contains([]ib.WCStatus{ib.WCSuccess, ib.WCFlushErr, ib.WCGeneralErr, ib.WCLocalQPOpErr}, wc.Status):
			c.Errorf("completion %d: %s", i, showWC(wc))
		}
	}
	l.a.flushed(l.a.rcq, 13)
	if o == ib.OpRDMARead { // the SENDs may come before the answer to it
		l.b.rcq.wait(2)
		l.a.mem.intact(fmt.Sprint("initiator's memory, ", o))
		return
	}
	l.b.flushed(l.b.rcq, 11, 12)
	l.a.mem.intact(fmt.Sprint("initiator's memory, ", o))
	l.b.mem.intact(fmt.Sprint("target memory, ", o))
}

// eventOf waits for one of the types of event of a QP.
func (s *Side) eventOf(qpn ib.QPN, types ...ib.EventType) ib.EventType {
	s.c.Helper()
	for range 64 {
		ev, err := call(s, opAsync, waitArgs{Wait: patience})
		if err != nil {
			s.c.Fatalf("%s: none of the events %q of QP %#x came: %v", s.name, types, qpn, err)
		}
		for _, t := range types {
			if ev.Type == t && ev.QPN == qpn {
				return t
			}
		}
		s.c.Logf("%s: event %q of QP %#x", s.name, ev.Type, ev.QPN)
	}
	s.c.Fatalf("%s: none of the events %q of QP %#x came", s.name, types, qpn)
	return 0
}

// A region's keys are not those of regions that were registered before it.
func keysNotReused(c *C) {
	l := c.pair(ib.RC)
	old := map[ib.RKey]bool{}
	var first *Mem
	for i := range 200 {
		m := c.B.mem(c.B.pd, 4096, accessAll)
		if old[m.RKey] {
			c.Fatalf("registration %d got rkey %#x, which was given out before", i, m.RKey)
		}
		old[m.RKey] = true
		if first == nil {
			first = m
		}
		if err := m.close(); err != nil {
			c.Fatal(err)
		}
	}
	live := c.B.mem(c.B.pd, 4096, accessAll)
	live.canary()
	l.remoteAccessError(c, ib.OpRDMAWrite, live.Addr, first.RKey, ib.WCRemoteAccessErr)
	live.intact("region whose neighbour's old key was used")
}

var rightFor = map[ib.Opcode]ib.Access{
	ib.OpRDMAWrite: ib.AccessRemoteWrite, ib.OpRDMAWriteWithImm: ib.AccessRemoteWrite, ib.OpRDMARead: ib.AccessRemoteRead,
	ib.OpAtomicCmpSwap: ib.AccessRemoteAtomic, ib.OpAtomicFetchAdd: ib.AccessRemoteAtomic,
}

func regionWithoutRight(c *C) {
	for _, o := range remoteOps {
		if !c.hasOp(o) {
			continue
		}
		if o == ib.OpRDMARead && c.B.dev.Provider == "siw" {
			c.note("a region without the right to be read is read all the same") // siw_qp_sq_proc_tx asks siw_check_sgl_tx for no right
			continue
		}
		for _, slice := range []bool{false, true} {
			l := c.pair(ib.RC)
			m := &Mem{c.B, do(c.B, opMem, memArgs{PD: c.B.pd, Size: 4096, Access: accessAll &^ rightFor[o], Slice: slice}), 4096}
			m.canary()
			l.remoteAccessError(c, o, m.Addr, m.RKey, ib.WCRemoteAccessErr)
			m.intact(fmt.Sprintf("region without the right for %v", o))
		}
	}
}

// A QP that does not allow the operation: IBA 11.6.2 lists "operation not supported by this receive queue" under remote
// invalid request, and so does rxe; other devices call it a remote access error. The result is the same.
func qpWithoutRight(c *C) {
	for _, o := range remoteOps {
		if !c.hasOp(o) {
			continue
		}
		l := c.pair(ib.RC, func(p *linkOpts) { p.access = ib.AccessRemote &^ rightFor[o] })
		l.remoteAccessError(c, o, l.b.mem.Addr, l.b.mem.RKey, ib.WCRemoteAccessErr, ib.WCRemoteInvalidReqErr)
	}
}

// The whole range is checked before the first byte is written.
func halfOutside(c *C) {
	l := c.pair(ib.RC, bigMem)
	l.b.mem.canary()
	n := 1 << 20
	l.a.post(wrWrite(1, l.a.mem.sges(0, n), l.b.mem, l.b.mem.n-n+1))
	l.a.sent(want{ID: 1, Status: ib.WCRemoteAccessErr})
	l.b.mem.intact("WRITE of which the last byte is outside")
}

// Right after a region that is only readable was read, a WRITE to it fails.
func readOnlyRegion(c *C) {
	l := c.pair(ib.RC)
	m := c.B.mem(c.B.pd, 4096, ib.AccessRemoteRead)
	m.canary()
	l.a.post(wrRead(1, l.a.mem.sges(0, 4096), m, 0))
	l.a.sent(want{ID: 1, Op: ib.WCRDMARead, Len: 4096})
	l.a.mem.is("READ of a read-only region", 0, 4096, canaryByte)
	l.remoteAccessError(c, ib.OpRDMAWrite, m.Addr, m.RKey, ib.WCRemoteAccessErr)
	m.intact("read-only region")
}

// localSource sends from the element that bad makes: a local protection error, and the peer sees nothing of it.
func localSource(bad func(*C, link) ib.SGE) func(*C) {
	return func(c *C) {
		for _, o := range []ib.Opcode{ib.OpSend, ib.OpRDMAWrite} {
			l := c.pair(ib.RC)
			sge := bad(c, l)
			l.b.mem.canary()
			l.b.recv(7, l.b.mem.sge(0, 100))
			wr := wrOneSided(1, o, []ib.SGE{sge}, l.b.mem.Addr+1000, l.b.mem.RKey)
			l.a.post(wr, wrSend(2))
			l.a.sent(want{ID: 1, Status: ib.WCLocalProtErr}, want{ID: 2, Status: ib.WCFlushErr})
			l.a.inState(ib.Err)
			l.b.mem.intact(fmt.Sprintf("%v from bad memory", o))
			if c.cmOnly() { // the end of one QP is that of the connection
				l.b.flushed(l.b.rcq, 7)
				continue
			}
			l.b.rcq.empty("nothing was sent")
			l.b.staysIn(ib.RTS)
		}
	}
}

func readIntoReadOnly(c *C) {
	for _, o := range []ib.Opcode{ib.OpRDMARead, ib.OpAtomicFetchAdd} {
		if !c.hasOp(o) {
			continue
		}
		for _, slice := range []bool{false, true} {
			l := c.pair(ib.RC)
			m := &Mem{c.A, do(c.A, opMem, memArgs{PD: c.A.pd, Size: 4096, Slice: slice}), 4096}
			m.canary()
			wr := remoteReq(1, o, m, l.b.mem.Addr, l.b.mem.RKey)
			if c.cmOnly() { // what follows may be sent before
				l.a.post(wr)
				l.a.sent(want{ID: 1, Status: ib.WCLocalProtErr})
			} else {
				l.a.post(wr, wrSend(2))
				l.a.sent(want{ID: 1, Status: ib.WCLocalProtErr}, want{ID: 2, Status: ib.WCFlushErr})
			}
			l.a.inState(ib.Err)
			m.intact("memory without local write")
		}
	}
}

func secondElementBad(c *C) {
	l := c.pair(ib.RC)
	if l.a.Cap.MaxSendSGE < 2 {
		c.Skip("the device has one SGE")
	}
	bad := l.a.mem.sge(0, 8)
	bad.LKey ^= 0x3300
	l.b.recv(7, l.b.mem.sge(0, 100))
	l.a.post(wrSend(1, l.a.mem.sge(0, 8), bad))
	l.a.sent(want{ID: 1, Status: ib.WCLocalProtErr})
	l.a.inState(ib.Err)
	if c.cmOnly() {
		l.b.flushed(l.b.rcq, 7)
		return
	}
	l.b.rcq.empty("nothing was sent")
}

// A receive buffer that cannot be written: the receiver gets a local protection error, and the sender a remote operation
// error (IBA 9.9.3, class A of the responder). rxe reports the receive as a local QP operation error.
func receiveBad(c *C) {
	for name, bad := range inOrder(map[string]func(l link) (*Mem, ib.SGE){
		"bad lkey":     func(l link) (*Mem, ib.SGE) { s := l.b.mem.sge(0, 64); s.LKey ^= 0x5500; return l.b.mem, s },
		"out of range": func(l link) (*Mem, ib.SGE) { return l.b.mem, l.b.mem.sge(l.b.mem.n-32, 64) },
		"read only": func(l link) (*Mem, ib.SGE) {
			m := c.B.mem(c.B.pd, 4096, 0)
			return m, m.sge(0, 64)
		},
		"revoked": func(l link) (*Mem, ib.SGE) {
			m := c.B.mem(c.B.pd, 4096, accessAll)
			if err := m.close(); err != nil {
				c.Fatal(err)
			}
			return l.b.mem, m.sge(0, 64) // its own memory has gone with it
		},
		"other domain": func(l link) (*Mem, ib.SGE) {
			m := c.B.mem(do(c.B, opPD, none{}), 4096, accessAll)
			return m, m.sge(0, 64)
		},
	}) {
		c.Logf("receive buffer: %s", name)
		l := c.pair(ib.RC)
		m, sge := bad(l)
		l.b.mem.canary()
		m.canary()
		l.b.recv(7, sge)
		l.b.recv(8, l.b.mem.sge(0, 64))
		l.a.post(wrSend(1, l.a.mem.sge(0, 64)), wrSend(2))
		l.a.sent(want{ID: 1, Status: ib.WCRemoteOpErr}, want{ID: 2, Status: ib.WCFlushErr})
		l.b.receivedOneOf(7, ib.WCLocalProtErr, ib.WCLocalQPOpErr)
		l.b.flushed(l.b.rcq, 8)
		l.a.inState(ib.Err)
		l.b.inState(ib.Err)
		l.b.mem.intact("after a receive into bad memory")
		m.intact("the memory that the receive names")
	}
}

// Rights that do not go together are refused at registration (IBA 10.6.3.1).
func accessFlagsChecked(c *C) {
	for _, a := range []ib.Access{ib.AccessRemoteWrite, ib.AccessRemoteAtomic, ib.AccessRemoteWrite | ib.AccessRemoteRead, 1 << 30} {
		for _, slice := range []bool{false, true} {
			if m, err := call(c.A, opMem, memArgs{PD: c.A.pd, Size: 4096, Access: a, Slice: slice}); err == nil {
				c.A.mustClose(m.H)
				c.Errorf("a region with the rights %v was registered", a)
			}
		}
	}
}

// The addresses of a zero-based region are offsets (IBA 10.6.3.2).
func zeroBased(c *C) {
	i, err := call(c.B, opMem, memArgs{PD: c.B.pd, Size: 8192, Access: accessAll | ib.AccessZeroBased})
	if err != nil {
		c.Log(err)
		c.Skip("the device has no zero-based regions")
	}
	m := &Mem{c.B, i, 8192}
	if m.Addr != 0 {
		c.Errorf("a zero-based region starts at %#x", m.Addr)
	}
	l := c.pair(ib.RC)
	m.canary()
	l.a.mem.fill(0, 1000, 6)
	l.a.post(wrWrite(1, l.a.mem.sges(0, 1000), m, 100), wrRead(2, l.a.mem.sges(2000, 1000), m, 100))
	l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen}, want{ID: 2, Op: ib.WCRDMARead, Len: 1000})
	m.has("WRITE to a zero-based region", 100, 1000, 6)
	m.intactAround("WRITE to a zero-based region", 100, 1000)
	l.a.mem.has("READ of a zero-based region", 2000, 1000, 6)
	// It is a buffer like any other.
	l.b.recv(3, m.sge(4096, 1000))
	l.a.post(wrSend(4, l.a.mem.sge(0, 1000)))
	l.a.sent(want{ID: 4, Op: ib.WCSend, Len: anyLen})
	l.b.received(want{ID: 3, Op: ib.WCRecv, Len: 1000})
	m.has("SEND to a zero-based region", 4096, 1000, 6)
	l.b.post(wrWrite(5, m.sges(100, 1000), l.a.mem, 30000))
	l.b.sent(want{ID: 5, Op: ib.WCRDMAWrite, Len: anyLen})
	l.a.mem.has("WRITE from a zero-based region", 30000, 1000, 6)
	l.remoteAccessError(c, ib.OpRDMAWrite, 8192-8, m.RKey, ib.WCRemoteAccessErr)
}
