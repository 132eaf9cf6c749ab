package softnic

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/pcap"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// observed collects packets of NICs, as a file and as they are.
type observed struct {
	t     testing.TB
	out   bytes.Buffer
	files pcap.Files
	sink  observe.FileSink
	seen  []observe.Record
	lost  uint64
	s     *observe.Session
	stop  func() error
}

// Packet implements observe.Sink.
func (o *observed) Packet(s *observe.Seen) error {
	r := s.Record
	r.Data = bytes.Clone(r.Data)
	o.seen = append(o.seen, r)
	return o.sink.Packet(s)
}

func (o *observed) Flush() error { return o.sink.Flush() }

func (o *observed) Finish(s *observe.Source, lost uint64) error {
	o.lost += lost
	return o.sink.Finish(s, lost)
}

// observeNICs captures NICs until stop.
func observeNICs(t testing.TB, nics ...*NIC) *observed {
	t.Helper()
	o := &observed{t: t}
	o.files = pcap.Files{Name: "-", Out: &o.out, App: "test"}
	if err := o.files.Open(); err != nil {
		t.Fatal(err)
	}
	o.sink.Files = &o.files
	calls := make(chan *observe.Source, len(nics))
	for _, n := range nics {
		s, err := observe.Attach(t.Context(), n.gid, observe.MaxData, 1<<24)
		if err != nil {
			t.Fatal(err)
		}
		calls <- s
	}
	ctx, cancel := context.WithCancel(t.Context())
	o.s = &observe.Session{Sink: o, Calls: calls, Warn: func(err error) { t.Error(err) }}
	done := make(chan error, 1)
	go func() { done <- o.s.Run(ctx) }()
	o.stop = sync.OnceValue(func() error { cancel(); return <-done })
	return o
}

// end ends the capture, and has tshark look at it. Every packet must have the ICRC that belongs to its headers: one that was received, the one
// that it came with.
func (o *observed) end() (opcodes []string) {
	o.t.Helper()
	if err := o.stop(); err != nil {
		o.t.Fatal(err)
	}
	if o.lost != 0 {
		o.t.Errorf("%d packets were lost", o.lost)
	}
	var x observe.Renderer
	var crcs []string
	for i := range o.seen {
		ip, _, _ := x.Render(&o.seen[i])
		if !testutil.HasICRC(ip) {
			o.t.Errorf("packet %d has a wrong ICRC: % x", i, ip)
		}
		crcs = append(crcs, fmt.Sprintf("0x%08x", binary.BigEndian.Uint32(ip[len(ip)-4:])))
	}
	packets := testutil.Tshark(o.t, o.out.Bytes(), "infiniband.bth.opcode", "infiniband.invariant.crc", "frame.interface_name")
	if len(packets) != len(o.seen) {
		o.t.Fatalf("tshark sees %d packets of %d", len(packets), len(o.seen))
	}
	for i, p := range packets {
		op := roce.Opcode(o.seen[i].Data[0]).Op()
		if younger := op == roce.Flush || op == roce.AtomicWrite; p[1] != crcs[i] && !younger { // tshark 4.0 does not know those
			o.t.Errorf("packet %d: tshark sees the ICRC %s, want %s", i, p[1], crcs[i])
		}
		n, err := strconv.ParseUint(p[0], 0, 8)
		if err != nil {
			o.t.Fatalf("%q", p)
		}
		dir := "<"
		if o.seen[i].Out {
			dir = ">"
		}
		opcodes = append(opcodes, dir+roce.Opcode(n).String())
	}
	return opcodes
}

