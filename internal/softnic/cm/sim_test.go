package cm

import (
	"bytes"
	"container/heap"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/pcap"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A network joins connection managers in virtual time. Everything that happens follows from the seed.
type network struct {
	t       testing.TB
	r       *rand.Rand
	now     time.Duration
	events  events
	order   uint64
	nodes   map[netip.Addr]*node
	capture *pcap.Writer // sees what is sent
	lose    func(from, to netip.Addr, m roce.CMMessage) bool

	// The share of datagrams that this happens to, and how long they take.
	loss, duplicate float64
	delay, jitter   time.Duration
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

func newNetwork(t testing.TB, seed uint64) *network {
	return &network{t: t, r: rand.New(rand.NewPCG(seed, 1)), nodes: map[netip.Addr]*node{}, delay: 20 * time.Microsecond, now: 1}
}

func (n *network) after(d time.Duration, do func()) {
	n.order++
	heap.Push(&n.events, event{n.now + d, n.order, do})
}

// run runs until nothing is left to happen, or for a time.
func (n *network) run(d time.Duration) {
	end := n.now + d
	for {
		at, who := end+1, (*node)(nil)
		for _, a := range addrs {
			if x := n.nodes[a]; x != nil {
				if d := x.e.Deadline(); d != 0 && d < at {
					at, who = d, x
				}
			}
		}
		if len(n.events) > 0 && n.events[0].at <= at {
			if n.events[0].at > end {
				break
			}
			e := heap.Pop(&n.events).(event)
			n.now = e.at
			e.do()
			continue
		}
		if who == nil {
			break
		}
		n.now = max(n.now, at)
		who.e.Expire(n.now)
	}
	n.now = end
}

var addrs = []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")}

// A node is a host: its connection manager, and programs.
type node struct {
	net  *network
	addr netip.Addr
	e    *Engine
	sent []roce.CMMessage
	psn  ib.PSN
}

func (n *network) node(i int) *node {
	x := &node{net: n, addr: addrs[i]}
	x.e = New(Config{Local: x.addr, GUID: ib.GUID(0x1000 + i), MTU: ib.MTU4096, Rand: n.r.Uint32, Out: x})
	n.nodes[x.addr] = x
	return x
}

// Send implements Output.
func (x *node) Send(at netip.AddrPort, b *[roce.MADLen]byte) {
	n, to := x.net, at.Addr()
	if at.Port() != roce.Port {
		n.t.Errorf("%v sends to %v", x.addr, at)
	}
	_, m, err := roce.DecodeMAD(b[:])
	if err != nil {
		n.t.Fatalf("%v sends %x: %v", x.addr, b, err)
	}
	x.sent = append(x.sent, m)
	if n.capture != nil {
		x.psn++
		record(n.t, n.capture, n.now, x.addr, to, x.psn, b[:])
	}
	copies := 1
	switch {
	case n.lose != nil && n.lose(x.addr, to, m), n.r.Float64() < n.loss:
		copies = 0
	case n.r.Float64() < n.duplicate:
		copies = 2
	}
	for range copies {
		b := bytes.Clone(b[:])
		n.after(n.delay+time.Duration(n.r.Int64N(int64(n.jitter)+1)), func() {
			if y := n.nodes[to]; y != nil {
				y.e.Receive(managerAt(x.addr), b, n.now)
			}
		})
	}
}

func managerAt(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, roce.Port) }

// count is how many messages of a kind the node has sent.
func (x *node) count(a roce.CMAttr) (n int) {
	for _, m := range x.sent {
		if m.Attr() == a {
			n++
		}
	}
	return n
}

// record writes a datagram to a capture.
func record(t testing.TB, w *pcap.Writer, now time.Duration, from, to netip.Addr, psn ib.PSN, payload []byte) {
	p := roce.Packet{Opcode: roce.Op(roce.UD, roce.SendOnly), PKey: roce.DefaultPKey, DestQP: roce.GSIQP, SrcQP: roce.GSIQP, QKey: roce.GSIQKey, PSN: psn}
	b := make([]byte, p.Opcode.HeaderLen()+len(payload))
	copy(b[p.PutHeader(b, len(payload)):], payload)
	src, dst := netip.AddrPortFrom(from, roce.Port), netip.AddrPortFrom(to, roce.Port)
	var icrc roce.ICRC
	icrc.Init(src, dst)
	if err := w.Packet(&pcap.Packet{Time: time.Unix(0, int64(now)), Data: roce.AppendDatagram(nil, src, dst, 0, icrc.Put(b))}); err != nil {
		t.Fatal(err)
	}
}

// A side is a program's end of a connection.
type side struct {
	x      *node
	c      *Conn
	reply  *roce.REP
	answer *roce.SIDRREP
	up     int
	ended  []error
}

func (s *side) Replied(m *roce.REP) {
	if s.reply != nil || len(s.ended) > 0 {
		s.x.net.t.Errorf("%v: replied to twice, or too late", s.x.addr)
	}
	s.reply = m
}

func (s *side) Resolved(m *roce.SIDRREP) {
	if s.answer != nil || len(s.ended) > 0 {
		s.x.net.t.Errorf("%v: answered twice, or too late", s.x.addr)
	}
	s.answer = m
}

func (s *side) Established() {
	if s.up++; s.up > 1 || len(s.ended) > 0 {
		s.x.net.t.Errorf("%v: established %d times, %v", s.x.addr, s.up, s.ended)
	}
}

func (s *side) Ended(err error) {
	if s.ended = append(s.ended, err); len(s.ended) > 1 || err == nil {
		s.x.net.t.Errorf("%v: ended %d times: %v", s.x.addr, len(s.ended), s.ended)
	}
}

// end is why it has ended; nil: it has not.
func (s *side) end() error {
	if len(s.ended) == 0 {
		return nil
	}
	return s.ended[0]
}

// A service keeps the requests that come.
type service struct {
	x       *node
	backlog int
	came    []*side
}

func (s *service) Request(c *Conn) (Handler, roce.RejectReason) {
	if len(s.came) == s.backlog {
		return nil, roce.RejectNoResources
	}
	p := &side{x: s.x, c: c}
	s.came = append(s.came, p)
	return p, 0
}

const testPort = 7471

func (x *node) listen(backlog int) *service {
	s := &service{x: x, backlog: backlog}
	if err := x.e.Listen(testPort, s); err != nil {
		x.net.t.Fatal(err)
	}
	return s
}

func (x *node) dial(to *node, change func(*Params)) *side {
	p := &Params{QPN: 0x100 + ib.QPN(x.net.r.Uint32N(1<<20)), PSN: 0x123456, ResponderResources: 4, InitiatorDepth: 5, RNRRetry: 6, RetryCount: 7,
		MTU: ib.MTU1024, VendorID: Vendor, VendorOptions: OptionSelective, Private: []byte("hello")}
	if change != nil {
		change(p)
	}
	s := &side{x: x}
	var err error
	if s.c, err = x.e.Connect(x.net.now, 0, netip.AddrPortFrom(to.addr, testPort), p, s); err != nil {
		x.net.t.Fatal(err)
	}
	return s
}

func (s *side) accept() {
	p := &Params{QPN: 0x400 + ib.QPN(s.x.net.r.Uint32N(1<<20)), PSN: 0x654321, ResponderResources: 2, InitiatorDepth: 3, RNRRetry: 5, Private: []byte("welcome")}
	if s.c.Selective() {
		p.VendorID, p.VendorOptions = Vendor, OptionSelective
	}
	if err := s.c.Accept(s.x.net.now, p); err != nil {
		s.x.net.t.Error(err)
	}
}

// Connections are made and end on networks that lose, repeat and reorder: both sides agree on what has become of each, nothing is
// left of them, and it takes few messages where nothing is lost.
func TestNetworks(t *testing.T) {
	for seed := range uint64(60) {
		n := newNetwork(t, seed)
		if seed > 0 {
			n.loss, n.duplicate, n.jitter = 0.3*n.r.Float64(), 0.3*n.r.Float64(), time.Duration(n.r.Int64N(int64(200*time.Millisecond)))
		}
		a, b := n.node(0), n.node(1)
		var clients, servers []*side
		service := b.listen(100)
		const count = 30
		answered := 0
		for range count {
			n.after(time.Duration(n.r.Int64N(int64(time.Second))), func() { clients = append(clients, a.dial(b, nil)) })
		}
		for range 300 { // the programs look at what has come, now and then
			n.run(200 * time.Millisecond)
			for ; answered < len(service.came); answered++ {
				s := service.came[answered]
				if s.end() != nil {
					t.Errorf("seed %d: a request has ended: %v", seed, s.end())
					continue
				}
				if s.c.REQ().QPN < 0x100 || !bytes.HasPrefix(s.c.REQ().Private[roce.IPHelloLen:], []byte("hello")) || !s.c.Selective() {
					t.Errorf("seed %d: request %+v", seed, s.c.REQ())
				}
				if answered%5 == 4 {
					if err := s.c.Reject(n.now, roce.RejectConsumer, []byte("no")); err != nil {
						t.Error(err)
					}
					continue
				}
				s.accept()
				servers = append(servers, s)
			}
			for _, c := range clients {
				if c.reply != nil && c.c.state == repReceived {
					c.c.Ready()
				}
			}
		}
		up := 0
		for _, c := range clients {
			if c.c.state != established {
				if e, ok := c.end().(*RejectError); !ok || e.Reason != roce.RejectConsumer || !bytes.HasPrefix(e.Private, []byte("no")) {
					t.Errorf("seed %d: a client has ended: %v", seed, c.end())
				}
				continue
			}
			up++
			if c.reply.StartingPSN != 0x654321 || c.reply.ResponderResources != 2 || !bytes.HasPrefix(c.reply.Private[:], []byte("welcome")) || !c.c.Selective() {
				t.Errorf("seed %d: reply %+v", seed, c.reply)
			}
		}
		if len(clients) != count || len(service.came) != count || up != count*4/5 || up != len(servers) {
			t.Errorf("seed %d: %d clients, %d requests, %d connected, %d accepted", seed, len(clients), len(service.came), up, len(servers))
		}
		for _, s := range servers {
			if s.up != 1 || s.end() != nil {
				t.Errorf("seed %d: server side: up %d, %v", seed, s.up, s.end())
			}
		}
		// Either side ends it, or both at once.
		for i, s := range servers {
			if i%3 != 0 {
				s.c.Disconnect(n.now)
			}
		}
		for i, c := range clients {
			if i%2 == 0 {
				c.c.Disconnect(n.now)
			}
		}
		n.run(time.Second)
		for _, c := range append(clients, servers...) {
			c.c.Disconnect(n.now)
		}
		n.run(time.Minute)
		for _, c := range append(clients, servers...) {
			if c.c.state == established || c.end() == nil {
				t.Errorf("seed %d: still there: %v, %v", seed, c.c.state, c.end())
			}
		}
		for _, x := range []*node{a, b} {
			e := x.e
			if len(e.conns)+len(e.requests)+len(e.peers)+len(e.timers)+len(e.old)+len(e.bound)+e.leaving != 0 || e.Deadline() != 0 {
				t.Errorf("seed %d: left: %+v", seed, e)
			}
		}
	}
}
