package conformance

import (
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var _ = addCases("memory windows, type 2", ib.CapMW2,
	testCase{name: "mw/bind-and-use", run: func(c *C) { mwUse(c) }},
	testCase{name: "mw/bounds", run: mwBounds},
	testCase{name: "mw/local-invalidate", run: mwLocalInv},
	testCase{name: "mw/send-with-invalidate", run: mwSendInv},
	testCase{name: "mw/send-with-invalidate-wrong-key", run: mwSendInvWrong},
	testCase{name: "mw/other-qp", run: mwOtherQP},
	testCase{name: "mw/rights", run: mwRights},
	testCase{name: "mw/bind-refused", run: mwBindRefused},
	testCase{name: "mw/bind-again", run: mwBindAgain},
	testCase{name: "mw/region-in-use", run: mwRegionInUse},
	testCase{name: "mw/closed", run: mwClosed},
	testCase{name: "mw/slice", run: func(c *C) { mwUse(c, sliceMem) }},
	testCase{name: "mw/unsignalled-bind-before-send", run: mwUnsignalled},
)

const accessBind = accessAll | ib.AccessMWBind

func bindable(o *linkOpts) { o.memAccess = accessBind }

// bind binds a window of B's QP to B's memory and returns it as memory that A can use: an address and a key.
func (e *end) bind(w handle, m *Mem, off, n int, access ib.Access) *Mem {
	e.c.Helper()
	wr := do(e.Side, opBindWR, bindArgs{w, m.H, off, n, access})
	wr.ID, wr.Flags = 1000, ib.SendSignaled
	e.post(wr)
	e.sent(want{ID: 1000, Op: ib.WCBindMW, Len: anyLen})
	return e.windowMem(w, m, off, n)
}

func (e *end) windowMem(w handle, m *Mem, off, n int) *Mem {
	e.c.Helper()
	return &Mem{e.Side, memInfo{H: m.H, Addr: m.Addr + uint64(off), RKey: do(e.Side, opWindowRKey, w)}, n}
}

func (e *end) invalidate(key ib.RKey) {
	e.c.Helper()
	e.post(ib.SendWR{ID: 1001, Opcode: ib.OpLocalInv, Flags: ib.SendSignaled, InvalidateRKey: key})
	e.sent(want{ID: 1001, Op: ib.WCLocalInv, Len: anyLen})
}

func mwUse(c *C, changes ...func(*linkOpts)) {
	l := c.pair(ib.RC, append(changes, bindable)...)
	w := do(c.B, opWindow, c.B.pd)
	const off, n = 4096, 8192
	win := l.b.bind(w, l.b.mem, off, n, ib.AccessRemote)
	if win.RKey == l.b.mem.RKey {
		c.Fatal("the window has the region's key")
	}
	l.b.mem.canary()
	l.a.mem.fill(0, 1000, 3)
	l.a.post(wrWrite(1, l.a.mem.sges(0, 1000), win, 8))
	l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen})
	l.b.mem.has("WRITE by a window", off+8, 1000, 3)
	l.b.mem.intactAround("WRITE by a window", off+8, 1000)
	l.a.post(wrRead(2, l.a.mem.sges(2000, 1000), win, 8))
	l.a.sent(want{ID: 2, Op: ib.WCRDMARead, Len: 1000})
	l.a.mem.has("READ by a window", 2000, 1000, 3)
	if c.A.dev.Attr.Caps.Has(ib.CapAtomic) {
		l.b.mem.write(off, wordBytes(41))
		l.a.post(wrAdd(3, l.a.mem.sges(0, 8), win, 0, 1))
		l.a.sent(want{ID: 3, Op: ib.WCFetchAdd, Len: 8})
		if v := word(l.b.mem.read(off, 8)); v != 42 {
			c.Errorf("atomic by a window: %d, want 42", v)
		}
	}
	// The region's own key works as before.
	l.a.post(wrWrite(4, l.a.mem.sges(0, 8), l.b.mem, 0))
	l.a.sent(want{ID: 4, Op: ib.WCRDMAWrite, Len: anyLen})
	l.b.invalidate(win.RKey)
}

func mwBounds(c *C) {
	const off, n = 4096, 512
	for _, at := range []int{-1, n - 15, n, -4096, 60000} {
		l := c.pair(ib.RC, bindable)
		w := do(c.B, opWindow, c.B.pd)
		win := l.b.bind(w, l.b.mem, off, n, ib.AccessRemote)
		l.remoteAccessError(c, ib.OpRDMAWrite, win.Addr+uint64(at), win.RKey, ib.WCRemoteAccessErr)
	}
}

