package softnic

import (
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A link joins two NICs: the chunks that each has given the other, the peer's regions that this side has mapped, and the
// control channel. A NIC's link to itself has itself as the peer.
type link struct {
	nic  *NIC
	cut  atomic.Bool // the peer broke the protocol: the link is about to close
	peer ib.GID
	path string // "inproc" or "shm"
	full bool   // stores on the data path must be full fences
	out  ctlWriter
	// peerLive is the peer's region table: valid handles by slot. Peer-written, loaded with the busy word raised.
	peerLive []uint32
	peerMem  *mem.Region // mapping behind peerLive, nil within a process

	mu       sync.Mutex
	down     error // why the link ended; nil: it works
	chunks   []*chunk
	freeBlk  map[uint32][]block // by size, returned by the peer
	leaving  map[uint64]leaving // blocks that the peer has been asked to release
	ports    map[*CQ][]*port
	sent     map[uint64]bool // channels and SRQs that the peer knows
	peers    map[uint32]peerChunk
	wakers   map[uint32]*peerWaker
	srqs     map[uint32]*srqView
	connects map[[2]uint32]connectMsg // {our QPN, peer's QPN}: arrived before our QP was ready
	udViews  map[ib.QPN]*udView
	assists  map[uint32]*QP
	nextID   uint32
	views    map[*QP]bool    // QPs whose peer view is on this link
	ownedBlk int             // blocks handed out and not freed
	pds      map[*PD]bool    // protection domains with QPs on this link
	told     map[uint32]bool // handles of receive buffers' regions that the peer was told of unasked
	pushed   int             // regions that the peer was told of unasked

	regMu    sync.RWMutex
	byRKey   map[ib.RKey]*remoteRegion
	byHandle map[uint32]*remoteRegion
	asked    map[uint64]bool // resolve requests under way, by key
	taken    int             // regions that the peer has told us of unasked
}

// ctlWriter sends control messages, in order; it never blocks. It takes over hasFD's descriptor only if it says so.
type ctlWriter interface {
	send(m ctl) error
	close(reason error)
}

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

type peerChunk struct {
	mem []byte
	reg *mem.Region
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

func newLink(n *NIC, peer ib.GID, path string) *link {
	return &link{nic: n, peer: peer, path: path, freeBlk: map[uint32][]block{}, leaving: map[uint64]leaving{},
		ports: map[*CQ][]*port{}, sent: map[uint64]bool{}, peers: map[uint32]peerChunk{}, wakers: map[uint32]*peerWaker{},
		srqs: map[uint32]*srqView{}, connects: map[[2]uint32]connectMsg{}, udViews: map[ib.QPN]*udView{},
		assists: map[uint32]*QP{}, views: map[*QP]bool{}, pds: map[*PD]bool{}, told: map[uint32]bool{}, byRKey: map[ib.RKey]*remoteRegion{},
		byHandle: map[uint32]*remoteRegion{}, asked: map[uint64]bool{}}
}

// send hands a control message to the peer; a failure ends the link.
func (l *link) send(m ctl) {
	if err := l.out.send(m); err != nil {
		l.nic.later(func() { l.close(err) })
	}
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
		l.chunks = append(l.chunks, c)
		if err := l.out.send(m); err != nil {
			return block{}, err
		}
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

// fault ends the link because the peer broke the protocol.
func (l *link) fault(format string, args ...any) {
	l.cut.Store(true)
	err := fmt.Errorf("%w: %s", errPeerFault, fmt.Sprintf(format, args...))
	l.nic.later(func() { l.close(err) })
}

var (
	errPeerFault = errors.New("the peer's software NIC broke the protocol; the connection to it was closed")
	errPeerGone  = errors.New("the peer's software NIC has gone: its process ended or closed the device")
	errLinkBusy  = errors.New("the peer's software NIC does not take control messages")
)

// close ends the link: QPs on it go to the error state, mappings go once nobody uses them. Blocks are kept until their QPs
// are closed, since completions that the peer has written are still valid. Runs on its own goroutine, with no lock held.
func (l *link) close(reason error) {
	l.mu.Lock()
	if l.down != nil {
		l.mu.Unlock()
		return
	}
	l.down = reason
	left := l.leaving
	l.leaving = map[uint64]leaving{}
	views := make([]*QP, 0, len(l.views))
	for q := range l.views {
		views = append(views, q)
	}
	uds := l.udViews
	l.udViews = map[ib.QPN]*udView{}
	ports := maps.Clone(l.ports) // CQs that are closed meanwhile leave the original
	l.mu.Unlock()

	l.nic.dropLink(l)
	l.out.close(reason)
	for _, v := range uds {
		v.drop()
	}
	for _, q := range views {
		q.linkDown(l, reason)
	}
	l.nic.eachQP(func(q *QP) { q.linkDown(l, reason) })
	for _, e := range left {
		if e.done != nil {
			e.done()
		}
	}
	l.nic.eachSRQ(func(s *SRQ) { s.reclaim(l) })
	for c, ps := range ports {
		for _, p := range ps {
			p.tidy()
		}
		c.fire(true)
	}
	// Every QP has let go of its view under its lock: the peer's memory can be unmapped.
	l.mu.Lock()
	for _, e := range left {
		l.freeLocked(e.b)
	}
	for _, c := range l.peers {
		if c.reg != nil {
			c.reg.Close()
		}
	}
	l.peers = nil
	for _, s := range l.srqs {
		s.unmap()
	}
	l.srqs = nil
	for _, w := range l.wakers {
		w.close()
	}
	l.wakers = nil
	l.maybeUnmapLocked()
	l.mu.Unlock()
	l.regMu.Lock()
	for _, r := range l.byRKey {
		r.unmap()
	}
	for _, r := range l.byHandle {
		r.unmap()
	}
	l.byRKey, l.byHandle = nil, nil
	l.regMu.Unlock()
	if l.peerMem != nil {
		l.peerMem.Close()
	}
}

// maybeUnmapLocked frees the link's own chunks once the link is down and no QP or port uses them.
func (l *link) maybeUnmapLocked() {
	if l.down == nil || l.ownedBlk > 0 {
		return
	}
	for _, c := range l.chunks {
		if c.reg != nil {
			c.reg.Close()
		}
	}
	l.chunks = nil
}

// reason is why the link is down, or nil.
func (l *link) reason() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.down
}

// peerBlock returns n bytes of a chunk of the peer.
func (l *link) peerBlock(chunk, off, n uint32) ([]byte, error) {
	c, ok := l.peers[chunk]
	if !ok || uint64(off)+uint64(n) > uint64(len(c.mem)) {
		return nil, errCtl
	}
	return c.mem[off : off+n : off+n], nil
}

// handle processes one control message of the peer. An error ends the link. It runs on the link's reader goroutine.
func (l *link) handle(m *ctl) error {
	switch m.kind {
	case ctlChunk:
		return l.handleChunk(m)
	case ctlChannel:
		return l.handleChannel(m)
	case ctlSRQ:
		return l.handleSRQ(m)
	case ctlDrop:
		return l.handleDrop(m)
	case ctlConnect:
		return l.handleConnect(m)
	case ctlDisconnect:
		return l.handleDisconnect(m)
	case ctlReleased:
		key := uint64(m.a)<<32 | uint64(m.b)
		l.mu.Lock()
		e, ok := l.leaving[key]
		if ok {
			delete(l.leaving, key)
			l.freeLocked(e.b)
		}
		l.mu.Unlock()
		if !ok {
			return errCtl
		}
		if e.done != nil {
			e.done()
		}
		return nil
	case ctlResolve:
		return l.handleResolve(m)
	case ctlRegion:
		return l.handleRegion(m)
	case ctlGone:
		l.forget(m.a)
		return nil
	case ctlFault:
		if q := l.nic.qp(ib.QPN(m.dst)); q != nil {
			epoch := q.epoch.Load() // before looking at the block, so that a reset in between is noticed
			if in := q.in.Load(); in != nil && in.link == l && in.blk.chunk == m.a && in.blk.off == m.b {
				q.remoteFault(epoch, ib.EventType(m.status))
			}
		}
		return nil
	case ctlAssist:
		return l.handleAssist(m)
	case ctlAssisted:
		l.mu.Lock()
		q := l.assists[m.id]
		delete(l.assists, m.id)
		l.mu.Unlock()
		if q != nil {
			q.assisted(m)
		}
		return nil
	case ctlAttach:
		return l.handleAttach(m)
	case ctlAttached:
		return l.handleAttached(m)
	case ctlBye:
		return fmt.Errorf("%w (%s)", errPeerGone, printable(m.data))
	}
	return errCtl
}

// printable makes text of a peer safe to print.
func printable(b []byte) string {
	if len(b) > 200 {
		b = b[:200]
	}
	out := make([]byte, len(b))
	for i, c := range b {
		if c < ' ' || c > '~' {
			c = '?'
		}
		out[i] = c
	}
	return string(out)
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

// maxMapped is how much memory this process maps in all: a quarter of the address space that the smallest of the usual
// systems has.
const maxMapped = 1 << 45

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
		closeFDs([]int{w.fd})
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

const maxWaitingConnects = 1 << 16

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
	if len(l.connects) >= maxWaitingConnects {
		l.mu.Unlock()
		return fmt.Errorf("%d queue pairs wait for ones of ours", maxWaitingConnects)
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

// mailbox is an unbounded queue with one consumer: control messages, and work for a NIC's own goroutine.
type mailbox[T any] struct {
	mu     sync.Mutex
	c      sync.Cond
	q      []T
	closed bool
}

func newMailbox[T any]() *mailbox[T] {
	b := &mailbox[T]{}
	b.c.L = &b.mu
	return b
}

// put appends v; it reports the length of the queue, or -1 if the mailbox is closed.
func (b *mailbox[T]) put(v T) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return -1
	}
	b.q = append(b.q, v)
	b.c.Signal()
	return len(b.q)
}

// take waits for the next batch; nil: closed and empty.
func (b *mailbox[T]) take(old []T) []T {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.q) == 0 {
		if b.closed {
			return nil
		}
		b.c.Wait()
	}
	q := b.q
	clear(old)
	b.q = old[:0]
	return q
}

func (b *mailbox[T]) close() {
	b.mu.Lock()
	b.closed = true
	b.c.Broadcast()
	b.mu.Unlock()
}

// Paths as QP.Path reports them.
const (
	pathInproc = "inproc"
	pathShm    = "shm"
)
