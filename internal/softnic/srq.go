package softnic

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// SRQ is a receive queue that several peers take from, themselves: a shared receive queue, or the receive queue of a UD QP.
//
// Entries are claimed in order by CAS on the entry's claim word: {sequence, free} becomes {sequence, claimer's tag}. The
// sequence says that the entry was posted in this lap, the tag (see inbound.tag) whose claim it is, so that the owner can take
// back what a dead peer had claimed and not completed. The head only helps claimers to find the first free entry; whoever sees
// a claimed entry at the head moves it on.
//
// The ring is twice as long as the queue: an entry at the tail that is still in use (its receive was claimed long ago, and the
// completion not polled yet) is skipped.
type SRQ struct {
	nic     *NIC
	pd      *PD
	id      uint32
	max     int
	sges    uint32
	ring    uint32 // entries, a power of two
	mask    uint32
	reg     *mem.Region // nil: heap memory, no peer process can reach it
	mem     []byte
	headW   *uint64
	entries []uint64
	lists   []uint64
	private bool // a UD QP's own

	mu    ring.SpinLock // guards the rest
	tail  uint64
	used  int // posted and not completed
	recs  []srqRec
	limit int
	qps   int
	gone  bool
}

type srqRec struct {
	recvRec
	seq   uint64 // ring position, to tell laps apart
	sgesD []descriptor
}

const (
	recFree   = 0
	recPosted = 1
)

// CreateSRQ implements driver.SRQCreator.
func (pd *PD) CreateSRQ(cfg driver.SRQConfig) (driver.SRQ, error) {
	if err := pd.addChild(); err != nil {
		return nil, err
	}
	s, err := newSRQ(pd.nic, pd, cfg, false)
	if err != nil {
		pd.dropChild()
		return nil, err
	}
	return s, nil
}

func newSRQ(n *NIC, pd *PD, cfg driver.SRQConfig, private bool) (*SRQ, error) {
	if cfg.MaxWR < 1 || cfg.MaxWR > maxSRQDepth || cfg.MaxSGE < 0 || cfg.MaxSGE > maxSGE {
		return nil, fmt.Errorf("an SRQ of the software NIC has 1 to %d receives of up to %d SGEs; asked for %d of %d",
			maxSRQDepth, maxSGE, cfg.MaxWR, cfg.MaxSGE)
	}
	s := &SRQ{nic: n, pd: pd, max: int(pow2(cfg.MaxWR)), sges: uint32(max(cfg.MaxSGE, 1)), private: private}
	s.ring = uint32(2 * s.max)
	s.mask = s.ring - 1
	size := int(srqSize(s.ring, s.sges))
	if n.shared {
		reg, err := mem.Alloc(size, mem.Options{Name: "ringside-srq", Huge: mem.HugeNever})
		if err != nil {
			return nil, err
		}
		s.reg, s.mem = reg, reg.Bytes()[:size]
	} else {
		s.mem = heapBytes(size)
	}
	w := words64(s.mem)
	s.headW = &w[srqHead/8]
	s.entries = w[srqEntries/8:][:s.ring*srqWords]
	if s.sges > 1 {
		s.lists = w[srqEntries/8+int(s.ring)*srqWords:][:s.ring*s.sges*2]
	}
	s.recs = make([]srqRec, s.ring)
	if err := n.addSRQ(s); err != nil {
		if s.reg != nil {
			s.reg.Close()
		}
		return nil, err
	}
	return s, nil
}

func (s *SRQ) fd() int {
	if s.reg == nil {
		return -1
	}
	return s.reg.FD()
}

// MaxWR implements driver.SRQ.
func (s *SRQ) MaxWR() int { return s.max }

// MaxSGE implements driver.SRQ.
func (s *SRQ) MaxSGE() int { return int(s.sges) }

// Limit implements driver.SRQ.
func (s *SRQ) Limit() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.limit
}

// SetLimit implements driver.SRQ.
func (s *SRQ) SetLimit(n int) error {
	if n < 0 || n > s.max {
		return fmt.Errorf("SRQ limit %d: the queue has %d receives", n, s.max)
	}
	s.mu.Lock()
	if s.gone { // its memory is no longer there
		s.mu.Unlock()
		return driver.ErrClosed
	}
	s.limit = n
	fire := s.belowLimitLocked()
	s.mu.Unlock()
	if fire {
		s.nic.raise(driver.AsyncEvent{Type: ib.EventSRQLimit, SRQ: s})
	}
	return nil
}

// belowLimitLocked reports, once, that fewer receives than the limit are left.
func (s *SRQ) belowLimitLocked() bool {
	if s.limit == 0 || s.available() >= s.limit {
		return false
	}
	s.limit = 0
	return true
}

