package softnic

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A hostileNet is a NIC with a connection of each kind, whose peer on the network is the test, byte by byte.
type hostileNet struct {
	t         *testing.T
	n         *NIC
	port      *netPort
	gid       int
	raw       *net.UDPConn // the peer
	other     *net.UDPConn // a stranger; nil: this host has no other address
	bystander *netVictim   // an RC connection that must not mind
	selective bool         // connections are as between two of this library's NICs; else go-back-N
}

// A netVictim is a QP of the NIC's, connected to the queue pair peerQPN of the test's.
type netVictim struct {
	*end
	peerQPN uint32
	psn     ib.PSN // of the next packet that it expects
}

const (
	victimMTU               = ib.MTU256
	victimQKey              = 0x1234567
	victimQPN, bystanderQPN = 99, 98 // their peers'
	victimRecv              = 1024   // bytes at the start of the memory that receives are posted to; nothing else of it may ever change
	victimSize              = 8 << 10
)

func newHostileNet(t *testing.T, local, stranger string) *hostileNet {
	t.Helper()
	n := openNIC(t, false)
	addr := netip.MustParseAddr(local)
	x := &hostileNet{t: t, n: n, gid: gidIndex(t, n, addr)}
	var err error
	if x.port, err = n.netPortAt(x.gid); err != nil {
		t.Fatal(err)
	}
	open := func(a string) *net.UDPConn {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(a), 0)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	x.raw = open(local)
	if stranger != "" {
		x.other = open(stranger)
	}
	x.bystander = x.victim(ib.RC, bystanderQPN)
	return x
}

// gidIndex is where the NIC's GID table has an address.
func gidIndex(t *testing.T, n *NIC, addr netip.Addr) int {
	t.Helper()
	gids, err := n.GIDs(1)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(gids, func(g ib.GIDEntry) bool { return g.GID.Addr() == addr })
	if i < 0 {
		testutil.Skip(t, "this host does not have the address "+addr.String())
	}
	return gids[i].Index
}

// victim makes a QP whose receives are all posted to the start of its memory.
func (x *hostileNet) victim(typ ib.QPType, peerQPN uint32) *netVictim {
	x.t.Helper()
	v := &netVictim{end: newEnd(x.t, x.n, endConfig{typ: typ, size: victimSize, depth: 256}), peerQPN: peerQPN, psn: 70}
	for i := range v.buf {
		v.buf[i] = byte(i * 13)
	}
	set := func(a ib.QPAttr, mask ib.QPAttrMask) {
		x.t.Helper()
		if err := v.q.Modify(context.Background(), &a, mask|ib.AttrState); err != nil {
			x.t.Fatal(err)
		}
	}
	peer := x.raw.LocalAddr().(*net.UDPAddr).AddrPort()
	rtr := ib.QPAttr{State: ib.RTR, AH: ib.AHAttr{DGID: ib.GIDFromAddr(peer.Addr().Unmap()), SGIDIndex: x.gid, UDPPort: peer.Port()}, PathMTU: victimMTU,
		DestQPN: ib.QPN(peerQPN), RQPSN: v.psn, MaxDestRdAtomic: 4, MinRNRTimer: 1}
	rts := ib.QPAttr{State: ib.RTS, MaxRdAtomic: 4, AckTimeout: 18, RetryCount: 7, RNRRetry: 7, SQPSN: 500}
	const conn = ib.AttrAV | ib.AttrPathMTU | ib.AttrDestQPN | ib.AttrRQPSN
	switch typ {
	case ib.RC:
		v.init()
		set(rtr, conn|ib.AttrMaxDestRdAtomic|ib.AttrMinRNRTimer)
		if peerQPN != bystanderQPN && !x.selective {
			v.q.(*QP).wire.plain()
		}
		set(rts, ib.AttrMaxRdAtomic|ib.AttrAckTimeout|ib.AttrRetryCount|ib.AttrRNRRetry|ib.AttrSQPSN)
	case ib.UC:
		v.init()
		set(rtr, conn)
		set(rts, ib.AttrSQPSN)
	case ib.UD:
		set(ib.QPAttr{State: ib.Init, Port: 1, QKey: victimQKey}, ib.AttrPort|ib.AttrPKeyIndex|ib.AttrQKey)
		set(ib.QPAttr{State: ib.RTR}, 0)
		set(ib.QPAttr{State: ib.RTS}, ib.AttrSQPSN)
	}
	return v
}

