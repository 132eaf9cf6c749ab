package transport_test

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/transport"
)

func init() {
	testutil.RegisterChild("net-listen", netListen)
	testutil.RegisterChild("net-dial", netDial)
}

// netListen echoes what comes, at an address, over a path, and says how each connection begins and ends.
func netListen(args []string) {
	ctx := context.Background()
	l, err := transport.Listen(ctx, args[0], &transport.Config{Device: "soft0", Path: transport.Path(args[1])})
	if err != nil {
		fmt.Println("error", err)
		return
	}
	fmt.Println("listening", l.Addr())
	for {
		c, err := l.Accept(ctx)
		if err != nil {
			return
		}
		fmt.Println("accepted", c.Path())
		go func() {
			for {
				var msg []byte
				if err = c.Recv(ctx, func(m *transport.Message) error { msg = bytes.Clone(m.Bytes()); return nil }); err != nil {
					break
				}
				if err = c.Send(ctx, msg); err != nil {
					break
				}
			}
			<-c.Done()
			fmt.Println("ended", c.Err())
			c.Close()
		}()
	}
}

// netDial dials, says how long that took, and sends a message that is to be echoed for each line that it is given: the message's length.
func netDial(args []string) {
	ctx := context.Background()
	begun := time.Now()
	c, err := transport.Dial(ctx, args[0], &transport.Config{Device: "soft0", Path: transport.Path(args[1])})
	fmt.Println("took", time.Since(begun))
	if err != nil {
		fmt.Println("refused", err)
		return
	}
	defer c.Close()
	fmt.Println("dialled", c.Path())
	for line := range testutil.ChildInput() {
		var n int
		fmt.Sscan(line, &n)
		msg := bytes.Repeat([]byte{7}, n)
		err := c.Send(ctx, msg)
		if err == nil {
			err = c.Recv(ctx, func(m *transport.Message) error {
				if !bytes.Equal(m.Bytes(), msg) {
					return fmt.Errorf("%d bytes came back, and others than were sent", len(m.Bytes()))
				}
				return nil
			})
		}
		if err != nil {
			<-c.Done()
			fmt.Println("lost", c.Err())
			return
		}
		fmt.Println("echoed", n)
	}
}

// A netPair is a listener in one namespace, and a network between it and a dialler in another.
type netPair struct {
	*testutil.RoutedNet
	t      *testing.T
	server *testutil.Child
	addr   string
	path   transport.Path
}

func newNetPair(t *testing.T, v6 bool, path transport.Path) *netPair {
	t.Helper()
	softOnly(t)
	n := &netPair{RoutedNet: testutil.NewRoutedNet(t), t: t, path: path}
	at := n.Addr[1].V4
	if v6 {
		at = n.Addr[1].V6
	}
	n.server = testutil.StartChildIn(t, n.B, nil, "net-listen", netip.AddrPortFrom(at, 7000).String(), string(path))
	n.addr = n.server.Expect("listening ")
	return n
}

func (n *netPair) dial() *testutil.Child {
	n.t.Helper()
	return testutil.StartChildIn(n.t, n.A, nil, "net-dial", n.addr, string(n.path))
}

// foundOut is how long it takes at most to find out that UDP is blocked, and to do without.
const foundOut = 2 * time.Second

// dialBlocked dials where UDP is blocked, and returns the child before it says what has come of it: foundOut must have been enough, if not at once, since
// a busy machine takes longer, then once of a few times.
func (n *netPair) dialBlocked() *testutil.Child {
	n.t.Helper()
	for least, i := time.Duration(math.MaxInt64), 0; ; i++ {
		c := n.dial()
		took, err := time.ParseDuration(c.Expect("took "))
		if err != nil {
			n.t.Fatal(err)
		}
		if least = min(least, took); least <= foundOut {
			return c
		}
		if i == 5 {
			n.t.Fatalf("it takes %v to find out that UDP is blocked, want %v at most", least, foundOut)
		}
	}
}

