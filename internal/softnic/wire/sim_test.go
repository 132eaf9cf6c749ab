package wire

import (
	"bytes"
	"container/heap"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/pcap"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A network joins two connections in virtual time. Everything that happens follows from the seed.
type network struct {
	t      testing.TB
	r      *rand.Rand
	now    time.Duration
	events events
	order  uint64
	nodes  [2]*node
	trace  func(format string, args ...any)
	tap    *pcap.Writer // sees what is sent
	link   *bottleneck  // what node via sends goes through; nil: nothing is in its way
	via    int

	// The share of packets that this happens to, and how long they take.
	loss, duplicate, corrupt, full float64
	delay, jitter                  time.Duration
	cut                            [2]bool // nothing arrives at the node
	drop                           func(from *node, p *roce.Packet) bool
}

type event struct {
	at    time.Duration
	order uint64
	do    func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].order < e[j].order
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	x := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return x
}

func (n *network) after(d time.Duration, do func()) {
	n.order++
	heap.Push(&n.events, event{n.now + d, n.order, do})
}

// settle runs until nothing is on its way.
func (n *network) settle() {
	for len(n.events) > 0 {
		e := heap.Pop(&n.events).(event)
		n.now = e.at
		e.do()
	}
}

// run runs until done says so, or nothing is left to happen.
func (n *network) run(done func() bool) {
	n.t.Helper()
	const limit = 10 * time.Minute
	for !done() {
		next := time.Duration(-1)
		var expired *node
		for _, x := range n.nodes {
			if d := x.req.Deadline(); d != 0 && (next < 0 || d < next) {
				next, expired = d, x
			}
		}
		if len(n.events) > 0 && (next < 0 || n.events[0].at <= next) {
			e := heap.Pop(&n.events).(event)
			n.now = e.at
			e.do()
			continue
		}
		if expired == nil || next > limit {
			n.t.Fatalf("after %v: nothing happens any more, and it is not done\n%v\n%v", n.now, n.nodes[0], n.nodes[1])
		}
		n.now = next
		expired.req.Expire(n.now)
		expired.pump()
	}
}

// A node is one end: a program with its memory, its queues, and the state of a connection.
type node struct {
	net   *network
	id    int
	req   *Requester
	resp  *Responder
	icrc  [2]roce.ICRC // of what it sends, and of what comes
	buf   []byte
	later bool    // it is to be pumped when there is room
	owes  bool    // it is to acknowledge what nobody waits for
	uc    *ucPair // what it talks instead of a reliable connection

	mem      []byte // of rkey memKey
	readOnly []byte // of rkey roKey
	sends    [][]byte
	sinks    [][]byte
	done     []ib.WCStatus
	recvs    int // posted and not taken
	recvLen  int
	message  []byte
	got      []received
	fatal    ib.WCStatus
	badAt    int // request whose memory may not be read; -1: none
	sent     []sentPacket
	withdraw bool // roKey is gone
	flushed  []ib.Flush
}

// sentPacket is of a request.
type sentPacket struct {
	psn ib.PSN
	why Reason
}

type received struct {
	Message
	data []byte
	st   ib.WCStatus
}

const (
	memKey = 0x1100
	roKey  = 0x2200
)

func (x *node) String() string {
	r := x.req
	return fmt.Sprintf("node %d: requests %d..%d, cur %d, una %d, nxt %d, end %d, %d asked for, rnr until %v, %+v; wants %d, %d receives, %+v", x.id, r.head, r.tail, r.cur,
		r.una, r.nxt, r.end, len(r.asks), r.rnrUntil, r.Counters, x.resp.want, x.recvs, x.resp.Counters)
}

// Packet implements Output.
func (x *node) Packet(p *roce.Packet, n int) ([]byte, bool) {
	if x.net.r.Float64() < x.net.full {
		if !x.later {
			x.later = true
			x.net.after(time.Microsecond, func() {
				x.later = false
				x.pump()
			})
		}
		return nil, false
	}
	h := p.PutHeader(x.buf[:cap(x.buf)], n)
	x.buf = x.buf[:h+n+roce.Pad(n)]
	clear(x.buf[h+n:])
	if x.net.trace != nil {
		x.net.trace("%v: node %d sends %v psn %d, %d bytes, %v, ackreq %v", x.net.now, x.id, p.Opcode, p.PSN, n, p.Syndrome, p.AckReq)
	}
	return x.buf[h : h+n : h+n], true
}

func (x *node) Abort() {}