// plain makes the connection one as with others than this library's NICs: go-back-N.
func (w *wireQP) plain() {
	w.port.mu.Lock()
	defer w.port.mu.Unlock()
	w.cfg.Selective = false
	w.resp = wire.NewResponder(w.cfg, &w.t)
}

// post posts a receive of n bytes.
func (v *netVictim) post(n int) { v.recv(7, v.sge(0, n)) }

// service is the victim's.
func (v *netVictim) service() roce.Service {
	return map[ib.QPType]roce.Service{ib.RC: roce.RC, ib.UC: roce.UC, ib.UD: roce.UD}[v.q.(*QP).typ]
}

// packet is one that the victim expects.
func (v *netVictim) packet(op uint8) *roce.Packet {
	return &roce.Packet{Opcode: roce.Op(v.service(), op), PKey: roce.DefaultPKey, DestQP: uint32(v.q.QPN()), PSN: v.psn, AckReq: true,
		QKey: victimQKey, SrcQP: 77, Addr: addrOf(v.buf) + victimRecv, RKey: uint32(v.mr.RKey())}
}

// bytesOf is a packet, without its invariant CRC, with n bytes of payload that are not in the victim's memory.
func bytesOf(p *roce.Packet, n int) []byte {
	b := make([]byte, p.Opcode.HeaderLen()+n+roce.Pad(n))
	p.PutHeader(b, n)
	for i := range n {
		b[p.Opcode.HeaderLen()+i] = 0xee
	}
	return b
}

// send sends a packet, with its CRC or a wrong one.
func (x *hostileNet) send(from *net.UDPConn, b []byte, wrongCRC bool) {
	x.t.Helper()
	src := from.LocalAddr().(*net.UDPAddr).AddrPort()
	var c roce.ICRC
	c.Init(netip.AddrPortFrom(src.Addr().Unmap(), src.Port()), x.port.sock.Local())
	if len(b) >= roce.BTHLen {
		b = c.Put(b)
	}
	if wrongCRC {
		b[len(b)-1] ^= 0xff
	}
	if _, err := from.WriteToUDPAddrPort(b, x.port.sock.Local()); err != nil {
		x.t.Fatal(err)
	}
}

// reply is the next packet that the NIC sends to the peer.
func (x *hostileNet) reply() (p roce.Packet) {
	x.t.Helper()
	b := make([]byte, 8192)
	x.raw.SetReadDeadline(time.Now().Add(testutil.Patience))
	k, src, err := x.raw.ReadFromUDPAddrPort(b)
	if err != nil {
		x.t.Fatalf("no answer: %v; %+v", err, x.n.Counters())
	}
	var c roce.ICRC
	c.Init(netip.AddrPortFrom(src.Addr().Unmap(), src.Port()), x.raw.LocalAddr().(*net.UDPAddr).AddrPort())
	pkt, err := c.Split(b[:k], true)
	if err == nil {
		err = p.Decode(pkt)
	}
	if err != nil {
		x.t.Fatalf("% x: %v", b[:k], err)
	}
	return p
}

