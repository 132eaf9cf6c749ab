package softnic

import (
	"errors"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// joined returns two NICs with a connection through shared memory.
func joined(t testing.TB) (na, nb *NIC, a, b *end) {
	na, nb = openNIC(t, true), openNIC(t, true)
	if na.sharedE != nil {
		testutil.Skip(t, na.sharedE.Error())
	}
	cfg := endConfig{typ: ib.RC, depth: 8, size: 64 << 10}
	a, b = newEnd(t, na, cfg), newEnd(t, nb, cfg)
	a.connect(b)
	b.connect(a)
	exchange(a, b)
	return na, nb, a, b
}

// What a peer learns by asking is what it was given: regions with remote rights by rkey, receive buffers by handle.
func TestResolveOnlyWhatIsGranted(t *testing.T) {
	na, nb, a, _ := joined(t)
	reg, err := mem.Alloc(8192, mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	local, err := a.pd.RegisterMR(driver.MRConfig{Mem: reg.Bytes(), FD: reg.FD(), Access: ib.AccessLocalWrite})
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	lb := nb.linkWith(na)
	ask := func(byHandle bool) (r *remoteRegion) {
		get := func() *remoteRegion {
			if byHandle {
				return lb.regionByHandle(uint32(local.LKey()))
			}
			return lb.regionByRKey(local.RKey())
		}
		testutil.Eventually(t, "the peer answers", func() bool { r = get(); return r != nil })
		if r.missing {
			lb.forgetMissing(r)
		}
		return r
	}
	if r := ask(false); !r.missing {
		t.Errorf("a region without remote rights was given by its rkey: %+v", r)
	}
	if r := ask(true); !r.missing {
		t.Errorf("a region that no receive was posted from was given by its handle: %+v", r)
	}
	a.q.PostRecv([]ib.RecvWR{{ID: 1, SGEs: []ib.SGE{{Addr: addrOf(reg.Bytes()), Length: 100, LKey: local.LKey()}}}})
	if r := ask(true); r.missing {
		t.Error("the region of a posted receive was refused")
	}
}

// A region that is closed between being looked up and being told to a peer is not told: the descriptor of its file may be that of
// something else by then.
func TestRegionGoesBeforeItIsTold(t *testing.T) {
	na, nb, a, _ := joined(t)
	reg, err := mem.Alloc(8192, mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	mr, err := a.pd.RegisterMR(driver.MRConfig{Mem: reg.Bytes(), FD: reg.FD(), Access: ib.AccessLocalWrite | ib.AccessRemoteWrite})
	if err != nil {
		t.Fatal(err)
	}
	r := na.regions.lookupRKey(mr.RKey())
	if err := mr.Close(); err != nil {
		t.Fatal(err)
	}
	reg.Close()
	la, lb := na.linkWith(nb), nb.linkWith(na)
	la.push(r)
	if la.grant(r, ctl{kind: ctlRegion}) {
		t.Error("a closed region was told")
	}
	testutil.Eventually(t, "the peer hears that there is none", func() bool {
		r := lb.regionByRKey(mr.RKey())
		return r != nil && r.missing || la.reason() != nil
	})
	if err := la.reason(); err != nil {
		t.Error(err)
	}
}

// A receive whose region has gone since it was posted fails on both sides, also when the message before has gone to the same region.
func TestRegionGoesBetweenMessages(t *testing.T) {
	paths(t, func(t *testing.T, na, nb *NIC) {
		a, b := newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC})
		a.connect(b)
		b.connect(a)
		reg, err := mem.Alloc(8192, mem.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer reg.Close()
		mr, err := b.pd.RegisterMR(driver.MRConfig{Mem: reg.Bytes(), FD: reg.FD(), Access: ib.AccessLocalWrite})
		if err != nil {
			t.Fatal(err)
		}
		for id := range uint64(2) {
			b.recv(id, []ib.SGE{{Addr: addrOf(reg.Bytes()), Length: 64, LKey: mr.LKey()}})
		}
		a.send(ib.SendWR{ID: 10, Opcode: ib.OpSend, SGEs: a.sge(0, 64)})
		if wc := b.poll(); wc.ID != 0 || wc.Status != ib.WCSuccess {
			t.Fatalf("before the region has gone: %+v", wc)
		}
		if err := mr.Close(); err != nil {
			t.Fatal(err)
		}
		la := na.linkWith(nb)
		testutil.Eventually(t, "the sender has unmapped the region", func() bool {
			la.regMu.RLock()
			defer la.regMu.RUnlock()
			r := la.byHandle[uint32(mr.LKey())]
			return r == nil || r.missing // it may have asked when it was being told
		})
		copy(a.buf, "late")
		a.send(ib.SendWR{ID: 11, Opcode: ib.OpSend, SGEs: a.sge(0, 64)})
		if wc := a.poll(); wc.ID != 11 || wc.Status != ib.WCRemoteOpErr {
			t.Errorf("send: %+v", wc)
		}
		if wc := b.poll(); wc.ID != 1 || wc.Status != ib.WCLocalProtErr {
			t.Errorf("recv: %+v", wc)
		}
		if string(reg.Bytes()[:4]) == "late" {
			t.Error("the message is in memory that was deregistered")
		}
	})
}

// A zero-based window in the middle of its region is reached by peers.
func TestZeroBasedWindow(t *testing.T) {
	paths(t, func(t *testing.T, na, nb *NIC) {
		a, b := newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC})
		a.connect(b)
		b.connect(a)
		w, err := b.pd.(*PD).AllocMW()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		key := w.RKey() + 1
		if key>>8 != w.RKey()>>8 {
			key = w.RKey() - 1
		}
		b.send(ib.SendWR{ID: 9, Opcode: ib.OpBindMW, Flags: ib.SendSignaled, Bind: &ib.BindMW{Window: w.Handle(), MRLKey: b.mr.LKey(), RKey: key,
			Addr: addrOf(b.buf) + 4096, Length: 100, Access: ib.AccessRemoteWrite | ib.AccessZeroBased}})
		if wc := b.poll(); wc.Status != ib.WCSuccess {
			t.Fatalf("bind: %+v", wc)
		}
		copy(a.buf, "window")
		a.send(ib.SendWR{ID: 1, Opcode: ib.OpRDMAWrite, Flags: ib.SendSignaled, SGEs: a.sge(0, 6), RemoteAddr: 10, RKey: key})
		if wc := a.poll(); wc.Status != ib.WCSuccess || string(b.buf[4106:4112]) != "window" {
			t.Fatalf("write: %+v, %q", wc, b.buf[4106:4112])
		}
	})
}

