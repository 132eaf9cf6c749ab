package conformance

import (
	"errors"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var _ = addCases("FLUSH and ATOMIC WRITE", 0,
	testCase{name: "placement/flush", needs: ib.CapFlush, run: flushBasic},
	testCase{name: "placement/flush-rights", needs: ib.CapFlush, run: flushRights},
	testCase{name: "placement/flush-persistent", needs: ib.CapFlushPersistent, run: flushPersistent},
	testCase{name: "placement/flush-bad-request", needs: ib.CapFlush, run: flushBad},
	testCase{name: "placement/flush-depth-zero", needs: ib.CapFlush, run: flushDepthZero},
	testCase{name: "placement/atomic-write", needs: ib.CapAtomicWrite, run: atomicWriteBasic},
	testCase{name: "placement/atomic-write-rights", needs: ib.CapAtomicWrite, run: atomicWriteRights},
	testCase{name: "placement/atomic-write-bad-request", needs: ib.CapAtomicWrite, run: atomicWriteBad},
	testCase{name: "placement/atomic-write-depth-zero", needs: ib.CapAtomicWrite, run: atomicWriteDepthZero},
)

// A device without says so when the request is posted, and goes on.
var _ = addCases("", 0, testCase{name: "placement/absent", run: placementAbsent})

// placementPair is a pair whose sides wait long for acknowledgements. rxe (Linux 6.12) forgets the address of both kinds of
// request when it sends them again (req_retry in rxe_req.c), so that the peer refuses them: on a busy machine a case would fail
// for that.
func (c *C) placementPair(typ ib.QPType, changes ...func(*linkOpts)) link {
	c.Helper()
	o := c.opts(typ)
	o.noConnect = true
	o.inline = 8
	if typ == ib.RC {
		o.access |= ib.AccessFlushGlobal
		if c.A.dev.Attr.Caps.Has(ib.CapFlush) {
			o.memAccess |= ib.AccessFlushGlobal
		}
	}
	for _, f := range changes {
		f(&o)
	}
	l := c.pairOn(c.A, c.B, o)
	for _, e := range []*end{l.a, l.b} {
		e.toInit(o, o.qkeyA)
	}
	l.a.toRTR(o, l.b)
	l.b.toRTR(o, l.a)
	for _, e := range []*end{l.a, l.b} {
		attr, mask := e.rtsAttr(o)
		attr.AckTimeout = 21 // 8.6 s
		e.modify(attr, mask)
	}
	return l
}

func wrFlush(id uint64, m *Mem, off int, f ib.Flush) ib.SendWR {
	return ib.SendWR{ID: id, Opcode: ib.OpFlush, Flags: ib.SendSignaled, RemoteAddr: m.Addr + uint64(off), RKey: m.RKey, Flush: f}
}

func wrAtomicWrite(id uint64, m *Mem, off int, v uint64) ib.SendWR {
	return ib.SendWR{ID: id, Opcode: ib.OpAtomicWrite, Flags: ib.SendSignaled, RemoteAddr: m.Addr + uint64(off), RKey: m.RKey, Inline: wordBytes(v)}
}

// When a FLUSH completes, what was written before is there: no other sign is waited for.
func flushBasic(c *C) {
	l := c.placementPair(ib.RC)
	l.b.mem.canary()
	for i := range uint64(20) {
		n := 1 + 1500*int(i)
		l.a.mem.fill(0, n, i)
		w := wrWrite(1, l.a.mem.sges(0, n), l.b.mem, 64)
		w.Flags = 0
		f := ib.Flush{Placement: ib.FlushGlobal, Length: uint32(n)}
		if i%3 == 1 {
			f = ib.Flush{Placement: ib.FlushGlobal, Level: ib.FlushRegion}
		}
		l.a.post(w, wrFlush(2, l.b.mem, 64, f))
		l.a.sent(want{ID: 2, Op: ib.WCFlush, Len: anyLen})
		l.b.mem.has("flushed", 64, n, i)
		l.b.mem.intactAround("flushed", 64, 1+1500*int(max(i, 1)))
	}
	l.a.post(wrFlush(3, l.b.mem, 0, ib.Flush{Placement: ib.FlushGlobal}), wrFlush(4, l.b.mem, l.b.mem.n-1, ib.Flush{Placement: ib.FlushGlobal, Length: 1}))
	l.a.sent(want{ID: 3, Op: ib.WCFlush, Len: anyLen}, want{ID: 4, Op: ib.WCFlush, Len: anyLen})
	l.b.rcq.empty("a FLUSH takes no receive")
	l.alive(c)
}

// IBA A19.4.1.3: key, range and rights are checked as those of a WRITE are; the QP has a say, too.
func flushRights(c *C) {
	global := ib.Flush{Placement: ib.FlushGlobal, Length: 64}
	for name, f := range inOrder(map[string]func(l link) ib.SendWR{
		"beyond the region": func(l link) ib.SendWR { return wrFlush(1, l.b.mem, l.b.mem.n-63, global) },
		"before the region": func(l link) ib.SendWR { return wrFlush(1, l.b.mem, -1, global) },
		"persistent, not global": func(l link) ib.SendWR {
			return wrFlush(1, l.b.mem, 0, ib.Flush{Placement: ib.FlushPersistent, Length: 64})
		},
		"wrong key": func(l link) ib.SendWR {
			wr := wrFlush(1, l.b.mem, 0, global)
			wr.RKey ^= 0x40
			return wr
		},
		"region without the right": func(l link) ib.SendWR {
			return wrFlush(1, c.B.mem(c.B.pd, 4096, accessAll), 0, ib.Flush{Placement: ib.FlushGlobal, Level: ib.FlushRegion})
		},
	}) {
		l := c.placementPair(ib.RC)
		l.a.post(f(l))
		c.Logf("%s: %q", name, l.a.sentOneOf(1, ib.WCRemoteAccessErr, ib.WCRemoteInvalidReqErr))
		l.a.inState(ib.Err)
	}
	l := c.placementPair(ib.RC, func(o *linkOpts) { o.access = ib.AccessRemote })
	l.a.post(wrFlush(1, l.b.mem, 0, global))
	l.a.sentOneOf(1, ib.WCRemoteAccessErr, ib.WCRemoteInvalidReqErr)
}

// Persistence is a property of the memory. That of these tests has none, so a device that knows refuses the right.
func flushPersistent(c *C) {
	m, err := call(c.B, opMem, memArgs{PD: c.B.pd, Size: 4096, Access: accessAll | ib.AccessFlushPersistent})
	if err != nil {
		c.note("ordinary memory cannot be registered for persistent flushes: %v", err)
		return
	}
	l := c.placementPair(ib.RC, func(o *linkOpts) { o.access |= ib.AccessFlushPersistent })
	l.a.post(wrFlush(1, &Mem{c.B, m, 4096}, 0, ib.Flush{Placement: ib.FlushPersistent, Length: 64}))
	l.a.sent(want{ID: 1, Op: ib.WCFlush, Len: anyLen})
}

func flushBad(c *C) {
	l := c.placementPair(ib.RC)
	good := ib.Flush{Placement: ib.FlushGlobal, Length: 8}
	withSGE, withInline := wrFlush(1, l.b.mem, 0, good), wrFlush(1, l.b.mem, 0, good)
	withSGE.SGEs, withInline.Inline = l.a.mem.sges(0, 8), make([]byte, 8)
	for _, wr := range []ib.SendWR{withSGE, withInline, wrFlush(1, l.b.mem, 0, ib.Flush{Length: 8}), wrFlush(1, l.b.mem, 0, ib.Flush{Placement: 4, Length: 8}),
		wrFlush(1, l.b.mem, 0, ib.Flush{Placement: ib.FlushGlobal, Level: 2})} {
		c.refused(l.a.QP, wr)
	}
	l.alive(c)
	if c.A.dev.Attr.Caps.Has(ib.CapUC) {
		u := c.placementPair(ib.UC)
		c.refused(u.a.QP, wrFlush(1, u.b.mem, 0, good))
	}
}

// Both take responder resources, as a READ does.
func flushDepthZero(c *C) {
	depthZero(c, c.placementPair(ib.RC, noResources), func(l link) ib.SendWR {
		return wrFlush(1, l.b.mem, 0, ib.Flush{Placement: ib.FlushGlobal, Length: 64})
	})
}

func atomicWriteDepthZero(c *C) {
	depthZero(c, c.placementPair(ib.RC, noResources), func(l link) ib.SendWR { return wrAtomicWrite(1, l.b.mem, 0, 1) })
}

// Inline or from a region; after everything that came before.
func atomicWriteBasic(c *C) {
	l := c.placementPair(ib.RC)
	const at = 512
	l.b.mem.canary()
	for i := range uint64(10) {
		v := i * 0x1122334455667788
		wr := wrAtomicWrite(i, l.b.mem, at, v)
		if i%2 == 1 {
			l.a.mem.write(24, wordBytes(v))
			wr.Inline, wr.SGEs = nil, l.a.mem.sges(24, 8)
		}
		l.a.post(wr)
		l.a.sent(want{ID: i, Op: ib.WCAtomicWrite, Len: anyLen})
		if got := word(l.b.mem.read(at, 8)); got != v {
			c.Fatalf("the word is %#x after %#x was written", got, v)
		}
		l.b.mem.intactAround("an atomic write", at, 8)
	}
	// The flag that says that data is there, which is what this is for.
	for i := range uint64(20) {
		l.a.mem.fill(0, 9000, i)
		w := wrWrite(1, l.a.mem.sges(0, 9000), l.b.mem, 1024)
		w.Flags = 0
		l.a.post(w, wrAtomicWrite(2, l.b.mem, at, i))
		if !c.waitFor(patience, func() bool { return word(l.b.mem.read(at, 8)) == i }) { // nobody but the device says so
			c.Fatalf("the flag of round %d does not come", i)
		}
		l.b.mem.has("what was written before the flag", 1024, 9000, i)
		l.a.sent(want{ID: 2, Op: ib.WCAtomicWrite, Len: anyLen})
	}
	l.b.rcq.empty("an atomic write takes no receive")
}

func atomicWriteRights(c *C) {
	for name, f := range inOrder(map[string]func(l link) (*Mem, ib.SendWR){
		"misaligned":        func(l link) (*Mem, ib.SendWR) { return l.b.mem, wrAtomicWrite(1, l.b.mem, 4, 1) },
		"beyond the region": func(l link) (*Mem, ib.SendWR) { return l.b.mem, wrAtomicWrite(1, l.b.mem, l.b.mem.n, 1) },
		"region without the right": func(l link) (*Mem, ib.SendWR) {
			m := c.B.mem(c.B.pd, 4096, ib.AccessLocalWrite|ib.AccessRemoteRead)
			return m, wrAtomicWrite(1, m, 0, 1)
		},
	}) {
		l := c.placementPair(ib.RC)
		m, wr := f(l)
		l.b.mem.canary()
		m.canary()
		l.a.post(wr)
		c.Logf("%s: %q", name, l.a.sentOneOf(1, ib.WCRemoteAccessErr, ib.WCRemoteInvalidReqErr))
		l.a.inState(ib.Err)
		l.b.mem.intact(name)
		m.intact(name + ": the memory that is named")
	}
}

func atomicWriteBad(c *C) {
	l := c.placementPair(ib.RC)
	change := func(f func(*ib.SendWR)) ib.SendWR {
		wr := wrAtomicWrite(1, l.b.mem, 0, 1)
		f(&wr)
		return wr
	}
	for _, wr := range []ib.SendWR{
		change(func(wr *ib.SendWR) { wr.Inline = wr.Inline[:7] }),
		change(func(wr *ib.SendWR) { wr.Inline = nil }),
		change(func(wr *ib.SendWR) { wr.SGEs = l.a.mem.sges(0, 8) }),
		change(func(wr *ib.SendWR) { wr.Inline, wr.SGEs = nil, l.a.mem.sges(0, 16) }),
		change(func(wr *ib.SendWR) { wr.Inline, wr.SGEs = nil, []ib.SGE{l.a.mem.sge(0, 4), l.a.mem.sge(4, 4)} }),
	} {
		c.refused(l.a.QP, wr)
	}
	l.alive(c)
}

func placementAbsent(c *C) {
	if (c.A.dev.Attr.Caps|c.B.dev.Attr.Caps)&(ib.CapFlush|ib.CapAtomicWrite) != 0 {
		c.Skip(nothingToDo + ": a device has them")
	}
	l := c.pair(ib.RC)
	for _, wr := range []ib.SendWR{wrFlush(1, l.b.mem, 0, ib.Flush{Placement: ib.FlushGlobal, Length: 8}), wrAtomicWrite(1, l.b.mem, 0, 1)} {
		c.refused(l.a.QP, wr)
	}
	for _, a := range []ib.Access{ib.AccessFlushGlobal, ib.AccessFlushPersistent} {
		if _, err := call(c.B, opMem, memArgs{PD: c.B.pd, Size: 4096, Access: accessAll | a}); !errors.Is(err, errors.ErrUnsupported) {
			c.Errorf("a region with %v: %v", a, err)
		}
	}
	if n, err := l.a.tryPost(wrAtomicWrite(1, l.b.mem, 0, 1)); n != 0 || !errors.Is(err, verbs.ErrInvalidWR) {
		c.Error(n, err)
	}
	l.alive(c)
}
