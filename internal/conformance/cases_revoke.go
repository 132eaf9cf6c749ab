package conformance

import (
	"errors"
	"time"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var _ = addCases("withdrawal under load", 0,
	testCase{name: "revoke/slice-region-under-writes", run: func(c *C) { revokeRegion(c, true) }},
	testCase{name: "revoke/region-under-writes", run: func(c *C) { revokeRegion(c, false) }},
	testCase{name: "revoke/window-under-writes", needs: ib.CapMW2, run: revokeWindow},
	testCase{name: "revoke/right-under-writes", run: revokeRight},
	testCase{name: "revoke/receives-under-sends", run: revokeReceives},
	testCase{name: "revoke/qp-destroyed-under-sends", run: revokeQP},
	testCase{name: "revoke/sink-of-reads", run: revokeSink},
	testCase{name: "revoke/reset-under-writes", run: revokeReset},
)

var _ = addCases("concurrent use", 0,
	testCase{name: "concurrent/posters-and-pollers", run: concurrentStorm},
	testCase{name: "concurrent/both-directions", run: concurrentDirections},
	testCase{name: "concurrent/close-while-used", run: closeWhileUsed},
	testCase{name: "concurrent/many-contexts", run: manyContexts},
)

var _ = addCases("reachability", 0,
	testCase{name: "reach/path-is-told", run: reach},
)

// underLoad lets A repeat op against target while during runs, and returns the completions that ended it.
func (l link) underLoad(c *C, wrs []ib.SendWR, during func()) []ib.WC {
	c.severalGoroutines()
	c.Helper()
	done := make(chan none)
	var got pumpResult
	var err error
	go func() {
		defer close(done)
		got, err = call(l.a.Side, opPump, pumpArgs{QP: l.a.H, CQ: l.a.scq.H, WRs: wrs})
	}()
	c.sleep(time.Duration(1+c.rand().IntN(4)) * time.Millisecond)
	during()
	<-done
	if err != nil {
		c.Fatalf("after %d rounds: %v", got.Rounds, err)
	}
	c.Logf("%d rounds", got.Rounds)
	return got.Bad
}

// endedWith checks that requests succeeded, then one failed with one of the statuses, then all were flushed.
func endedWith(c *C, wcs []ib.WC, status ...ib.WCStatus) {
	c.Helper()
	i := 0
	for i < len(wcs) && wcs[i].Status == ib.WCSuccess {
		i++
	}
	if i == len(wcs) {
		c.Fatalf("no request failed: %+v", wcs)
	}
	ok := c.cmOnly() && (wcs[i].Status == ib.WCFlushErr || wcs[i].Status == ib.WCLocalQPOpErr) // the connection ends, and no more is said
	for _, s := range status {
		ok = ok || wcs[i].Status == s
	}
	if !ok {
		c.Errorf("the first request to fail ends with %q, want one of %q", wcs[i].Status, status)
	}
	for _, wc := range wcs[i+1:] {
		if wc.Status != ib.WCFlushErr {
			c.Errorf("a request behind it ends with %q, want flushed", wc.Status)
		}
	}
}

// stream returns requests of one kind that both ends of l can repeat for ever, from x to y.
func stream(x, y *end, op ib.Opcode) (wrs []ib.SendWR) {
	for i := range 16 {
		id := uint64(i)
		switch op {
		case ib.OpSend:
			wrs = append(wrs, wrSend(id, x.mem.sge(0, 1000)))
		case ib.OpAtomicFetchAdd:
			wrs = append(wrs, wrAdd(id, x.mem.sges(8*i, 8), y.mem, 8*i, 1))
		default:
			wrs = append(wrs, wrOneSided(id, op, x.mem.sges(0, 3000), y.mem.Addr, y.mem.RKey))
		}
	}
	return wrs
}

// startReceiving lets y take messages for ever, in the background. The channel tells when it has ended.
func (c *C) startReceiving(y *end, ch handle) chan error {
	c.severalGoroutines()
	c.Helper()
	done := make(chan error, 1)
	for i := range 64 {
		y.recv(uint64(i), y.mem.sge(32<<10, 1000))
	}
	go func() {
		_, err := call(y.Side, opDrain, drainArgs{Channel: ch, CQs: []handle{y.rcq.H}, N: 1 << 40, QP: y.H, Recv: ib.RecvWR{SGEs: y.mem.sges(32<<10, 1000)}})
		done <- err
	}()
	return done
}

func writes(x *end, to *Mem, n int) (wrs []ib.SendWR) {
	for i := range 16 {
		wrs = append(wrs, wrWrite(uint64(i), x.mem.sges(0, n), to, 0))
	}
	return wrs
}

// When Close of a region has returned, nobody writes to its memory any more, whatever was under way.
func revokeRegion(c *C, slice bool) {
	for range 5 {
		l := c.pair(ib.RC)
		m := &Mem{c.B, do(c.B, opMem, memArgs{PD: c.B.pd, Size: 16384, Access: accessAll, Slice: slice}), 16384}
		bad := l.underLoad(c, writes(l.a, m, 16384), func() {
			if err := m.close(); err != nil {
				c.Error(err)
			}
			if slice {
				m.canary()
				c.sleep(quiet / 3)
				m.intact("memory of a closed region")
			}
		})
		endedWith(c, bad, ib.WCRemoteAccessErr)
		l.b.inState(ib.Err)
	}
}

func revokeWindow(c *C) {
	for range 5 {
		l := c.pair(ib.RC, bindable)
		w := do(c.B, opWindow, c.B.pd)
		win := l.b.bind(w, l.b.mem, 0, 16384, ib.AccessRemoteWrite)
		bad := l.underLoad(c, writes(l.a, win, 16384), func() {
			l.b.invalidate(win.RKey)
			l.b.mem.canary()
			c.sleep(quiet / 3)
			l.b.mem.intact("memory behind a window that was invalidated")
		})
		endedWith(c, bad, ib.WCRemoteAccessErr)
	}
}

func revokeRight(c *C) {
	l := c.pair(ib.RC)
	bad := l.underLoad(c, writes(l.a, l.b.mem, 16384), func() {
		l.b.modify(ib.QPAttr{State: ib.RTS, Access: ib.AccessRemoteRead}, ib.AttrState|ib.AttrAccess)
	})
	endedWith(c, bad, ib.WCRemoteAccessErr, ib.WCRemoteInvalidReqErr)
	l.b.inState(ib.Err)
	l.b.mem.canary()
	c.sleep(quiet / 3)
	l.b.mem.intact("memory of a QP in error")
}

// sendsInto lets A send into receives of B, which are posted again, until during has ended it.
func (l link) sendsInto(c *C, ch handle, during func()) []ib.WC {
	c.Helper()
	receiving := c.startReceiving(l.b, ch)
	bad := l.underLoad(c, stream(l.a, l.b, ib.OpSend), during)
	<-receiving
	return bad
}

func (c *C) eventPairFor(changes ...func(*linkOpts)) (link, handle) {
	ch := do(c.B, opChannel, none{})
	rcq := c.B.cqOn(256, ch)
	return c.pair(ib.RC, append(changes, func(o *linkOpts) { o.rcqB, o.retry = rcq, 1 })...), ch
}

// When a receive was flushed, its buffer is the owner's again.
func revokeReceives(c *C) {
	for range 3 {
		l, ch := c.eventPairFor()
		bad := l.sendsInto(c, ch, func() {
			l.b.to(ib.Err)
			// Modify has returned; those receives that were not used complete as flushed, at the latest when polled for.
			c.sleep(quiet)
			l.b.mem.canary()
			c.sleep(quiet / 3)
			l.b.mem.intact("receive buffers of a QP in error")
		})
		endedWith(c, bad, ib.WCRetryExceeded, ib.WCFlushErr)
	}
}

func revokeQP(c *C) {
	for range 3 {
		l, ch := c.eventPairFor()
		receiving := c.startReceiving(l.b, ch)
		bad := l.underLoad(c, stream(l.a, l.b, ib.OpSend), func() {
			do(c.B, opCloseTwice, l.b.H)
			l.b.mem.canary()
			c.sleep(quiet / 3)
			l.b.mem.intact("receive buffers of a destroyed QP")
			if err := l.b.mem.close(); err != nil {
				c.Error(err)
			}
			// The receiver's loop sleeps in vain now: its channel ends it.
			do(c.B, opCloseTwice, l.b.rcq.H)
			do(c.B, opCloseTwice, ch)
		})
		if err := <-receiving; err == nil && !c.cmOnly() { // a connection is closed before its QP, and that flushes
			c.Error("the receiver's loop ended by itself")
		}
		endedWith(c, bad, ib.WCRetryExceeded, ib.WCFlushErr)
	}
}

// A READ that was flushed does not write to its sink any more.
func revokeSink(c *C) {
	for range 5 {
		l := c.pair(ib.RC)
		l.b.mem.fill(0, 16384, 7)
		var wrs []ib.SendWR
		for i := range 16 {
			wrs = append(wrs, wrRead(uint64(i), l.a.mem.sges(0, 16384), l.b.mem, 0))
		}
		bad := l.underLoad(c, wrs, func() { l.a.to(ib.Err) })
		endedWith(c, bad, ib.WCFlushErr)
		l.a.mem.canary()
		c.sleep(quiet / 3)
		l.a.mem.intact("sink of READs that were flushed")
	}
}

func revokeReset(c *C) {
	l := c.pair(ib.RC, func(o *linkOpts) { o.retry = 1 })
	bad := l.underLoad(c, writes(l.a, l.b.mem, 16384), func() {
		l.b.to(ib.Reset)
		l.b.mem.canary()
		c.sleep(quiet / 3)
		l.b.mem.intact("memory of a QP in RESET")
	})
	endedWith(c, bad, ib.WCRetryExceeded, ib.WCFlushErr)
}

func concurrentStorm(c *C) {
	c.severalGoroutines()
	l := c.pair(ib.RC, func(o *linkOpts) { o.depth, o.cqEntries = 128, 256 })
	l.a.mem.fill(0, 64, 3)
	for _, wr := range []ib.SendWR{wrWrite(0, l.a.mem.sges(0, 64), l.b.mem, 0), wrRead(0, l.a.mem.sges(1000, 64), l.b.mem, 0)} {
		do(c.A, opStorm, stormArgs{QP: l.a.H, CQ: l.a.scq.H, WR: wr, Posters: 4, PerPoster: 1000, Pollers: 3})
	}
	l.a.mem.has("READ", 1000, 64, 3)
}

// Streams of every kind run both ways on one QP pair at once.
func concurrentDirections(c *C) {
	c.severalGoroutines()
	l := c.pair(ib.RC)
	done := make(chan error, 2)
	for _, dir := range []link{l, {l.b, l.a}} {
		go func() {
			var wrs []ib.SendWR
			for i := range 8 {
				wrs = append(wrs, wrWrite(uint64(4*i), dir.a.mem.sges(0, 3000), dir.b.mem, 30000), wrRead(uint64(4*i+1), dir.a.mem.sges(20000, 3000), dir.b.mem, 0))
				if c.A.dev.Attr.Caps.Has(ib.CapAtomic) {
					wrs = append(wrs, wrAdd(uint64(4*i+2), dir.a.mem.sges(10000, 8), dir.b.mem, 60000, 1))
				}
			}
			r, err := call(dir.a.Side, opPump, pumpArgs{QP: dir.a.H, CQ: dir.a.scq.H, WRs: wrs, Rounds: 300})
			if err == nil && len(r.Bad) > 0 {
				err = errors.New(showWC(r.Bad[0]))
			}
			done <- err
		}()
	}
	for range 2 {
		if err := <-done; err != nil {
			c.Error(err)
		}
	}
	if !c.A.dev.Attr.Caps.Has(ib.CapAtomic) {
		return
	}
	for _, m := range []*Mem{l.a.mem, l.b.mem} {
		if v := word(m.read(60000, 8)); v != 2400 {
			c.Errorf("%s: after 2400 additions the word is %d", m.s.name, v)
		}
	}
}

// Close of objects that other goroutines use: the calls end, and say net.ErrClosed from then on.
func closeWhileUsed(c *C) {
	c.severalGoroutines()
	for range 5 {
		l := c.pair(ib.RC, func(o *linkOpts) { o.rnrRetry, o.cqEntries = 7, 4096 })
		done := make(chan error, 3)
		for range 3 {
			go func() {
				_, err := call(c.A, opUseUntilClosed, useUntilClosedArgs{QP: l.a.H, CQ: l.a.scq.H,
					WR: wrWrite(1, l.a.mem.sges(0, 64), l.b.mem, 0), Recv: ib.RecvWR{SGEs: l.a.mem.sges(0, 64)}})
				done <- err
			}()
		}
		c.sleep(quiet / 5)
		do(c.A, opCloseTwice, l.a.H)
		do(c.A, opCloseTwice, l.a.rcq.H)
		do(c.A, opCloseTwice, l.a.scq.H)
		do(c.A, opCloseTwice, l.a.mem.H)
		for range 3 {
			if err := <-done; err != nil {
				c.Error(err)
			}
		}
	}
}

// Contexts of one device are independent (IBA 11.2.1.1): their objects do not mix.
func manyContexts(c *C) {
	c.severalGoroutines()
	a, b := c.A, c.B
	if a.local == nil { // the third context is one of this process, and so the other side's device
		a, b = b, a
	}
	third := &Side{c: c, name: a.name + "2", local: newHost()}
	third.dev = do(third, opOpen, a.opened)
	defer func() {
		if _, err := call(third, opCloseAll, none{}); err != nil && !c.Failed() {
			c.Error(err)
		}
	}()
	third.pd = do(third, opPD, none{})
	l1, l2 := c.pairOn(a, b, c.opts(ib.RC)), c.pairOn(third, b, c.opts(ib.RC))
	l1.alive(c)
	l2.alive(c)
	// A key of another context of this process is no key.
	l1.b.mem.canary()
	l2.a.post(ib.SendWR{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: []ib.SGE{{Addr: l1.a.mem.Addr, Length: 8, LKey: l1.a.mem.LKey}}})
	l2.a.sentOneOf(1, ib.WCLocalProtErr)
	l1.alive(c)
}

func reach(c *C) {
	if c.streams {
		c.Skip(nothingToDo + ": who has made a stream has reached the peer")
	}
	got, err := call(c.A, opReach, c.B.dev.GID)
	if errors.Is(err, errors.ErrUnsupported) {
		c.Log(err)
		c.Skip("the device cannot tell whom it reaches")
	}
	if err != nil {
		c.Fatal(err)
	}
	if c.A.dev.Provider == "soft" && got != currentPath(c) {
		c.Errorf("path %q, want %q", got, currentPath(c))
	}
	nobody := c.B.dev.GID
	if c.A.dev.Net {
		nobody = ib.GID{0xfd, 0x3b, 0xc4, 0x71, 0x0e, 0x96} // one of a NIC on this host, and of no site that is one's own
	}
	nobody[15] ^= 0x5a
	nobody[9] ^= 0xa5
	if got, err := call(c.A, opReach, nobody); !errors.Is(err, verbs.ErrUnreachable) {
		c.Errorf("a GID that nobody has: %q, %v; want ErrUnreachable", got, err)
	}
	o := c.opts(ib.RC)
	o.noConnect = true
	l := c.pairOn(c.A, c.B, o)
	l.a.toInit(o, 0)
	attr, mask := l.a.rtrAttr(o, l.b)
	attr.AH.DGID = nobody
	if err := l.a.tryModify(attr, mask); err != nil && !errors.Is(err, verbs.ErrUnreachable) {
		c.Errorf("to RTR with a GID that nobody has: %v; want ErrUnreachable", err)
	} else if err == nil {
		c.note("a GID that nobody has is not noticed on the way to RTR")
		return
	}
	l.a.staysIn(ib.Init)
}
