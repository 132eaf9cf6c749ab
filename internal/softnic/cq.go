package softnic

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A CQ is a view on rings, not a ring: each QP has one ring of send completions, written by whoever posts, and one of
// receive completions a peer, written by the peer. Poll gathers them. So completions need no lock between producers, a
// producer that dies leaves no hole, and a peer can only write to the rings of its own QPs.
//
// With few QPs Poll looks at each ring (scan mode). Beyond scanLimit a bitmap of QPs with news is kept instead.
//
// Nobody counts completions as they come. If the members could have more of them outstanding than the CQ has entries, Poll counts, before it
// takes any: so an overrun is noticed by the next Poll. In bitmap mode it looks at those that have news only, and keeps those that have
// something in a queue of its own, so that a completion is counted once, and a long queue costs no more than a short one.
type CQ struct {
	nic *NIC

	mu      ring.SpinLock // guards polling: the consumer side of every ring
	members []*QP         // by member index; nil: free. Replaced under mu, so Poll may keep the slice
	rr      int           // where the next scan starts, for fairness
	entries int           // capacity
	sumCap  int           // completions that the members could have outstanding in all
	useBits bool          // bitmap mode
	counted bool          // bitmap mode, and sumCap is more than entries
	ports   []*port       // on every link that members are connected over
	ready   readySet      // members with news from this process; bitmap mode
	// single is the only member, if whether it has news can be seen without the lock; else nil. Replaced under mu.
	single atomic.Pointer[QP]
	closed bool
	marks  bool // see MarkSolicited

	err atomic.Pointer[error]

	armMu sync.Mutex
	armed uint32 // what was armed last; 0: fired and seen. Guarded by armMu
	// armedLocal is the armed word for completions of this process: set by Arm, cleared by CAS by whoever completes.
	armedLocal atomic.Uint32
	channel    *CompChannel

	// Guarded by mu.
	shared  map[*SRQ]int // how much of sumCap the members of each shared receive queue would be, but for the queue's own limit
	queued  int          // completions that members had when each was last counted
	backlog backlog      // members with completions that were counted; bitmap mode
}

// scanLimit is the number of QPs up to which Poll looks at each of them.
const scanLimit = 8

// CreateCQ implements driver.Context.
func (n *NIC) CreateCQ(cfg driver.CQConfig) (driver.CQ, error) {
	if cfg.Entries < 1 || cfg.Entries > maxCQE {
		return nil, fmt.Errorf("a CQ of the software NIC has 1 to %d entries, not %d", maxCQE, cfg.Entries)
	}
	c := &CQ{nic: n, entries: cfg.Entries}
	if cfg.Channel != nil {
		ch, ok := cfg.Channel.(*CompChannel)
		if !ok || ch.nic != n {
			return nil, errors.New("the completion channel belongs to another context")
		}
		if err := ch.add(c); err != nil {
			return nil, err
		}
		c.channel = ch
	}
	if err := n.addCQ(c); err != nil {
		if c.channel != nil {
			c.channel.remove(c)
		}
		return nil, err
	}
	return c, nil
}

// WCSolicited is a flag of receives whose sender asked for a solicited event. The verbs do not have it: it is only set on CQs that
// were told to.
const WCSolicited ib.WCFlags = 1 << 7

// MarkSolicited has c set WCSolicited, for those who raise its events themselves. To be called before c is used.
func (c *CQ) MarkSolicited() { c.marks = true }

// Entries implements driver.CQ.
func (c *CQ) Entries() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries
}

// Err implements driver.CQ.
func (c *CQ) Err() error {
	if e := c.err.Load(); e != nil {
		return *e
	}
	return nil
}

var errOverrun = errors.New("completion queue overrun: more completions than entries; make the CQ as deep as its queues together")