// everyOpcode has a do one operation of each kind with b, each of three packets where it can be.
func everyOpcode(t *testing.T, a, b *end) {
	t.Helper()
	const n = 2*256 + 10
	for i := range a.buf[:8192] { // like nothing that Wireshark guesses
		a.buf[i], b.buf[i] = 0xee, 0xdd
	}
	remote := func(off int) uint64 { return addrOf(b.buf) + uint64(off) }
	for i := range uint64(5) {
		b.recv(i, b.sge(4096, 1024))
	}
	w, err := b.pd.(*PD).AllocMW() // for a key to invalidate
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	key := w.RKey() ^ 1
	b.send(ib.SendWR{Opcode: ib.OpBindMW, Flags: ib.SendSignaled, Bind: &ib.BindMW{Window: w.Handle(), MRLKey: b.mr.LKey(), RKey: key,
		Addr: addrOf(b.buf), Length: 100, Access: ib.AccessRemoteWrite}})
	if wc := b.poll(); wc.Status != ib.WCSuccess {
		t.Fatalf("bind: %+v", wc)
	}
	ops := []ib.SendWR{
		{Opcode: ib.OpSend, SGEs: a.sge(0, n)},
		{Opcode: ib.OpSendWithImm, Imm: 7, SGEs: a.sge(0, 20), Flags: ib.SendSolicited},
		{Opcode: ib.OpRDMAWrite, SGEs: a.sge(0, n), RemoteAddr: remote(0), RKey: b.mr.RKey()},
		{Opcode: ib.OpRDMAWriteWithImm, Imm: 8, SGEs: a.sge(0, 21), RemoteAddr: remote(0), RKey: b.mr.RKey()},
		{Opcode: ib.OpRDMARead, SGEs: a.sge(2048, n), RemoteAddr: remote(1024), RKey: b.mr.RKey()},
		{Opcode: ib.OpAtomicFetchAdd, CompareAdd: 1, SGEs: a.sge(4096, 8), RemoteAddr: remote(2048), RKey: b.mr.RKey()},
		{Opcode: ib.OpAtomicCmpSwap, CompareAdd: 1, Swap: 2, SGEs: a.sge(4096, 8), RemoteAddr: remote(2048), RKey: b.mr.RKey()},
		{Opcode: ib.OpSend},
		{Opcode: ib.OpSendWithInv, InvalidateRKey: key, SGEs: a.sge(0, n)},
	}
	for i, wr := range ops {
		wr.ID, wr.Flags = uint64(i), wr.Flags|ib.SendSignaled
		a.send(wr)
		if wc := a.poll(); wc.Status != ib.WCSuccess || wc.ID != wr.ID {
			t.Fatalf("%v: %+v", wr.Opcode, wc)
		}
	}
	for i := range uint64(5) {
		if wc := b.poll(); wc.Status != ib.WCSuccess || wc.ID != i || (wc.Flags&ib.WCWithInv != 0) != (i == 4) {
			t.Fatalf("%+v", wc)
		}
	}
}

// What everyOpcode's packets are, at the initiator.
var everyPacket = []string{
	">RC_SEND_FIRST", ">RC_SEND_MIDDLE", ">RC_SEND_LAST", "<RC_ACKNOWLEDGE", ">RC_SEND_ONLY_WITH_IMMEDIATE", "<RC_ACKNOWLEDGE",
	">RC_RDMA_WRITE_FIRST", ">RC_RDMA_WRITE_MIDDLE", ">RC_RDMA_WRITE_LAST", "<RC_ACKNOWLEDGE", ">RC_RDMA_WRITE_ONLY_WITH_IMMEDIATE", "<RC_ACKNOWLEDGE",
	">RC_RDMA_READ_REQUEST", "<RC_RDMA_READ_RESPONSE_FIRST", "<RC_RDMA_READ_RESPONSE_MIDDLE", "<RC_RDMA_READ_RESPONSE_LAST",
	">RC_FETCH_ADD", "<RC_ATOMIC_ACKNOWLEDGE", ">RC_COMPARE_SWAP", "<RC_ATOMIC_ACKNOWLEDGE", ">RC_SEND_ONLY", "<RC_ACKNOWLEDGE",
	">RC_SEND_FIRST", ">RC_SEND_MIDDLE", ">RC_SEND_LAST_WITH_INVALIDATE", "<RC_ACKNOWLEDGE",
}

// join connects a QP to a peer with a path MTU of 256, at the GID with the index.
func (e *end) join(peer *end, gid ib.GID, index int, udpPort uint16, psn, peerPSN ib.PSN, timeout ib.AckTimeout) {
	e.t.Helper()
	e.init()
	err := e.q.Modify(e.t.Context(), &ib.QPAttr{State: ib.RTR, AH: ib.AHAttr{DGID: gid, SGIDIndex: index, UDPPort: udpPort}, PathMTU: ib.MTU256, DestQPN: peer.q.QPN(), RQPSN: peerPSN,
		MaxDestRdAtomic: 4, MinRNRTimer: 1}, ib.AttrState|ib.AttrAV|ib.AttrPathMTU|ib.AttrDestQPN|ib.AttrRQPSN|ib.AttrMaxDestRdAtomic|ib.AttrMinRNRTimer)
	if err == nil {
		err = e.q.Modify(e.t.Context(), &ib.QPAttr{State: ib.RTS, SQPSN: psn, MaxRdAtomic: 4, AckTimeout: timeout, RetryCount: 7, RNRRetry: 7},
			ib.AttrState|ib.AttrMaxRdAtomic|ib.AttrAckTimeout|ib.AttrRetryCount|ib.AttrRNRRetry|ib.AttrSQPSN)
	}
	if err != nil {
		e.t.Fatal(err)
	}
}