// mark has the bystander receive a message, and returns the packets that the NIC has sent until it acknowledges that: the answers to
// whatever was sent before.
func (x *hostileNet) mark() (before []roce.Packet) {
	x.t.Helper()
	y := x.bystander
	y.post(victimRecv)
	x.send(x.raw, bytesOf(y.packet(roce.SendOnly), 64), false)
	for {
		p := x.reply()
		if p.DestQP != y.peerQPN {
			before = append(before, p)
			continue
		}
		if p.Opcode != roce.Op(roce.RC, roce.Acknowledge) || p.Syndrome != roce.Ack || p.PSN != y.psn {
			x.t.Fatalf("the bystander answers %+v", p)
		}
		break
	}
	y.psn = y.psn.Add(1)
	if wc := y.poll(); wc.Status != ib.WCSuccess || wc.ByteLen != 64 {
		x.t.Fatalf("the bystander: %+v", wc)
	}
	return before
}

// counters are the port's.
func (x *hostileNet) counters() map[string]uint64 {
	p := x.n.Counters().Ports[0]
	w := &p.Total
	m := map[string]uint64{"req_dropped": w.Useless, "resp_duplicates": w.Duplicates, "resp_out_of_sequence": w.Early, "resp_no_receive": w.NotReady, "resp_dropped": w.Dropped}
	for why, n := range p.Dropped {
		m["drop_"+why] = n
	}
	for why, n := range w.RefusedBy {
		m["refused: "+why] = n
	}
	return m
}

// A wrongPacket is a row of the table: what is sent to a victim, and what must come of it.
type wrongPacket struct {
	name string
	typ  ib.QPType
	// make returns the packet, without its CRC. n is a payload length that would be right.
	make func(v *netVictim) []byte
	from func(x *hostileNet) *net.UDPConn // nil: the peer
	post int                              // bytes of the receive that is posted before; 0: none
	// reply is the syndrome of the answer; 0: there is none.
	reply   roce.Syndrome
	counter string
	ends    bool        // the connection: its QP goes to ERR
	recv    ib.WCStatus // how the receive ends, if it does with this
	early   bool        // it is dropped before its CRC is looked at
	kept    bool        // a selective connection keeps it until those before it have come
	silent  bool        // a selective connection does not answer it, and counts it as dropped, too
}

// with is a packet with a change.
func with(op uint8, n int, change func(p *roce.Packet)) func(*netVictim) []byte {
	return func(v *netVictim) []byte {
		p := v.packet(op)
		p.Len = uint32(n)
		if change != nil {
			change(p)
		}
		return bytesOf(p, n)
	}
}

// patched is a packet with a change to its bytes.
func patched(op uint8, n int, change func(b []byte) []byte) func(*netVictim) []byte {
	return func(v *netVictim) []byte { return change(with(op, n, nil)(v)) }
}

