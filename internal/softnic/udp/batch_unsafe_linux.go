package udp

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/roce"
)

// message is struct mmsghdr of sendmmsg(2) and recvmmsg(2).
type message struct {
	hdr unix.Msghdr
	n   uint32
}

// sockaddr has room for struct sockaddr_in and sockaddr_in6, in words so that it is aligned for them.
type sockaddr [unix.SizeofSockaddrInet6 / 4]uint32

// sendControl has room for the control messages of what is sent: UDP_SEGMENT, and what ipControl has. In words, so that it is aligned for
// them.
type sendControl [9]uint64

func (g *sendControl) bytes() []byte {
	// Safe: the bytes of an array.
	return unsafe.Slice((*byte)(unsafe.Pointer(g)), unsafe.Sizeof(*g))
}

// ipControl is the control messages with which packets leave with another traffic class or hop limit than the socket's others.
type ipControl struct {
	mem [6]uint64
	n   int // bytes; 0: none is needed
}

// set makes them: class and hops, if they are not negative.
func (c *ipControl) set(v4 bool, class, hops int) {
	level, typeClass, typeHops := unix.IPPROTO_IPV6, unix.IPV6_TCLASS, unix.IPV6_HOPLIMIT
	if v4 {
		level, typeClass, typeHops = unix.IPPROTO_IP, unix.IP_TOS, unix.IP_TTL
	}
	// Safe: the bytes of an array.
	b := unsafe.Slice((*byte)(unsafe.Pointer(&c.mem)), unsafe.Sizeof(c.mem))
	c.n = 0
	for _, o := range [...]struct{ typ, value int }{{typeClass, class}, {typeHops, hops}} {
		if o.value >= 0 {
			binary.NativeEndian.PutUint32(b[c.n+unix.CmsgLen(0):], uint32(o.value))
			c.n += putControl(b[c.n:], level, o.typ, 4)
		}
	}
}

// put copies them, and returns how long they are.
func (c *ipControl) put(b []byte) int {
	// Safe: the bytes of an array.
	return copy(b, unsafe.Slice((*byte)(unsafe.Pointer(&c.mem)), c.n))
}

// putControl makes the header of a control message with n bytes of data at b, which is aligned for it, and returns how much room the message takes.
func putControl(b []byte, level, typ, n int) int {
	_ = b[unix.CmsgSpace(n)-1]
	// Safe: there are so many bytes, aligned, as the caller says.
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = int32(level), int32(typ)
	h.SetLen(unix.CmsgLen(n))
	return unix.CmsgSpace(n)
}

// bytes is the bytes of an address.
func (a *sockaddr) bytes() []byte {
	// Safe: the bytes of an array.
	return unsafe.Slice((*byte)(unsafe.Pointer(a)), unsafe.Sizeof(*a))
}

// set makes a struct sockaddr of an address, and returns its length.
func (a *sockaddr) set(to netip.AddrPort) uint32 {
	name := a.bytes()
	binary.BigEndian.PutUint16(name[2:], to.Port())
	if to.Addr().Is4() {
		binary.NativeEndian.PutUint16(name, unix.AF_INET)
		b := to.Addr().As4()
		copy(name[4:], b[:])
		return unix.SizeofSockaddrInet4
	}
	binary.NativeEndian.PutUint16(name, unix.AF_INET6)
	b := to.Addr().As16()
	copy(name[8:], b[:])
	return unix.SizeofSockaddrInet6
}

// get is the address.
func (a *sockaddr) get(v4 bool) netip.AddrPort {
	name := a.bytes()
	port := binary.BigEndian.Uint16(name[2:])
	if v4 {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(name[4:8])), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(name[8:24])).Unmap(), port)
}

// txBatch is packets to be sent by one system call. Those in a row that go to one peer and are of one length (the last may be
// shorter) leave in one piece, if the peer can be sent such: the system, or the network device, takes it apart.
type txBatch struct {
	mem    []byte
	peers  []*Peer
	iovs   []unix.Iovec
	msgs   []message
	counts []int // packets of each message
	names  []sockaddr
	ctls   []sendControl
}

func (b *txBatch) init(n int) {
	*b = txBatch{mem: make([]byte, n*slotLen), peers: make([]*Peer, n), iovs: make([]unix.Iovec, n), msgs: make([]message, n),
		counts: make([]int, n), names: make([]sockaddr, n), ctls: make([]sendControl, n)}
	for i := range n {
		b.iovs[i].Base = &b.slot(i)[0]
		// Safe: the array is of as many bytes as the length that is set with it says, and lives as long as the header that points to it.
		b.msgs[i].hdr.Name = (*byte)(unsafe.Pointer(&b.names[i]))
	}
}