// overUDP returns where to find a NIC at 127.0.0.1.
func (n *NIC) overUDP(t testing.TB) (gid ib.GID, index int, port uint16) {
	t.Helper()
	gid = ib.GIDFromAddr(netip.MustParseAddr("127.0.0.1"))
	all, err := n.GIDs(1)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range all {
		if g.GID == gid {
			index = g.Index
		}
	}
	if port, err = n.UDPPort(1, index); err != nil {
		t.Fatal(err)
	}
	return gid, index, port
}

// joinUDP connects two QPs over UDP. With the timeout 0, nothing is sent again because the machine is busy.
func joinUDP(t testing.TB, a, b *end, timeout ib.AckTimeout) {
	t.Helper()
	gid, ia, pa := a.n.overUDP(t)
	_, ib_, pb := b.n.overUDP(t)
	a.join(b, gid, ia, pb, 0xfffffe, 5, timeout)
	b.join(a, gid, ib_, pa, 5, 0xfffffe, timeout)
}

// capturedPaths are the paths of the capture tests. What goes by TCP is shown as if it went by UDP.
var capturedPaths = []struct {
	name string
	path observe.Path
}{{"inproc", observe.Inproc}, {"shm", observe.Shm}, {pathUDP, observe.UDP}, {pathTCP, observe.UDP}}

// joinBy connects two QPs by one of capturedPaths.
func joinBy(t testing.TB, path string, a, b *end) {
	t.Helper()
	switch path {
	case pathUDP:
		joinUDP(t, a, b, 0)
		return
	case pathTCP:
		c, d := tcpPair(t)
		a.useStream(c)
		b.useStream(d)
	}
	a.join(b, b.n.gid, 0, 0, 0xfffffe, 5, 14)
	b.join(a, a.n.gid, 0, 0, 5, 0xfffffe, 14)
}

// Whatever the path, the packets of each operation are captured, with PSNs that follow each other, and tshark takes them.
func TestCaptureOperations(t *testing.T) {
	check := func(t *testing.T, path observe.Path, opcodes []string, seen []observe.Record) {
		t.Helper()
		every := slices.Clone(everyPacket)
		if path == observe.UDP { // one acknowledgement can be for several requests, and come late
			isAck := func(o string) bool { return o == "<RC_ACKNOWLEDGE" }
			if !slices.ContainsFunc(opcodes, isAck) {
				t.Error("no acknowledgement was captured")
			}
			every, opcodes = slices.DeleteFunc(every, isAck), slices.DeleteFunc(opcodes, isAck)
		}
		if !slices.Equal(opcodes, every) {
			t.Errorf("captured\n%s\nwant\n%s", strings.Join(opcodes, " "), strings.Join(every, " "))
		}
		want := ib.PSN(0xfffffe)
		for i, r := range seen {
			var p roce.Packet
			if r.Path != path {
				t.Errorf("packet %d went through %v", i, r.Path)
			}
			if !r.Out || p.Decode(r.Data[:r.Length-roce.ICRCLen]) != nil {
				continue
			}
			if p.PSN != want {
				t.Errorf("packet %d, %v: PSN %d, want %d", i, p.Opcode, p.PSN, want)
			}
			want = p.PSN.Add(1)
			if p.Opcode.Op() == roce.ReadRequest {
				want = p.PSN.Add(3)
			}
		}
	}
	for _, p := range capturedPaths {
		t.Run(p.name, func(t *testing.T) {
			na, nb := openNIC(t, p.path == observe.Shm), openNIC(t, p.path == observe.Shm)
			if na.sharedE != nil {
				testutil.Skip(t, na.sharedE.Error())
			}
			a, b := newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC})
			o := observeNICs(t, na)
			joinBy(t, p.name, a, b)
			everyOpcode(t, a, b)
			opcodes := o.end()
			check(t, p.path, opcodes, o.seen)
			c := a.q.(*QP).counters()
			if c.Path != p.name || c.Requests != (observe.Traffic{Messages: 9, Bytes: 4*522 + 20 + 21 + 16}) || c.PeerQPN != uint32(b.q.QPN()) {
				t.Errorf("%+v", c)
			}
			if d := b.q.(*QP).counters(); d.Receives != (observe.Traffic{Messages: 5, Bytes: 2*522 + 20 + 21}) {
				t.Errorf("%+v", d)
			}
		})
	}
}

