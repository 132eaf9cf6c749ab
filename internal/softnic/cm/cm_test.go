package cm

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/pcap"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func pairOf(t testing.TB, backlog int) (n *network, a, b *node, s *service) {
	n = newNetwork(t, 1)
	a, b = n.node(0), n.node(1)
	return n, a, b, b.listen(backlog)
}

// connected makes a connection.
func connected(n *network, a, b *node, s *service) (client, server *side) {
	n.t.Helper()
	came := len(s.came)
	client = a.dial(b, nil)
	n.run(time.Millisecond)
	if len(s.came) != came+1 {
		n.t.Fatalf("%d requests", len(s.came)-came)
	}
	server = s.came[came]
	server.accept()
	n.run(time.Millisecond)
	client.c.Ready()
	n.run(time.Millisecond)
	if client.c.state != established || server.up != 1 {
		n.t.Fatalf("client %v, server up %d", client.c.state, server.up)
	}
	return client, server
}

// Where nothing is lost, nothing is said twice; and Wireshark understands all of it.
func TestMessages(t *testing.T) {
	n, a, b, s := pairOf(t, 10)
	var out bytes.Buffer
	var err error
	if n.capture, err = pcap.NewWriter(&out, "ringside"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.capture.AddInterface(pcap.Interface{Name: "sim"}); err != nil {
		t.Fatal(err)
	}
	client, server := connected(n, a, b, s)
	server.c.Disconnect(n.now)
	n.run(time.Second)
	if !errors.Is(client.end(), ErrDisconnected) || !errors.Is(server.end(), ErrDisconnected) {
		t.Errorf("%v, %v", client.end(), server.end())
	}
	refused := a.dial(b, nil)
	n.run(time.Millisecond)
	if err := s.came[1].c.Reject(n.now, roce.RejectConsumer, []byte("no")); err != nil {
		t.Error(err)
	}
	n.run(time.Second)
	if _, ok := refused.end().(*RejectError); !ok {
		t.Error(refused.end())
	}
	want := "REQ,REP,RTU,DREQ,DREP,REQ,REJ"
	names := map[string]string{"0x0010": "REQ", "0x0013": "REP", "0x0014": "RTU", "0x0015": "DREQ", "0x0016": "DREP", "0x0012": "REJ"}
	got := ""
	for i, p := range testutil.Tshark(t, out.Bytes(), "infiniband.mad.attributeid", "infiniband.cm.req.serviceid.dport") {
		if i > 0 {
			got += ","
		}
		got += names[p[0]]
		if names[p[0]] == "REQ" && p[1] != fmt.Sprint(testPort) && p[1] != fmt.Sprintf("0x%04x", testPort) {
			t.Errorf("the port is %s", p[1])
		}
	}
	if got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// What both sides hear of each other.
func TestNegotiated(t *testing.T) {
	n, a, b, s := pairOf(t, 10)
	client, server := connected(n, a, b, s)
	q := server.c.REQ()
	if q.ResponderResources != 4 || q.InitiatorDepth != 5 || q.RNRRetryCount != 6 || q.RetryCount != 7 || q.MTU != ib.MTU1024 || q.StartingPSN != 0x123456 {
		t.Errorf("%+v", q)
	}
	r := client.reply
	if r.ResponderResources != 2 || r.InitiatorDepth != 3 || r.RNRRetryCount != 5 || r.StartingPSN != 0x654321 || r.QPN != server.c.qpn {
		t.Errorf("%+v", r)
	}
	if client.c.AckTimeout() != ackTimeout || server.c.AckTimeout() != ackTimeout {
		t.Errorf("%v, %v", client.c.AckTimeout(), server.c.AckTimeout())
	}
	r.TargetAckDelay = 15 // rxe
	if client.c.AckTimeout() != 16 {
		t.Errorf("%v", client.c.AckTimeout())
	}
	if client.c.LocalAddr() != server.c.RemoteAddr() || client.c.RemoteAddr() != server.c.LocalAddr() || client.c.RemoteAddr() != netip.AddrPortFrom(b.addr, testPort) {
		t.Errorf("%v %v, %v %v", client.c.LocalAddr(), client.c.RemoteAddr(), server.c.LocalAddr(), server.c.RemoteAddr())
	}
}

// One kind of message is lost for a while: the handshake comes to the same end, and what is asked again gets the same answer.
func TestLost(t *testing.T) {
	for _, kind := range []roce.CMAttr{roce.CMREQ, roce.CMREP, roce.CMRTU, roce.CMDREQ, roce.CMDREP, roce.CMREJ} {
		t.Run(kind.String(), func(t *testing.T) {
			n, a, b, s := pairOf(t, 10)
			left := 3
			n.lose = func(_, _ netip.Addr, m roce.CMMessage) bool {
				if m.Attr() == kind && left > 0 {
					left--
					return true
				}
				return false
			}
			client := a.dial(b, nil)
			n.run(2 * time.Second)
			server := s.came[0]
			if kind == roce.CMREJ {
				if err := server.c.Reject(n.now, roce.RejectConsumer, []byte("no")); err != nil {
					t.Error(err)
				}
				n.run(30 * time.Second)
				if e, ok := client.end().(*RejectError); !ok || !e.ByPeer() || !bytes.HasPrefix(e.Data(), []byte("no")) || !errors.Is(e, syscall.ECONNREFUSED) {
					t.Errorf("%v", client.end())
				}
			} else {
				server.accept()
				n.run(2 * time.Second)
				client.c.Ready()
				n.run(time.Minute) // the server was asked to wait
				if client.c.state != established || server.up != 1 {
					t.Fatalf("client %v %v, server up %d, %v", client.c.state, client.end(), server.up, server.end())
				}
				client.c.Disconnect(n.now)
				n.run(5 * time.Second)
				if client.end() != ErrDisconnected || server.end() != ErrDisconnected {
					t.Errorf("%v, %v", client.end(), server.end())
				}
			}
			if left != 0 || len(s.came) != 1 {
				t.Errorf("%d not lost, %d requests", left, len(s.came))
			}
		})
	}
}

// The program takes longer than the peer would wait: it is told to wait.
func TestSlowProgram(t *testing.T) {
	n, a, b, s := pairOf(t, 10)
	client := a.dial(b, nil)
	n.run(60 * time.Second)
	if client.end() != nil || s.came[0].end() != nil || b.count(roce.CMMRA) == 0 || a.count(roce.CMREQ) > 12 {
		t.Fatalf("client %v, request %v, %d MRA, %d REQ", client.end(), s.came[0].end(), b.count(roce.CMMRA), a.count(roce.CMREQ))
	}
	s.came[0].accept()
	n.run(5 * time.Second) // the client's program is slow as well
	if a.count(roce.CMMRA) == 0 || client.reply == nil {
		t.Errorf("%d MRA, %v", a.count(roce.CMMRA), client.reply)
	}
	client.c.Ready()
	n.run(20 * time.Second)
	if s.came[0].up != 1 {
		t.Error("not established")
	}
}

// Nobody answers: whoever waits gives up in the end, and says so.
func TestSilence(t *testing.T) {
	silent := func(m roce.CMMessage, kinds ...roce.CMAttr) bool {
		for _, k := range kinds {
			if m.Attr() == k {
				return true
			}
		}
		return false
	}
	t.Run("nobody is there", func(t *testing.T) {
		n := newNetwork(t, 1)
		a := n.node(0)
		s := &side{x: a}
		if _, err := a.e.Connect(n.now, 0, netip.AddrPortFrom(addrs[2], 1), &Params{QPN: 5, MTU: ib.MTU1024}, s); err != nil {
			t.Fatal(err)
		}
		n.run(time.Minute)
		if !errors.Is(s.end(), driver.ErrUnreachable) || a.count(roce.CMREQ) != maxRetries+1 || a.count(roce.CMREJ) != 1 {
			t.Errorf("%v, %d REQ, %d REJ", s.end(), a.count(roce.CMREQ), a.count(roce.CMREJ))
		}
	})
	t.Run("the answer does not come", func(t *testing.T) {
		n, a, b, s := pairOf(t, 10)
		n.lose = func(from, _ netip.Addr, m roce.CMMessage) bool { return from == b.addr }
		client := a.dial(b, nil)
		n.run(time.Minute)
		if client.end() != ErrNoAnswer || s.came[0].end() != ErrGivenUp || len(b.e.requests)+len(b.e.conns) != 0 {
			t.Errorf("%v, %v", client.end(), s.came[0].end())
		}
	})
	t.Run("the peer vanishes", func(t *testing.T) {
		n, a, b, s := pairOf(t, 10)
		n.lose = func(from, _ netip.Addr, m roce.CMMessage) bool { return from == a.addr && !silent(m, roce.CMREQ) }
		a.dial(b, nil).c.Abandon(n.now)
		n.run(5 * time.Minute)
		if s.came[0].end() != ErrGivenUp || len(b.e.conns) != 0 {
			t.Errorf("%v, %d left", s.came[0].end(), len(b.e.conns))
		}
	})
	t.Run("no confirmation", func(t *testing.T) {
		n, a, b, s := pairOf(t, 10)
		n.lose = func(from, _ netip.Addr, m roce.CMMessage) bool { return silent(m, roce.CMRTU, roce.CMMRA) }
		client := a.dial(b, nil)
		n.run(time.Millisecond)
		s.came[0].accept()
		n.run(time.Millisecond)
		client.c.Ready()
		n.run(time.Minute)
		if s.came[0].end() != ErrNoAnswer || s.came[0].up != 0 {
			t.Errorf("%v", s.came[0].end())
		}
		if client.end() != ErrGivenUp || client.c.state == established {
			t.Errorf("the client: %v", client.end())
		}
	})
	t.Run("no answer to the end", func(t *testing.T) {
		n, a, b, s := pairOf(t, 10)
		client, _ := connected(n, a, b, s)
		n.lose = func(from, _ netip.Addr, m roce.CMMessage) bool { return true }
		client.c.Disconnect(n.now)
		if a.e.Leaving() != 1 {
			t.Error("it has left at once")
		}
		n.run(time.Minute)
		if client.end() != ErrDisconnected || a.e.Leaving() != 0 {
			t.Errorf("%v", client.end())
		}
	})
}

// What is given up on either side ends on the other.
func TestAbandon(t *testing.T) {
	for name, c := range map[string]struct {
		steps  int // of the handshake before
		client bool
		want   error
	}{
		"request, by the client":     {0, true, ErrGivenUp},
		"request, by the server":     {0, false, &RejectError{Reason: roce.RejectConsumer}},
		"acceptance, by the client":  {1, true, &RejectError{Reason: roce.RejectConsumer}},
		"acceptance, by the server":  {1, false, &RejectError{Reason: roce.RejectConsumer}},
		"connection, by the client":  {2, true, ErrDisconnected},
		"connection, by the server":  {2, false, ErrDisconnected},
		"unconfirmed, by the server": {3, false, &RejectError{Reason: roce.RejectConsumer}},
	} {
		t.Run(name, func(t *testing.T) {
			n, a, b, s := pairOf(t, 10)
			client := a.dial(b, nil)
			n.run(time.Millisecond)
			if c.steps > 0 {
				s.came[0].accept()
				n.run(time.Millisecond)
			}
			if c.steps > 2 {
				n.lose = func(_, _ netip.Addr, m roce.CMMessage) bool { return m.Attr() == roce.CMRTU }
			}
			if c.steps > 1 {
				client.c.Ready()
				n.run(time.Millisecond)
			}
			who, other := client, s.came[0]
			if !c.client {
				who, other = other, who
			}
			who.c.Abandon(n.now)
			n.run(time.Second)
			if fmt.Sprint(other.end()) != fmt.Sprint(c.want) || who.end() != nil {
				t.Errorf("%v, and who has given up has heard %v", other.end(), who.end())
			}
			n.run(time.Minute)
			if len(a.e.conns)+len(b.e.conns)+len(a.e.timers)+len(b.e.timers) != 0 {
				t.Error("something is left")
			}
		})
	}
}

// Who disconnects is done when it hears that the peer has given the connection up.
func TestRejectedDisconnect(t *testing.T) {
	n, a, b, s := pairOf(t, 10)
	n.lose = func(from, _ netip.Addr, m roce.CMMessage) bool {
		return m.Attr() == roce.CMRTU || m.Attr() == roce.CMDREQ
	}
	client := a.dial(b, nil)
	n.run(time.Millisecond)
	s.came[0].accept()
	n.run(time.Millisecond)
	client.c.Ready()
	client.c.Disconnect(n.now)
	s.came[0].c.Abandon(n.now)
	n.run(time.Millisecond)
	if client.end() != ErrDisconnected || a.e.Leaving() != 0 || len(a.e.timers) != 0 {
		t.Errorf("%v, %d are leaving", client.end(), a.e.Leaving())
	}
}

// Requests that cannot be taken are refused for their reasons, and nothing is kept of them.
func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(m *roce.REQ)
		want   roce.RejectReason
	}{
		"no listener":       {func(m *roce.REQ) { m.ServiceID++ }, roce.RejectInvalidService},
		"port space":        {func(m *roce.REQ) { m.ServiceID = roce.PortSpaceUDP.ServiceID(testPort) }, roce.RejectInvalidService},
		"UC":                {func(m *roce.REQ) { m.Transport = roce.TransportUC }, roce.RejectInvalidTransport},
		"XRC":               {func(m *roce.REQ) { m.Transport = 3 }, roce.RejectInvalidTransport},
		"to another":        {func(m *roce.REQ) { m.RemoteGID[15]++ }, roce.RejectInvalidGID},
		"from another":      {func(m *roce.REQ) { m.LocalGID[15]++ }, roce.RejectInvalidGID},
		"hello to another":  {func(m *roce.REQ) { m.Private[35]++ }, roce.RejectInvalidGID},
		"hello from others": {func(m *roce.REQ) { m.Private[19]++ }, roce.RejectInvalidGID},
		"no hello":          {func(m *roce.REQ) { m.Private[0] = 1 }, roce.RejectUnsupported},
		"QP 0":              {func(m *roce.REQ) { m.QPN = 0 }, roce.RejectNoQP},
		"QP 1":              {func(m *roce.REQ) { m.QPN = 1 }, roce.RejectNoQP},
		"no MTU":            {func(m *roce.REQ) { m.MTU = 0 }, roce.RejectInvalidMTU},
		"MTU":               {func(m *roce.REQ) { m.MTU = 6 }, roce.RejectInvalidMTU},
		"no ID":             {func(m *roce.REQ) { m.LocalID = 0 }, roce.RejectInvalidCommID},
	} {
		n, a, b, s := pairOf(t, 10)
		a.dial(b, nil)
		m := *a.sent[0].(*roce.REQ)
		n.events = nil // what was sent is lost
		c.change(&m)
		var mad [roce.MADLen]byte
		roce.PutMAD(mad[:], 77, &m)
		b.e.Receive(managerAt(a.addr), mad[:], n.now)
		r, ok := b.sent[0].(*roce.REJ)
		if !ok || r.Reason != c.want || r.RemoteID != m.LocalID || len(b.e.conns) != 0 || len(s.came) != 0 {
			t.Errorf("%s: %+v, %d connections, %d requests", name, b.sent[0], len(b.e.conns), len(s.came))
		}
	}
	n, a, b, s := pairOf(t, 2)
	for i := range 3 {
		c := a.dial(b, nil)
		n.run(time.Millisecond)
		if e, ok := c.end().(*RejectError); ok != (i == 2) || ok && e.Reason != roce.RejectNoResources {
			t.Errorf("request %d: %v", i, c.end())
		}
	}
	if len(b.e.conns) != 2 {
		t.Errorf("%d connections", len(b.e.conns))
	}
	for what, err := range map[string]error{
		"request": func() error {
			_, err := a.e.Connect(n.now, 0, netip.AddrPortFrom(b.addr, 1), &Params{Private: make([]byte, MaxRequest+1)}, &side{})
			return err
		}(),
		"accept": s.came[0].c.Accept(n.now, &Params{Private: make([]byte, MaxReply+1)}),
		"reject": s.came[0].c.Reject(n.now, roce.RejectConsumer, make([]byte, MaxReject+1)),
	} {
		if err == nil {
			t.Errorf("%s: too much private data", what)
		}
	}
}

