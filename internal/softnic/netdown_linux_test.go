package softnic

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// host is a process whose network is taken away. It prints asynchronous events as they come, and does what it is told: each line is
// answered by one that begins with its first word.
func init() {
	testutil.RegisterChild("softnic.host", func([]string) {
		t := childTB{}
		n, err := Open()
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				e, err := n.AsyncEvent(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				fmt.Println("event:", e.Type)
			}
		}()
		h := netHost{n: n}
		for line := range testutil.ChildInput() {
			word, rest, _ := strings.Cut(line, " ")
			fmt.Println(word+":", h.do(word, rest))
		}
	})
}

// netHost is what the process has.
type netHost struct {
	n    *NIC
	e    *end
	gid  int
	psn  ib.PSN
	sent int
}

// do does what a line says, and returns the answer.
func (h *netHost) do(word, rest string) any {
	switch word {
	case "state":
		a, err := h.n.QueryPort(1)
		if err != nil {
			return err
		}
		return a.State
	case "gids":
		gids, err := h.n.GIDs(1)
		if err != nil {
			return err
		}
		var list []string
		for _, g := range gids {
			if g.Type == ib.GIDRoCEv2 && g.NetDev != "lo" {
				list = append(list, g.GID.Addr().String())
			}
		}
		return list
	case "open": // an end, at an address of the host
		gids, err := h.n.GIDs(1)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(gids, func(g ib.GIDEntry) bool { return g.GID.Addr().String() == rest })
		if i < 0 {
			return "no such address"
		}
		h.gid, h.sent = gids[i].Index, 0
		p, err := h.n.netPortAt(h.gid)
		if err != nil {
			return err
		}
		h.e = makeEnd(childTB{}, h.n, endConfig{typ: ib.RC, size: 64 << 10})
		h.psn = ib.PSN(rand.Uint32()) & ib.MaxPSN
		return fmt.Sprint(p.sock.Local(), " ", uint32(h.e.q.QPN()), " ", uint32(h.psn))
	case "wire": // it to a peer
		var at, timeout string
		var psn uint32
		if _, err := fmt.Sscan(rest, &at, &psn, &timeout); err != nil {
			return err
		}
		d, err := time.ParseDuration(timeout)
		if err != nil {
			return err
		}
		h.e.wire(wireTo{gid: h.gid, addr: netip.MustParseAddrPort(at), own: true, qpn: phoenixQPN, from: h.psn, at: ib.PSN(psn), timeout: d})
		return ""
	case "talk": // to the peer, which echoes
		for range 20 {
			if st := h.message(); st != ib.WCSuccess {
				return st
			}
		}
		return "all echoed"
	}
	return "what?"
}

// message has the peer send one back, and returns how that ended.
func (h *netHost) message() ib.WCStatus {
	e, i := h.e, h.sent
	h.sent++
	copy(e.buf, bytes.Repeat([]byte{byte(i >> 8), byte(i)}, phoenixSize/2))
	e.recv(uint64(i), e.sge(8192, 64))
	e.send(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, SGEs: e.sge(0, phoenixSize)})
	var wc [1]ib.WC
	for e.cq.Poll(wc[:]) == 0 {
		time.Sleep(100 * time.Microsecond)
	}
	if wc[0].Status == ib.WCSuccess && (wc[0].ID != uint64(i) || !bytes.Equal(e.buf[8192:8200], e.buf[:8])) {
		e.t.Fatalf("echo %d: %+v: % x, want % x", i, wc[0], e.buf[8192:8200], e.buf[:8])
	}
	return wc[0].Status
}

// A netHostChild is that process, seen from the test.
type netHostChild struct {
	*testutil.Child
	t  *testing.T
	nw *testutil.Network
}

// ask tells it something, and returns the answer; events that come before are passed over.
func (c *netHostChild) ask(line string) string {
	c.t.Helper()
	word, _, _ := strings.Cut(line, " ")
	c.Send(line)
	return c.Expect(word + ":")
}

// connect gives it a connection to a new peer, from an address.
func (c *netHostChild) connect(from string, timeout string) {
	c.t.Helper()
	peer := startPhoenix(c.t, c.nw.Namespaces[1], netip.AddrPortFrom(c.nw.Addrs[1], 0))
	open := c.ask("open " + from)
	peer.Send(open)
	c.ask(fmt.Sprint("wire ", peer.at, " ", peer.psn, " ", timeout))
	peer.Expect("ready:")
	if got := c.ask("talk"); got != "all echoed" {
		c.t.Fatalf("at first: %s (%s)", got, open)
	}
}

// ip runs ip(8) in its namespace.
func (c *netHostChild) ip(args string) {
	c.t.Helper()
	if out, err := exec.Command("ip", append([]string{"-n", c.nw.Namespaces[0]}, strings.Fields(args)...)...).CombinedOutput(); err != nil {
		c.t.Fatalf("ip %s: %v: %s", args, err, out)
	}
}

func (c *netHostChild) expect(line, want string) {
	c.t.Helper()
	if got := c.ask(line); got != want {
		c.t.Errorf("%s: %q, want %q", line, got, want)
	}
}

func newNetHost(t *testing.T) *netHostChild {
	nw := testutil.NewNetwork(t)
	c := &netHostChild{Child: testutil.StartChildIn(t, nw.Namespaces[0], nil, "softnic.host"), t: t, nw: nw}
	c.expect("gids", "["+nw.Addrs[0].String()+"]")
	c.expect("state", "ACTIVE")
	return c
}

// An interface that is down for less than the retries take costs time, and nothing else. One that is down for longer ends what was
// under way. Both are told of, as the port's error, and its return.
func TestInterfaceDown(t *testing.T) {
	c := newNetHost(t)
	addr := c.nw.Addrs[0].String()
	c.connect(addr, "2s")
	c.ip("link set veth down")
	c.Expect("event: port error")
	c.expect("state", "DOWN")
	c.expect("gids", "[]")
	c.Send("talk") // into the void, for now
	c.ip("link set veth up")
	c.Expect("talk: all echoed")
	testutil.Eventually(t, "the port is active", func() bool { return c.ask("state") == "ACTIVE" })
	c.expect("gids", "["+addr+"]")
	c.expect("talk", "all echoed")

	c.connect(addr, "250ms")
	c.ip("link set veth down")
	c.Expect("event: port error")
	if got := c.ask("talk"); got != ib.WCRetryExceeded.String() && got != ib.WCFlushErr.String() { // the receive's end, or the request's
		t.Errorf("%s, when the interface stays down", got)
	}
	c.ip("link set veth up")
	c.Expect("event: port active")
	c.connect(addr, "2s")
}

// Connections end with the address that they come from, also those that wait. Those from its successor are not concerned.
func TestAddressChanges(t *testing.T) {
	c := newNetHost(t)
	was, is := c.nw.Addrs[0].String(), "10.97.0.9"
	c.connect(was, "2s")
	c.ip("address add " + is + "/24 dev veth")
	c.Expect("event: GID change")
	c.ip("address delete " + was + "/24 dev veth")
	c.ip("address replace " + is + "/24 dev veth") // if it was a secondary one it has gone as well
	c.Expect("event: QP fatal")
	c.expect("gids", "["+is+"]")
	if got := c.ask("talk"); got != ib.WCRetryExceeded.String() && got != ib.WCFlushErr.String() {
		t.Errorf("%s, from an address that is gone", got)
	}
	c.connect(is, "2s")
	c.expect("talk", "all echoed")
}
