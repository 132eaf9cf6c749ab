package mlx5emu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A client of the emulated device speaks to a software NIC that knows nothing of it.
func TestPeerIsSoftwareNIC(t *testing.T) {
	d := newDevice(t, Config{})
	nic := openPeer(t)
	talk(t, d, nic, ib.AHAttr{DGID: nic.GID(), HopLimit: 64, Port: 1}, ib.AHAttr{DGID: d.nic.GID(), HopLimit: 64, Port: 1})
}

// Two queue pairs of a device that are connected by an address of the host meet over UDP.
func TestUDP(t *testing.T) {
	c := connect(t, newDevice(t, Config{}))
	gid := gidOf(t, c.dev, netip.MustParseAddr("127.0.0.1"))
	m := mapAt(t, 0, 4*pageSize)
	key := uint32(c.reg(m, everything).LKey)
	cq := c.newCQ(64, -1)
	for _, typ := range []ib.QPType{ib.RC, ib.UC} {
		a, b := c.newQP(cq, cq, qpOptions{typ: typ, srq: -1, uidx: 3}), c.newQP(cq, cq, qpOptions{typ: typ, srq: -1, uidx: 4})
		for _, x := range [][2]*queuePair{{a, b}, {b, a}} {
			for _, s := range []ib.QPState{ib.Init, ib.RTR, ib.RTS} {
				r := x[0].attrs(x[1].qpn)
				r.State, r.AH = s, ib.AHAttr{DGID: gid.GID, SGIDIndex: gid.Index, HopLimit: 64, Port: 1}
				x[0].modify(r, changes[typ][[2]ib.QPState{s - 1, s}].need|ib.AttrState)
			}
		}
		fill(m[:3000], byte(typ))
		b.recv(segData(addrOf(m)+8192, 4096, key))
		a.send(opSendImm, ceUpdate, 9, segData(addrOf(m), 3000, key))
		both := []completion{cq.wait(), cq.wait()}
		for _, e := range both {
			if e.op != cqeRequester && (e.op != cqeRecvSendImm || e.n != 3000 || e.imm != 9) || e.syndrome != 0 && e.op >= cqeRequesterErr {
				t.Errorf("%v: CQE %+v", typ, e)
			}
		}
		if !bytes.Equal(m[:3000], m[8192:11192]) {
			t.Errorf("%v: what was received is not what was sent", typ)
		}
	}
}

// Queue pairs of two devices of a process meet at the address that both have, whichever has the port for RoCEv2.
func TestUDPBetweenDevices(t *testing.T) {
	var cs [2]*client
	var cqs [2]*cqueue
	var qs [2]*queuePair
	for i := range cs {
		cs[i] = connect(t, newDevice(t, Config{}))
		cqs[i] = cs[i].newCQ(64, -1)
		qs[i] = cs[i].newQP(cqs[i], cqs[i], qpOptions{srq: -1, uidx: 3})
	}
	for i, q := range qs {
		gid := gidOf(t, cs[i].dev, netip.MustParseAddr("127.0.0.1"))
		for _, s := range []ib.QPState{ib.Init, ib.RTR, ib.RTS} {
			r := q.attrs(qs[1-i].qpn)
			r.State, r.AH = s, ib.AHAttr{DGID: gid.GID, SGIDIndex: gid.Index, HopLimit: 64, Port: 1}
			q.modify(r, changes[ib.RC][[2]ib.QPState{s - 1, s}].need|ib.AttrState)
		}
	}
	for i, q := range qs {
		m := mapAt(t, 0, pageSize)
		key := uint32(cs[1-i].reg(m, everything).LKey)
		qs[1-i].recv(segData(addrOf(m), 64, key))
		q.send(opSend, ceUpdate, 0, segInline([]byte("hello")))
		cqs[i].expect(cqeRequester, 5)
		cqs[1-i].expect(cqeRecvSend, 5)
		if string(m[:5]) != "hello" {
			t.Errorf("received %q", m[:5])
		}
	}
}