// echoes has messages of some lengths, the long ones by rendezvous, go both ways.
func echoes(c *testutil.Child) {
	for _, n := range []string{"1", "5000", "100000"} {
		c.Send(n)
		c.Expect("echoed " + n)
	}
}

func wantText(t *testing.T, what, got string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("%s: %q does not say %q", what, got, w)
		}
	}
}

// If UDP does not pass one way, or both, the handshake finds out, and says what to open.
func TestUDPBlocked(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		n := newNetPair(t, v6, transport.PathUDP)
		a, b := n.Addr[0].V4.String()+":4791", n.Addr[1].V4.String()+":4791"
		if v6 {
			a, b = "["+n.Addr[0].V6.String()+"]:4791", "["+n.Addr[1].V6.String()+"]:4791"
		}
		ways := [][]string{{testutil.RouterDevA}, {testutil.RouterDevB}, {testutil.RouterDevA, testutil.RouterDevB}}
		if v6 {
			ways = ways[:1]
		}
		for _, blocked := range ways {
			for _, from := range blocked {
				n.BlockUDP(from)
			}
			wantText(t, fmt.Sprint(blocked), n.dialBlocked().Expect("refused "), "unreachable", "UDP between "+b+" and "+a+" is blocked", "let UDP pass")
			for _, from := range blocked {
				n.AllowUDP(from)
			}
		}
		c := n.dial()
		c.Expect("dialled udp")
		echoes(c)
	}
}

// A connection whose UDP is blocked later ends, on both sides, with a reason that says so.
func TestUDPBlockedLater(t *testing.T) {
	n := newNetPair(t, false, transport.PathUDP)
	c := n.dial()
	c.Expect("dialled udp")
	echoes(c)
	n.BlockUDP(testutil.RouterDevA)
	c.Send("10")
	wantText(t, "the dialler", c.Expect("lost "), "the peer is gone", "UDP between 10.97.1.2:4791 and 10.97.2.2:4791 is blocked", "let UDP pass")
	wantText(t, "the listener", n.server.Expect("ended "), "it says: ", "is blocked")
}

// Packets that are too long for a link on the way, of which nobody may hear, are noticed in the handshake; and later, if the link
// changes then.
func TestNarrowLink(t *testing.T) {
	for _, told := range []bool{true, false} {
		n := newNetPair(t, !told, transport.PathUDP) // IPv6 wants 1280 bytes at least
		wide := n.dial()
		wide.Expect("dialled udp")
		echoes(wide)
		n.NarrowLink(1300, told)
		c := n.dial()
		c.Expect("dialled udp")
		for what := ""; !strings.Contains(what, "path MTU 1024"); {
			what = n.server.Expect("accepted ")
		}
		echoes(c)
		wide.Send("5000")
		wantText(t, "the wide one", wide.Expect("lost "), "packets of path MTU 4096 do not arrive any more, those of 1024 do", "a new connection")
		echoes(c)
	}
}

// Where UDP does not pass, peers that have not said how they are to meet do so by TCP, and both know why.
func TestTCPWhereUDPIsBlocked(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		n := newNetPair(t, v6, transport.PathAny)
		c := n.dial()
		wantText(t, "at first", c.Expect("dialled udp"), "no shared memory")
		n.server.Expect("accepted udp")
		n.BlockUDP(testutil.RouterDevB)
		c = n.dialBlocked()
		wantText(t, "the dialler", c.Expect("dialled tcp"), "no shared memory", "no UDP: ", "is blocked", "let UDP pass")
		wantText(t, "the listener", n.server.Expect("accepted tcp"), "no shared memory", "no UDP: ", "is blocked", "let UDP pass")
		echoes(c)
		n.server.Kill()
		c.Send("10")
		wantText(t, "the dialler", c.Expect("lost "), "the peer is gone")
	}
}

// The listener notices as well that the other side was killed, while nothing is under way.
func TestTCPPeerKilled(t *testing.T) {
	n := newNetPair(t, false, transport.PathTCP)
	c := n.dial()
	c.Expect("dialled tcp")
	echoes(c)
	c.Kill()
	wantText(t, "the listener", n.server.Expect("ended "), "the peer is gone")
}
