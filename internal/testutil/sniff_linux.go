package testutil

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A Sniffer looks at the RoCEv2 packets of a network device, of both directions, as they are there. Each must have the invariant CRC that
// belongs to its headers; it keeps some of every kind.
type Sniffer struct {
	t      testing.TB
	fd     int
	finish func()        // ends run
	end    chan struct{} // closed by finish
	done   chan struct{} // run has returned; before that, the rest is its own
	kept   map[kind][][]byte
	seen   map[kind]int
}

// A kind of packets that a Sniffer sees.
type kind struct {
	out    bool // sent by this end of the device
	opcode byte
}

// keep is how many packets of a kind are kept.
const keep = 50

// Sniff looks at the packets of n until the test has ended, or Check.
func (n *RXENet) Sniff(t testing.TB) *Sniffer {
	t.Helper()
	s, err := sniff(t, rxeNetDev)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func sniff(t testing.TB, device string) (*Sniffer, error) {
	dev, err := net.InterfaceByName(device)
	if err != nil {
		return nil, err
	}
	everything := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(everything))
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	s := &Sniffer{t: t, fd: fd, end: make(chan struct{}), done: make(chan struct{}), kept: map[kind][][]byte{}, seen: map[kind]int{}}
	s.finish = sync.OnceFunc(func() { close(s.end); <-s.done })
	if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: everything, Ifindex: dev.Index})); err != nil {
		unix.Close(fd)
		return nil, err
	}
	go s.run()
	t.Cleanup(func() {
		s.finish()
		unix.Close(fd)
	})
	return s, nil
}

// run reads packets until finish, and what there is then. It looks now and then: to be woken for each packet would take time from those
// who exchange them, on a machine of two emulated processors.
func (s *Sniffer) run() {
	defer close(s.done)
	b := make([]byte, 1<<16)
	for last := false; ; {
		n, from, err := unix.Recvfrom(s.fd, b, unix.MSG_DONTWAIT)
		if a, ok := from.(*unix.SockaddrLinklayer); ok && err == nil {
			s.packet(a.Pkttype == unix.PACKET_OUTGOING, b[:n])
			continue
		}
		if last {
			return
		}
		select {
		case <-s.end:
			last = true
		case <-time.After(30 * time.Millisecond):
		}
	}
}

// packet looks at what may be a packet.
func (s *Sniffer) packet(out bool, ip []byte) {
	const udp, port = 17, 4791
	n := 40
	switch {
	case len(ip) > 20 && ip[0]>>4 == 4 && ip[9] == udp:
		n = int(ip[0]&0xf) * 4
	case len(ip) > 40 && ip[0]>>4 == 6 && ip[6] == udp:
	default:
		return
	}
	if len(ip) < n+8+12+4 || binary.BigEndian.Uint16(ip[n+2:]) != port {
		return
	}
	k := kind{out, ip[n+8]}
	s.seen[k]++
	if len(s.kept[k]) < keep {
		s.kept[k] = append(s.kept[k], bytes.Clone(ip))
	}
	if !HasICRC(ip) {
		s.t.Errorf("a packet has the ICRC %08x, and its headers want %08x: % x", binary.LittleEndian.Uint32(ip[len(ip)-4:]), ICRC(ip), ip)
	}
}

// Check ends the looking, and fails the test if packets of a direction were not seen. Those that were kept are in a file named for the test
// then, if the machine has a folder that outlives it: make vm has tshark look at them (TestTsharkRXE of package roce), where that takes no minute.
func (s *Sniffer) Check() {
	s.t.Helper()
	s.finish()
	var total [2]int
	var packets [][]byte
	for k, n := range s.seen {
		if total[0] += n; k.out {
			total[0] -= n
			total[1] += n
		}
		if !k.younger() {
			packets = append(packets, s.kept[k]...)
		}
	}
	lost := s.lost()
	if total[0] == 0 || total[1] == 0 {
		s.t.Errorf("%d packets came from the software NIC, and %d from rxe", total[0], total[1])
	}
	s.t.Logf("%d packets from the software NIC and %d from rxe, of %d kinds, were seen, and %d not", total[0], total[1], len(s.seen), lost)
	const folder = "/out" // of test/soft-roce
	if _, err := os.Stat(folder); err == nil {
		if err := os.WriteFile(folder+"/rxe-"+s.t.Name()+".pcap", pcap(packets), 0o666); err != nil {
			s.t.Error(err)
		}
	}
}

// younger reports whether tshark 4.0 does not know such packets, or not where their invariant CRC is: FLUSH, ATOMIC WRITE, CNPs, and
// the software NIC's own.
func (k kind) younger() bool {
	return k.opcode == 0x1c || k.opcode == 0x1d || k.opcode == 0x81 || k.opcode >= 0xc0
}

// lost is how many packets of the device the socket had no room for.
func (s *Sniffer) lost() uint32 {
	st, err := unix.GetsockoptTpacketStats(s.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		s.t.Error(err)
		return 0
	}
	return st.Drops
}

// pcap returns a capture of IP packets.
func pcap(packets [][]byte) []byte {
	const linkRaw = 101
	var b []byte
	u32 := func(v ...uint32) {
		for _, v := range v {
			b = binary.NativeEndian.AppendUint32(b, v)
		}
	}
	u32(0xa1b2c3d4, 2|4<<16, 0, 0, 1<<16, linkRaw)
	for i, p := range packets {
		u32(uint32(i), 0, uint32(len(p)), uint32(len(p)))
		b = append(b, p...)
	}
	return b
}
