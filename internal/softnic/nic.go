package softnic

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// NIC is a software NIC. It implements driver.Context: every open context is a NIC of its own, with its own GID.
type NIC struct {
	gid     ib.GID
	guid    ib.GUID
	taps    atomic.Pointer[taps] // nil: nobody observes packets; replaced under watch.mu
	watch   watch                // by whom the NIC is observed
	shared  bool                 // peers in other processes can reach it
	sharedE error
	busyFor time.Duration // busyLimit; shorter in tests
	faults  *string       // of its ports, as EnvFaults; nil: as the environment says
	viaDoor bool          // tests: reach NICs of this process through shared memory too
	liveReg *mem.Region
	door    *door // where other processes knock; nil without shared memory
	stagePD PD
	stages  stagePool
	regions regionTable

	regionUse sync.RWMutex // held for reading while a region is used for a peer: something is done for it, or the file is passed on

	mu       sync.Mutex
	closed   bool
	qps      map[ib.QPN]*QP
	nextQPN  ib.QPN
	cqs      map[*CQ]bool
	channels map[*CompChannel]bool
	srqs     map[*SRQ]bool
	mws      map[uint32]*MW
	links    map[ib.GID]*link
	dials    map[ib.GID]*dial
	nextPD   uint32
	nextMW   uint32
	nextChan uint32
	nextSRQ  uint32
	pds      int
	qpList   atomic.Pointer[[]*QP] // copy of qps for the slow walks; replaced under mu

	ahs     atomic.Pointer[[]*AH] // by number; replaced under mu
	freeAHs []ib.AHNum

	events *mailbox[driver.AsyncEvent]
	evC    chan struct{} // an event was added, or the NIC was closed
	work   *mailbox[func()]
	done   chan struct{} // the worker has ended

	sim       *simulation // nil: the NIC is in the real world
	gids      gidTable
	following atomic.Bool                // the host's addresses are followed; set under mu
	unfollow  func()                     // ends that; nil: it has not begun. Guarded by mu
	netPorts  atomic.Pointer[[]*netPort] // that are open; replaced under gids.mu
	streams   streamPorts
	early     *wire.EarlyPool // for packets of networks that came before others
	listeners []*cmListener   // guarded by mu
	sleepers  atomic.Int32    // CQs that are armed

	stalled   atomic.Int32 // QPs whose head request waits
	stalledMu sync.Mutex
	stalledQs []*QP
	kick      chan struct{}
	retryDone chan struct{}

	mappedMu sync.Mutex     // a leaf
	mapped   map[*link]bool // links that are down, whose memory is mapped for late readers
}

// Device attributes.
const (
	vendorID   = 0x1f5d // not assigned: a software device
	deviceName = "soft0"
)

// maxEarly is how many bytes the NIC keeps of packets that came before others, whatever peers send: some windows of long packets.
const maxEarly = 64 << 20

// linkTimeout bounds the set-up of a path to another process.
const linkTimeout = 2 * time.Second

// Open makes a NIC.
func Open() (*NIC, error) {
	n := newNIC()
	rand.Read(n.gid[:])
	n.identify()
	return n.open()
}

// OpenNumbered makes a NIC with predictable numbers, for tests that compare what was written with what it was: the first queue pair
// is number first, and keys of regions and windows are key's, of which windows set bit 8.
func OpenNumbered(first ib.QPN, key func() uint32) (*NIC, error) {
	n := newNIC()
	rand.Read(n.gid[:])
	n.identify()
	n.nextQPN, n.regions.random = first, key
	return n.open()
}

func (n *NIC) open() (*NIC, error) {
	if err := n.openShared(); err != nil {
		n.sharedE = err
		n.regions.init(heapBytes(maxMRs*4), -1)
	}
	register(n)
	go n.worker()
	go n.retrier()
	n.joinCapture()
	return n, nil
}

func newNIC() *NIC {
	n := &NIC{qps: map[ib.QPN]*QP{}, cqs: map[*CQ]bool{}, channels: map[*CompChannel]bool{}, srqs: map[*SRQ]bool{},
		mws: map[uint32]*MW{}, links: map[ib.GID]*link{}, dials: map[ib.GID]*dial{}, done: make(chan struct{}),
		events: newMailbox[driver.AsyncEvent](), evC: make(chan struct{}, 1), work: newMailbox[func()](),
		kick: make(chan struct{}, 1), retryDone: make(chan struct{}), busyFor: busyLimit, early: wire.NewEarlyPool(maxEarly)}
	n.regions.random = random32
	n.stagePD = PD{nic: n}
	n.gids.system = hostAddrs
	n.gids.raise = func(e ib.EventType) { n.raise(driver.AsyncEvent{Type: e, Port: 1}) }
	return n
}

// softGID is the first byte of every NIC's GID: fd00::/8, locally assigned addresses.
const softGID = 0xfd

// identify makes a GID of n.gid's random bits, and what goes with it.
func (n *NIC) identify() {
	// Its random part is the NIC's identity on this host.
	n.gid[0] = softGID
	n.guid = ib.GUID(n.gid.InterfaceID())
	n.nextQPN = ib.QPN(n.regions.random() & 0xffff) // so that stale QPNs of other runs rarely fit
	n.nextQPN += 16
}