func mwLocalInv(c *C) {
	for _, o := range remoteOps {
		if !c.hasOp(o) {
			continue
		}
		l := c.pair(ib.RC, bindable)
		w := do(c.B, opWindow, c.B.pd)
		win := l.b.bind(w, l.b.mem, 0, 4096, ib.AccessRemote)
		l.b.invalidate(win.RKey)
		// It can be bound again, with another key.
		again := l.b.bind(w, l.b.mem, 8192, 4096, ib.AccessRemote)
		if again.RKey == win.RKey {
			c.Fatal("a window that is bound again has the same key")
		}
		l.a.post(wrWrite(1, l.a.mem.sges(0, 64), again, 0))
		l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen})
		l.remoteAccessError(c, o, win.Addr, win.RKey, ib.WCRemoteAccessErr)
	}
}

func mwSendInv(c *C) {
	l := c.pair(ib.RC, bindable)
	w := do(c.B, opWindow, c.B.pd)
	for round := range 5 {
		win := l.b.bind(w, l.b.mem, 0, 4096, ib.AccessRemote)
		l.b.recv(7, l.b.mem.sge(8192, 64))
		send := wrSend(2, l.a.mem.sge(0, 16))
		send.Opcode, send.InvalidateRKey = ib.OpSendWithInv, win.RKey
		l.a.post(wrWrite(1, l.a.mem.sges(0, 64), win, 0), send)
		l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen}, want{ID: 2, Op: ib.WCSend, Len: anyLen})
		wc := l.b.received(want{ID: 7, Op: ib.WCRecv, Len: 16, Flags: ib.WCWithInv})[0]
		if wc.InvalidatedRKey != win.RKey {
			c.Fatalf("completion says that %#x was invalidated, want %#x", wc.InvalidatedRKey, win.RKey)
		}
		if round == 4 {
			l.remoteAccessError(c, ib.OpRDMARead, win.Addr, win.RKey, ib.WCRemoteAccessErr)
		}
	}
}

// SEND with invalidate of a key that cannot be invalidated fails at the responder: the receive ends with an error, the
// QP is in error, and the key still works for whoever may use it. Whether the requester is told is not agreed upon: by
// IBA 9.9.3 the error is of class J, found when the request was accepted already; rxe ends the receive with remote invalid
// request and does not acknowledge; others answer with a remote access error.
func mwSendInvWrong(c *C) {
	var m link
	var win *Mem
	for name, key := range inOrder(map[string]func(l link) ib.RKey{
		"no key":    func(l link) ib.RKey { return 0x12345600 ^ l.b.mem.RKey },
		"a region":  func(l link) ib.RKey { return l.b.mem.RKey },
		"not bound": func(l link) ib.RKey { return do(c.B, opWindowRKey, do(c.B, opWindow, c.B.pd)) },
		"another QP's": func(l link) ib.RKey {
			m = c.pair(ib.RC, bindable)
			win = m.b.bind(do(c.B, opWindow, c.B.pd), m.b.mem, 0, 64, ib.AccessRemoteRead)
			return win.RKey
		},
	}) {
		l := c.pair(ib.RC, func(o *linkOpts) { bindable(o); o.retry = 1 })
		other := c.pair(ib.RC)
		k := key(l)
		l.b.recv(7, l.b.mem.sge(8192, 64))
		l.b.recv(8, l.b.mem.sge(8192, 64))
		send := wrSend(2, l.a.mem.sge(0, 16))
		send.Opcode, send.InvalidateRKey = ib.OpSendWithInv, k
		l.a.post(send)
		c.note("SEND with invalidate of %s: the sender's request ends with %q", name,
			l.a.sentOneOf(2, ib.WCRemoteAccessErr, ib.WCRemoteInvalidReqErr, ib.WCRemoteOpErr, ib.WCRetryExceeded, ib.WCSuccess))
		if wc := l.b.rcq.wait(1)[0]; wc.ID != 7 || wc.Status == ib.WCSuccess {
			c.Errorf("invalidate of %s: receive completion %s, want number 7 with an error", name, showWC(wc))
			continue
		}
		l.b.flushed(l.b.rcq, 8)
		l.b.inState(ib.Err)
		switch name {
		case "a region":
			other.a.post(wrRead(3, other.a.mem.sges(0, 8), l.b.mem, 0))
			other.a.sent(want{ID: 3, Op: ib.WCRDMARead, Len: 8})
		case "another QP's":
			m.a.post(wrRead(3, m.a.mem.sges(0, 8), win, 0))
			m.a.sent(want{ID: 3, Op: ib.WCRDMARead, Len: 8})
		}
	}
}