func (x *node) Commit() {
	n := x.net
	if x.uc == nil && !roce.Opcode(x.buf[0]).IsResponse() {
		x.sent = append(x.sent, sentPacket{ib.PSN(binary.BigEndian.Uint32(x.buf[8:])) & ib.MaxPSN, x.req.Again()})
	}
	pkt := x.icrc[0].Put(bytes.Clone(x.buf))
	if n.tap != nil {
		if err := n.tap.Packet(&pcap.Packet{Time: time.Unix(0, int64(n.now)), Data: roce.AppendDatagram(nil, ends[x.id], ends[1-x.id], 0, pkt)}); err != nil {
			n.t.Error(err)
		}
	}
	copies := 1
	if n.r.Float64() < n.loss {
		copies = 0
	} else if n.r.Float64() < n.duplicate {
		copies = 2
	}
	for range copies {
		b := bytes.Clone(pkt)
		if n.r.Float64() < n.corrupt {
			b[n.r.IntN(len(b))] ^= 1 << n.r.IntN(8)
		}
		wait := time.Duration(0)
		if n.link != nil && x.id == n.via {
			var ok bool
			if wait, ok = n.link.take(n.now, b); !ok {
				continue
			}
		}
		n.after(wait+n.delay+time.Duration(n.r.Int64N(int64(n.jitter)+1)), func() { n.nodes[1-x.id].arrives(b) })
	}
}

func (x *node) arrives(b []byte) {
	if x.net.cut[x.id] {
		return
	}
	pkt, err := x.icrc[1].Split(b, false)
	if err != nil {
		return
	}
	var p roce.Packet
	if err := p.Decode(pkt); err != nil {
		x.net.t.Errorf("%x: %v", pkt, err)
		return
	}
	if x.net.drop != nil && x.net.drop(x.net.nodes[1-x.id], &p) {
		return
	}
	x.takes(&p)
}

func (x *node) takes(p *roce.Packet) {
	if p.Opcode == roce.CNP {
		x.req.Notify()
		return
	}
	if x.uc != nil {
		x.uc.resp.Receive(p)
		return
	}
	if p.Opcode.IsResponse() {
		x.req.Receive(p, x.net.now)
	} else {
		x.resp.Receive(p)
	}
	x.pump()
	if x.resp.Late() && !x.owes {
		x.owes = true
		x.net.after(x.req.LateAck(), func() {
			x.owes = false
			x.resp.Acknowledge()
			x.pump()
		})
	}
}

func (x *node) pump() {
	if x.uc != nil {
		x.uc.req.Pump(x.net.now, x)
		return
	}
	x.resp.Pump(x.net.now, x)
	x.req.Pump(x.net.now, x)
}

// SendQueue.

func (x *node) Gather(n, off uint32, dst []byte) bool {
	if int(n) == x.badAt {
		return false
	}
	copy(dst, x.sends[n][off:])
	return true
}

func (x *node) Scatter(n, off uint32, src []byte) bool {
	if int(n) == x.badAt {
		return false
	}
	copy(x.sinks[n][off:], src)
	return true
}

func (x *node) Complete(n uint32, st ib.WCStatus) {
	if int(n) != len(x.done) {
		x.net.t.Errorf("node %d: request %d ended, but %d was expected to", x.id, n, len(x.done))
	}
	x.done = append(x.done, st)
}

// target is the Target of a node: Complete has another meaning there.
type target struct{ *node }

func (x target) Take() bool {
	if x.recvs == 0 {
		return false
	}
	x.recvs--
	x.message = make([]byte, 0, x.recvLen)
	return true
}

func (x target) Put(off uint32, data []byte) ib.WCStatus {
	if off == 0 {
		x.message = x.message[:0]
	}
	if int(off) != len(x.message) {
		x.net.t.Errorf("node %d: part of a message at %d, after %d bytes", x.id, off, len(x.message))
	}
	if len(x.message)+len(data) > x.recvLen {
		return ib.WCRemoteInvalidReqErr
	}
	x.message = append(x.message, data...)
	return ib.WCSuccess
}

func (x target) Complete(m Message, st ib.WCStatus) {
	x.got = append(x.got, received{m, x.message, st})
}

func (x target) region(rkey uint32, addr uint64, n int, need ib.Access) ([]byte, ib.WCStatus) {
	b, has := x.mem, ib.AccessRemoteWrite|ib.AccessRemoteRead|ib.AccessRemoteAtomic
	switch {
	case rkey == roKey && !x.withdraw:
		b, has = x.readOnly, ib.AccessRemoteRead
	case rkey != memKey:
		return nil, ib.WCRemoteAccessErr
	}
	if has&need != need || addr > uint64(len(b)) || uint64(len(b))-addr < uint64(n) {
		return nil, ib.WCRemoteAccessErr
	}
	return b[addr:][:n], ib.WCSuccess
}