// register makes the NIC reachable for others of this process.
var (
	registryMu sync.Mutex
	registry   = map[ib.GID]*NIC{}
)

func register(n *NIC) {
	registryMu.Lock()
	registry[n.gid] = n
	registryMu.Unlock()
}

func lookupNIC(g ib.GID) *NIC {
	registryMu.Lock()
	defer registryMu.Unlock()
	return registry[g]
}

// GID is the NIC's own GID.
func (n *NIC) GID() ib.GID { return n.gid }

// QueryDevice implements driver.Context.
func (n *NIC) QueryDevice() (ib.DeviceAttr, error) {
	if n.isClosed() {
		return ib.DeviceAttr{}, driver.ErrClosed
	}
	return ib.DeviceAttr{Firmware: "software", NodeGUID: n.guid, SysImageGUID: n.guid, VendorID: vendorID, Ports: 1,
		MaxMRSize: 1 << 46, PageSizeCap: 1<<12 | 1<<21 | 1<<30, MaxQP: maxQPs, MaxQPWR: maxDepth, MaxSGE: maxSGE, MaxSGERead: maxSGE,
		MaxCQ: 1 << 16, MaxCQE: maxCQE, MaxMR: maxMRs - 1, MaxPD: 1 << 16, MaxQPRdAtomic: maxPaths, MaxQPInitRdAtom: maxPaths,
		MaxMW: maxMRs - 1, MaxAH: maxAHs - 1, MaxSRQ: 1 << 14, MaxSRQWR: maxSRQDepth, MaxSRQSGE: maxSGE, MaxPKeys: 1, MaxInline: maxInline,
		Caps: ib.CapMW2 | ib.CapSRQ | ib.CapAtomic | ib.CapAtomicGlobal | ib.CapResizeCQ | ib.CapUD | ib.CapUC |
			ib.CapImm | ib.CapMWBounds | ib.CapFlush | ib.CapAtomicWrite}, nil
}

// QueryPort implements driver.Context.
func (n *NIC) QueryPort(port uint8) (ib.PortAttr, error) {
	if n.isClosed() {
		return ib.PortAttr{}, driver.ErrClosed
	}
	if port != 1 {
		return ib.PortAttr{}, errPort(port)
	}
	return ib.PortAttr{State: n.gids.portState(), MaxMTU: ib.MTU4096, ActiveMTU: ib.MTU4096, GIDTable: maxGIDs, PKeyTable: 1,
		MaxMessage: 1 << 31, LinkLayer: ib.LinkMemory}, nil
}

func errPort(port uint8) error { return fmt.Errorf("the software NIC has port 1 only, not %d", port) }

// GIDs implements driver.Context.
func (n *NIC) GIDs(port uint8) ([]ib.GIDEntry, error) {
	if n.isClosed() {
		return nil, driver.ErrClosed
	}
	if port != 1 {
		return nil, errPort(port)
	}
	n.followNet()
	return n.gids.list(n.gid), nil
}

func (n *NIC) isClosed() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.closed
}

// PD implements driver.PD.
type PD struct {
	nic      *NIC
	id       uint32
	children atomic.Int64 // closed: a large negative number
}

const pdClosed = -1 << 40

// AllocPD implements driver.Context.
func (n *NIC) AllocPD() (driver.PD, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, driver.ErrClosed
	}
	n.nextPD++
	n.pds++
	return &PD{nic: n, id: n.nextPD}, nil
}

func (pd *PD) addChild() error {
	if pd.children.Add(1) <= 0 {
		pd.children.Add(-1)
		return driver.ErrClosed
	}
	return nil
}

func (pd *PD) dropChild() { pd.children.Add(-1) }

// Close implements driver.PD.
func (pd *PD) Close() error {
	if !pd.children.CompareAndSwap(0, pdClosed) {
		if pd.children.Load() < 0 {
			return driver.ErrClosed
		}
		return fmt.Errorf("%w: regions, queue pairs or windows belong to the protection domain", driver.ErrBusy)
	}
	pd.nic.mu.Lock()
	pd.nic.pds--
	pd.nic.mu.Unlock()
	return nil
}

// Events.

const maxEvents = 1 << 14

// raise queues an asynchronous event; when nobody takes them, the newest are lost.
func (n *NIC) raise(e driver.AsyncEvent) {
	n.events.mu.Lock()
	if len(n.events.q) < maxEvents {
		n.events.q = append(n.events.q, e)
	}
	n.events.mu.Unlock()
	n.kickEvents()
}

func (n *NIC) kickEvents() {
	select {
	case n.evC <- struct{}{}:
	default:
	}
}

