package transport

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// sharedQueue is the poller's shared receive queue. Credits make sure that it never runs dry: its posted receives are
// at least the sum of what its connections' peers may send.
type sharedQueue struct {
	mu       sync.Mutex // making, growing, releases by other goroutines than the polling one
	q        *qp.SRQ
	slots    atomic.Pointer[[]*Message]
	arena    *arena
	payload  int
	need     int // sum over the connections of the receives that their peers may use
	posted   int // receives that exist
	byQPN    atomic.Pointer[qpnTable]
	conns    []*Conn
	batch    [sharedBatch]ib.RecvWR // guarded by the role
	nbatch   int
	returned [sharedBatch]ib.RecvWR // guarded by mu
	nreturn  int
}

// sharedBatch is how many receives are posted to the shared queue at a time; two batches more than needed exist, so
// that slots waiting in them do not count.
const sharedBatch = 16

// qpnTable finds connections by QPN: open addressing, replaced as a whole.
type qpnTable struct {
	mask  uint32
	conns []*Conn
}

func hashQPN(q ib.QPN) uint32 { return uint32(q) * 0x9e3779b1 >> 7 }

func (t *qpnTable) find(q ib.QPN) *Conn {
	for i := hashQPN(q); ; i++ {
		c := t.conns[i&t.mask]
		if c == nil || c.qpn == q {
			return c
		}
	}
}

func newQPNTable(conns []*Conn) *qpnTable {
	n := 16
	for n < 2*len(conns)+2 {
		n <<= 1
	}
	t := &qpnTable{mask: uint32(n - 1), conns: make([]*Conn, n)}
	for _, c := range conns {
		i := hashQPN(c.qpn)
		for t.conns[i&t.mask] != nil {
			i++
		}
		t.conns[i&t.mask] = c
	}
	return t
}

// join reserves receives for one more connection, posting them if there are not enough, and returns the queue.
func (s *sharedQueue) join(p *Poller, receives, eager int) (*qp.SRQ, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.q == nil {
		depth := p.cfg.SharedDepth
		if p.attr.MaxSRQWR > 0 {
			depth = min(depth, p.attr.MaxSRQWR)
		}
		q, err := qp.NewSRQ(p.pd, qp.SRQConfig{Depth: depth, SGE: 1})
		if err != nil {
			return nil, err
		}
		s.q = q
		s.payload = p.cfg.SharedSize
		s.arena = p.arenaFor(slotStride(s.payload))
		s.slots.Store(&[]*Message{})
		s.byQPN.Store(newQPNTable(nil))
	}
	if eager > s.payload {
		return nil, fmt.Errorf("transport: EagerSize %d exceeds the shared receive queue's slots of %d bytes: raise PollerConfig.SharedSize", eager, s.payload)
	}
	want := s.need + receives + 2*sharedBatch
	if want > s.q.Depth() {
		return nil, fmt.Errorf("%w: its shared receive queue has %d receives, and %d would be needed: raise PollerConfig.SharedDepth", ErrNoRoom, s.q.Depth(), want)
	}
	for s.posted < want {
		if err := s.growLocked(min(want-s.posted, 64)); err != nil {
			return nil, err
		}
	}
	s.need += receives
	return s.q, nil
}

func (s *sharedQueue) growLocked(n int) error {
	old := *s.slots.Load()
	slots := append(make([]*Message, 0, len(old)+n), old...)
	wrs := make([]ib.RecvWR, n)
	block := make([]Message, n)
	for i := range block {
		m := &block[i]
		sl, err := s.arena.get()
		if err != nil {
			return err // what was taken stays with the arena until the poller closes
		}
		m.init(sl, makeID(idShared, 0, 0, uint32(len(slots))), s.payload+headerLen)
		m.shared = true
		slots = append(slots, m)
		wrs[i] = m.wr
	}
	s.slots.Store(&slots)
	if _, err := s.q.PostRecv(wrs); err != nil {
		return err
	}
	s.posted += n
	return nil
}

// bind makes completions with the connection's QPN find it.
func (s *sharedQueue) bind(c *Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns = append(s.conns, c)
	s.byQPN.Store(newQPNTable(s.conns))
}

// part undoes join and, if it was called, bind.
func (s *sharedQueue) part(c *Conn, receives int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.need -= receives
	for i, o := range s.conns {
		if o == c {
			last := len(s.conns) - 1
			s.conns[i] = s.conns[last]
			s.conns[last] = nil
			s.conns = s.conns[:last]
			s.byQPN.Store(newQPNTable(s.conns))
			return
		}
	}
}

// received handles a completion of the shared queue. The role is held.
func (s *sharedQueue) received(p *Poller, wc *ib.WC) {
	slots := *s.slots.Load()
	low := uint32(wc.ID)
	if low >= uint32(len(slots)) {
		return
	}
	m := slots[low]
	c := s.byQPN.Load().find(wc.QPN)
	if c == nil {
		s.recycle(m) // of a connection that has ended
		return
	}
	c.received(m, wc)
}

// recycle posts a slot again, sooner or later. The role is held.
func (s *sharedQueue) recycle(m *Message) {
	s.batch[s.nbatch] = m.wr
	if s.nbatch++; s.nbatch == sharedBatch {
		s.nbatch = 0
		s.q.PostRecv(s.batch[:]) // fails only if the device does; then the CQ says so
	}
}

// giveBack is recycle for other goroutines.
func (s *sharedQueue) giveBack(m *Message) {
	s.mu.Lock()
	s.returned[s.nreturn] = m.wr
	if s.nreturn++; s.nreturn == sharedBatch {
		s.nreturn = 0
		s.q.PostRecv(s.returned[:])
	}
	s.mu.Unlock()
}

func (s *sharedQueue) close() error {
	if s.q == nil {
		return nil
	}
	return s.q.Close()
}