// A peer that has forgotten a connection takes its queue pair for another: the old one ends, and the new one is refused until then.
func TestStale(t *testing.T) {
	n, a, b, s := pairOf(t, 10)
	qpn := func(p *Params) { p.QPN = 77 }
	_ = a.dial(b, qpn)
	n.run(time.Millisecond)
	s.came[0].accept()
	n.run(time.Millisecond)
	for _, c := range a.e.conns {
		c.Ready()
	}
	n.run(time.Millisecond)
	a = n.node(0) // its process has started again, with the same GUID
	again := a.dial(b, qpn)
	n.run(100 * time.Millisecond)
	if e, ok := again.end().(*RejectError); !ok || e.Reason != roce.RejectStale {
		t.Errorf("%v", again.end())
	}
	if s.came[0].end() != ErrDisconnected {
		t.Errorf("the old connection: %v", s.came[0].end())
	}
	again = a.dial(b, qpn) // in timewait
	n.run(100 * time.Millisecond)
	if e, ok := again.end().(*RejectError); !ok || e.Reason != roce.RejectStale {
		t.Errorf("%v", again.end())
	}
	n.run(2 * timewait)
	again = a.dial(b, qpn)
	n.run(time.Millisecond)
	if again.end() != nil || len(s.came) != 2 {
		t.Errorf("%v, %d requests", again.end(), len(s.came))
	}
}