// Poll implements driver.CQ.
func (c *CQ) Poll(wcs []ib.WC) int {
	if c.nic.stalled.Load() != 0 {
		c.nic.progressStalled()
	}
	c.nic.pollPorts()
	if q := c.single.Load(); q != nil && q.quiet() && c.err.Load() == nil {
		c.nic.idle()
		return 0
	}
	c.mu.Lock()
	if c.err.Load() != nil {
		c.mu.Unlock()
		return -1
	}
	var n int
	if !c.useBits {
		if c.sumCap > c.entries && c.recount() > c.entries && c.overrun() {
			c.mu.Unlock()
			return -1
		}
		members := c.members
		if len(members) == 1 {
			if q := members[0]; q != nil {
				n = q.poll(c, wcs)
			}
		} else if len(members) > 0 {
			c.rr++
			if c.rr >= len(members) {
				c.rr = 0
			}
			for i, k := 0, c.rr; i < len(members) && n < len(wcs); i++ {
				if q := members[k]; q != nil {
					n += q.poll(c, wcs[n:])
				}
				if k++; k == len(members) {
					k = 0
				}
			}
		}
	} else {
		n = c.pollReady(wcs)
	}
	c.mu.Unlock()
	if n == 0 {
		c.nic.idle()
	}
	return n
}

// pollReady gathers from the members whose bits are set. A member that has more than fits keeps its bit.
func (c *CQ) pollReady(wcs []ib.WC) int {
	for _, p := range c.ports {
		p.collect(&c.ready)
	}
	if c.counted {
		return c.pollCounted(wcs)
	}
	n := 0
	for n < len(wcs) {
		k, ok := c.ready.pop()
		if !ok {
			break
		}
		if k >= len(c.members) || c.members[k] == nil {
			continue
		}
		q := c.members[k]
		got := q.poll(c, wcs[n:])
		n += got
		if n == len(wcs) {
			c.ready.set(k) // perhaps not empty
		}
	}
	return n
}

// pollCounted is pollReady where the CQ could overrun; -1: it has.
func (c *CQ) pollCounted(wcs []ib.WC) int {
	for range c.members { // what else comes meanwhile is for the next Poll
		k, ok := c.ready.pop()
		if !ok {
			break
		}
		if k < len(c.members) && c.members[k] != nil {
			c.queued += c.members[k].recount(c)
			c.backlog.push(k)
		}
	}
	if c.queued > c.entries && c.overrun() {
		return -1
	}
	n := 0
	for n < len(wcs) {
		k, ok := c.backlog.pop()
		if !ok {
			break
		}
		if k >= len(c.members) || c.members[k] == nil {
			continue
		}
		q := c.members[k]
		n += q.poll(c, wcs[n:])
		c.queued += q.recount(c)
		if n == len(wcs) {
			c.backlog.push(k) // perhaps not empty
		}
	}
	return n
}

// recount looks at all members, and returns how many completions are queued. Called with mu held.
func (c *CQ) recount() int {
	for _, q := range c.members {
		if q != nil {
			c.queued += q.recount(c)
		}
	}
	return c.queued
}

// overrun fails the CQ if more is queued than it has room for, as it seems. A peer can claim to have completed what it has not: such a
// one costs itself its link, not the others the CQ. Called with mu held.
func (c *CQ) overrun() bool {
	seen := map[srqSlot]bool{}
	for _, q := range c.members {
		if q != nil && q.rcq == c && !q.flushing.Load() {
			q.eachInbound(func(in *inbound) { in.checkSeen(seen) })
		}
	}
	if c.recount() <= c.entries {
		return false
	}
	c.fail(errOverrun)
	return true
}

// fail puts the CQ, and then its QPs, into the error state, also those that are reset meanwhile: the CQ stays broken, so that
// nothing they do could be heard of. Called with mu held.
func (c *CQ) fail(err error) {
	if !c.err.CompareAndSwap(nil, &err) {
		return
	}
	c.nic.raise(driver.AsyncEvent{Type: ib.EventCQErr, CQ: c})
	members := c.members
	c.nic.later(func() {
		for _, q := range members {
			if q != nil {
				q.toError(ib.EventQPFatal, true)
			}
		}
		c.fire(true)
	})
}