// So do their datagrams.
func TestDatagramsBetweenDevices(t *testing.T) {
	var cs [3]*client // two of the first device, whose is the port
	var cqs [3]*cqueue
	var qs [3]*queuePair
	var bufs [3][]byte
	for i := range cs {
		if i == 1 {
			cs[i] = connect(t, cs[0].dev)
		} else {
			cs[i] = connect(t, newDevice(t, Config{}))
		}
		bufs[i] = mapAt(t, 0, pageSize)
		cqs[i] = cs[i].newCQ(64, -1)
		qs[i] = cs[i].newQP(cqs[i], cqs[i], qpOptions{typ: ib.UD, srq: -1, uidx: 3})
		qs[i].connectTo(0)
		key := uint32(cs[i].reg(bufs[i], everything).LKey)
		for range 8 {
			qs[i].recv(segData(addrOf(bufs[i]), 200, key))
		}
	}
	n := byte(0)
	for range 2 {
		for i, from := range qs {
			for k, to := range qs {
				gid := gidOf(t, cs[i].dev, netip.MustParseAddr("127.0.0.1"))
				av := make([]byte, avSize)
				be.PutUint32(av, 0x1111)
				be.PutUint32(av[8:], 1<<31|to.qpn)
				n++
				av[26], av[27] = 4*n, 64+n // DSCP, and hop limit
				be.PutUint32(av[28:], uint32(gid.Index)<<20)
				copy(av[32:], gid.GID[:])
				from.send(opSend, ceUpdate, 0, av, segInline([]byte{n}))
				if i == k { // its two completions come in either order
					cqs[i].wait()
					cqs[i].wait()
				} else {
					cqs[i].expect(cqeRequester, 1)
					cqs[k].expect(cqeRecvSend, 41)
				}
				if bufs[k][40] != n {
					t.Errorf("from %d to %d: received %d, not %d", i, k, bufs[k][40], n)
				}
				// The second half of a GRH is the IPv4 header, whose ECN bits are congestion control's.
				if ip := bufs[k][20:]; ip[1]&^3 != 4*n || ip[8] != 64+n {
					t.Errorf("from %d to %d: the IP header is % x, want traffic class %d and time to live %d", i, k, ip[:20], 4*n, 64+n)
				}
			}
		}
	}
}

// A device loses packets when it is to, and what is lost is sent again.
func TestFaults(t *testing.T) {
	if _, err := NewDevice(Config{Faults: "loss"}); err == nil {
		t.Error("a device with faults that are none")
	}
	c := connect(t, newDevice(t, Config{Faults: "loss=10%"}))
	gid := gidOf(t, c.dev, netip.MustParseAddr("127.0.0.1"))
	m := mapAt(t, 0, 4*pageSize)
	key := uint32(c.reg(m, everything).LKey)
	cq := c.newCQ(64, -1)
	a, b := c.newQP(cq, cq, qpOptions{srq: -1, uidx: 3}), c.newQP(cq, cq, qpOptions{srq: -1, uidx: 4})
	for _, x := range [][2]*queuePair{{a, b}, {b, a}} {
		for _, s := range []ib.QPState{ib.Init, ib.RTR, ib.RTS} {
			r := x[0].attrs(x[1].qpn)
			r.State, r.AH, r.AckTimeout = s, ib.AHAttr{DGID: gid.GID, SGIDIndex: gid.Index, HopLimit: 64, Port: 1}, 12
			x[0].modify(r, changes[ib.RC][[2]ib.QPState{s - 1, s}].need|ib.AttrState)
		}
	}
	for range 50 { // of four packets each, and their answers
		a.send(opWrite, ceUpdate, 0, segRemote(addrOf(m)+8192, key), segData(addrOf(m), 4096, key))
		cq.expect(cqeRequester, 4096)
	}
	seen := false
	for _, q := range c.dev.nic.Counters().QPs {
		seen = seen || q.QPN == a.qpn && q.Wire.Resent > 0 && q.Wire.Timeouts+q.Wire.SeqNAKs > 0
	}
	if !seen {
		t.Errorf("nothing was sent again: %+v", c.dev.nic.Counters().QPs)
	}
}