// Messages about no connection, or by somebody else, do nothing; a DREQ is answered.
func TestStrangers(t *testing.T) {
	n, a, b, s := pairOf(t, 10)
	client, server := connected(n, a, b, s)
	local, remote := server.c.localID, server.c.remoteID
	send := func(from netip.Addr, m roce.CMMessage) roce.CMMessage {
		before := len(b.sent)
		var mad [roce.MADLen]byte
		roce.PutMAD(mad[:], 99, m)
		b.e.Receive(managerAt(from), mad[:], n.now)
		if len(b.sent) == before {
			return nil
		}
		return b.sent[before]
	}
	for _, from := range []netip.Addr{addrs[2], a.addr} {
		id := local
		if from == a.addr {
			id++
		}
		for _, m := range []roce.CMMessage{&roce.RTU{LocalID: remote, RemoteID: id}, &roce.REJ{LocalID: remote, RemoteID: id, Reason: roce.RejectConsumer},
			&roce.MRA{LocalID: remote, RemoteID: id}, &roce.DREP{LocalID: remote, RemoteID: id}} {
			if r := send(from, m); r != nil {
				t.Errorf("%v: answered by %v", m.Attr(), r.Attr())
			}
		}
		if r, ok := send(from, &roce.DREQ{LocalID: remote, RemoteID: id, RemoteQPN: server.c.qpn}).(*roce.DREP); !ok || r.LocalID != id || r.RemoteID != remote {
			t.Errorf("DREQ: %+v", r)
		}
	}
	a.dial(b, nil)
	n.run(time.Millisecond)
	waits := s.came[1]
	for _, m := range []*roce.REJ{{LocalID: waits.c.remoteID, RemoteID: waits.c.localID, Reason: roce.RejectConsumer},
		{LocalID: waits.c.remoteID, Reason: roce.RejectTimeout, InfoLen: 8, Info: [72]byte{7: 1}}} {
		if send(addrs[2], m); waits.end() != nil {
			t.Errorf("a stranger has ended a request: %+v, %v", m, waits.end())
		}
	}
	if r := send(a.addr, &roce.DREQ{LocalID: remote, RemoteID: local, RemoteQPN: server.c.qpn + 1}); r != nil {
		t.Errorf("DREQ of another queue pair: %+v", r)
	}
	if r := send(a.addr, &roce.REJ{LocalID: remote, RemoteID: local, Reason: roce.RejectConsumer}); r != nil || server.end() != nil {
		t.Errorf("REJ of a connection that is there: %+v", r)
	}
	if r, ok := send(a.addr, &roce.SIDRREQ{RequestID: 5}).(*roce.SIDRREP); !ok || r.RequestID != 5 || r.Status != 1 {
		t.Errorf("SIDR: %+v", r)
	}
	if r, ok := send(a.addr, &roce.REP{LocalID: 7, RemoteID: 12345, QPN: 9}).(*roce.REJ); !ok || r.Reason != roce.RejectInvalidCommID {
		t.Errorf("REP: %+v", r)
	}
	b.e.Receive(managerAt(a.addr), make([]byte, 100), n.now)
	b.e.Receive(managerAt(a.addr), make([]byte, roce.MADLen), n.now)
	if b.e.Counters.Malformed != 2 || b.e.Counters.Strange == 0 {
		t.Errorf("%+v", b.e.Counters)
	}
	if client.end() != nil || server.end() != nil {
		t.Errorf("%v, %v", client.end(), server.end())
	}
}