var wrongPackets = func() (rows []wrongPacket) {
	stranger := func(x *hostileNet) *net.UDPConn { return x.other }
	for _, typ := range []ib.QPType{ib.RC, ib.UC, ib.UD} {
		name := typ.String() + ": "
		rows = append(rows,
			wrongPacket{name: name + "nothing", typ: typ, make: func(*netVictim) []byte { return make([]byte, 4) }, counter: "drop_short", early: true},
			wrongPacket{name: name + "half a header", typ: typ, make: patched(roce.SendOnly, 0, func(b []byte) []byte { return b[:8] }), counter: "drop_short", early: true},
			wrongPacket{name: name + "version", typ: typ, make: patched(roce.SendOnly, 8, func(b []byte) []byte { b[1] |= 1; return b }), counter: "drop_version", early: true},
			wrongPacket{name: name + "reserved opcode", typ: typ, make: patched(roce.SendOnly, 8, func(b []byte) []byte { b[0] |= 0x1f; return b }), counter: "drop_opcode", early: true},
			wrongPacket{name: name + "opcode of a service that is not spoken", typ: typ, make: patched(roce.SendOnly, 8, func(b []byte) []byte { b[0] = b[0]&0x1f | 0x40; return b }), counter: "drop_opcode", early: true},
			wrongPacket{name: name + "padding longer than the payload", typ: typ, make: patched(roce.SendOnly, 0, func(b []byte) []byte { b[1] |= 3 << 4; return b }), counter: "drop_pad", early: true},
			wrongPacket{name: name + "length that is no multiple of 4", typ: typ, make: patched(roce.SendOnly, 8, func(b []byte) []byte { return b[:len(b)-1] }), counter: "drop_length", early: true},
			wrongPacket{name: name + "longer than any packet", typ: typ, make: with(roce.SendOnly, 5000, nil), post: 7000, counter: "drop_length"},
			wrongPacket{name: name + "P_Key", typ: typ, make: with(roce.SendOnly, 8, func(p *roce.Packet) { p.PKey = 0x8001 }), counter: "drop_pkey", early: true},
			wrongPacket{name: name + "queue pair", typ: typ, make: with(roce.SendOnly, 8, func(p *roce.Packet) { p.DestQP ^= 0x5a5a5a }), counter: "drop_no_qp", early: true},
		)
	}
	for _, typ := range []ib.QPType{ib.RC, ib.UC} {
		name := typ.String() + ": "
		other := map[ib.QPType]roce.Service{ib.RC: roce.UC, ib.UC: roce.RC}[typ]
		rows = append(rows,
			wrongPacket{name: name + "from another address", typ: typ, make: with(roce.SendOnly, 8, nil), from: stranger, counter: "drop_source", early: true},
			wrongPacket{name: name + "of another service", typ: typ, make: with(roce.SendOnly, 8, func(p *roce.Packet) { p.Opcode = roce.Op(other, roce.SendOnly) }), counter: "drop_service", early: true},
			wrongPacket{name: name + "datagram", typ: typ, make: with(roce.SendOnly, 8, func(p *roce.Packet) { p.Opcode = roce.Op(roce.UD, roce.SendOnly) }), counter: "drop_no_qp", early: true},
		)
	}
	rc := func(name, counter string, reply roce.Syndrome, ends bool, make func(*netVictim) []byte) {
		rows = append(rows, wrongPacket{name: "RC: " + name, typ: ib.RC, make: make, counter: counter, reply: reply, ends: ends})
	}
	refused := func(name string, make func(*netVictim) []byte) {
		rc(name, "refused: invalid request", roce.NakInvalid, true, make)
	}
	denied := func(name string, make func(*netVictim) []byte) {
		rc(name, "refused: remote access error", roce.NakAccess, true, make)
	}
	rc("PSN ahead", "resp_out_of_sequence", roce.NakPSN, false, with(roce.SendOnly, 8, func(p *roce.Packet) { p.PSN = p.PSN.Add(3) }))
	rows[len(rows)-1].kept = true
	rc("PSN farther ahead than anything is kept", "resp_out_of_sequence", roce.NakPSN, false, with(roce.SendOnly, 8, func(p *roce.Packet) { p.PSN = p.PSN.Add(100_000) }))
	rows[len(rows)-1].silent = true
	rc("PSN of long ago", "resp_duplicates", roce.Ack, false, with(roce.SendOnly, 8, func(p *roce.Packet) { p.PSN = p.PSN.Add(-30) }))
	rc("PSN half the space away", "resp_duplicates", roce.Ack, false, with(roce.SendOnly, 8, func(p *roce.Packet) { p.PSN = p.PSN.Add(-1 << 23) }))
	rc("READ that was never asked for, again", "resp_dropped", 0, false, with(roce.ReadRequest, 0, func(p *roce.Packet) { p.PSN = p.PSN.Add(-20); p.Len = 64 }))
	rc("atomic that was never done, again", "resp_dropped", 0, false, with(roce.FetchAdd, 0, func(p *roce.Packet) { p.PSN = p.PSN.Add(-20); p.Swap = 1 }))
	rc("no receive", "resp_no_receive", roce.RNRNak(1), false, with(roce.SendOnly, 8, nil))
	for what, op := range map[string]uint8{"middle": roce.SendMiddle, "last": roce.SendLast, "middle of a WRITE": roce.WriteMiddle, "last of a WRITE": roce.WriteLast} {
		n := 256
		refused(what+" without a first", with(op, n, nil))
	}
	padded := patched(roce.SendFirst, 256, func(b []byte) []byte { b[1] |= 1 << 4; return b })
	refused("first with padding", padded)
	refused("first of nothing", with(roce.SendFirst, 0, nil))
	refused("first that is not full", with(roce.SendFirst, 252, nil))
	refused("longer than the MTU", with(roce.SendOnly, 260, nil))
	refused("WRITE longer than it says", with(roce.WriteOnly, 16, func(p *roce.Packet) { p.Len = 12 }))
	refused("WRITE shorter than it says", with(roce.WriteOnly, 16, func(p *roce.Packet) { p.Len = 20 }))
	refused("WRITE that ends too soon", with(roce.WriteFirst, 256, func(p *roce.Packet) { p.Len = 256 }))
	refused("WRITE longer than a message can be", with(roce.WriteFirst, 256, func(p *roce.Packet) { p.Len = 1<<31 + 1 }))
	refused("READ longer than a message can be", with(roce.ReadRequest, 0, func(p *roce.Packet) { p.Len = 1<<31 + 1 }))
	refused("atomic at an odd address", with(roce.FetchAdd, 0, func(p *roce.Packet) { p.Addr += 4 }))
	refused("FLUSH without a placement", with(roce.Flush, 0, nil))
	refused("ATOMIC WRITE of another length", with(roce.AtomicWrite, 8, func(p *roce.Packet) { p.Len = 16 }))
	for what, change := range map[string]func(*roce.Packet){
		"rkey":               func(p *roce.Packet) { p.RKey ^= 0x100 },
		"rkey that is 0":     func(p *roce.Packet) { p.RKey = 0 },
		"address before":     func(p *roce.Packet) { p.Addr -= victimRecv + 8 },
		"address behind":     func(p *roce.Packet) { p.Addr += victimSize - victimRecv - 4 },
		"address that wraps": func(p *roce.Packet) { p.Addr = ^uint64(3) },
	} {
		denied("WRITE, "+what, with(roce.WriteOnly, 8, change))
		denied("READ, "+what, with(roce.ReadRequest, 0, func(p *roce.Packet) { change(p); p.Len = 8 }))
		denied("compare-and-swap, "+what, with(roce.CompareSwap, 0, func(p *roce.Packet) {
			change(p)
			p.Addr &^= 7
			if what == "address behind" {
				p.Addr += 8
			}
		}))
	}
	denied("SEND that invalidates a key that is none", with(roce.SendOnlyInv, 8, func(p *roce.Packet) { p.InvKey = 0x1234 }))
	rows[len(rows)-1].post, rows[len(rows)-1].recv = 64, ib.WCLocalProtErr
	refused("SEND longer than its receive", with(roce.SendOnly, 64, nil))
	rows[len(rows)-1].post, rows[len(rows)-1].recv = 32, ib.WCLocalLengthErr
	// Answers to what was not asked.
	for _, p := range []struct {
		what string
		op   uint8
		n    int
	}{{"ACK", roce.Acknowledge, 0}, {"answer to an atomic", roce.AtomicAcknowledge, 0}, {"answer to a READ", roce.ReadResponseOnly, 8},
		{"middle of an answer", roce.ReadResponseMiddle, 256}} {
		for where, psn := range map[string]ib.PSN{"next": 500, "before": 499, "far behind": 900} {
			rc(p.what+" of the PSN "+where, "req_dropped", 0, false, with(p.op, p.n, func(q *roce.Packet) { q.PSN, q.Syndrome = psn, roce.Ack }))
		}
	}
	for _, s := range []roce.Syndrome{roce.NakPSN, roce.NakInvalid, roce.NakAccess, roce.RNRNak(3), 0x40, 0x7f} {
		rc(s.String()+" of nothing", "req_dropped", 0, false, with(roce.Acknowledge, 0, func(q *roce.Packet) { q.PSN, q.Syndrome = 500, s }))
	}
	uc := func(name, counter string, make func(*netVictim) []byte) {
		rows = append(rows, wrongPacket{name: "UC: " + name, typ: ib.UC, make: make, counter: counter})
	}
	uc("middle without a first", "refused: silently", with(roce.SendMiddle, 256, nil))
	uc("PSN ahead", "resp_out_of_sequence", with(roce.SendMiddle, 256, func(p *roce.Packet) { p.PSN = p.PSN.Add(9) }))
	uc("no receive", "resp_no_receive", with(roce.SendOnly, 8, nil))
	uc("first with padding", "refused: silently", padded)
	uc("first of nothing", "refused: silently", with(roce.SendFirst, 0, nil))
	uc("first that is not full", "refused: silently", with(roce.SendFirst, 252, nil))
	uc("longer than the MTU", "refused: silently", with(roce.SendOnly, 260, nil))
	uc("WRITE, rkey", "refused: silently", with(roce.WriteOnly, 8, func(p *roce.Packet) { p.RKey++ }))
	uc("WRITE, address", "refused: silently", with(roce.WriteOnly, 8, func(p *roce.Packet) { p.Addr += victimSize }))
	uc("WRITE longer than it says", "refused: silently", with(roce.WriteOnly, 16, func(p *roce.Packet) { p.Len = 12 }))
	uc("READ", "drop_opcode", patched(roce.WriteOnly, 0, func(b []byte) []byte { b[0] = b[0]&0xe0 | roce.ReadRequest; return b }))
	rows[len(rows)-1].early = true
	ud := func(name, counter string, post int, make func(*netVictim) []byte) {
		rows = append(rows, wrongPacket{name: "UD: " + name, typ: ib.UD, make: make, counter: counter, post: post})
	}
	ud("Q_Key", "drop_qkey", 64, with(roce.SendOnly, 8, func(p *roce.Packet) { p.QKey ^= 1 }))
	ud("no receive", "drop_no_room", 0, with(roce.SendOnly, 8, nil))
	ud("longer than its receive", "drop_no_room", 64, with(roce.SendOnly, 64, nil))
	ud("longer than the largest MTU", "drop_no_room", 7000, with(roce.SendOnly, 4100, nil))
	return rows
}()