func openPeer(t *testing.T) *softnic.NIC {
	t.Helper()
	nic, err := softnic.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := nic.Close(); err != nil {
			t.Error(err)
		}
	})
	return nic
}

func gidOf(t *testing.T, d *Device, addr netip.Addr) ib.GIDEntry {
	t.Helper()
	l, err := d.GIDs()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range l {
		if e.GID.Addr() == addr {
			return e
		}
	}
	t.Fatalf("no GID of %v", addr)
	return ib.GIDEntry{}
}

// talk connects a queue pair of the device with one of the NIC's, and sends both ways.
func talk(t *testing.T, d *Device, nic *softnic.NIC, toPeer, toDevice ib.AHAttr) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	c := connect(t, d)
	m := mapAt(t, 0, pageSize)
	key := uint32(c.reg(m, everything).LKey)
	cq := c.newCQ(64, -1)
	q := c.newQP(cq, cq, qpOptions{srq: -1, uidx: 3})

	pd, err := nic.AllocPD()
	must(err)
	defer pd.Close()
	pcq, err := nic.CreateCQ(driver.CQConfig{Entries: 64})
	must(err)
	defer pcq.Close()
	p, err := pd.CreateQP(driver.QPConfig{Type: ib.RC, SendCQ: pcq, RecvCQ: pcq, Cap: ib.QPCap{MaxSendWR: 8, MaxRecvWR: 8, MaxSendSGE: 1, MaxRecvSGE: 1, MaxInline: 64}})
	must(err)
	defer p.Close()
	theirs := make([]byte, 256)
	mr, err := pd.RegisterMR(driver.MRConfig{Mem: theirs, Access: everything, FD: -1})
	must(err)
	defer mr.Close()

	for _, s := range []ib.QPState{ib.Init, ib.RTR, ib.RTS} {
		need := changes[ib.RC][[2]ib.QPState{s - 1, s}].need | ib.AttrState
		a := q.attrs(uint32(p.QPN()))
		a.State, a.AH = s, toPeer
		q.modify(a, need)
		b := q.attrs(q.qpn)
		b.State, b.AH = s, toDevice
		must(p.Modify(context.Background(), &b, need))
	}
	wait := func() ib.WC {
		t.Helper()
		var wcs [1]ib.WC
		testutil.Eventually(t, "the peer's completion", func() bool { return pcq.Poll(wcs[:]) == 1 })
		if wcs[0].Status != ib.WCSuccess {
			t.Fatalf("the peer's completion: %v", wcs[0].Status)
		}
		return wcs[0]
	}
	at := addrOf(theirs)
	_, err = p.PostRecv([]ib.RecvWR{{ID: 1, SGEs: []ib.SGE{{Addr: at, Length: 64, LKey: mr.LKey()}}}})
	must(err)
	copy(m, "from the emulated device")
	q.send(opSendImm, ceUpdate, 77, segData(addrOf(m), 24, key))
	cq.expect(cqeRequester, 24)
	if wc := wait(); wc.Imm != 77 || string(theirs[:24]) != "from the emulated device" {
		t.Errorf("the peer received %q, %+v", theirs[:24], wc)
	}
	q.recv(segData(addrOf(m)+512, 64, key))
	_, err = p.PostSend([]ib.SendWR{{ID: 2, Opcode: ib.OpSend, Flags: ib.SendSignaled, Inline: []byte("from the software NIC")}})
	must(err)
	cq.expect(cqeRecvSend, 21)
	wait()
	// The device's client knows its own region by the key that peers have to use.
	_, err = p.PostSend([]ib.SendWR{{ID: 3, Opcode: ib.OpRDMARead, Flags: ib.SendSignaled, RemoteAddr: addrOf(m) + 512, RKey: ib.RKey(key),
		SGEs: []ib.SGE{{Addr: at + 128, Length: 21, LKey: mr.LKey()}}}})
	must(err)
	wait()
	if string(theirs[128:149]) != "from the software NIC" {
		t.Errorf("the peer read %q", theirs[128:149])
	}
	q.send(opRead, ceUpdate, 0, segRemote(at, uint32(mr.RKey())), segData(addrOf(m)+1024, 24, key))
	cq.expect(cqeRequester, 24)
	if string(m[1024:1048]) != "from the emulated device" {
		t.Errorf("the device read %q", m[1024:1048])
	}
}

