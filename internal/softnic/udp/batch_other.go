//go:build !linux

package udp

import (
	"errors"
	"net/netip"
	"os"
	"time"
)

func setOptions(int, bool) error { return nil }

// batch is packets that are sent and received one by one.
type batch struct {
	mem   []byte
	lens  []int
	addrs []netip.AddrPort
}

func (b *batch) init(n int, _ bool) {
	*b = batch{mem: make([]byte, n*slotLen), lens: make([]int, n), addrs: make([]netip.AddrPort, n)}
}

func (b *batch) slot(i int) []byte { return b.mem[i*slotLen : (i+1)*slotLen : (i+1)*slotLen] }

func (b *batch) set(i, n int, to netip.AddrPort) { b.lens[i], b.addrs[i] = n, to }

func (b *batch) get(i int) ([]byte, netip.AddrPort) { return b.slot(i)[:b.lens[i]], b.addrs[i] }

func (b *batch) shift(done, n int) int {
	if done > 0 {
		for i := done; i < n; i++ {
			copy(b.slot(i-done), b.slot(i)[:b.lens[i]])
			b.set(i-done, b.lens[i], b.addrs[i])
		}
	}
	return n - done
}

func again(error) bool { return false } // a write waits for room

type calls struct{}

func (s *Socket) prepare() {}

// sleep waits a moment: these systems have no way to look for packets without taking them.
func (s *Socket) sleep() error {
	time.Sleep(time.Millisecond)
	return nil
}

func (s *Socket) send(first, n int) (sent int, err error) {
	for i := first; i < first+n; i++ {
		if _, err := s.conn.WriteToUDPAddrPort(s.tx.slot(i)[:s.tx.lens[i]], s.tx.addrs[i]); err != nil {
			return i - first, err
		}
	}
	return n, nil
}

func (s *Socket) receive(deadline time.Time) (int, error) {
	if deadline.IsZero() {
		deadline = time.Now().Add(time.Microsecond)
	}
	s.conn.SetReadDeadline(deadline)
	n, src, err := s.conn.ReadFromUDPAddrPort(s.rx.slot(0))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return 0, nil
	case err != nil:
		return 0, err
	}
	s.rx.set(0, n, netip.AddrPortFrom(src.Addr().Unmap(), src.Port()))
	return 1, nil
}
