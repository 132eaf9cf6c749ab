package softnic

import (
	"fmt"
	"maps"
	"sync"

	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/softnic/unixmsg"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The side of a link that is the peer's: what it has told us, every word of which is checked.

type peerChunk struct {
	mem []byte
	reg *mem.Region
}

// peerBlock returns n bytes of a chunk of the peer.
func (l *link) peerBlock(chunk, off, n uint32) ([]byte, error) {
	c, ok := l.peers[chunk]
	if !ok || uint64(off)+uint64(n) > uint64(len(c.mem)) {
		return nil, errCtl
	}
	return c.mem[off : off+n : off+n], nil
}

// mapPeer maps memory that came with a message.
func (l *link) mapPeer(m *ctl, size int, writable bool) ([]byte, *mem.Region, error) {
	if l.path == pathInproc {
		b, ok := m.obj.([]byte)
		if !ok || len(b) < size {
			return nil, nil, errCtl
		}
		return b, nil, nil
	}
	if !m.hasFD {
		return nil, nil, errCtl
	}
	r, err := l.mapFD(m.fd, 0, size, writable)
	if err != nil {
		return nil, nil, err
	}
	return r.Bytes(), r, nil
}

// mapFD maps memory of the peer, within reason: sparse files are large for nothing, and if they used up the address space
// the Go runtime could not go on.
func (l *link) mapFD(fd int, off int64, size int, writable bool) (*mem.Region, error) {
	if _, all := mem.Live(); int64(size) > maxMapped-all {
		return nil, fmt.Errorf("mapping %d bytes of the peer: %w", size, mem.ErrSize)
	}
	return mem.MapFD(fd, off, size, writable)
}

func (l *link) handleChunk(m *ctl) error {
	if m.x == 0 || m.x > 1<<30 || m.id >= maxChunks {
		return errCtl
	}
	b, reg, err := l.mapPeer(m, int(m.x), true)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, dup := l.peers[m.id]; dup || l.peers == nil {
		if reg != nil {
			reg.Close()
		}
		return errCtl
	}
	l.peers[m.id] = peerChunk{b, reg}
	return nil
}

func (l *link) handleChannel(m *ctl) error {
	w := &peerWaker{fd: -1}
	if l.path == pathInproc {
		f, ok := m.obj.(func())
		if !ok {
			return errCtl
		}
		w.local = f
	} else {
		if !m.hasFD {
			return errCtl
		}
		fd, err := remoteWaker(m.fd)
		if err != nil {
			return err
		}
		w.fd = fd
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, dup := l.wakers[m.id]; dup || m.id == 0 || len(l.wakers) >= 1<<14 || l.wakers == nil {
		w.close()
		return errCtl
	}
	l.wakers[m.id] = w
	return nil
}

// handleDrop forgets a channel or an SRQ of the peer, who has disconnected every block that used it.
func (l *link) handleDrop(m *ctl) error {
	l.mu.Lock()
	switch w, v := l.wakers[m.id], l.srqs[m.id]; {
	case m.status == dropChannel && w != nil:
		delete(l.wakers, m.id)
		l.mu.Unlock()
		w.close()
		return nil
	case m.status == dropSRQ && v != nil:
		delete(l.srqs, m.id) // no new views
		used := false
		for _, c := range l.connects {
			used = used || c.geo.srq && c.srq == m.id // one may be about to become a view
		}
		uds := maps.Clone(l.udViews)
		l.mu.Unlock()
		uses := func(pv *peerView) bool { return pv != nil && pv.srq == v }
		for _, u := range uds {
			u.mu.Lock()
			used = used || uses(u.pv)
			u.mu.Unlock()
		}
		l.nic.eachQP(func(q *QP) {
			q.sq.Lock()
			used = used || uses(q.pv)
			q.sq.Unlock()
		})
		if !used {
			v.unmap()
			return nil
		}
		l.mu.Lock() // it stays mapped until the views are gone
		if l.srqs != nil {
			l.srqs[m.id] = v
		}
	}
	l.mu.Unlock()
	return errCtl
}

// peerWaker wakes a completion channel of the peer.
type peerWaker struct {
	local func() // within a process

	mu sync.RWMutex
	fd int // eventfd; -1: closed
}

func (w *peerWaker) wake() {
	if w.local != nil {
		w.local()
		return
	}
	w.mu.RLock() // the number must not become another file's meanwhile
	if w.fd >= 0 {
		wakeFD(w.fd)
	}
	w.mu.RUnlock()
}

func (w *peerWaker) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fd >= 0 {
		unixmsg.Close([]int{w.fd})
		w.fd = -1
	}
}

func (l *link) handleSRQ(m *ctl) error {
	if m.a == 0 || m.a&(m.a-1) != 0 || m.a > 2*maxSRQDepth || m.b == 0 || m.b > maxSGE || m.id == 0 {
		return errCtl
	}
	b, reg, err := l.mapPeer(m, int(srqSize(m.a, m.b)), true)
	if err != nil {
		return err
	}
	v := newSRQView(b, m.a, m.b, reg)
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, dup := l.srqs[m.id]; dup || l.srqs == nil || len(l.srqs) >= 1<<14 {
		v.unmap()
		return errCtl
	}
	l.srqs[m.id] = v
	return nil
}

// view builds what a QP of ours sends through, from the peer's description of its block.
func (l *link) view(c *connectMsg, srcQPN uint32) (*peerView, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down != nil {
		return nil, l.down
	}
	b, err := l.peerBlock(c.chunk, c.off, c.geo.size())
	if err != nil {
		return nil, err
	}
	pb, err := l.peerBlock(c.portChunk, c.portOff, portSize)
	if err != nil {
		return nil, err
	}
	var srq *srqView
	if c.geo.srq {
		if srq = l.srqs[c.srq]; srq == nil {
			return nil, errCtl
		}
	}
	var wake func()
	if c.channel != 0 {
		w := l.wakers[c.channel]
		if w == nil {
			return nil, errCtl
		}
		wake = w.wake
	}
	return newPeerView(l, c, ib.QPN(srcQPN), b, newPortView(pb, c.bit, wake), srq), nil
}

func (l *link) handleConnect(m *ctl) error {
	var c connectMsg
	if err := c.from(m); err != nil {
		return err
	}
	v, err := l.view(&c, m.qpn)
	if err != nil {
		return err
	}
	l.mu.Lock()
	if len(l.connects) >= maxWaitingConnects+len(l.views) { // each QP of ours has one peer, which does not wait
		l.mu.Unlock()
		return fmt.Errorf("more than %d queue pairs wait for ones of ours", maxWaitingConnects)
	}
	l.connects[[2]uint32{m.dst, m.qpn}] = c
	l.mu.Unlock()
	if q := l.nic.qp(ib.QPN(m.dst)); q != nil {
		q.tryConnect(l, v, false)
	}
	return nil
}

// stillWaiting reports whether the peer has not withdrawn the block of v. Called with the QP's sq held.
func (l *link) stillWaiting(own ib.QPN, v *peerView) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	c, ok := l.connects[[2]uint32{uint32(own), uint32(v.qpn)}]
	return ok && c.chunk == v.chunk && c.off == v.off
}

