package cm

import (
	"bytes"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
)

func (x *node) ask(to *node, port uint16) *side {
	s := &side{x: x}
	var err error
	if s.c, err = x.e.Resolve(x.net.now, 4000, netip.AddrPortFrom(to.addr, port), []byte("who?"), s); err != nil {
		x.net.t.Fatal(err)
	}
	return s
}

// A question gets its answer, whatever is lost on the way, and the same one if it is asked again.
func TestDatagramService(t *testing.T) {
	for _, lost := range []roce.CMAttr{0, roce.CMSIDRREQ, roce.CMSIDRREP} {
		n := newNetwork(t, 1)
		a, b := n.node(0), n.node(1)
		s := &service{x: b, backlog: 1}
		if err := b.e.ListenDatagrams(testPort, s); err != nil {
			t.Fatal(err)
		}
		if err := b.e.ListenDatagrams(testPort, s); !errors.Is(err, ErrPortInUse) {
			t.Error(err)
		}
		left := 2
		n.lose = func(_, _ netip.Addr, m roce.CMMessage) bool {
			if m.Attr() == lost && left > 0 {
				left--
				return true
			}
			return false
		}
		client := a.ask(b, testPort)
		n.run(time.Second)
		c := s.came[0].c
		if q := c.Question(); !bytes.HasPrefix(q.Private[roce.IPHelloLen:], []byte("who?")) || c.LocalAddr() != netip.AddrPortFrom(b.addr, testPort) ||
			c.RemoteAddr() != netip.AddrPortFrom(a.addr, 4000) || c.REQ() != nil {
			t.Errorf("%+v", q)
		}
		if err := c.Answer(n.now, &Answer{QPN: 77, QKey: 0x1234567, Private: []byte("me")}); err != nil {
			t.Fatal(err)
		}
		n.run(2 * time.Second)
		if m := client.answer; m == nil || m.Status != StatusSuccess || m.QPN != 77 || m.QKey != 0x1234567 || !bytes.HasPrefix(m.Private[:], []byte("me")) {
			t.Errorf("%v lost: %+v, %v", lost, m, client.end())
		}
		if c.Answer(n.now, &Answer{}) == nil {
			t.Error("answered twice")
		}
		n.run(time.Minute)
		if len(s.came) != 1 || client.end() != nil || s.came[0].end() != nil || len(a.e.conns)+len(b.e.conns)+len(b.e.requests) != 0 {
			t.Errorf("%v lost: %d questions, %v, %v, %d and %d are left", lost, len(s.came), client.end(), s.came[0].end(), len(a.e.conns), len(b.e.conns))
		}
		b.e.UnlistenDatagrams(testPort)
		client = a.ask(b, testPort)
		n.run(time.Second)
		if client.answer == nil || client.answer.Status != StatusUnsupported {
			t.Errorf("%+v", client.answer)
		}
	}
}

// Questions that nobody answers, or waits for.
func TestDatagramSilence(t *testing.T) {
	n := newNetwork(t, 1)
	a, b := n.node(0), n.node(1)
	s := &service{x: b, backlog: 2}
	if err := b.e.ListenDatagrams(testPort, s); err != nil {
		t.Fatal(err)
	}
	nobody := &side{x: a}
	if _, err := a.e.Resolve(n.now, 1, netip.AddrPortFrom(addrs[2], 1), nil, nobody); err != nil {
		t.Fatal(err)
	}
	if _, err := a.e.Resolve(n.now, 1, netip.AddrPortFrom(addrs[2], 1), make([]byte, MaxQuestion+1), nobody); err == nil {
		t.Error("a question that is too long")
	}
	gone, waits := a.ask(b, testPort), a.ask(b, testPort)
	n.run(time.Millisecond)
	gone.c.Abandon(n.now)
	full := a.ask(b, testPort)
	n.run(time.Millisecond)
	if full.answer == nil || full.answer.Status != StatusRejected {
		t.Errorf("%+v", full.answer)
	}
	s.came[1].c.Abandon(n.now) // the program that was asked goes
	n.run(time.Millisecond)
	if waits.answer == nil || waits.answer.Status != StatusRejected {
		t.Errorf("%+v", waits.answer)
	}
	if s.came[0].c.Answer(n.now, &Answer{Private: make([]byte, MaxAnswer+1)}) == nil {
		t.Error("an answer that is too long")
	}
	n.run(2 * time.Minute)
	if !errors.Is(nobody.end(), driver.ErrUnreachable) || !errors.Is(s.came[0].end(), ErrGivenUp) || gone.answer != nil {
		t.Errorf("%v, %v, %+v", nobody.end(), s.came[0].end(), gone.answer)
	}
	if len(a.e.conns)+len(b.e.conns)+len(b.e.requests) != 0 {
		t.Errorf("%d and %d are left", len(a.e.conns), len(b.e.conns))
	}
}