func (x target) Check(rkey uint32, addr uint64, n uint32, need ib.Access) ib.WCStatus {
	_, st := x.region(rkey, addr, int(n), need)
	return st
}

func (x target) Write(rkey uint32, addr uint64, data []byte) ib.WCStatus {
	b, st := x.region(rkey, addr, len(data), ib.AccessRemoteWrite)
	copy(b, data)
	return st
}

func (x target) Read(rkey uint32, addr uint64, dst []byte) ib.WCStatus {
	b, st := x.region(rkey, addr, len(dst), ib.AccessRemoteRead)
	copy(dst, b)
	return st
}

func (x target) Atomic(rkey uint32, addr uint64, op ib.Opcode, compareAdd, swap uint64) (uint64, ib.WCStatus) {
	need := ib.AccessRemoteAtomic
	if op == ib.OpAtomicWrite {
		need = ib.AccessRemoteWrite
	}
	b, st := x.region(rkey, addr, 8, need)
	if st != ib.WCSuccess {
		return 0, st
	}
	old := binary.NativeEndian.Uint64(b)
	atomicOn(b, op, compareAdd, swap)
	return old, st
}

func atomicOn(b []byte, op ib.Opcode, compareAdd, swap uint64) {
	old := binary.NativeEndian.Uint64(b)
	switch {
	case op == ib.OpAtomicWrite:
		binary.NativeEndian.PutUint64(b, swap)
	case op == ib.OpAtomicFetchAdd:
		binary.NativeEndian.PutUint64(b, old+compareAdd)
	case old == compareAdd:
		binary.NativeEndian.PutUint64(b, swap)
	}
}

func (x target) Flush(rkey uint32, addr uint64, f ib.Flush) ib.WCStatus {
	if f.Placement != ib.FlushGlobal {
		return ib.WCRemoteAccessErr
	}
	n := f.Length
	if f.Level == ib.FlushRegion {
		addr, n = 0, 0
	}
	x.flushed = append(x.flushed, f)
	_, st := x.region(rkey, addr, int(n), ib.AccessRemoteWrite)
	return st
}

func (x target) Invalidate(rkey uint32) ib.WCStatus { return ib.WCSuccess }

func (x target) Fail(st ib.WCStatus) {
	if x.fatal != ib.WCSuccess {
		x.net.t.Errorf("node %d fails twice: %v, %v", x.id, x.fatal, st)
	}
	x.fatal = st
}

const simMTU = 256

var ends = [2]netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:4791"), netip.MustParseAddrPort("10.0.0.2:4791")}

func newNetwork(t testing.TB, seed uint64, change func(*Config)) *network {
	n := &network{t: t, r: rand.New(rand.NewPCG(seed, 1)), delay: 5 * time.Microsecond}
	psns := [2]ib.PSN{ib.PSN(n.r.Uint32()) & ib.MaxPSN, ib.MaxPSN - 20}
	for i := range n.nodes {
		x := &node{net: n, id: i, buf: make([]byte, 0, 8192), mem: make([]byte, 1<<14), readOnly: make([]byte, 1<<14), recvLen: 1 << 14, badAt: -1}
		for j := range x.readOnly {
			x.readOnly[j] = byte(n.r.Uint32())
		}
		x.icrc[0].Init(ends[i], ends[1-i])
		x.icrc[1].Init(ends[1-i], ends[i])
		cfg := Config{DestQP: uint32(100 + 1 - i), MTU: simMTU, SQPSN: psns[i], RQPSN: psns[1-i], AckTimeout: 500 * time.Microsecond, RetryCount: 7,
			RNRRetry: ib.RNRRetryForever, MinRNRTimer: 4, MaxRdAtomic: 4, MaxDestRdAtomic: 4, SendDepth: 64}
		if change != nil {
			change(&cfg)
		}
		x.req, x.resp = NewRequester(cfg, x), NewResponder(cfg, target{x})
		n.nodes[i] = x
	}
	return n
}

// post queues a request of node x.
func (x *node) post(r Request, data []byte) {
	x.sends = append(x.sends, data)
	x.sinks = append(x.sinks, make([]byte, min(r.Len, 1<<20)))
	x.req.Post(&r)
}

// ended says that all requests of both nodes have.
func (n *network) ended() bool { return n.nodes[0].req.Queued() == 0 && n.nodes[1].req.Queued() == 0 }
