package udp

import (
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

// Which packets leave in one piece.
func TestGroup(t *testing.T) {
	ours := &Peer{addr: netip.MustParseAddrPort("10.0.0.1:4791"), pieces: true}
	too := &Peer{addr: netip.MustParseAddrPort("10.0.0.2:4791"), pieces: true}
	theirs := &Peer{addr: netip.MustParseAddrPort("10.0.0.3:4791")}
	type pkt struct {
		to *Peer
		n  int
	}
	repeat := func(p pkt, n int) (all []pkt) {
		for range n {
			all = append(all, p)
		}
		return all
	}
	for _, tc := range []struct {
		what string
		pkts []pkt
		want []int
	}{
		{"one", []pkt{{ours, 100}}, []int{1}},
		{"of one length", repeat(pkt{ours, 100}, 5), []int{5}},
		{"the last is shorter", []pkt{{ours, 100}, {ours, 100}, {ours, 60}}, []int{3}},
		{"one in between is shorter", []pkt{{ours, 100}, {ours, 60}, {ours, 100}}, []int{2, 1}},
		{"longer and longer", []pkt{{ours, 100}, {ours, 104}, {ours, 108}}, []int{1, 1, 1}},
		{"to several peers", []pkt{{ours, 100}, {too, 100}, {too, 100}, {ours, 100}}, []int{1, 2, 1}},
		{"not one of ours", repeat(pkt{theirs, 100}, 3), []int{1, 1, 1}},
		{"many small", repeat(pkt{ours, 60}, 100), []int{64, 36}},
		{"many large", repeat(pkt{ours, 4120}, 20), []int{15, 5}},
	} {
		var b txBatch
		b.init(128)
		const skip = 3 // the first of those to be sent
		for i, p := range tc.pkts {
			b.set(skip+i, p.n, p.to)
		}
		n := b.group(skip, len(tc.pkts), true)
		if got := b.counts[:n]; !slices.Equal(got, tc.want) {
			t.Errorf("%s: messages of %v, want %v", tc.what, got, tc.want)
		}
		for i, at := 0, skip; i < n; i++ {
			if m := &b.msgs[i].hdr; m.Iov != &b.iovs[at] || int(m.Iovlen) != b.counts[i] || (m.Control != nil) != (b.counts[i] > 1) {
				t.Errorf("%s: message %d is %+v", tc.what, i, m)
			}
			at += b.counts[i]
		}
		if n := b.group(skip, len(tc.pkts), false); n != len(tc.pkts) {
			t.Errorf("%s: %d messages where no pieces are possible", tc.what, n)
		}
	}
}

// Receiving polls the device, and the socket holds what it asks for, also where net.core.rmem_max is Linux' usual 208 KiB, if the process may have that.
func TestOptions(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4096); err != nil {
		testutil.Skip(t, "this process may not administer the network: "+err.Error())
	}
	if err := setOptions(fd, true); err != nil {
		t.Fatal(err)
	}
	for _, o := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF} {
		if n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, o); err != nil || n < bufferLen {
			t.Errorf("option %d: %d bytes, %v; asked for %d", o, n, err, bufferLen)
		}
	}
	if n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BUSY_POLL); err != nil || n != busyPoll {
		t.Errorf("SO_BUSY_POLL: %d, %v", n, err)
	}
}

// That there is no way to a peer does not mean that the network device takes no pieces.
func TestNoRouteInPieces(t *testing.T) {
	s, err := Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	nowhere, err := s.Peer(netip.MustParseAddrPort("192.0.2.1:4791")) // from the loopback device's address
	if err != nil {
		t.Fatal(err)
	}
	nowhere.AllowPieces()
	h := &roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly), PKey: roce.DefaultPKey}
	for range 3 {
		if _, ok := nowhere.Packet(h, 64); !ok {
			t.Fatal("no room")
		}
		nowhere.Commit()
	}
	s.Flush()
	if s.Counters.NotSent != 3 || s.Counters.SendErr == nil || s.sys.whole {
		t.Errorf("%+v, and pieces are given up: %v", s.Counters, s.sys.whole)
	}
}