// An ATOMIC_WRITE and a FLUSH do what they say on each path, also to memory that only its own process reaches, and look the same in a
// capture.
func TestCapturePlacement(t *testing.T) {
	for _, p := range capturedPaths {
		t.Run(p.name, func(t *testing.T) {
			na, nb := openNIC(t, p.path == observe.Shm), openNIC(t, p.path == observe.Shm)
			if na.sharedE != nil {
				testutil.Skip(t, na.sharedE.Error())
			}
			a, b := newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC})
			o := observeNICs(t, na)
			joinBy(t, p.name, a, b)
			const rights = ib.AccessLocalWrite | ib.AccessRemote | ib.AccessFlushGlobal
			mem := heapBytes(64)
			mr, err := b.pd.RegisterMR(driver.MRConfig{Mem: mem, Access: rights, FD: -1})
			if err != nil {
				t.Fatal(err)
			}
			defer mr.Close()
			if err := b.q.Modify(t.Context(), &ib.QPAttr{State: ib.RTS, Access: rights}, ib.AttrState|ib.AttrAccess); err != nil {
				t.Fatal(err)
			}
			copy(a.buf[8:], "eight by")
			a.send(ib.SendWR{ID: 1, Opcode: ib.OpAtomicWrite, SGEs: a.sge(8, 8), RemoteAddr: addrOf(mem) + 16, RKey: mr.RKey()})
			a.send(ib.SendWR{ID: 2, Opcode: ib.OpFlush, Flags: ib.SendSignaled, RemoteAddr: addrOf(mem) + 16, RKey: mr.RKey(), Flush: ib.Flush{Placement: ib.FlushGlobal, Length: 8}})
			if wc := a.poll(); wc.ID != 2 || wc.Status != ib.WCSuccess || wc.Opcode != ib.WCFlush {
				t.Fatalf("%+v", wc)
			}
			if string(mem[16:24]) != "eight by" {
				t.Errorf("the memory has %q", mem)
			}
			want := []string{">RC_ATOMIC_WRITE", "<RC_RDMA_READ_RESPONSE_ONLY", ">RC_FLUSH", "<RC_RDMA_READ_RESPONSE_ONLY"}
			opcodes := o.end()
			if p.path == observe.UDP { // the second need not wait for the first one's answer
				slices.Sort(opcodes)
				slices.Sort(want)
			}
			if !slices.Equal(opcodes, want) {
				t.Fatalf("captured %q, want %q", opcodes, want)
			}
			for i := range o.seen {
				var p roce.Packet
				r := &o.seen[i]
				if err := p.Decode(r.Data[:r.Length-roce.ICRCLen]); err != nil {
					t.Fatal(err)
				}
				switch flush := p.Opcode.Op() == roce.Flush; {
				case p.Opcode.IsResponse():
					if len(p.Payload) != 0 || p.Syndrome != roce.Ack {
						t.Errorf("%+v", p)
					}
				case p.Addr != addrOf(mem)+16 || p.RKey != uint32(mr.RKey()) || p.Len != 8 || !p.AckReq || flush && p.FETH != 1 || !flush && string(p.Payload) != "eight by":
					t.Errorf("%+v", p)
				}
			}
		})
	}
}

// Requests that are refused, and those without a receive, are answered by NAKs.
func TestCaptureRefusals(t *testing.T) {
	na, nb := openNIC(t, true), openNIC(t, true)
	if na.sharedE != nil {
		testutil.Skip(t, na.sharedE.Error())
	}
	a, b := newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC})
	o := observeNICs(t, na)
	a.join(b, nb.gid, 0, 0, 3, 5, 14)
	b.join(a, na.gid, 0, 0, 5, 3, 14)
	a.send(ib.SendWR{ID: 1, Opcode: ib.OpSend, SGEs: a.sge(0, 10), Flags: ib.SendSignaled})
	testutil.Eventually(t, "an attempt in vain", func() bool { na.Progress(); return a.q.(*QP).counters().RNR > 0 })
	b.recv(1, b.sge(0, 100))
	if wc := a.poll(); wc.Status != ib.WCSuccess {
		t.Fatalf("%+v", wc)
	}
	rnr := a.q.(*QP).counters().RNR
	a.send(ib.SendWR{ID: 2, Opcode: ib.OpRDMARead, SGEs: a.sge(0, 10), RemoteAddr: 1, RKey: b.mr.RKey(), Flags: ib.SendSignaled})
	if wc := a.poll(); wc.Status != ib.WCRemoteAccessErr {
		t.Fatalf("%+v", wc)
	}
	o.end()
	var naks []roce.Syndrome
	for i := range o.seen {
		var p roce.Packet
		if r := &o.seen[i]; p.Decode(r.Data[:r.Length-roce.ICRCLen]) == nil && p.Opcode.Op() == roce.Acknowledge && !p.Syndrome.IsAck() {
			naks = append(naks, p.Syndrome)
		}
	}
	if uint64(len(naks)) != rnr+1 || naks[0] != roce.RNRNak(1) || naks[rnr] != roce.NakAccess {
		t.Errorf("%v, and %d attempts in vain were counted", naks, rnr)
	}
}