// Resize implements driver.CQResizer.
func (c *CQ) Resize(entries int) error {
	if entries < 1 || entries > maxCQE {
		return fmt.Errorf("a CQ of the software NIC has 1 to %d entries, not %d", maxCQE, entries)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return driver.ErrClosed
	}
	if n := c.recount(); n > entries {
		return fmt.Errorf("%w: %d completions are queued, more than %d: poll first", driver.ErrBusy, n, entries)
	}
	c.entries = entries
	c.changed()
	return nil
}

// Close implements driver.CQ.
func (c *CQ) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return driver.ErrClosed
	}
	for _, q := range c.members {
		if q != nil {
			c.mu.Unlock()
			return fmt.Errorf("%w: queue pairs complete on this CQ", driver.ErrBusy)
		}
	}
	c.closed = true
	if c.armedLocal.Swap(armNone) != armNone {
		c.nic.sleepers.Add(-1)
	}
	ports := c.ports
	c.ports = nil
	e := error(driver.ErrClosed)
	c.err.CompareAndSwap(nil, &e)
	c.mu.Unlock()
	for _, p := range ports {
		p.tidy()
	}
	if c.channel != nil {
		c.channel.remove(c)
	}
	c.nic.dropCQ(c)
	return nil
}

// attach makes q a member and returns its index.
func (c *CQ) attach(q *QP) (int, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return 0, driver.ErrClosed
	}
	members := append([]*QP(nil), c.members...)
	k := -1
	for i, m := range members {
		if m == nil {
			k = i
			break
		}
	}
	if k < 0 {
		k = len(members)
		members = append(members, nil)
	}
	members[k] = q
	c.members = members
	goBits := !c.useBits && len(members) > scanLimit
	c.ready.grow(len(members))
	c.backlog.grow(len(members))
	if goBits {
		c.useBits = true
		for _, p := range c.ports {
			p.setBitsMode()
		}
	}
	c.addCap(q, 1)
	c.changed()
	c.mu.Unlock()
	if goBits {
		heavyBarrier() // whoever still published without a bit is seen by the full look below
		c.readyAll()
	}
	return k, nil
}

// addCap counts what q could have outstanding, sign times. Called with mu held.
func (c *CQ) addCap(q *QP, sign int) {
	if q.scq == c {
		c.sumCap += sign * q.cap.MaxSendWR
	}
	switch s := q.srq; {
	case q.rcq != c:
	case s == nil || q.ownSRQ:
		c.sumCap += sign * q.cap.MaxRecvWR
	default: // of all, no more than the queue has receives
		before := c.shared[s]
		now := before + sign*int(min(s.ring, srqRingMax))
		c.sumCap += min(now, s.max) - min(before, s.max)
		if c.shared == nil {
			c.shared = map[*SRQ]int{}
		}
		if c.shared[s] = now; now == 0 {
			delete(c.shared, s)
		}
	}
}

// changed finds out how the CQ is to be polled, after its members or its size have changed. Called with mu held.
func (c *CQ) changed() {
	c.findSingle()
	if counted := c.useBits && c.sumCap > c.entries; counted != c.counted {
		c.counted = counted
		c.setAll() // members are in the backlog, or were not counted
	}
}

// findSingle sets single. Called with mu held.
func (c *CQ) findSingle() {
	var only *QP
	for _, q := range c.members {
		if q != nil {
			if only != nil {
				c.single.Store(nil)
				return
			}
			only = q
		}
	}
	if only != nil && (only.srq != nil || only.scq != only.rcq || c.sumCap > c.entries) {
		only = nil
	}
	c.single.Store(only)
}

func (c *CQ) readyAll() {
	c.mu.Lock()
	c.setAll()
	c.mu.Unlock()
}