// In SQD, the traffic class and hop limit of a connection may change, and where it goes may not.
func TestDestinationStays(t *testing.T) {
	paths(t, func(t *testing.T, na, nb *NIC) {
		a, b := newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC})
		a.connect(b)
		b.connect(a)
		to, err := a.q.Query()
		if err != nil {
			t.Fatal(err)
		}
		modify := func(ah ib.AHAttr) error {
			return a.q.Modify(t.Context(), &ib.QPAttr{State: ib.SQD, AH: ah}, ib.AttrState|ib.AttrAV)
		}
		if err := a.q.Modify(t.Context(), &ib.QPAttr{State: ib.SQD}, ib.AttrState); err != nil {
			t.Fatal(err)
		}
		other := to.AH
		other.DGID[15]++
		if err := modify(other); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("another destination: %v", err)
		}
		to.AH.TrafficClass, to.AH.HopLimit = 184, 7
		if err := modify(to.AH); err != nil {
			t.Error(err)
		}
		if now, err := a.q.Query(); err != nil || now.AH != to.AH {
			t.Errorf("%+v, %v; want %+v", now.AH, err, to.AH)
		}
		if err := a.q.Modify(t.Context(), &ib.QPAttr{State: ib.RTS}, ib.AttrState); err != nil {
			t.Fatal(err)
		}
		exchange(a, b)
	})
}

// A peer that claims more memory than anybody has does not get our address space.
func TestSparseMemoryOfAPeer(t *testing.T) {
	_, nb, _, _ := joined(t)
	l := nb.onlyLink(t)
	if _, err := l.mapFD(0, 0, 1<<46, false); err == nil {
		t.Error("64 TiB were mapped")
	}
}

// A QP in the error state does not serve one-sided operations on private memory either.
func TestAssistNeedsAReadyQP(t *testing.T) {
	na, nb := openNIC(t, true), openNIC(t, true)
	if na.sharedE != nil {
		testutil.Skip(t, na.sharedE.Error())
	}
	cfg := endConfig{typ: ib.RC, depth: 8, size: 64 << 10, private: true}
	a, b := newEnd(t, na, cfg), newEnd(t, nb, cfg)
	a.connect(b)
	b.connect(a)
	exchange(a, b)
	l := nb.linkWith(na)
	m := ctl{kind: ctlAssist, status: uint8(ib.OpRDMARead), qpn: uint32(a.q.QPN()), dst: uint32(b.q.QPN()), a: uint32(b.mr.RKey()), b: 64, x: addrOf(b.buf)}
	if st := l.doAssist(&m, &ctl{}); st != ib.WCSuccess {
		t.Fatalf("assist: %v", st)
	}
	at := ib.QPAttr{State: ib.Err}
	if err := b.q.Modify(t.Context(), &at, ib.AttrState); err != nil {
		t.Fatal(err)
	}
	if st := l.doAssist(&m, &ctl{}); st == ib.WCSuccess {
		t.Error("a QP in ERR has served a read")
	}
}