func (b *txBatch) slot(i int) []byte { return b.mem[i*slotLen : (i+1)*slotLen : (i+1)*slotLen] }

// set says how long packet i is, and where it goes.
func (b *txBatch) set(i, n int, to *Peer) {
	b.iovs[i].SetLen(n)
	b.peers[i] = to
}

// shift moves what is behind the first done of n packets to the front, and returns how many these are.
func (b *txBatch) shift(done, n int) int {
	if done > 0 {
		for i := done; i < n; i++ {
			copy(b.slot(i-done), b.slot(i)[:b.iovs[i].Len])
			b.set(i-done, int(b.iovs[i].Len), b.peers[i])
		}
	}
	return n - done
}

const (
	maxSegments = 64 // UDP_MAX_SEGMENTS
	maxPiece    = 65000
)

// group makes messages of n packets from the first on, and returns how many.
func (b *txBatch) group(first, n int, pieces bool) (messages int) {
	for i := first; i < first+n; messages++ {
		to, size := b.peers[i], b.iovs[i].Len
		k, all := 1, size
		for pieces && to.pieces && i+k < first+n && k < maxSegments && b.peers[i+k] == to && all+size <= maxPiece {
			next := b.iovs[i+k].Len
			if next > size {
				break
			}
			k++
			all += next
			if next < size {
				break
			}
		}
		m := &b.msgs[messages].hdr
		m.Namelen = b.names[messages].set(to.addr)
		m.Iov = &b.iovs[i]
		m.SetIovlen(k)
		n := 0
		m.Control = nil
		if k > 1 || to.ip.n > 0 {
			g := b.ctls[messages].bytes()
			m.Control = &g[0]
			if k > 1 {
				n = putControl(g, unix.SOL_UDP, unix.UDP_SEGMENT, 2)
				binary.NativeEndian.PutUint16(g[unix.CmsgLen(0):], uint16(size))
			}
			n += to.ip.put(g[n:])
		}
		m.SetControllen(n)
		b.counts[messages] = k
		i += k
	}
	return messages
}

// rxBatch is room for packets that are received by one system call, in pieces of several.
type rxBatch struct {
	mem   []byte
	msgs  []message
	iovs  []unix.Iovec
	names []sockaddr
	ctls  []control
	v4    bool
	dirty int // messages that are not as they were made: the system has written to them
}

const pieceLen = 1 << 16 // room for a message that was received

func (b *rxBatch) init(n int, v4 bool) {
	*b = rxBatch{mem: make([]byte, n*pieceLen), msgs: make([]message, n), iovs: make([]unix.Iovec, n), names: make([]sockaddr, n),
		ctls: make([]control, n), v4: v4, dirty: n}
	for i := range b.msgs {
		b.iovs[i].Base = &b.mem[i*pieceLen]
		b.iovs[i].SetLen(pieceLen)
		h := &b.msgs[i].hdr
		h.Iov = &b.iovs[i]
		h.SetIovlen(1)
		// Safe: the arrays are of as many bytes as clean says, and live as long as the header that points to them.
		h.Name = (*byte)(unsafe.Pointer(&b.names[i]))
		h.Control = &b.ctls[i].bytes()[0]
	}
	b.clean()
}

// clean makes the headers what they were.
func (b *rxBatch) clean() {
	for i := range b.msgs[:b.dirty] {
		h := &b.msgs[i].hdr
		h.Namelen = uint32(unsafe.Sizeof(sockaddr{}))
		h.SetControllen(int(unsafe.Sizeof(control{})))
	}
	b.dirty = 0
}

// get returns message i, the length of the packets that it is made of (of all but the last), where they came from, and what their
// IP headers say, in which all of them are alike.
func (b *rxBatch) get(i int) (piece []byte, size int, src netip.AddrPort, ip roce.IP) {
	m := &b.msgs[i]
	piece = b.mem[i*pieceLen:][:min(m.n, pieceLen)]
	size, ip = b.ctls[i].read(int(m.hdr.Controllen))
	if size == 0 {
		size = len(piece)
	}
	return piece, size, b.names[i].get(b.v4), ip
}

// control has room for the control messages of what was received: UDP_GRO, IP_TOS and IP_TTL, or IPV6_TCLASS, IPV6_HOPLIMIT and
// IPV6_FLOWINFO. In words, so that it is aligned for them.
type control [12]uint64