// However much strangers say, what is kept of it is bounded.
func TestFlood(t *testing.T) {
	n, a, b, s := pairOf(t, 20)
	a.dial(b, nil)
	m := *a.sent[0].(*roce.REQ)
	n.events = nil
	var mad [roce.MADLen]byte
	for i := range uint32(4 * maxMemory) {
		m.LocalID, m.QPN = i+1, i+100
		roce.PutMAD(mad[:], uint64(i), &m)
		b.e.Receive(managerAt(a.addr), mad[:], n.now)
		if i%2 == 0 && len(s.came) > 0 { // the program refuses what it gets
			if err := s.came[0].c.Reject(n.now, roce.RejectConsumer, nil); err != nil {
				t.Fatal(err)
			}
			s.came = s.came[1:]
		}
		b.sent, n.events = nil, nil
		if e := b.e; len(e.conns) > maxMemory+20 || len(e.requests) > maxMemory+20 || len(e.peers) > maxMemory+20 || len(e.old) > maxMemory || len(e.timers) > 20 {
			t.Fatalf("after %d: %d %d %d %d %d", i, len(e.conns), len(e.requests), len(e.peers), len(e.old), len(e.timers))
		}
	}
	if len(b.e.old) != maxMemory {
		t.Errorf("%d are remembered", len(b.e.old))
	}
}

