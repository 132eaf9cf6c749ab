//go:build !linux

package udp

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
)

// txBatch is packets that are sent one by one.
type txBatch struct {
	mem   []byte
	lens  []int
	peers []*Peer
}

func (b *txBatch) init(n int) {
	*b = txBatch{mem: make([]byte, n*slotLen), lens: make([]int, n), peers: make([]*Peer, n)}
}

func (b *txBatch) slot(i int) []byte { return b.mem[i*slotLen : (i+1)*slotLen : (i+1)*slotLen] }

func (b *txBatch) set(i, n int, to *Peer) { b.lens[i], b.peers[i] = n, to }

func (b *txBatch) shift(done, n int) int {
	if done > 0 {
		for i := done; i < n; i++ {
			copy(b.slot(i-done), b.slot(i)[:b.lens[i]])
			b.set(i-done, b.lens[i], b.peers[i])
		}
	}
	return n - done
}

// rxBatch is the packet that was received last. There is room for one byte more than a packet has, so that what is cut off is too long.
type rxBatch struct {
	mem []byte
	n   int
	src netip.AddrPort
}

func (b *rxBatch) init(int, bool) { b.mem = make([]byte, slotLen) }

func (b *rxBatch) get(int) ([]byte, int, netip.AddrPort, roce.IP) {
	return b.mem[:b.n], b.n, b.src, roce.IP{}
}

// ipControl is nothing: what is sent has the system's traffic class and hop limit.
type ipControl struct{}

func (*ipControl) of(*sysSocket, bool, uint8, uint8) {}

func again(error) bool { return false } // a write waits for room

func (s *Socket) send(first, n int) (sent int, err error) {
	for i := first; i < first+n; i++ {
		if _, err := s.sys.conn.WriteToUDPAddrPort(s.tx.slot(i)[:s.tx.lens[i]], s.tx.peers[i].addr); err != nil {
			return i - first, err
		}
	}
	return n, nil
}

func (s *Socket) receive(int) (int, error) {
	s.sys.conn.SetReadDeadline(time.Now().Add(time.Microsecond))
	n, src, err := s.sys.conn.ReadFromUDPAddrPort(s.rx.mem)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return 0, nil
	case err != nil:
		return 0, err
	}
	s.rx.n, s.rx.src = n, netip.AddrPortFrom(src.Addr().Unmap(), src.Port())
	return 1, nil
}

// A sysSocket is the system's socket. There is no waiting without taking a packet: sleep looks again a moment later.
type sysSocket struct {
	conn   *net.UDPConn
	closed atomic.Bool
	until  atomic.Int64 // Unix nanoseconds; 0: no deadline
}

func (y *sysSocket) open(a netip.AddrPort) (netip.AddrPort, error) {
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(a))
	if err != nil {
		return netip.AddrPort{}, err
	}
	c.SetReadBuffer(bufferLen)
	c.SetWriteBuffer(bufferLen)
	y.conn = c
	local := c.LocalAddr().(*net.UDPAddr).AddrPort()
	return netip.AddrPortFrom(local.Addr().Unmap(), local.Port()), nil
}

func (y *sysSocket) waiting() int { return -1 }

func (y *sysSocket) room() int { return 0 }

func (y *sysSocket) allowECN(bool) error { return errors.ErrUnsupported }

func (y *sysSocket) tellIP(bool, int) error { return errors.ErrUnsupported }

func (y *sysSocket) setDeadline(t time.Time) {
	if t.IsZero() {
		y.until.Store(0)
	} else {
		y.until.Store(t.UnixNano())
	}
}

func (y *sysSocket) sleep() error {
	if y.closed.Load() {
		return net.ErrClosed
	}
	d := time.Millisecond
	if u := y.until.Load(); u != 0 {
		d = min(d, time.Until(time.Unix(0, u)))
	}
	time.Sleep(d)
	return nil
}

func (y *sysSocket) close() error {
	y.closed.Store(true)
	return y.conn.Close()
}