// waitingView takes the peer's block for the pair, if its description has arrived.
func (l *link) waitingView(own, peer ib.QPN) *peerView {
	key := [2]uint32{uint32(own), uint32(peer)}
	l.mu.Lock()
	c, ok := l.connects[key]
	l.mu.Unlock()
	if !ok {
		return nil
	}
	v, err := l.view(&c, uint32(peer))
	if err != nil {
		return nil
	}
	return v
}

func (l *link) handleDisconnect(m *ctl) error {
	l.mu.Lock()
	delete(l.connects, [2]uint32{m.dst, m.qpn})
	ud := l.udViews[ib.QPN(m.qpn)]
	if m.dst == 0 && ud != nil {
		delete(l.udViews, ib.QPN(m.qpn))
	}
	l.mu.Unlock()
	if m.dst == 0 && ud != nil {
		ud.drop()
	}
	if q := l.nic.qp(ib.QPN(m.dst)); q != nil && m.dst != 0 {
		q.peerLeft(l, ib.QPN(m.qpn))
	}
	l.send(ctl{kind: ctlReleased, a: m.a, b: m.b})
	return nil
}

// bindView remembers that q sends over the link, so that its end reaches the QP.
func (l *link) bindView(q *QP) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down != nil {
		return l.down
	}
	l.views[q] = true
	return nil
}

func (l *link) unbindView(q *QP) {
	l.mu.Lock()
	delete(l.views, q)
	l.mu.Unlock()
}