func TestPorts(t *testing.T) {
	n, a, b, s := pairOf(t, 1)
	if err := b.e.Listen(testPort, s); !errors.Is(err, ErrPortInUse) || !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("%v", err)
	}
	dial := func(port uint16) (*Conn, error) {
		return a.e.Connect(n.now, port, netip.AddrPortFrom(b.addr, testPort), &Params{QPN: 5, MTU: ib.MTU1024}, &side{x: a})
	}
	c, err := dial(1234)
	if err != nil || c.LocalAddr().Port() != 1234 {
		t.Fatal(err)
	}
	if _, err := dial(1234); !errors.Is(err, ErrPortInUse) {
		t.Errorf("%v", err)
	}
	c.Abandon(n.now)
	if c, err = dial(1234); err != nil {
		t.Error(err)
	}
	if c, err := dial(0); err != nil || c.LocalAddr().Port() < ephemeral {
		t.Errorf("%v", err)
	}
	b.e.Unlisten(testPort)
	if b.e.PortInUse(testPort) {
		t.Error("still in use")
	}
	last := c.h.(*side)
	a.e.Close()
	if len(a.e.conns) != 0 || !errors.Is(last.end(), net.ErrClosed) {
		t.Errorf("%d connections, %v", len(a.e.conns), last.end())
	}
}

