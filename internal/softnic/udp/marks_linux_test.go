package udp

import (
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/roce"
)

// Packets that the network has marked are handed on with FECN, alone and in pieces, and others are not.
func TestMarks(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		a, err := Listen(netip.MustParseAddrPort(addr))
		if err != nil && addr != "127.0.0.1:0" {
			t.Logf("%s: %v", addr, err) // this host has no such address
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		b, err := Listen(netip.MustParseAddrPort(addr))
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		a.AllowECN()
		to, err := a.Peer(b.Local())
		if err != nil {
			t.Fatal(err)
		}
		to.AllowPieces()
		v4 := a.local.Addr().Is4()
		for _, tos := range []int{capable, markCE, capable, 0} {
			if v4 {
				err = unix.SetsockoptInt(a.sys.fd, unix.IPPROTO_IP, unix.IP_TOS, tos)
			} else {
				err = unix.SetsockoptInt(a.sys.fd, unix.IPPROTO_IPV6, unix.IPV6_TCLASS, tos)
			}
			if err != nil {
				t.Fatal(err)
			}
			const packets = 5
			for range packets {
				if _, ok := to.Packet(&roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly)}, 100); !ok {
					t.Fatal("no room")
				}
				to.Commit()
			}
			a.Flush()
			for came, end := 0, time.Now().Add(20*time.Second); came < packets; {
				if _, _, err := b.Receive(end, func(_ netip.AddrPort, p *roce.Packet) {
					if came++; p.FECN != (tos == markCE) {
						t.Errorf("%s: sent with %d, FECN is %v", addr, tos, p.FECN)
					}
				}); err != nil || time.Now().After(end) {
					t.Fatalf("%d packets came: %v", came, err)
				}
			}
		}
	}
}

// Whoever does not take what has come for so long that half of the socket's buffer is full hears of it; who does in time, does not.
func TestLateReceiver(t *testing.T) {
	a, err := Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	to, err := a.Peer(b.Local())
	if err != nil {
		t.Fatal(err)
	}
	marked, came := 0, 0
	count := func(_ netip.AddrPort, p *roce.Packet) {
		if came++; p.FECN {
			marked++
		}
	}
	send := func() {
		if _, ok := to.Packet(&roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly)}, 1024); !ok {
			t.Fatal("no room")
		}
		to.Commit()
		a.Flush()
	}
	take := func() {
		for b.sys.waiting() > 0 {
			if _, _, err := b.Receive(time.Time{}, count); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 200 {
		send()
		take()
	}
	if marked != 0 || came == 0 {
		t.Errorf("%d of %d packets are marked, though they were taken at once", marked, came)
	}
	for n := 0; b.sys.waiting() < b.most*3/2 && n < 100_000; n++ {
		send()
	}
	came = 0
	take()
	if marked == 0 || marked > came*3/4 {
		t.Errorf("%d of %d packets are marked that have filled three quarters of the buffer", marked, came)
	}
	marked = 0
	send()
	take()
	if marked != 0 {
		t.Error("a packet that has met an empty buffer is marked")
	}
}
