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
	net  bool   // no peer is there: a netPort writes to the blocks, for those who send it packets
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
	connects map[[2]uint32]connectMsg // {our QPN, peer's QPN}: who waits for our QP, or has it as its peer
	udViews  map[ib.QPN]*udView
	assists  map[uint32]*QP
	nextID   uint32
	views    map[*QP]bool    // QPs whose peer view is on this link
	ownedBlk int             // blocks handed out and not freed
	inbounds int             // inbounds that somebody may still look at; see watchInbound
	last     bool            // the NIC is closed: nobody looks at anything any more
	pds      map[*PD]bool    // protection domains with QPs on this link
	told     map[uint32]bool // handles of receive buffers' regions that the peer was told of unasked
	pushed   int             // regions that the peer was told of unasked
	// questions counts those for receives; see refill.go.
	questions uint64
	answered  atomic.Uint64 // the last question that the peer has answered
	deaf      atomic.Bool   // it has left one unanswered for long

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

	l.nic.keepMapped(l)
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

// maybeUnmapLocked frees the link's own chunks once the link is down, no QP or port uses them, and nobody may still look at
// them.
func (l *link) maybeUnmapLocked() {
	if l.down == nil || l.ownedBlk > 0 || l.inbounds > 0 && !l.last {
		return
	}
	for _, c := range l.chunks {
		if c.reg != nil {
			c.reg.Close()
		}
	}
	l.chunks = nil
	l.nic.forgetMapped(l)
}

// unmapLast unmaps what a link that is down has kept mapped for late readers.
func (l *link) unmapLast() {
	l.mu.Lock()
	l.last = true
	l.maybeUnmapLocked()
	l.mu.Unlock()
}

// reason is why the link is down, or nil.
func (l *link) reason() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.down
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
	case ctlRefill:
		return l.handleRefill(m)
	case ctlRefilled:
		return l.handleRefilled(m)
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

// maxMapped is how much memory this process maps in all: a quarter of the address space that the smallest of the usual
// systems has.
const maxMapped = 1 << 45

// maxWaitingConnects is how many QPs of the peer may wait for ones of ours, which need not exist.
const maxWaitingConnects = 1 << 16

// Paths as QP.Path reports them.
const (
	pathInproc = "inproc"
	pathShm    = "shm"
)