func init() {
	testutil.RegisterChild("mlx5emu.peer", func([]string) {
		nic, err := softnic.Open()
		if err != nil {
			fmt.Println("error", err)
			return
		}
		defer nic.Close()
		fmt.Println("gid", nic.GID())
		for range testutil.ChildInput() {
		}
	})
}

// A datagram does not have the device wait for another process: where no address handle has led yet, there is no way.
func TestDatagramsDoNotDial(t *testing.T) {
	peer := testutil.StartChild(t, "mlx5emu.peer")
	var gid ib.GID
	if err := gid.UnmarshalText([]byte(peer.Expect("gid "))); err != nil {
		t.Fatal(err)
	}
	c := connect(t, newDevice(t, Config{Manual: true}))
	m := mapAt(t, 0, pageSize)
	key := uint32(c.reg(m, everything).LKey)
	cq := c.newCQ(64, -1)
	send := func(q *queuePair) completion {
		t.Helper()
		av := make([]byte, avSize)
		be.PutUint32(av[8:], 1<<31|77)
		av[27] = 64
		copy(av[32:], gid[:])
		q.send(opSend, ceUpdate, 0, av, segData(addrOf(m), 8, key))
		return cq.wait()
	}
	q := c.newQP(cq, cq, qpOptions{typ: ib.UD, srq: -1, uidx: 1})
	q.connectTo(0)
	if e := send(q); e.op != cqeRequesterErr || e.syndrome != syndromes[ib.WCLocalQPOpErr] {
		t.Errorf("without a handle: CQE with opcode %d and syndrome %#x", e.op, e.syndrome)
	}
	if _, err := c.f.CreateAH(c.pd, &ib.AHAttr{DGID: gid, HopLimit: 64, Port: 1}, ib.LinkEthernet, make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	q = c.newQP(cq, cq, qpOptions{typ: ib.UD, srq: -1, uidx: 2})
	q.connectTo(0)
	if e := send(q); e.op != cqeRequester {
		t.Errorf("with a handle: CQE with opcode %d and syndrome %#x", e.op, e.syndrome)
	}
}

// Handles that the client has destroyed do not pile up.
func TestIdleHandles(t *testing.T) {
	c := connect(t, newDevice(t, Config{Manual: true}))
	var handles []uint32
	for i := range 2 * idleAHs {
		h, err := c.f.CreateAH(c.pd, &ib.AHAttr{DGID: c.dev.nic.GID(), FlowLabel: uint32(i), HopLimit: 64, Port: 1}, ib.LinkEthernet, make([]byte, 16))
		if err != nil {
			t.Fatal(err)
		}
		handles = append(handles, h)
	}
	kept := func() (all, idle int) {
		c.dev.mu.Lock()
		defer c.dev.mu.Unlock()
		h := &c.dev.order[0].ahs
		return len(h.m), h.idle.Len()
	}
	if all, idle := kept(); all != 2*idleAHs || idle != 0 {
		t.Errorf("%d handles are kept for %d of the client's, %d of them idle", all, len(handles), idle)
	}
	for _, h := range handles {
		if err := c.f.DestroyAH(h); err != nil {
			t.Fatal(err)
		}
	}
	if all, idle := kept(); all != idleAHs || idle != idleAHs {
		t.Errorf("%d handles are kept for nobody, %d of them idle", all, idle)
	}
	if err := c.f.DeallocPD(c.pd); err != nil {
		t.Error(err)
	}
	if all, idle := kept(); all != 0 || idle != 0 {
		t.Errorf("%d handles are left of a protection domain that has gone", all+idle)
	}
}

// A sender is a process that sends, with the software NIC, one message for each line that it reads.
func sender(args []string) (err error) {
	typ := map[string]ib.QPType{"RC": ib.RC, "UC": ib.UC, "UD": ib.UD}[args[0]]
	nic, err := softnic.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, nic.Close()) }()
	pd, err := nic.AllocPD()
	if err != nil {
		return err
	}
	defer pd.Close()
	cq, err := nic.CreateCQ(driver.CQConfig{Entries: 64})
	if err != nil {
		return err
	}
	defer cq.Close()
	q, err := pd.CreateQP(driver.QPConfig{Type: typ, SendCQ: cq, RecvCQ: cq, Cap: ib.QPCap{MaxSendWR: 8, MaxRecvWR: 8, MaxSendSGE: 1, MaxRecvSGE: 1, MaxInline: 64}})
	if err != nil {
		return err
	}
	defer q.Close()
	fmt.Println("at", nic.GID(), uint32(q.QPN()))
	in := testutil.ChildInput()
	var to ib.AHAttr
	var qpn uint32
	gid, rest, _ := strings.Cut(<-in, " ")
	if err := to.DGID.UnmarshalText([]byte(gid)); err != nil {
		return err
	}
	fmt.Sscan(rest, &qpn)
	to.HopLimit, to.Port = 64, 1
	wr := ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled, Inline: []byte("a message")}
	for _, s := range []ib.QPState{ib.Init, ib.RTR, ib.RTS} {
		a := ib.QPAttr{State: s, Port: 1, QKey: 0x1111, AH: to, PathMTU: ib.MTU1024, DestQPN: ib.QPN(qpn), RQPSN: 1, SQPSN: 1, AckTimeout: 20, RetryCount: 7}
		if err := q.Modify(context.Background(), &a, changes[typ][[2]ib.QPState{s - 1, s}].need|ib.AttrState); err != nil {
			return err
		}
	}
	if typ == ib.UD {
		h, err := pd.CreateAH(to)
		if err != nil {
			return err
		}
		defer h.Close()
		wr.AH, wr.RemoteQPN, wr.RemoteQKey = h.Num(), ib.QPN(qpn), 0x1111
	}
	fmt.Println("ready")
	for range in {
		if _, err := q.PostSend([]ib.SendWR{wr}); err != nil {
			return err
		}
		var wcs [1]ib.WC
		for cq.Poll(wcs[:]) == 0 {
			time.Sleep(10 * time.Microsecond)
		}
		fmt.Println("sent:", wcs[0].Status)
	}
	return nil
}