// available counts the receives that nobody has claimed, as far as the head tells, which peers write.
func (s *SRQ) available() int {
	h := atomic.LoadUint64(s.headW)
	if h > s.tail || s.tail-h > uint64(s.ring) {
		return 0
	}
	n := 0
	for i := h; i != s.tail; i++ {
		if atomic.LoadUint64(&s.entries[(uint32(i)&s.mask)*srqWords]) == uint64(uint32(i)+1)<<32|srqFree {
			n++
		}
	}
	return n
}

// PostRecv implements driver.SRQ.
func (s *SRQ) PostRecv(wrs []ib.RecvWR) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return 0, driver.ErrClosed
	}
	for i := range wrs {
		wr := &wrs[i]
		if s.used == s.max {
			return i, driver.ErrQueueFull
		}
		if len(wr.SGEs) > int(s.sges) {
			return i, driver.ErrTooManySGEs
		}
		sum := ib.SGELen(wr.SGEs)
		if sum > ib.MaxMessage {
			return i, errTooLong
		}
		r := s.slotLocked()
		r.id, r.total, r.sges, r.state, r.private = wr.ID, uint32(sum), uint16(len(wr.SGEs)), recPosted, false
		r.sgesD = r.sgesD[:0]
		for j := range wr.SGEs {
			d, private := s.nic.recvDesc(s.pd, &wr.SGEs[j])
			r.sgesD = append(r.sgesD, d)
			r.private = r.private || private
		}
		if r.private && s.nic.shared {
			r.staged = s.nic.stageRecv(s.pd, r.sgesD, r.total)
		}
		s.publishLocked(r)
	}
	return len(wrs), nil
}

// slotLocked returns the record of the ring entry at the tail, stepping over entries that are in use.
func (s *SRQ) slotLocked() *srqRec {
	for {
		k := uint32(s.tail) & s.mask
		r := &s.recs[k]
		if r.state == recFree {
			r.seq = s.tail
			return r
		}
		// Its receive is claimed and not polled: this lap's entry is no receive. The claimer's tag goes, and with it the chance
		// to take the receive back should the claimer die before it completes; the record is then freed with its QP.
		ring.StoreRel64(&s.entries[k*srqWords], uint64(uint32(s.tail)+1)<<32|srqSkip)
		s.tail++
	}
}

// publishLocked makes a record's receive claimable.
func (s *SRQ) publishLocked(r *srqRec) {
	k := uint32(r.seq) & s.mask
	e := s.entries[k*srqWords:][:srqWords]
	switch {
	case r.staged != nil:
		e[srqAddr], e[srqLenHdl] = r.staged.desc.addr, r.staged.desc.lenHdl
	case r.sges == 1:
		e[srqAddr], e[srqLenHdl] = r.sgesD[0].addr, r.sgesD[0].lenHdl
	case r.sges == 0:
		e[srqAddr], e[srqLenHdl] = 0, uint64(sgeList)<<32
	default:
		list := s.lists[k*s.sges*2:]
		for j, d := range r.sgesD {
			list[2*j], list[2*j+1] = d.addr, d.lenHdl
		}
		e[srqAddr], e[srqLenHdl] = uint64(r.sges), uint64(r.total)|uint64(sgeList)<<32
	}
	ring.StoreRel64(&e[srqClaim], uint64(uint32(r.seq)+1)<<32|srqFree)
	s.tail++
	s.used++
}

// complete takes the record of a completed receive; false: the peer names one that it cannot have.
func (s *SRQ) complete(slot uint32, wc *ib.WC, q *QP, in *inbound, a, b uint64) bool {
	if slot > s.mask {
		return false
	}
	s.mu.Lock()
	r := &s.recs[slot]
	if r.state != recPosted || !q.recvWC(wc, in, uint32(a>>32), b, r.id, r.total) {
		s.mu.Unlock()
		return false
	}
	if r.staged != nil {
		q.unstage(wc, &r.recvRec, r.sgesD)
	}
	r.state = recFree
	s.used--
	fire := s.belowLimitLocked()
	s.mu.Unlock()
	if fire {
		s.nic.raise(driver.AsyncEvent{Type: ib.EventSRQLimit, SRQ: s})
	}
	return true
}

// outstanding counts the receives that are posted and not completed, those included whose completions were not polled.
func (s *SRQ) outstanding() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used
}

// holds reports whether there is a receive in a slot that can be completed.
func (s *SRQ) holds(slot uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slot <= s.mask && s.recs[slot].state == recPosted
}