// Over a bad network, the packets that the capture calls sent again are those that the counters do, reason by reason, and none
// other was on its way before.
func TestCaptureLoss(t *testing.T) {
	t.Setenv(EnvFaults, "loss=2%,duplicate=1%,reorder=5%,seed=3")
	na, nb := openNIC(t, false), openNIC(t, false)
	if na.sharedE != nil {
		testutil.Skip(t, na.sharedE.Error())
	}
	a, b := newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC})
	for i := range a.buf[:1<<16] {
		a.buf[i] = 0xee
	}
	o := observeNICs(t, na, nb)
	joinUDP(t, a, b, 14)
	for range 30 {
		a.send(ib.SendWR{Opcode: ib.OpRDMAWrite, SGEs: a.sge(0, 1<<14), RemoteAddr: addrOf(b.buf), RKey: b.mr.RKey(), Flags: ib.SendSignaled})
		for done := false; !done; {
			var wcs [1]ib.WC
			b.cq.Poll(wcs[:])
			if done = a.cq.Poll(wcs[:]) == 1; done && wcs[0].Status != ib.WCSuccess {
				t.Fatalf("%+v", wcs[0])
			}
		}
	}
	// What was repeated or held back may still arrive: not while the port is locked.
	wb := b.q.(*QP).wire
	wb.port.mu.Lock()
	cb := wb.resp.Counters
	err := o.stop()
	wb.port.unlock()
	if err != nil {
		t.Fatal(err)
	}
	ca := a.q.(*QP).counters().Wire
	o.end()
	again, verdicts, seen := map[string]uint64{}, map[observe.Verdict]uint64{}, map[ib.PSN]bool{}
	var sent, received uint64
	for i := range o.seen {
		r := &o.seen[i]
		var p roce.Packet
		if err := p.Decode(r.Data[:r.Length-roce.ICRCLen]); err != nil {
			t.Fatal(err)
		}
		if p.Opcode.IsResponse() {
			continue
		}
		if !r.Out {
			received++
			verdicts[r.Verdict]++
			continue
		}
		sent++
		if seen[p.PSN] != (r.Again != 0) {
			t.Errorf("PSN %d: was sent before: %v, but is called %q", p.PSN, seen[p.PSN], r.Again)
		}
		seen[p.PSN] = true
		if r.Again != 0 {
			again[r.Again.String()]++
		}
	}
	if sent != ca.Sent || ca.Resent == 0 || fmt.Sprint(again) != fmt.Sprint(ca.Again) {
		t.Errorf("captured %d packets, again %v; counted %+v", sent, again, ca)
	}
	if received != cb.Received || verdicts[observe.Early] == 0 || verdicts[observe.Early]+verdicts[observe.Duplicate] < cb.Duplicates || cb.Duplicates == 0 {
		t.Errorf("captured %d packets that came, %v; counted %+v", received, verdicts, cb)
	}
}