func init() {
	testutil.RegisterChild("mlx5emu.sender", func(args []string) {
		if err := sender(args); err != nil {
			fmt.Println("error", err)
		}
	})
}

// A device reads what its client has posted when a message of another process comes, also if nobody has told it to look. The engine does
// not: nobody steps before the message has been sent.
func TestReceivesAreReadForMessages(t *testing.T) {
	for _, name := range []string{"RC", "UC", "UD", "RC with SRQ"} {
		t.Run(name, func(t *testing.T) {
			word, _, shared := strings.Cut(name, " ")
			typ := map[string]ib.QPType{"RC": ib.RC, "UC": ib.UC, "UD": ib.UD}[word]
			c := connect(t, newDevice(t, Config{Manual: true}))
			m := mapAt(t, 0, pageSize)
			key := uint32(c.reg(m, everything).LKey)
			cq := c.newCQ(64, -1)
			opts := qpOptions{typ: typ, srq: -1, uidx: 3}
			var list, record []byte
			if shared {
				list, record = mapAt(t, 0, pageSize), mapAt(t, 0, pageSize)
				for i := range 7 {
					be.PutUint16(list[i*64+2:], uint16(i+1))
				}
				h, _, _, err := c.f.CreateSRQ(c.pd, 7, 2, 77, uverbs.Bytes(&abi.Mlx5CreateSRQ{BufAddr: addrOf(list), DBAddr: addrOf(record)}), make([]byte, 8))
				if err != nil {
					t.Fatal(err)
				}
				opts.srq = int(h)
			}
			q := c.newQP(cq, cq, opts)
			p := testutil.StartChild(t, "mlx5emu.sender", word)
			at, qpn, _ := strings.Cut(p.Expect("at "), " ")
			var gid ib.GID
			n, err := strconv.Atoi(qpn)
			if err = errors.Join(err, gid.UnmarshalText([]byte(at))); err != nil {
				t.Fatal(err)
			}
			q.toInit()
			p.Send(fmt.Sprint(c.dev.nic.GID(), " ", q.qpn))
			for _, s := range []ib.QPState{ib.RTR, ib.RTS} {
				a := q.attrs(uint32(n))
				a.State, a.AH = s, ib.AHAttr{DGID: gid, HopLimit: 64, Port: 1}
				q.modify(a, changes[typ][[2]ib.QPState{s - 1, s}].need|ib.AttrState)
			}
			p.Expect("ready")
			for i := range 5 {
				seg := segData(addrOf(m)+uint64(i)*256, 256, key)
				if shared {
					copy(list[i*64+16:], append(seg, dataEnd...))
					be.PutUint32(record, uint32(i+1))
				} else {
					q.recv(seg)
				}
				p.Send("send")
				if s := p.Expect("sent: "); s != ib.WCSuccess.String() {
					t.Fatalf("message %d: %s", i, s)
				}
				if e := cq.wait(); e.op != cqeRecvSend {
					t.Fatalf("message %d: %+v", i, e)
				}
				if got := m[i*256:][:49]; !bytes.Contains(got, []byte("a message")) {
					t.Errorf("message %d is %q", i, got)
				}
			}
		})
	}
}