// A type 2 window belongs to the QP that bound it (IBA 10.6.7.2.3).
func mwOtherQP(c *C) {
	l, m := c.pair(ib.RC, bindable), c.pair(ib.RC, bindable)
	w := do(c.B, opWindow, c.B.pd)
	win := l.b.bind(w, l.b.mem, 0, 4096, ib.AccessRemote)
	l.b.mem.canary()
	m.remoteAccessError(c, ib.OpRDMAWrite, win.Addr, win.RKey, ib.WCRemoteAccessErr)
	l.b.mem.intact("window of another QP")
	l.alive(c)
	l.a.post(wrWrite(1, l.a.mem.sges(0, 64), win, 0))
	l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen})
}

func mwRights(c *C) {
	for _, o := range remoteOps {
		if !c.hasOp(o) {
			continue
		}
		l := c.pair(ib.RC, bindable)
		w := do(c.B, opWindow, c.B.pd)
		win := l.b.bind(w, l.b.mem, 0, 4096, ib.AccessRemote&^rightFor[o])
		l.remoteAccessError(c, o, win.Addr, win.RKey, ib.WCRemoteAccessErr)
	}
	// A window's rights are its own: the region need not be open to peers (IBA 10.6.7.2.3).
	l := c.pair(ib.RC)
	m := c.B.mem(c.B.pd, 4096, ib.AccessLocalWrite|ib.AccessMWBind)
	w := do(c.B, opWindow, c.B.pd)
	win := l.b.bind(w, m, 0, 4096, ib.AccessRemoteWrite|ib.AccessRemoteRead)
	l.a.post(wrWrite(1, l.a.mem.sges(0, 64), win, 0), wrRead(2, l.a.mem.sges(100, 64), win, 0))
	l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen}, want{ID: 2, Op: ib.WCRDMARead, Len: 64})
	m.canary()
	l.remoteAccessError(c, ib.OpRDMAWrite, m.Addr, m.RKey, ib.WCRemoteAccessErr)
	m.intact("region that is open by a window only")
}

// Binds that give what the region does not have (IBA 10.6.7.2.6, C10-72 to C10-75).
func mwBindRefused(c *C) {
	for name, f := range inOrder(map[string]func(l link, w handle) ib.SendWR{
		"a region without bind right": func(l link, w handle) ib.SendWR {
			m := c.B.mem(c.B.pd, 4096, accessAll)
			return do(c.B, opBindWR, bindArgs{w, m.H, 0, 64, ib.AccessRemoteRead})
		},
		"remote write without local write": func(l link, w handle) ib.SendWR {
			m := c.B.mem(c.B.pd, 4096, ib.AccessRemoteRead|ib.AccessMWBind)
			return do(c.B, opBindWR, bindArgs{w, m.H, 0, 64, ib.AccessRemoteWrite})
		},
		"remote atomic without local write": func(l link, w handle) ib.SendWR {
			m := c.B.mem(c.B.pd, 4096, ib.AccessRemoteRead|ib.AccessMWBind)
			return do(c.B, opBindWR, bindArgs{w, m.H, 0, 64, ib.AccessRemoteAtomic})
		},
		"more than the region": func(l link, w handle) ib.SendWR {
			wr := do(c.B, opBindWR, bindArgs{w, l.b.mem.H, 0, 64, ib.AccessRemoteRead})
			wr.Bind.Length = uint64(l.b.mem.n) + 1
			return wr
		},
		"before the region": func(l link, w handle) ib.SendWR {
			wr := do(c.B, opBindWR, bindArgs{w, l.b.mem.H, 0, 64, ib.AccessRemoteRead})
			wr.Bind.Addr -= 64
			return wr
		},
		"a region of another domain": func(l link, w handle) ib.SendWR {
			m := c.B.mem(do(c.B, opPD, none{}), 4096, accessBind)
			return do(c.B, opBindWR, bindArgs{w, m.H, 0, 64, ib.AccessRemoteRead})
		},
		"a wrong lkey": func(l link, w handle) ib.SendWR {
			wr := do(c.B, opBindWR, bindArgs{w, l.b.mem.H, 0, 64, ib.AccessRemoteRead})
			wr.Bind.MRLKey ^= 0x4400
			return wr
		},
		"a key that is not the window's": func(l link, w handle) ib.SendWR {
			wr := do(c.B, opBindWR, bindArgs{w, l.b.mem.H, 0, 64, ib.AccessRemoteRead})
			wr.Bind.RKey ^= 0x4400
			return wr
		},
		"a window that is not there": func(l link, w handle) ib.SendWR {
			wr := do(c.B, opBindWR, bindArgs{w, l.b.mem.H, 0, 64, ib.AccessRemoteRead})
			wr.Bind.Window ^= 0x7777
			wr.Bind.RKey ^= 0x777700
			return wr
		},
	}) {
		l := c.pair(ib.RC, bindable)
		w := do(c.B, opWindow, c.B.pd)
		wr := f(l, w)
		wr.ID, wr.Flags = 5, ib.SendSignaled
		c.Log("bind to ", name)
		if !c.refused(l.b.QP, wr, ib.WCMWBindErr, ib.WCLocalProtErr, ib.WCLocalQPOpErr) {
			l.b.inState(ib.Err) // so nobody can use the window: it would be this QP's
			continue
		}
		c.note("a bind to %s is refused by PostSend", name)
		l.a.post(remoteReq(1, ib.OpRDMARead, l.a.mem, wr.Bind.Addr, wr.Bind.RKey))
		l.a.sent(want{ID: 1, Status: ib.WCRemoteAccessErr})
	}
}