// Only what both sides want is agreed on.
func TestSelectiveTakesBoth(t *testing.T) {
	for _, x := range []struct{ offers, takes bool }{{true, true}, {true, false}, {false, true}, {false, false}} {
		n, a, b, s := pairOf(t, 1)
		vendor := map[bool]uint32{true: Vendor}
		client := a.dial(b, func(p *Params) { p.VendorID = vendor[x.offers] })
		n.run(time.Millisecond)
		if s.came[0].c.Selective() != x.offers {
			t.Errorf("%+v: the request offers %t", x, !x.offers)
		}
		p := &Params{QPN: 9, VendorID: vendor[x.takes], VendorOptions: OptionSelective}
		if err := s.came[0].c.Accept(n.now, p); err != nil {
			t.Fatal(err)
		}
		n.run(time.Millisecond)
		if client.reply == nil || client.c.Selective() != (x.offers && x.takes) {
			t.Errorf("%+v: selective %t", x, client.c.Selective())
		}
	}
}

// Who answers with options of its own is none of this library's, whatever vendor it names.
func TestSelectiveOfOthers(t *testing.T) {
	n, a, b, s := pairOf(t, 1)
	client := a.dial(b, nil)
	n.run(time.Millisecond)
	if err := s.came[0].c.Accept(n.now, &Params{QPN: 9, VendorID: Vendor, VendorOptions: 0x10000001}); err != nil {
		t.Fatal(err)
	}
	n.run(time.Millisecond)
	if client.reply == nil || client.c.Selective() {
		t.Errorf("selective %t", client.c.Selective())
	}
}