// Once a peer has been found to be stuck, nobody waits for its other QPs: taking something away is bounded.
func TestStuckPeerIsWaitedForOnce(t *testing.T) {
	na, nb := openNIC(t, true), openNIC(t, true)
	if na.sharedE != nil {
		testutil.Skip(t, na.sharedE.Error())
	}
	cfg := endConfig{typ: ib.RC, depth: 4, size: 4096, private: true}
	for range 40 {
		a, b := newEnd(t, na, cfg), newEnd(t, nb, cfg)
		a.connect(b)
		b.connect(a)
		exchange(a, b)
		*a.q.(*QP).in.Load().busy = 1
	}
	na.busyFor = shortBusy // nobody waits yet
	hold := make(chan none)
	na.later(func() { <-hold }) // the worker is busy, as when it is who waits
	done := make(chan none)
	go func() { na.quiesce(); close(done) }()
	l := na.linkWith(nb)
	testutil.Eventually(t, "the link is cut", func() bool { return l.cut.Load() })
	waits := 0
	for ended := false; !ended; {
		select {
		case <-done:
			ended = true
		case <-time.After(shortBusy):
			waits++
		}
	}
	close(hold)
	if waits > 30 {
		t.Errorf("quiesce went on for %d times the limit", waits)
	}
}

type none struct{}

// liveControl is a link of a live connection for control messages that nobody would send.
func controlRound(t testing.TB, in []byte) {
	na, nb, a, b := joined(t)
	honest := openNIC(t, true)
	x, y := newEnd(t, na, endConfig{typ: ib.RC, depth: 8, size: 4096}), newEnd(t, honest, endConfig{typ: ib.RC, depth: 8, size: 4096})
	x.connect(y)
	y.connect(x)
	l := na.linkWith(nb)
	if len(in) > 1<<12 {
		in = in[:1<<12]
	}
	small, err := mem.Alloc(1<<20, mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer small.Close()
	var ended error
	for len(in) > 2 && ended == nil {
		n := min(int(in[0])+ctlHeader-8, len(in)-2)
		how := in[1]
		msg := append([]byte(nil), in[2:2+n]...)
		in = in[2+n:]
		for len(msg) < ctlHeader {
			msg = append(msg, 0)
		}
		// Half of them are let through the first checks.
		if how&1 != 0 {
			msg[0] = 1 + msg[0]%byte(ctlKinds-1)
			putLen(msg)
		}
		var m ctl
		if m.decode(msg) != nil {
			continue
		}
		if how&2 != 0 { // numbers that mean something
			m.dst, m.qpn = uint32(a.q.QPN()), uint32(b.q.QPN())
			m.a &= 7
		}
		m.hasFD = how&4 != 0
		m.fd = -1
		if m.hasFD {
			m.fd = small.FD()
			if how&8 != 0 {
				m.fd = a.ch.(*CompChannel).w.fd()
			}
		}
		ended = l.handle(&m)
	}
	if ended != nil {
		l.close(ended)
		if l.reason() == nil {
			t.Error("the link has ended without a reason")
		}
	}
	a.q.PostSend([]ib.SendWR{{ID: 1, Opcode: ib.OpSend, SGEs: a.sge(0, 10)}})
	var wcs [8]ib.WC
	a.cq.Poll(wcs[:])
	alive(x, y)
}

func putLen(msg []byte) {
	n := len(msg) - ctlHeader
	msg[56], msg[57], msg[58], msg[59] = byte(n), byte(n>>8), 0, 0
	msg[60], msg[61], msg[62], msg[63] = 0, 0, 0, 0
}

func FuzzControl(f *testing.F) {
	for kind := range ctlKinds {
		m := ctl{kind: kind, id: 1, qpn: 17, dst: 18, a: 64, b: 1, c: 8, d: 2 | 2<<8, x: 1 << 16, y: 1, z: 1}
		b := m.encode(nil)
		f.Add(append([]byte{8, 7}, b...))
		f.Add(append(append([]byte{8, 1}, b...), append([]byte{8, 15}, b...)...))
	}
	f.Fuzz(func(t *testing.T, in []byte) { controlRound(t, in) })
}

func TestHostileControl(t *testing.T) {
	testutil.CheckLeaks(t)
	for seed := range uint64(120) {
		c := newChooser(seed, nil)
		in := make([]byte, 200+c.n(2000))
		for i := range in {
			in[i] = byte(c.rnd.Uint32())
			if c.n(3) > 0 {
				in[i] = byte(c.n(3))
			}
		}
		t.Run("", func(t *testing.T) { controlRound(t, in) })
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func FuzzHello(f *testing.F) {
	h := hello{flags: helloFences, uid: 1, pid: 2, pidNS: 3, mntNS: 4, from: ib.GID{0xfd, 1}, to: ib.GID{0xfd, 2}}
	f.Add(h.encode())
	f.Add([]byte(helloMagic))
	f.Fuzz(func(t *testing.T, in []byte) {
		var h hello
		if h.decode(in) != nil {
			return
		}
		var again hello
		if err := again.decode(h.encode()); err != nil || again != h {
			t.Errorf("%+v is decoded as %+v, %v", h, again, err)
		}
	})
}