// Each kind of wrong packet is answered or not as the specification says, is counted for its reason, touches no memory, and
// harms nobody else; and neither its victim, unless it comes from its peer and is the end of the connection. With a CRC that
// does not match it does nothing at all.
func TestWrongPackets(t *testing.T) {
	for _, where := range []struct {
		name, local, stranger string
		selective             bool
	}{{"IPv4", "127.0.0.1", "127.0.0.2", false}, {"IPv6", "::1", "", false}, {"IPv4, selective", "127.0.0.1", "127.0.0.2", true}} {
		t.Run(where.name, func(t *testing.T) {
			x := newHostileNet(t, where.local, where.stranger)
			x.selective = where.selective
			victims := map[ib.QPType]*netVictim{}
			for _, row := range wrongPackets {
				if row.from != nil && row.from(x) == nil {
					continue // the loopback interface has one IPv6 address
				}
				for _, wrongCRC := range []bool{true, false} {
					v := victims[row.typ]
					if v == nil {
						v = x.victim(row.typ, victimQPN)
						victims[row.typ] = v
					}
					row.run(x, v, wrongCRC)
					if (row.ends || row.kept && x.selective) && !wrongCRC {
						v.close()
						delete(victims, row.typ)
					}
					if t.Failed() {
						t.Fatalf("%s (wrong CRC: %t)", row.name, wrongCRC)
					}
				}
			}
		})
	}
}

