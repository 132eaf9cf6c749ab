package softnic

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The side of a link that is ours: memory that the peer may write to, and what the peer is told.

// block is cache-line aligned memory of a chunk.
type block struct {
	chunk, off uint32
	mem        []byte
}

type chunk struct {
	id   uint32
	mem  []byte
	reg  *mem.Region // nil within a process
	used uint32
}

type leaving struct {
	b    block
	done func()
}

const (
	firstChunk = 256 << 10
	largeChunk = 4 << 20
	maxChunks  = 4096
)

// watchInbound has the link's memory stay mapped for as long as in is in use. A poll that looks at a QP without its locks,
// and whoever waits for the end of the peer's operations, may have found in just before its QP was closed; what they read
// then means nothing any more, but it must be there. So the memory of a link that is down goes when the garbage collector
// has found that nobody has in any more, or with the NIC, which is closed after everything that polls.
func (l *link) watchInbound(in *inbound) {
	if l.path == pathInproc {
		return // the memory is the Go heap's
	}
	l.mu.Lock()
	l.inbounds++
	l.mu.Unlock()
	runtime.AddCleanup(in, (*link).inboundGone, l)
}

func (l *link) inboundGone() {
	l.mu.Lock()
	l.inbounds--
	l.maybeUnmapLocked()
	l.mu.Unlock()
}

// alloc takes a zeroed block of n bytes out of the link's chunks.
func (l *link) alloc(n uint32) (block, error) {
	n = (n + cacheLine - 1) &^ (cacheLine - 1)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down != nil {
		return block{}, l.down
	}
	if f := l.freeBlk[n]; len(f) > 0 {
		b := f[len(f)-1]
		l.freeBlk[n] = f[:len(f)-1]
		clear(b.mem)
		l.ownedBlk++
		return b, nil
	}
	var c *chunk
	if k := len(l.chunks); k > 0 && uint32(len(l.chunks[k-1].mem))-l.chunks[k-1].used >= n {
		c = l.chunks[k-1]
	} else {
		if k >= maxChunks {
			return block{}, fmt.Errorf("the link to %v has too many chunks of shared memory", l.peer)
		}
		size := firstChunk
		if k > 1 {
			size = largeChunk
		}
		size = max(size, int(n))
		c = &chunk{id: uint32(k)}
		m := ctl{kind: ctlChunk, id: c.id}
		if l.path == pathInproc {
			c.mem = heapBytes(size)
			m.obj = c.mem
		} else {
			reg, err := mem.Alloc(size, mem.Options{Name: "ringside-link", Huge: mem.HugeNever})
			if err != nil {
				return block{}, err
			}
			c.reg, c.mem = reg, reg.Bytes()
			m.fd, m.hasFD = reg.FD(), true
		}
		m.x = uint64(len(c.mem))
		if err := l.out.send(m); err != nil { // a chunk that the peer does not know is none: with the next one, it is tried again
			if c.reg != nil {
				c.reg.Close()
			}
			if errors.Is(err, errLinkBusy) { // it may be on its way all the same
				l.nic.later(func() { l.close(err) })
			}
			return block{}, err
		}
		l.chunks = append(l.chunks, c)
	}
	b := block{chunk: c.id, off: c.used, mem: c.mem[c.used : c.used+n : c.used+n]}
	c.used += n
	l.ownedBlk++
	return b, nil
}

func (l *link) freeLocked(b block) {
	l.ownedBlk--
	if l.down != nil {
		l.maybeUnmapLocked()
		return
	}
	l.freeBlk[uint32(len(b.mem))] = append(l.freeBlk[uint32(len(b.mem))], b)
}

// release gives a block back once the peer has confirmed that it does not touch it any more.
func (l *link) release(b block, qpn, dst ib.QPN, done func()) {
	l.mu.Lock()
	if l.down != nil {
		l.freeLocked(b)
		l.mu.Unlock()
		if done != nil {
			done()
		}
		return
	}
	l.leaving[uint64(b.chunk)<<32|uint64(b.off)] = leaving{b, done}
	l.mu.Unlock()
	l.send(ctl{kind: ctlDisconnect, qpn: uint32(qpn), dst: uint32(dst), a: b.chunk, b: b.off})
}

// port returns a port of the CQ with room for member k, and the member's bit.
func (l *link) port(c *CQ, k int) (*port, int, error) {
	l.mu.Lock()
	ps := l.ports[c]
	l.mu.Unlock()
	c.mu.Lock()
	for _, p := range ps {
		if bit, ok := p.addMember(k); ok {
			c.mu.Unlock()
			return p, bit, nil
		}
	}
	c.mu.Unlock()
	b, err := l.alloc(portSize)
	if err != nil {
		return nil, 0, err
	}
	p := newPort(l, c, b)
	bit, _ := p.addMember(k) // nobody else sees it yet
	l.mu.Lock()
	l.ports[c] = append(l.ports[c], p)
	l.mu.Unlock()
	c.addPort(p)
	return p, bit, nil
}

// dropPort forgets a port that was given up: it has no member, and so the peer has let go of every block that it came with.
func (l *link) dropPort(p *port) {
	p.cq.removePort(p)
	l.mu.Lock()
	defer l.mu.Unlock()
	var keep []*port
	for _, x := range l.ports[p.cq] {
		if x != p {
			keep = append(keep, x)
		}
	}
	if keep == nil {
		delete(l.ports, p.cq)
	} else {
		l.ports[p.cq] = keep
	}
	l.freeLocked(p.mem)
}

// tellChannel makes sure that the peer can wake the channel.
func (l *link) tellChannel(ch *CompChannel) uint32 {
	if ch == nil {
		return 0
	}
	l.tell(uint64(ch.id), ctl{kind: ctlChannel, id: ch.id, fd: ch.w.fd(), hasFD: l.path != pathInproc, obj: ch.wake})
	return ch.id
}

// tell sends m unless the peer has been told of key before: when it returns, what is sent next arrives after m.
func (l *link) tell(key uint64, m ctl) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.sent[key] {
		l.sent[key] = true
		l.send(m)
	}
}

// Kinds of objects in ctlDrop; a key of link.sent is the kind in the upper half and the id in the lower.
const (
	dropChannel uint8 = 0
	dropSRQ     uint8 = 1
)

// untell has the peer forget an object that it was told of and that no connection uses any more.
func (l *link) untell(kind uint8, id uint32) {
	key := uint64(kind)<<32 | uint64(id)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sent[key] {
		delete(l.sent, key)
		l.send(ctl{kind: ctlDrop, status: kind, id: id})
	}
}

// tellSRQ makes sure that the peer has mapped the shared receive queue.
func (l *link) tellSRQ(s *SRQ) uint32 {
	if s == nil {
		return 0
	}
	l.tell(uint64(dropSRQ)<<32|uint64(s.id),
		ctl{kind: ctlSRQ, id: s.id, a: s.ring, b: s.sges, fd: s.fd(), hasFD: l.path != pathInproc, obj: s.mem})
	return s.id
}