// What a program says goes through as it is.
func TestParams(t *testing.T) {
	n, a, b, s := pairOf(t, 1)
	client := a.dial(b, func(p *Params) {
		p.FlowControl, p.VendorID, p.VendorOptions, p.FlowLabel, p.TrafficClass = true, 0x2c9, 0x10000001, 0x12345, 0x60
	})
	n.run(time.Millisecond)
	if m := s.came[0].c.REQ(); !m.FlowControl || m.VendorID != 0x2c9 || m.VendorOptions != 0x10000001 || m.FlowLabel != 0x12345 || m.TrafficClass != 0x60 {
		t.Errorf("%+v", m)
	}
	if err := s.came[0].c.Accept(n.now, &Params{QPN: 9, FlowControl: true, VendorID: 0x2c9, VendorOptions: 5}); err != nil {
		t.Fatal(err)
	}
	n.run(time.Millisecond)
	if m := client.reply; m == nil || !m.FlowControl || m.VendorID != 0x2c9 || m.VendorOptions != 5 || client.c.Selective() {
		t.Errorf("%+v", m)
	}
}

// The answer is refused: the passive side hears of it, and why.
func TestRejectReply(t *testing.T) {
	n, a, b, s := pairOf(t, 1)
	client := a.dial(b, nil)
	n.run(time.Millisecond)
	s.came[0].accept()
	n.run(time.Millisecond)
	if err := client.c.Reject(n.now, roce.RejectUnsupported, []byte("no")); err != nil {
		t.Fatal(err)
	}
	n.run(time.Second)
	e, ok := s.came[0].end().(*RejectError)
	if !ok || e.Reason != roce.RejectUnsupported || !bytes.HasPrefix(e.Private, []byte("no")) || client.end() != nil {
		t.Errorf("%v, %v", s.came[0].end(), client.end())
	}
	if client.c.Reject(n.now, roce.RejectConsumer, nil) == nil {
		t.Error("rejected twice")
	}
}

// The peer's data says that it has confirmed, also if its RTU is lost.
func TestHeard(t *testing.T) {
	n, a, b, s := pairOf(t, 1)
	n.lose = func(_, _ netip.Addr, m roce.CMMessage) bool { return m.Attr() == roce.CMRTU }
	client := a.dial(b, nil)
	n.run(time.Millisecond)
	server := s.came[0]
	if server.c.Heard() {
		t.Error("before there was an answer")
	}
	server.accept()
	n.run(time.Millisecond)
	client.c.Ready()
	n.run(time.Millisecond)
	if !server.c.Heard() || server.c.Heard() {
		t.Error("not heard, or twice")
	}
	n.lose = nil
	n.run(time.Minute)
	if b.count(roce.CMREP) != 1 || server.up != 0 || server.end() != nil {
		t.Errorf("%d REP, up %d, %v", b.count(roce.CMREP), server.up, server.end())
	}
	server.c.Disconnect(n.now)
	n.run(time.Second)
	if client.end() != ErrDisconnected || server.end() != ErrDisconnected {
		t.Errorf("%v, %v", client.end(), server.end())
	}
}

// Both ends are at one address, and the active one's port is its caller's, who has a listener there as well.
func TestLoopback(t *testing.T) {
	n := newNetwork(t, 1)
	a := n.node(0)
	s := a.listen(1)
	client := &side{x: a}
	p := &Params{QPN: 5, MTU: ib.MTU1024, Bound: true}
	var err error
	if client.c, err = a.e.Connect(n.now, testPort, netip.AddrPortFrom(a.addr, testPort), p, client); err != nil {
		t.Fatal(err)
	}
	n.run(time.Millisecond)
	s.came[0].accept()
	n.run(time.Millisecond)
	client.c.Ready()
	n.run(time.Millisecond)
	if s.came[0].up != 1 {
		t.Fatalf("%v, %v", client.end(), s.came[0].end())
	}
	client.c.Disconnect(n.now)
	n.run(time.Minute)
	if client.end() != ErrDisconnected || s.came[0].end() != ErrDisconnected || len(a.e.conns) != 0 || len(a.e.peers) != 0 || !a.e.PortInUse(testPort) {
		t.Errorf("%v, %v, %d connections", client.end(), s.came[0].end(), len(a.e.conns))
	}
}