func (row *wrongPacket) run(x *hostileNet, v *netVictim, wrongCRC bool) {
	t := x.t
	t.Helper()
	was, memory := x.counters(), bytes.Clone(v.buf)
	if row.post > 0 {
		v.post(row.post)
	}
	from := x.raw
	if row.from != nil {
		from = row.from(x)
	}
	x.send(from, row.make(v), wrongCRC)
	replies := x.mark()

	counter, reply, ends := row.counter, row.reply, row.ends
	silent := row.silent && x.selective
	if silent {
		reply = 0
	}
	if wrongCRC {
		reply, ends = 0, false
		if !row.early {
			counter = "drop_icrc"
		}
		if row.counter == "drop_length" && !row.early { // nobody computes the CRC of what is too long
			counter = row.counter
		}
	}
	if reply == 0 && len(replies) > 0 {
		t.Errorf("%s: answered with %+v", row.name, replies)
	}
	if row.kept && x.selective && !wrongCRC {
		// The NAK says where the gap begins, and how long it is; the acknowledgement that was asked for, how far behind it packets have come.
		if len(replies) != 2 || replies[0].MSN != 0<<12|3 || replies[1].Syndrome != roce.Ack || replies[1].MSN != 4<<12 || replies[1].PSN != v.psn.Add(-1) {
			t.Errorf("%s: answered with %+v", row.name, replies)
			return
		}
		replies = replies[:1]
	}
	if reply != 0 && (len(replies) != 1 || replies[0].DestQP != v.peerQPN || replies[0].Opcode != roce.Op(roce.RC, roce.Acknowledge) || replies[0].Syndrome != reply) {
		t.Errorf("%s: answered with %+v, want %v", row.name, replies, reply)
	}
	now := x.counters()
	if now[counter] != was[counter]+1 {
		t.Errorf("%s: %s counted %d times", row.name, counter, now[counter]-was[counter])
	}
	for name, n := range now {
		also := name == "resp_duplicates" && counter == "resp_dropped" || name == "resp_dropped" && counter == "resp_out_of_sequence" && (row.typ == ib.UC || silent)
		if d := n - was[name]; name != counter && d != 0 && !also {
			t.Errorf("%s: %s counted %d times, and %s is what should count", row.name, name, d, counter)
		}
	}
	if ends && row.recv != ib.WCSuccess {
		if wc := v.poll(); wc.Status != row.recv {
			t.Errorf("%s: the receive ends with %v, want %v", row.name, wc.Status, row.recv)
		}
	}
	switch {
	case ends:
		testutil.Eventually(t, "the QP is in ERR", func() bool { a, _ := v.q.Query(); return a.State == ib.Err })
	default:
		x.alive(v, row)
	}
	if !bytes.Equal(v.buf[victimRecv:], memory[victimRecv:]) {
		t.Errorf("%s: memory was touched", row.name)
	}
}

// alive has the victim take a message, in the receive that the row has posted, if it has.
func (x *hostileNet) alive(v *netVictim, row *wrongPacket) {
	t := x.t
	t.Helper()
	if row.post == 0 {
		v.post(victimRecv)
	}
	p := v.packet(roce.SendOnly)
	if v.service() == roce.UC {
		p.PSN = p.PSN.Add(1000) // it does not mind what it has missed
		v.psn = p.PSN
	}
	x.send(x.raw, bytesOf(p, 16), false)
	v.psn = v.psn.Add(1)
	grh := uint32(0)
	switch v.service() {
	case roce.UD:
		grh = ib.GRHLen
	case roce.RC:
		if a := x.reply(); a.DestQP != v.peerQPN || a.Syndrome != roce.Ack || a.PSN != p.PSN {
			t.Errorf("%s: then the victim answers %+v", row.name, a)
		}
	}
	if wc := v.poll(); wc.ID != 7 || wc.Status != ib.WCSuccess || wc.ByteLen != 16+grh {
		t.Errorf("%s: then the victim receives %+v", row.name, wc)
	}
}