// A type 2 window that is bound must be invalidated before it can be bound again.
func mwBindAgain(c *C) {
	l := c.pair(ib.RC, bindable)
	w := do(c.B, opWindow, c.B.pd)
	win := l.b.bind(w, l.b.mem, 0, 4096, ib.AccessRemoteRead)
	wr := do(c.B, opBindWR, bindArgs{w, l.b.mem.H, 8192, 64, ib.AccessRemoteRead})
	wr.ID, wr.Flags = 5, ib.SendSignaled
	if !c.refused(l.b.QP, wr, ib.WCMWBindErr, ib.WCLocalProtErr, ib.WCLocalQPOpErr) {
		l.b.inState(ib.Err)
		return
	}
	l.a.post(wrRead(1, l.a.mem.sges(0, 64), win, 0))
	l.a.sent(want{ID: 1, Op: ib.WCRDMARead, Len: 64})
	l.a.post(remoteReq(2, ib.OpRDMARead, l.a.mem, wr.Bind.Addr, wr.Bind.RKey))
	l.a.sent(want{ID: 2, Status: ib.WCRemoteAccessErr})
}

// A region cannot go while a window is bound to it; after the invalidation it can.
func mwRegionInUse(c *C) {
	l := c.pair(ib.RC, bindable)
	w := do(c.B, opWindow, c.B.pd)
	m := c.B.mem(c.B.pd, 4096, accessBind)
	win := l.b.bind(w, m, 0, 4096, ib.AccessRemoteWrite)
	if err := m.close(); !errors.Is(err, verbs.ErrBusy) {
		c.Fatalf("close of a region with a window: %v, want ErrBusy", err)
	}
	l.a.post(wrWrite(1, l.a.mem.sges(0, 64), win, 0))
	l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen})
	l.b.invalidate(win.RKey)
	if err := m.close(); err != nil {
		c.Fatal(err)
	}
}

// A window that is closed is gone, bound or not.
func mwClosed(c *C) {
	l := c.pair(ib.RC, bindable)
	w := do(c.B, opWindow, c.B.pd)
	m := c.B.mem(c.B.pd, 4096, accessBind)
	m.canary()
	win := l.b.bind(w, m, 0, 4096, ib.AccessRemoteWrite)
	c.B.mustClose(w)
	l.remoteAccessError(c, ib.OpRDMAWrite, win.Addr, win.RKey, ib.WCRemoteAccessErr)
	m.intact("a closed window")
	if err := m.close(); err != nil {
		c.Fatal(err)
	}
}

// Bind, then a SEND that tells the key: the peer may use it at once, because requests of a QP are done in order.
func mwUnsignalled(c *C) {
	l := c.pair(ib.RC, bindable)
	w := do(c.B, opWindow, c.B.pd)
	for i := range 20 {
		wr := do(c.B, opBindWR, bindArgs{w, l.b.mem.H, 64 * i, 64, ib.AccessRemoteWrite})
		l.a.recv(1, l.a.mem.sge(0, 8))
		l.b.post(wr, wrSend(2, l.b.mem.sge(0, 8)))
		l.a.received(want{ID: 1, Op: ib.WCRecv, Len: 8})
		win := l.b.windowMem(w, l.b.mem, 64*i, 64)
		l.a.mem.set(0, 64, byte(i))
		l.a.post(wrWrite(3, l.a.mem.sges(0, 64), win, 0))
		l.a.sent(want{ID: 3, Op: ib.WCRDMAWrite, Len: anyLen})
		l.b.mem.is(fmt.Sprint("window ", i), 64*i, 64, byte(i))
		l.b.sent(want{ID: 2, Op: ib.WCSend, Len: anyLen})
		l.b.invalidate(win.RKey)
	}
}