// pollSRQ takes completions of receives that came from a shared queue. Called with rcq.mu held.
func (in *inbound) pollSRQ(wcs []ib.WC) int {
	if in.broken {
		return 0
	}
	q := in.q
	h := in.head
	n := 0
	for n < len(wcs) {
		c := in.cqes[(h&in.mask)*cqeWordsSRQ:][:cqeWordsSRQ]
		a := atomic.LoadUint64(&c[0])
		if uint32(a) != h+1 {
			break
		}
		slot, src := uint32(c[2]), ib.QPN(c[2]>>32)
		if !q.srq.complete(slot, &wcs[n], q, in, a, c[1]) {
			in.fault("impossible completion %#x %#x for SRQ entry %d of QP %d", a, c[1], slot, q.qpn)
			break
		}
		if q.typ == ib.UD {
			wcs[n].SrcQPN = src & ib.MaxQPN
			wcs[n].Flags |= ib.WCGRH
		}
		n++
		h++
	}
	if h != in.head {
		in.head = h
		ring.StoreRel32(in.headW, h)
		if !q.commEst {
			q.established()
		}
	}
	return n
}

// flush completes what is still posted to a UD QP's own queue. Called with rcq.mu held, after the peers have stopped.
func (s *SRQ) flush(q *QP, wcs []ib.WC) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for i := s.tail - min(s.tail, uint64(s.ring)); i != s.tail && n < len(wcs); i++ {
		r := &s.recs[uint32(i)&s.mask]
		if r.state != recPosted || r.seq != i {
			continue
		}
		wcs[n] = ib.WC{ID: r.id, Status: ib.WCFlushErr, Opcode: ib.WCRecv, QPN: q.qpn}
		n++
		s.freeLocked(r)
	}
	return n
}

func (s *SRQ) freeLocked(r *srqRec) {
	r.staged.free(s.nic)
	r.staged = nil
	r.state = recFree
	s.used--
	e := &s.entries[(uint32(r.seq)&s.mask)*srqWords]
	if uint32(atomic.LoadUint64(e)>>32) == uint32(r.seq)+1 { // else the entry is of a later lap, in which claimers step over it
		atomic.StoreUint64(e, uint64(uint32(r.seq)+1)<<32|srqSkip)
	}
}

// clear empties a UD QP's own queue, after the peers have stopped.
func (s *SRQ) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.recs {
		if s.recs[i].state == recPosted {
			s.freeLocked(&s.recs[i])
		}
	}
	// Only claimers move the head: receives that none of them saw would leave it behind by more than a lap, where it does not find
	// the entry that it is to step over.
	atomic.StoreUint64(s.headW, s.tail)
}

// giveUp settles the receives that the peer of a block has claimed, after it has stopped: those with a completion are lost with
// the QP's completions, the others (the peer died in between) go back to the queue.
func (s *SRQ) giveUp(in *inbound) {
	done := map[uint32]bool{}
	in.published(done)
	if in.link.reason() != nil || in.link.net { // it may have been in the middle of a message
		s.takeBack(in.tag, done, true)
		return
	}
	// A peer that has stopped alive has completed all that it claimed: no need to look for more.
	s.mu.Lock()
	for k := range done {
		if k <= s.mask && s.claimedBy(k, in.tag) {
			s.freeLocked(&s.recs[k])
		}
	}
	s.mu.Unlock()
}

// claimedBy reports whether the entry's receive is posted, and claimed by tag as far as can be told: the tag is gone once the
// ring has lapped the entry. Called with mu held.
func (s *SRQ) claimedBy(k, tag uint32) bool {
	r := &s.recs[k]
	c := atomic.LoadUint64(&s.entries[k*srqWords])
	return r.state == recPosted && (uint32(c) == tag || uint32(c>>32) != uint32(r.seq)+1)
}

// reclaim takes back what the peers on a link that has ended had claimed without completing it.
func (s *SRQ) reclaim(l *link) {
	s.nic.eachQP(func(q *QP) {
		if q.srq != s || q.typ == ib.UD {
			return
		}
		q.rcq.mu.Lock()
		in := q.in.Load()
		if in == nil || in.link != l {
			q.rcq.mu.Unlock()
			return
		}
		published := map[uint32]bool{}
		in.published(published)
		s.takeBack(in.tag, published, false)
		q.rcq.mu.Unlock()
	})
}

// published adds the entries whose completions are still to be polled.
func (in *inbound) published(slots map[uint32]bool) {
	for h := in.head; h-in.head <= in.mask; h++ {
		c := in.cqes[(h&in.mask)*cqeWordsSRQ:]
		if uint32(atomic.LoadUint64(&c[0])) != h+1 {
			return
		}
		slots[uint32(c[2])] = true
	}
}