// Datagrams, and unreliable connections, of both kinds of path.
func TestCaptureUnreliable(t *testing.T) {
	na, nb := openNIC(t, true), openNIC(t, true)
	if na.sharedE != nil {
		testutil.Skip(t, na.sharedE.Error())
	}
	gid, index, _ := na.overUDP(t)
	_, _, port := nb.overUDP(t)
	a, b := newEnd(t, na, endConfig{typ: ib.UD}), newEnd(t, nb, endConfig{typ: ib.UD})
	for i := range a.buf[:4096] {
		a.buf[i] = 0xee
	}
	for _, e := range []*end{a, b} {
		for _, m := range []struct {
			a    ib.QPAttr
			mask ib.QPAttrMask
		}{{ib.QPAttr{State: ib.Init, Port: 1, QKey: 7}, ib.AttrState | ib.AttrPort | ib.AttrPKeyIndex | ib.AttrQKey}, {ib.QPAttr{State: ib.RTR}, ib.AttrState},
			{ib.QPAttr{State: ib.RTS, SQPSN: 9}, ib.AttrState | ib.AttrSQPSN}} {
			if err := e.q.Modify(t.Context(), &m.a, m.mask); err != nil {
				t.Fatal(err)
			}
		}
	}
	o := observeNICs(t, na, nb)
	for i, attr := range []ib.AHAttr{{DGID: nb.gid, Port: 1}, {DGID: gid, SGIDIndex: index, Port: 1, UDPPort: port}} {
		h, err := a.pd.(interface {
			CreateAH(ib.AHAttr) (driver.AH, error)
		}).CreateAH(attr)
		if err != nil {
			t.Fatal(err)
		}
		b.recv(1, b.sge(0, 1000))
		a.send(ib.SendWR{ID: uint64(i), Opcode: ib.OpSendWithImm, Imm: 5, SGEs: a.sge(0, 33), AH: h.Num(), RemoteQPN: b.q.QPN(), RemoteQKey: 7, Flags: ib.SendSignaled})
		a.poll()
		if wc := b.poll(); wc.Status != ib.WCSuccess || wc.ByteLen != 33+ib.GRHLen {
			t.Fatalf("%+v", wc)
		}
		h.Close()
	}
	ua, ub := newEnd(t, na, endConfig{typ: ib.UC}), newEnd(t, nb, endConfig{typ: ib.UC})
	for i := range ua.buf[:4096] {
		ua.buf[i] = 0xee
	}
	for _, e := range []struct{ x, y *end }{{ua, ub}, {ub, ua}} {
		e.x.init()
		if err := e.x.q.Modify(t.Context(), &ib.QPAttr{State: ib.RTR, AH: ib.AHAttr{DGID: e.y.n.gid}, PathMTU: ib.MTU256, DestQPN: e.y.q.QPN()}, ib.AttrState|ib.AttrAV|ib.AttrPathMTU|ib.AttrDestQPN|ib.AttrRQPSN); err != nil {
			t.Fatal(err)
		}
		if err := e.x.q.Modify(t.Context(), &ib.QPAttr{State: ib.RTS}, ib.AttrState|ib.AttrSQPSN); err != nil {
			t.Fatal(err)
		}
	}
	for i, wr := range []ib.SendWR{
		{Opcode: ib.OpRDMAWrite, SGEs: ua.sge(0, 500), RemoteAddr: addrOf(ub.buf), RKey: ub.mr.RKey()},
		{Opcode: ib.OpSend, SGEs: ua.sge(0, 522)},
		{Opcode: ib.OpSendWithImm, Imm: 3, SGEs: ua.sge(0, 500)},
		{Opcode: ib.OpRDMAWriteWithImm, Imm: 4, SGEs: ua.sge(0, 20), RemoteAddr: addrOf(ub.buf), RKey: ub.mr.RKey()},
	} {
		if i > 0 {
			ub.recv(uint64(i), ub.sge(4096, 1024))
		}
		wr.Flags |= ib.SendSignaled
		ua.send(wr)
		if wc := ua.poll(); wc.Status != ib.WCSuccess {
			t.Fatalf("%v: %+v", wr.Opcode, wc)
		}
		if i > 0 {
			if wc := ub.poll(); wc.Status != ib.WCSuccess || wc.ID != uint64(i) || (wc.Flags&ib.WCWithImm != 0) != (i > 1) {
				t.Fatalf("%v: %+v", wr.Opcode, wc)
			}
		}
	}
	want := []string{">UD_SEND_ONLY_WITH_IMMEDIATE", ">UD_SEND_ONLY_WITH_IMMEDIATE", "<UD_SEND_ONLY_WITH_IMMEDIATE", ">UC_RDMA_WRITE_FIRST", ">UC_RDMA_WRITE_LAST",
		">UC_SEND_FIRST", ">UC_SEND_MIDDLE", ">UC_SEND_LAST", ">UC_SEND_FIRST", ">UC_SEND_LAST_WITH_IMMEDIATE", ">UC_RDMA_WRITE_ONLY_WITH_IMMEDIATE"}
	if got := o.end(); !slices.Equal(got, want) {
		t.Errorf("captured %q, want %q", got, want)
	}
}