// AsyncEvent implements driver.Context.
func (n *NIC) AsyncEvent(ctx context.Context) (driver.AsyncEvent, error) {
	n.followNet()
	for {
		n.events.mu.Lock()
		if len(n.events.q) > 0 {
			e := n.events.q[0]
			n.events.q = n.events.q[1:]
			more := len(n.events.q) > 0
			n.events.mu.Unlock()
			if more {
				n.kickEvents()
			}
			return e, nil
		}
		n.events.mu.Unlock()
		if n.isClosed() {
			n.kickEvents() // for the next waiter
			return driver.AsyncEvent{}, driver.ErrClosed
		}
		if n.sim != nil {
			if err := n.sim.net.Sleep(ctx, n.evC); err != nil {
				return driver.AsyncEvent{}, err
			}
			continue
		}
		select {
		case <-n.evC:
		case <-ctx.Done():
			return driver.AsyncEvent{}, ctx.Err()
		}
	}
}

// Background work.

// later runs f on the NIC's worker goroutine: with no lock held, after what was queued before.
func (n *NIC) later(f func()) {
	n.work.put(f)
	if n.sim != nil {
		n.sim.net.Wake()
	}
}

func (n *NIC) worker() {
	defer close(n.done)
	var batch []func()
	for {
		if batch = n.work.take(batch); batch == nil {
			return
		}
		for _, f := range batch {
			f()
		}
	}
}

// addStalled has the NIC retry q's head request until it can be executed.
func (n *NIC) addStalled(q *QP) {
	n.stalledMu.Lock()
	n.stalledQs = append(n.stalledQs, q)
	n.stalledMu.Unlock()
	n.stalled.Add(1)
	select {
	case n.kick <- struct{}{}:
	default:
	}
}

// progressStalled retries every QP that waits. Pollers call it, and the retrier when nobody polls.
func (n *NIC) progressStalled() (some bool) {
	if !n.stalledMu.TryLock() {
		return true
	}
	list := n.stalledQs
	n.stalledQs = nil
	n.stalledMu.Unlock()
	var keep []*QP
	for _, q := range list {
		if q.progress() {
			keep = append(keep, q)
			continue
		}
		q.sq.Lock()
		if q.pendLen > 0 && q.sending() { // it stalled again in between
			keep = append(keep, q)
		} else {
			q.stalled = false
			n.stalled.Add(-1)
		}
		q.sq.Unlock()
	}
	if len(keep) > 0 {
		n.stalledMu.Lock()
		n.stalledQs = append(n.stalledQs, keep...)
		n.stalledMu.Unlock()
		return true
	}
	return false
}

// retrier retries stalled QPs when nobody polls: at once, then less and less often.
func (n *NIC) retrier() {
	defer close(n.retryDone)
	const fastest, slowest = 20 * time.Microsecond, 2 * time.Millisecond
	for range n.kick {
		pause := fastest
		for n.stalled.Load() > 0 {
			n.progressStalled()
			time.Sleep(pause)
			pause = min(pause*5/4+1, slowest)
			select {
			case _, ok := <-n.kick:
				if !ok {
					return
				}
				pause = fastest
			default:
			}
		}
	}
}

// Progress implements driver.Progresser.
func (n *NIC) Progress() bool {
	some := n.pollPorts()
	some = n.stalled.Load() != 0 && n.progressStalled() || some
	if !some && n.sim != nil {
		return n.sim.net.Step()
	}
	return some
}

// Close implements driver.Context.
func (n *NIC) Close() error {
	n.mu.Lock()
	switch {
	case n.closed:
		n.mu.Unlock()
		return driver.ErrClosed
	case len(n.qps) > 0 || len(n.cqs) > 0 || n.pds > 0 || len(n.channels) > 0 || len(n.srqs) > 0:
		err := fmt.Errorf("%w: %d queue pairs, %d completion queues, %d channels, %d SRQs and %d protection domains are open",
			driver.ErrBusy, len(n.qps), len(n.cqs), len(n.channels), len(n.srqs), n.pds)
		n.mu.Unlock()
		return err
	}
	n.closed = true
	listeners, unfollow := slices.Clone(n.listeners), n.unfollow
	n.mu.Unlock()
	if unfollow != nil {
		unfollow()
	}
	for _, l := range listeners {
		l.Close()
	}
	registryMu.Lock()
	delete(registry, n.gid)
	registryMu.Unlock()
	n.unwatch()
	n.closeShared()
	if ports := n.netPorts.Load(); ports != nil {
		until := time.Now().Add(linger)
		for _, p := range *ports {
			p.sayGoodbye(until)
			p.close()
		}
	}
	n.eachLink(func(l *link) {
		l.out.send(ctl{kind: ctlBye, data: []byte("device closed")})
		l.close(driver.ErrClosed)
	})
	n.work.close()
	if n.sim != nil {
		n.worker() // now, and here
	}
	<-n.done
	close(n.kick)
	if n.sim == nil {
		<-n.retryDone
	}
	n.mappedMu.Lock()
	mapped := slices.Collect(maps.Keys(n.mapped))
	n.mappedMu.Unlock()
	for _, l := range mapped {
		l.unmapLast()
	}
	n.stages.close()
	if n.liveReg != nil {
		n.liveReg.Close()
	}
	n.kickEvents()
	return nil
}