func (c *control) bytes() []byte {
	// Safe: the bytes of an array.
	return unsafe.Slice((*byte)(unsafe.Pointer(c)), unsafe.Sizeof(*c))
}

// read returns what n bytes of control messages say: the length of the packets in the piece (0: nothing), and of their IP headers.
func (c *control) read(n int) (size int, ip roce.IP) {
	b := c.bytes()
	for b = b[:min(max(n, 0), len(b))]; len(b) >= unix.SizeofCmsghdr; {
		// Safe: there are so many bytes, aligned: control is, and CmsgSpace keeps it.
		h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
		if h.Len < unix.SizeofCmsghdr || uint64(h.Len) > uint64(len(b)) {
			break
		}
		data := b[unix.CmsgLen(0):h.Len]
		switch {
		case h.Level == unix.SOL_UDP && h.Type == unix.UDP_GRO && len(data) >= 4:
			size = max(0, int(int32(binary.NativeEndian.Uint32(data))))
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_TOS && len(data) >= 1:
			ip.Class = data[0]
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_TCLASS && len(data) >= 4:
			ip.Class = uint8(binary.NativeEndian.Uint32(data))
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_TTL && len(data) >= 4, h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_HOPLIMIT && len(data) >= 4:
			ip.Hops = uint8(binary.NativeEndian.Uint32(data))
		case h.Level == unix.IPPROTO_IPV6 && h.Type == ipv6FlowInfo && len(data) >= 4:
			ip.Flow = binary.BigEndian.Uint32(data) & (1<<20 - 1)
		}
		b = b[min(unix.CmsgSpace(len(data)), len(b)):]
	}
	return size, ip
}

// waiting returns how much of the socket's buffer is used, as the system counts it; -1: it does not say.
func (y *sysSocket) waiting() int {
	var info [9]uint32 // SK_MEMINFO_RMEM_ALLOC is the first
	n := uint32(unsafe.Sizeof(info))
	// Safe: n is the length of the array.
	_, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(y.fd), unix.SOL_SOCKET, unix.SO_MEMINFO, uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return -1
	}
	return int(info[0])
}

// again reports whether the system will take more later.
func again(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EINTR)
}

// The system calls do not wait, so that the runtime need not know of them: it would look for other work to do meanwhile, which
// costs more than they do. One message has calls of its own, which are faster.

// sendMessages sends n messages from the first on, and returns how many are gone.
func (b *txBatch) sendMessages(fd, n int) (int, syscall.Errno) {
	if n == 1 {
		// Safe: the header points to memory of the batch.
		_, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.msgs[0].hdr)), unix.MSG_DONTWAIT)
		if errno != 0 {
			return 0, errno
		}
		return 1, 0
	}
	// Safe: the headers point to memory of the batch, and there are n of them.
	r, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.msgs[0])), uintptr(n), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}

// receiveMessages receives at most n messages, and returns how many.
func (b *rxBatch) receiveMessages(fd, n int) (int, syscall.Errno) {
	if n == 1 {
		// Safe: the header points to memory of the batch.
		r, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.msgs[0].hdr)), unix.MSG_DONTWAIT)
		if errno != 0 {
			return 0, errno
		}
		b.msgs[0].n = uint32(r)
		return 1, 0
	}
	// Safe: the headers point to memory of the batch, and there are n of them.
	r, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.msgs[0])), uintptr(n), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}

// send sends n packets of s.tx from the first on, and returns how many are gone.
func (s *Socket) send(first, n int) (sent int, err error) {
	done, errno := s.tx.sendMessages(s.sys.fd, s.tx.group(first, n, !s.sys.whole))
	for _, k := range s.tx.counts[:done] {
		sent += k
	}
	if errno != 0 {
		if s.tx.counts[0] > 1 && !again(errno) { // perhaps no checksums by the device, or a tunnel (udp(7), UDP_SEGMENT); or no route
			s.sys.whole = true
			sent, err = s.send(first, n)
			s.sys.whole = sent > 0
			return sent, err
		}
		err = errno
	}
	return sent, err
}

// receive fills s.rx with at most n messages of what there is, and returns how many that is.
func (s *Socket) receive(n int) (int, error) {
	s.rx.clean()
	done, errno := s.rx.receiveMessages(s.sys.fd, n)
	switch errno {
	case 0, unix.EAGAIN, unix.EINTR, unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH: // nothing, or news of what was sent
		s.rx.dirty = done
		return done, nil
	case unix.EBADF:
		return 0, net.ErrClosed
	}
	return 0, errno
}