// What the port drops is captured, with the reason, and counted under it.
func TestCaptureDrops(t *testing.T) {
	x := newNetTest(t, false)
	n := x.e.n
	if n.sharedE != nil {
		testutil.Skip(t, n.sharedE.Error())
	}
	o := observeNICs(t, n)
	p := x.packet(roce.SendOnly)
	p.PKey = 0x1234
	x.send(x.sock, p, 8)
	x.counts("another partition", &x.port.drops.PKey)
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(x.port.sock.Local()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write(append([]byte{0xff}, make([]byte, 39)...))
	x.counts("no packet", &x.port.sock.Stats().Dropped[roce.DropOpcode])
	damaged := make([]byte, 40) // a UD packet for a queue pair that there is, which is found before the CRC is looked at
	x.packet(roce.SendOnly).PutHeader(damaged, 8)
	c.Write(damaged[:roce.Op(roce.RC, roce.SendOnly).HeaderLen()+8+roce.ICRCLen])
	x.counts("damaged", &x.port.sock.Stats().Dropped[roce.DropICRC])
	if err := o.stop(); err != nil {
		t.Fatal(err)
	}
	var got []string
	for i := range o.seen {
		got = append(got, o.seen[i].Verdict.Key())
	}
	if !slices.Equal(got, []string{"pkey", "opcode", "icrc"}) {
		t.Errorf("captured %q", got)
	}
	r, err := observe.ReadNIC(t.Context(), n.gid)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Ports) != 1 || fmt.Sprint(r.Ports[0].Dropped) != "map[icrc:1 opcode:1 pkey:1]" || len(r.QPs) != 1 || r.QPs[0].Path != pathUDP || r.PID == 0 {
		t.Errorf("%+v", r)
	}
}

// What is received is captured as it came, whatever becomes of it: bits that mean nothing, padding, and the invariant CRC, right or wrong.
func TestCaptureAsReceived(t *testing.T) {
	for _, faults := range []string{"", "reorder=100%"} {
		t.Run(faults, func(t *testing.T) {
			t.Setenv(EnvFaults, faults)
			x := newHostileNet(t, "127.0.0.1", "")
			if x.n.sharedE != nil {
				testutil.Skip(t, x.n.sharedE.Error())
			}
			src, dst := x.raw.LocalAddr().(*net.UDPAddr).AddrPort(), x.port.sock.Local()
			ud := x.victim(ib.UD, 97)
			ud.post(victimRecv)
			good := bytesOf(ud.packet(roce.SendOnly), 61)
			good[1] |= 0x40               // M
			good[4], good[8] = 0x3f, 0x7f // reserved
			good[len(good)-1] = 0xa5      // padding
			nobody := bytes.Clone(good)   // in another partition
			nobody[2] = 0x12
			const id = 0x1234
			o := observeNICs(t, x.n)
			rows := []struct {
				pkt     []byte
				damaged bool
				verdict observe.Verdict
				udp     []byte
			}{{pkt: nobody, verdict: observe.PKey}, {pkt: nobody, damaged: true, verdict: observe.PKey}, {pkt: good, damaged: true, verdict: observe.Dropped(roce.DropICRC)},
				{pkt: good, verdict: observe.Taken}}
			for i := range rows {
				r := &rows[i]
				r.udp = append(bytes.Clone(r.pkt), 0, 0, 0, 0)
				crc := testutil.ICRC(roce.AppendDatagram(nil, src, dst, id, r.udp))
				if r.damaged {
					crc ^= 1
				}
				binary.LittleEndian.PutUint32(r.udp[len(r.pkt):], crc)
				if _, err := x.raw.WriteToUDPAddrPort(r.udp, dst); err != nil {
					t.Fatal(err)
				}
			}
			if wc := ud.poll(); wc.Status != ib.WCSuccess {
				t.Fatalf("%+v", wc)
			}
			if err := o.stop(); err != nil {
				t.Fatal(err)
			}
			if len(o.seen) != len(rows) {
				t.Fatalf("captured %d packets, want %d", len(o.seen), len(rows))
			}
			var render observe.Renderer
			for i, r := range rows {
				got := &o.seen[i]
				if !bytes.Equal(got.Data, r.udp) || got.Verdict != r.verdict {
					t.Errorf("packet %d: captured % x, %v, want % x, %v", i, got.Data, got.Verdict, r.udp, r.verdict)
				}
				render.KeepPorts = true
				ip, _, _ := render.Render(got)
				if !bytes.HasSuffix(ip, r.udp) || testutil.HasICRC(ip) == r.damaged || (binary.BigEndian.Uint16(ip[4:]) == id) == r.damaged {
					t.Errorf("packet %d: shown as % x", i, ip)
				}
			}
		})
	}
}