// Where a peer is, the device may be told; otherwise it guesses from whose number it is.
func TestMeet(t *testing.T) {
	c := connect(t, newDevice(t, Config{}))
	gid := gidOf(t, c.dev, netip.MustParseAddr("127.0.0.1"))
	cq := c.newCQ(64, -1)
	own := c.newQP(cq, cq, qpOptions{srq: -1, uidx: 3})
	port := func(qpn uint32) uint16 {
		t.Helper()
		q := c.newQP(cq, cq, qpOptions{srq: -1, uidx: 4})
		for _, s := range []ib.QPState{ib.Init, ib.RTR} {
			r := q.attrs(qpn)
			r.State, r.AH = s, ib.AHAttr{DGID: gid.GID, SGIDIndex: gid.Index, HopLimit: 64, Port: 1}
			q.modify(r, changes[ib.RC][[2]ib.QPState{s - 1, s}].need|ib.AttrState)
		}
		c.dev.mu.Lock()
		defer c.dev.mu.Unlock()
		a, err := c.dev.qps[q.qpn].soft.Query()
		if err != nil {
			t.Fatal(err)
		}
		return a.AH.UDPPort
	}
	guessed := port(own.qpn)
	if guessed == 0 || port(0x123456) != 0 {
		t.Errorf("guessed %d", guessed)
	}
	forget := c.dev.Meet(gid.GID, ib.QPN(own.qpn), 0)
	if p := port(own.qpn); p != 0 {
		t.Errorf("port %d, not 0", p)
	}
	again := c.dev.Meet(gid.GID, ib.QPN(own.qpn), 9)
	forget()
	if p := port(own.qpn); p != 9 {
		t.Errorf("port %d, not 9", p)
	}
	again()
	if p := port(own.qpn); p != guessed || len(c.dev.told.of) != 0 {
		t.Errorf("port %d, not %d, %d peers", p, guessed, len(c.dev.told.of))
	}
}