// setAll is readyAll with mu held.
func (c *CQ) setAll() {
	for i, m := range c.members {
		if m != nil {
			c.ready.set(i)
		}
	}
}

func (c *CQ) detach(k int) {
	c.mu.Lock()
	members := append([]*QP(nil), c.members...)
	q := members[k]
	members[k] = nil
	for len(members) > 0 && members[len(members)-1] == nil {
		members = members[:len(members)-1]
	}
	c.members = members
	c.addCap(q, -1)
	c.changed()
	c.mu.Unlock()
}

// signal tells the CQ of news of member k from this process: the completion is already visible. solicited says whether it
// wakes a sleeper that only waits for solicited ones.
func (c *CQ) signal(k int, solicited bool) {
	if c.bitsMode() {
		c.ready.set(k)
	}
	if a := c.armedLocal.Load(); a != armNone {
		c.fireIf(a, solicited)
	}
}

func (c *CQ) bitsMode() bool { return c.ready.on.Load() }

func (c *CQ) fireIf(a uint32, solicited bool) {
	if (a == armAny || solicited) && c.armedLocal.CompareAndSwap(a, armNone) {
		c.nic.sleepers.Add(-1)
		if c.channel != nil {
			c.channel.wake()
		}
	}
}

// fire wakes the sleeper, if there is one.
func (c *CQ) fire(solicited bool) {
	if a := c.armedLocal.Load(); a != armNone {
		c.fireIf(a, solicited)
	}
}

// Arm implements driver.CQ.
func (c *CQ) Arm(solicitedOnly bool) error {
	if err := c.Err(); err != nil {
		return err
	}
	if c.channel == nil {
		return errors.New("the CQ has no completion channel: give it one when it is created")
	}
	kind := armAny
	if solicitedOnly {
		kind = armSolicited
	}
	c.armMu.Lock()
	if c.armed == armAny {
		kind = armAny // the stronger request stays
	}
	c.armed = kind
	if c.armedLocal.Swap(kind) == armNone {
		c.nic.sleepers.Add(1)
	}
	c.mu.Lock()
	ports := c.ports
	c.mu.Unlock()
	for _, p := range ports {
		p.arm(kind)
	}
	c.armMu.Unlock()
	// Producers publish, then load the armed word, without a fence between the two: this is the fence.
	heavyBarrier()
	c.nic.wakePorts()
	return nil
}

// takeFired reports whether the armed CQ has fired, and disarms it then.
func (c *CQ) takeFired() bool {
	c.armMu.Lock()
	defer c.armMu.Unlock()
	if c.armed == armNone {
		return false
	}
	c.mu.Lock()
	ports := c.ports
	c.mu.Unlock()
	fired := c.armedLocal.Load() == armNone
	for _, p := range ports {
		fired = fired || p.fired()
	}
	if !fired {
		return false
	}
	c.armed = armNone
	if c.armedLocal.Swap(armNone) != armNone {
		c.nic.sleepers.Add(-1)
	}
	for _, p := range ports {
		p.arm(armNone)
	}
	return true
}

// addPort makes a new port part of the CQ: it gets the mode and armed word that the others have.
func (c *CQ) addPort(p *port) {
	c.armMu.Lock()
	c.mu.Lock()
	c.ports = append(append([]*port(nil), c.ports...), p)
	if c.useBits {
		p.setBitsMode()
	}
	c.mu.Unlock()
	p.arm(c.armed)
	c.armMu.Unlock()
}

// removePort forgets a port that was given up, and lets the sleeper look.
func (c *CQ) removePort(p *port) {
	c.armMu.Lock() // whoever arms looks at the ports with only this lock held
	c.mu.Lock()
	var ports []*port
	for _, x := range c.ports {
		if x != p {
			ports = append(ports, x)
		}
	}
	c.ports = ports
	c.mu.Unlock()
	c.armMu.Unlock()
	c.fire(true)
}