// Observers come and go, more than there can be are refused, and a NIC that is closed ends with them.
func TestObservers(t *testing.T) {
	n, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	if n.sharedE != nil {
		n.Close()
		testutil.Skip(t, n.sharedE.Error())
	}
	var all []*observe.Source
	for range maxTaps {
		s, err := observe.Attach(t.Context(), n.gid, 64, 0)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	if _, err := observe.Attach(t.Context(), n.gid, 64, 0); err == nil || !strings.Contains(err.Error(), "as many observers") {
		t.Errorf("one more: %v", err)
	}
	all[0].Close()
	testutil.Eventually(t, "the place of one that has left", func() bool {
		s, err := observe.Attach(t.Context(), n.gid, 64, 0)
		if err == nil {
			all[0] = s
		}
		return err == nil
	})
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if n.taps.Load() != nil {
		t.Error("somebody observes a NIC that is closed")
	}
	for _, s := range all {
		testutil.Eventually(t, "the end of the NIC", s.Ended)
		s.Close()
	}
	if _, err := observe.Attach(t.Context(), n.gid, 64, 0); err == nil {
		t.Error("a NIC that is closed was observed")
	}
}

// A NIC that is told to calls its observer before it is used; one that nobody answers works all the same.
func TestJoinCapture(t *testing.T) {
	l, err := observe.Listen()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(observe.EnvCapture, l.Name)
	calls := make(chan *observe.Source, 1)
	go l.Take(1000, 0, calls, func(err error) { t.Error(err) })
	n := openNIC(t, false)
	if n.taps.Load() == nil {
		t.Error("its first packets are not seen")
	}
	s := <-calls
	if s.GID != n.gid || s.Program == "" {
		t.Errorf("%+v", s)
	}
	s.Close()
	l.Close()
	for range calls {
	}
	if n := openNIC(t, false); n.taps.Load() != nil {
		t.Error("somebody observes")
	}
}

// Requests of observers that make no sense are refused, and nothing else happens.
func FuzzObserver(f *testing.F) {
	n, err := Open()
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { n.Close() })
	if n.sharedE != nil {
		f.Skip(n.sharedE)
	}
	f.Add((&observe.Request{What: observe.Counters, To: n.gid}).Encode(), false)
	f.Add((&observe.Request{What: observe.Packets, SnapLen: 64, Ring: 4096 + 1<<17, To: n.gid}).Encode(), true)
	f.Add((&observe.Request{What: observe.Packets, SnapLen: 64, Ring: 1 << 31}).Encode(), true)
	f.Add((&observe.Request{What: 3}).Encode(), false)
	f.Fuzz(func(t *testing.T, b []byte, withFD bool) {
		c := knock(t, n)
		defer c.Close()
		var oob []byte
		if withFD {
			oob = rightsOf(t, 1<<17+4096)
		}
		if len(b) == 0 {
			return
		}
		c.WriteMsgUnix(b, oob, nil)
		c.SetDeadline(time.Now().Add(10 * time.Second))
		answer := make([]byte, 512)
		if _, err := c.Read(answer); err != nil && strings.Contains(err.Error(), "timeout") && !withFD {
			t.Errorf("%x: %v", b, err)
		}
	})
}

// rightsOf is a control message with a memory file of n bytes, which stays open until the test ends.
func rightsOf(t testing.TB, n int) []byte {
	t.Helper()
	reg, err := mem.Alloc(n, mem.Options{Huge: mem.HugeNever})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reg.Close() })
	return unix.UnixRights(reg.FD())
}

// captured is a connected pair whose initiator is captured, but nobody reads on: the ring fills up, and what does not fit is lost.
func captured(t testing.TB) (a, b *end) {
	na, nb := openNIC(t, true), openNIC(t, true)
	if na.sharedE != nil {
		testutil.Skip(t, na.sharedE.Error())
	}
	a, b = newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC})
	a.connect(b)
	b.connect(a)
	s, err := observe.Attach(context.Background(), na.gid, observe.MaxData, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return a, b
}

// Being captured costs no memory, and an observer that does not read holds nobody up.
func TestCapturedAllocatesNothing(t *testing.T) {
	a, b := captured(t)
	wr := []ib.SendWR{{ID: 1, Opcode: ib.OpRDMAWrite, Flags: ib.SendSignaled, SGEs: a.sge(0, 10000), RemoteAddr: addrOf(b.buf), RKey: b.mr.RKey()}}
	var wc [1]ib.WC
	a.send(wr[0])
	a.poll()
	if n := testing.AllocsPerRun(200, func() {
		a.q.PostSend(wr)
		for a.cq.Poll(wc[:]) == 0 {
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkSendCaptured is BenchmarkSend for a NIC whose packets are captured, and mostly lost.
func BenchmarkSendCaptured(b *testing.B) {
	x, y := captured(b)
	wr := []ib.SendWR{{ID: 1, Opcode: ib.OpSend, Inline: make([]byte, 64)}}
	rr := []ib.RecvWR{{ID: 2, SGEs: y.sge(0, 64)}}
	var wc [16]ib.WC
	b.ReportAllocs()
	for b.Loop() {
		y.q.PostRecv(rr)
		x.q.PostSend(wr)
		for y.cq.Poll(wc[:]) == 0 {
		}
	}
}