// takeBack posts again what tag has claimed and not completed. The entries in completed are left to the poller, or, with
// lost set, freed.
func (s *SRQ) takeBack(tag uint32, completed map[uint32]bool, lost bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var again []*srqRec
	for k := range s.recs {
		r := &s.recs[k]
		c := atomic.LoadUint64(&s.entries[k*srqWords])
		switch {
		case !s.claimedBy(uint32(k), tag):
		case completed[uint32(k)]:
			if lost {
				s.freeLocked(r)
			}
		case c == uint64(uint32(r.seq)+1)<<32|uint64(tag): // lapped ones may be anybody's
			again = append(again, r)
		}
	}
	for _, r := range again {
		copied := *r
		r.state, r.staged, r.sgesD = recFree, nil, nil
		s.used--
		to := s.slotLocked()
		seq := to.seq
		*to = copied
		to.seq = seq
		s.publishLocked(to)
	}
}

func (s *SRQ) attachQP() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return driver.ErrClosed
	}
	s.qps++
	return nil
}

func (s *SRQ) detachQP() {
	s.mu.Lock()
	s.qps--
	s.mu.Unlock()
}

// Close implements driver.SRQ.
func (s *SRQ) Close() error {
	s.mu.Lock()
	if s.gone {
		s.mu.Unlock()
		return driver.ErrClosed
	}
	if s.qps > 0 {
		s.mu.Unlock()
		return fmt.Errorf("%w: queue pairs take receives from this SRQ", driver.ErrBusy)
	}
	s.gone = true
	s.mu.Unlock()
	s.destroy()
	s.pd.dropChild()
	return nil
}

func (s *SRQ) destroy() {
	s.mu.Lock()
	s.gone = true
	for i := range s.recs {
		s.recs[i].staged.free(s.nic)
		s.recs[i].staged = nil
	}
	s.mu.Unlock()
	s.nic.dropSRQ(s)
	if s.reg != nil {
		s.reg.Close() // peers keep their own mapping; nobody of ours looks at it any more
	}
}

// postOwnSRQ posts receives to a UD QP's own queue.
func (q *QP) postOwnSRQ(wrs []ib.RecvWR) (int, error) {
	if ib.QPState(q.state.Load()) == ib.Reset {
		return 0, q.stateErr()
	}
	n, err := q.srq.PostRecv(wrs)
	if n > 0 && q.flushing.Load() {
		q.rcq.signal(q.rIdx, true)
	}
	return n, err
}

// srqView is a peer's side of a receive queue.
type srqView struct {
	reg     *mem.Region
	once    sync.Once
	mask    uint64
	sges    uint32
	headW   *uint64
	entries []uint64
	lists   []uint64
}

func newSRQView(b []byte, entries, sges uint32, reg *mem.Region) *srqView {
	w := words64(b)
	v := &srqView{reg: reg, mask: uint64(entries - 1), sges: sges, headW: &w[srqHead/8],
		entries: w[srqEntries/8:][:entries*srqWords]}
	if sges > 1 {
		v.lists = w[srqEntries/8+int(entries)*srqWords:][:entries*sges*2]
	}
	return v
}

func (v *srqView) unmap() {
	v.once.Do(func() {
		if v.reg != nil {
			v.reg.Close()
		}
	})
}

// peek finds the first receive that nobody has claimed. The search is bounded: the words are shared with others.
func (v *srqView) peek(s *recvSlot) bool {
	for range v.mask + 2 {
		h := atomic.LoadUint64(v.headW)
		k := h & v.mask
		e := v.entries[k*srqWords:][:srqWords]
		c := atomic.LoadUint64(&e[srqClaim])
		if uint32(c>>32) != uint32(h)+1 {
			if atomic.LoadUint64(v.headW) != h {
				continue
			}
			return false // not posted yet
		}
		if uint32(c) != srqFree {
			atomic.CompareAndSwapUint64(v.headW, h, h+1)
			continue
		}
		s.addr, s.lenHdl, s.slot = e[srqAddr], e[srqLenHdl], uint32(k)
		s.seq = uint32(h) + 1
		s.list = nil
		if uint32(s.lenHdl>>32) == sgeList && v.sges > 1 {
			s.list = v.lists[uint32(k)*v.sges*2:][:v.sges*2]
		}
		return true
	}
	return false
}

// claim takes the receive that peek found. What peek read is the receive's, if the claim word has not changed since.
func (v *srqView) claim(s *recvSlot, tag uint32) bool {
	free := uint64(s.seq)<<32 | srqFree
	if !atomic.CompareAndSwapUint64(&v.entries[uint64(s.slot)*srqWords+srqClaim], free, uint64(s.seq)<<32|uint64(tag)) {
		return false
	}
	if h := atomic.LoadUint64(v.headW); uint32(h)+1 == s.seq {
		atomic.CompareAndSwapUint64(v.headW, h, h+1)
	}
	return true
}
