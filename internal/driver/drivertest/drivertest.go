// Package drivertest is a provider whose devices do nothing: they count objects, keep what was posted, and complete
// and fail when a test says so. It is for tests of the packages above the contract; what work requests do is tested
// on the software NIC.
package drivertest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Provider is a provider of the devices in Devs.
type Provider struct {
	ProviderName string
	Devs         []*Device
	Err          error // of the search
}

// Name returns ProviderName.
func (p *Provider) Name() string { return p.ProviderName }

// Devices returns Devs and Err.
func (p *Provider) Devices() ([]driver.Device, error) {
	var d []driver.Device
	for _, dev := range p.Devs {
		d = append(d, dev)
	}
	return d, p.Err
}

// Device is a device. Set its fields before use.
type Device struct {
	DeviceInfo driver.DeviceInfo
	OpenErr    error        // what Open fails with
	PortState  ib.PortState // default ib.PortActive
	NoOptions  bool         // leave out the optional parts of the contract
	Memory     int          // how many bytes can be registered at a time, for RegisterMR to fail with ENOMEM beyond; 0: any number
	Modifying  func()       // if not nil, what QP.Modify does first

	mu         sync.Mutex
	live       map[string]int
	fail       map[string]error
	next       uint32
	registered int // bytes, with Memory
}

// New returns a device called name.
func New(name string) *Device {
	return &Device{DeviceInfo: driver.DeviceInfo{Name: name, Provider: "fake", Tier: driver.TierSoft, GUID: 0x42}}
}

// Live returns how many objects of each kind are open, without those that are none: "pd", "mr", "qp" and so on.
func (d *Device) Live() map[string]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := map[string]int{}
	for k, n := range d.live {
		if n != 0 {
			m[k] = n
		}
	}
	return m
}

// Fail makes the calls of one name fail with err, or succeed again with nil: "create_cq", "close_mr", "modify_qp".
func (d *Device) Fail(call string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fail == nil {
		d.fail = map[string]error{}
	}
	d.fail[call] = err
}

func (d *Device) failure(call string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.fail[call]
}

// object is what all objects have in common.
type object struct {
	dev    *Device
	kind   string
	num    uint32
	closed atomic.Bool
}

func (o *object) init(d *Device, kind, call string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.fail[call]; err != nil {
		return err
	}
	if d.live == nil {
		d.live = map[string]int{}
	}
	d.live[kind]++
	d.next++
	o.dev, o.kind, o.num = d, kind, d.next
	return nil
}

// Close counts. It panics if it is called twice, which the layer above must not do.
func (o *object) Close() error {
	if err := o.dev.failure("close_" + o.kind); err != nil {
		return err
	}
	if o.closed.Swap(true) {
		panic("drivertest: " + o.kind + " closed twice")
	}
	o.dev.mu.Lock()
	defer o.dev.mu.Unlock()
	o.dev.live[o.kind]--
	return nil
}

func (o *object) err() error {
	if o.closed.Load() {
		return net.ErrClosed
	}
	return nil
}

// Info returns DeviceInfo.
func (d *Device) Info() driver.DeviceInfo { return d.DeviceInfo }

// Open makes a *Context.
func (d *Device) Open() (driver.Context, error) {
	if d.OpenErr != nil {
		return nil, d.OpenErr
	}
	c := &Context{Events: make(chan driver.AsyncEvent, 16), done: make(chan struct{})}
	if err := c.init(d, "context", "open"); err != nil {
		return nil, err
	}
	if d.NoOptions {
		return struct{ driver.Context }{c}, nil
	}
	return c, nil
}

// Context is an open Device.
type Context struct {
	object
	Events chan driver.AsyncEvent // what AsyncEvent returns
	Busy   atomic.Bool            // what Progress returns
	done   chan struct{}
}

// QueryDevice returns small limits and every feature.
func (c *Context) QueryDevice() (ib.DeviceAttr, error) {
	if err := c.dev.failure("query_device"); err != nil {
		return ib.DeviceAttr{}, err
	}
	a := ib.DeviceAttr{Ports: 1, MaxMRSize: 1 << 40, MaxQP: 1000, MaxQPWR: 1000, MaxSGE: 8, MaxCQ: 1000, MaxCQE: 10000, MaxMR: 1000,
		MaxPD: 100, MaxQPRdAtomic: 8, MaxQPInitRdAtom: 4, MaxMW: 100, MaxAH: 100, MaxSRQ: 100, MaxSRQWR: 2000, MaxSRQSGE: 4, MaxInline: 32,
		MaxModerateCount: 100, MaxModeratePeriod: 100 * time.Microsecond,
		Caps: ib.CapMW2 | ib.CapSRQ | ib.CapAtomic | ib.CapResizeCQ | ib.CapUD | ib.CapUC | ib.CapImm | ib.CapRawPacket |
			ib.CapFlowSteering}
	if c.dev.NoOptions {
		a.Caps = 0
	}
	return a, c.err()
}

// QueryPort knows port 1.
func (c *Context) QueryPort(port uint8) (ib.PortAttr, error) {
	if port != 1 {
		return ib.PortAttr{}, fmt.Errorf("there is no port %d", port)
	}
	s := c.dev.PortState
	if s == 0 {
		s = ib.PortActive
	}
	return ib.PortAttr{State: s, MaxMTU: ib.MTU4096, ActiveMTU: ib.MTU1024, GIDTable: 4, PKeyTable: 1}, c.err()
}

// GIDs returns one at index 0 and one at index 2.
func (c *Context) GIDs(port uint8) ([]ib.GIDEntry, error) {
	return []ib.GIDEntry{{Index: 0, GID: ib.GID{15: 1}, PortNum: port}, {Index: 2, GID: ib.GID{15: 2}, PortNum: port}}, c.err()
}

// AllocPD makes a *PD.
func (c *Context) AllocPD() (driver.PD, error) {
	pd := &PD{}
	if err := errors.Join(c.err(), pd.init(c.dev, "pd", "alloc_pd")); err != nil {
		return nil, err
	}
	if c.dev.NoOptions {
		return struct{ driver.PD }{pd}, nil
	}
	return pd, nil
}

// CreateCompChannel makes a *CompChannel.
func (c *Context) CreateCompChannel() (driver.CompChannel, error) {
	ch := &CompChannel{Fired: make(chan driver.CQ, 16), done: make(chan struct{})}
	if err := errors.Join(c.err(), ch.init(c.dev, "channel", "create_channel")); err != nil {
		return nil, err
	}
	return ch, nil
}

// CreateCQ makes a *CQ of at least the size asked for.
func (c *Context) CreateCQ(cfg driver.CQConfig) (driver.CQ, error) {
	cq := &CQ{Config: cfg, entries: cfg.Entries + 1}
	if err := errors.Join(c.err(), cq.init(c.dev, "cq", "create_cq")); err != nil {
		return nil, err
	}
	if c.dev.NoOptions {
		return struct{ driver.CQ }{cq}, nil
	}
	return cq, nil
}

// AsyncEvent returns what is in Events.
func (c *Context) AsyncEvent(ctx context.Context) (driver.AsyncEvent, error) {
	select {
	case e := <-c.Events:
		return e, nil
	case <-ctx.Done():
		return driver.AsyncEvent{}, ctx.Err()
	case <-c.done:
		return driver.AsyncEvent{}, net.ErrClosed
	}
}

// CheckReach reaches only the GIDs of GIDs.
func (c *Context) CheckReach(ctx context.Context, gid ib.GID) (string, error) {
	if gid == (ib.GID{15: 1}) || gid == (ib.GID{15: 2}) {
		return "fake", ctx.Err()
	}
	return "", driver.ErrUnreachable
}

// Progress returns Busy.
func (c *Context) Progress() bool { return c.Busy.Load() }

// Close ends AsyncEvent calls.
func (c *Context) Close() error {
	if err := c.object.Close(); err != nil {
		return err
	}
	close(c.done)
	return nil
}

// PD is a protection domain.
type PD struct{ object }

// RegisterMR makes an *MR.
func (pd *PD) RegisterMR(cfg driver.MRConfig) (driver.MR, error) {
	m := &MR{Config: cfg}
	if err := pd.dev.pin(len(cfg.Mem)); err != nil {
		return nil, err
	}
	if err := errors.Join(pd.err(), m.init(pd.dev, "mr", "reg_mr")); err != nil {
		pd.dev.pin(-len(cfg.Mem))
		return nil, err
	}
	return m, nil
}

// pin counts n bytes of registered memory, or -n that is not registered any more.
func (d *Device) pin(n int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.Memory != 0 && n > d.Memory-d.registered {
		return syscall.ENOMEM
	}
	d.registered += n
	return nil
}

// RegisterDMABuf makes an *MR.
func (pd *PD) RegisterDMABuf(cfg driver.DMABufConfig) (driver.MR, error) {
	m := &MR{DMABuf: cfg}
	if err := errors.Join(pd.err(), m.init(pd.dev, "mr", "reg_mr")); err != nil {
		return nil, err
	}
	return m, nil
}

// CreateQP makes a *QP.
func (pd *PD) CreateQP(cfg driver.QPConfig) (driver.QP, error) {
	q := &QP{Config: cfg}
	if err := errors.Join(pd.err(), q.init(pd.dev, "qp", "create_qp")); err != nil {
		return nil, err
	}
	return q, nil
}

// CreateAH makes an address handle.
func (pd *PD) CreateAH(ib.AHAttr) (driver.AH, error) {
	a := &ah{}
	if err := errors.Join(pd.err(), a.init(pd.dev, "ah", "create_ah")); err != nil {
		return nil, err
	}
	return a, nil
}

// CreateSRQ makes an *SRQ.
func (pd *PD) CreateSRQ(cfg driver.SRQConfig) (driver.SRQ, error) {
	s := &SRQ{Config: cfg}
	if err := errors.Join(pd.err(), s.init(pd.dev, "srq", "create_srq")); err != nil {
		return nil, err
	}
	return s, nil
}

// AllocMW makes a memory window.
func (pd *PD) AllocMW() (driver.MW, error) {
	w := &mw{}
	if err := errors.Join(pd.err(), w.init(pd.dev, "mw", "alloc_mw")); err != nil {
		return nil, err
	}
	return w, nil
}

type ah struct{ object }

func (a *ah) Num() ib.AHNum { return ib.AHNum(a.num) }

type mw struct{ object }

func (w *mw) Handle() uint32 { return w.num }
func (w *mw) RKey() ib.RKey  { return ib.RKey(w.num<<8 | 0xfe) }

// MR is a region, with the config that it was made with.
type MR struct {
	object
	Config driver.MRConfig
	DMABuf driver.DMABufConfig
}

// LKey is a number.
func (m *MR) LKey() ib.LKey { return ib.LKey(m.num << 8) }

// RKey is another number.
func (m *MR) RKey() ib.RKey { return ib.RKey(m.num<<8 | 1) }

// Close counts, of the memory too.
func (m *MR) Close() error {
	if err := m.object.Close(); err != nil {
		return err
	}
	return m.dev.pin(-len(m.Config.Mem))
}

// CQ is a completion queue, of what Push puts into it.
type CQ struct {
	object
	Config driver.CQConfig

	mu      sync.Mutex
	entries int
	queue   []ib.WC
	broken  error
	armed   bool
}

// Push adds a completion, and fires the queue's channel if it is armed.
func (cq *CQ) Push(wc ib.WC) {
	cq.mu.Lock()
	defer cq.mu.Unlock()
	cq.queue = append(cq.queue, wc)
	if ch, ok := cq.Config.Channel.(*CompChannel); ok && cq.armed {
		cq.armed = false
		ch.Fired <- cq
	}
}

// Break makes the queue fail with err.
func (cq *CQ) Break(err error) {
	cq.mu.Lock()
	defer cq.mu.Unlock()
	cq.broken = err
}

// Entries is one more than was asked for.
func (cq *CQ) Entries() int {
	cq.mu.Lock()
	defer cq.mu.Unlock()
	return cq.entries
}

// Poll returns what was pushed.
func (cq *CQ) Poll(wcs []ib.WC) int {
	cq.mu.Lock()
	defer cq.mu.Unlock()
	if cq.broken != nil || cq.closed.Load() {
		return -1
	}
	n := copy(wcs, cq.queue)
	cq.queue = append(cq.queue[:0], cq.queue[n:]...)
	return n
}

// Err returns why the queue is broken.
func (cq *CQ) Err() error {
	cq.mu.Lock()
	defer cq.mu.Unlock()
	return errors.Join(cq.broken, cq.err())
}

// Arm makes the next Push fire.
func (cq *CQ) Arm(bool) error {
	cq.mu.Lock()
	defer cq.mu.Unlock()
	cq.armed = true
	return cq.err()
}

// Moderate does nothing.
func (cq *CQ) Moderate(int, time.Duration) error { return cq.err() }

// Resize changes what Entries returns.
func (cq *CQ) Resize(entries int) error {
	cq.mu.Lock()
	defer cq.mu.Unlock()
	if entries < len(cq.queue) {
		return errors.New("more is queued")
	}
	cq.entries = entries + 1
	return cq.err()
}

// CompChannel delivers what is put into Fired.
type CompChannel struct {
	object
	Fired chan driver.CQ
	done  chan struct{}
}

// Wait takes from Fired.
func (ch *CompChannel) Wait(ctx context.Context) (driver.CQ, error) {
	select {
	case cq := <-ch.Fired:
		return cq, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-ch.done:
		return nil, net.ErrClosed
	}
}

// Close ends Wait calls.
func (ch *CompChannel) Close() error {
	if err := ch.object.Close(); err != nil {
		return err
	}
	close(ch.done)
	return nil
}

// QP is a queue pair. Work requests are counted, and refused once a queue is full; nothing completes.
type QP struct {
	object
	Config driver.QPConfig

	mu           sync.Mutex
	attr         ib.QPAttr
	sends, recvs int
	Mods         []ib.QPAttrMask // masks of the Modify calls that reached the device
}

// QPN is a number.
func (q *QP) QPN() ib.QPN { return ib.QPN(q.num) }

// Cap is what was asked for.
func (q *QP) Cap() ib.QPCap { return q.Config.Cap }

// SetState changes the state as an error of the device would.
func (q *QP) SetState(s ib.QPState) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.attr.State = s
}

// Modify keeps the whole of attr, and the mask.
func (q *QP) Modify(ctx context.Context, attr *ib.QPAttr, mask ib.QPAttrMask) error {
	if q.dev.Modifying != nil {
		q.dev.Modifying()
	}
	if err := q.dev.failure("modify_qp"); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	state := q.attr.State
	q.attr = *attr
	if mask&ib.AttrState == 0 {
		q.attr.State = state
	}
	q.Mods = append(q.Mods, mask)
	return errors.Join(ctx.Err(), q.err())
}

// Query returns the attributes of the last Modify.
func (q *QP) Query() (ib.QPAttr, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.attr, q.err()
}

// PostSend counts.
func (q *QP) PostSend(wrs []ib.SendWR) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return post(&q.sends, len(wrs), q.Config.Cap.MaxSendWR)
}

// PostRecv counts.
func (q *QP) PostRecv(wrs []ib.RecvWR) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return post(&q.recvs, len(wrs), q.Config.Cap.MaxRecvWR)
}

// Steer makes a *Flow.
func (q *QP) Steer(r *ib.FlowRule) (driver.Flow, error) {
	f := &Flow{Rule: *r}
	if err := errors.Join(q.err(), f.init(q.dev, "flow", "create_flow")); err != nil {
		return nil, err
	}
	return f, nil
}

// Flow is a flow rule.
type Flow struct {
	object
	Rule ib.FlowRule
}

// Path is "fake".
func (q *QP) Path() string { return "fake" }

func post(have *int, n, limit int) (int, error) {
	m := min(n, limit-*have)
	*have += m
	if m < n {
		return m, driver.ErrQueueFull
	}
	return m, nil
}

// SRQ is a shared receive queue, which counts.
type SRQ struct {
	object
	Config driver.SRQConfig

	mu           sync.Mutex
	recvs, limit int
}

// MaxWR is what was asked for.
func (s *SRQ) MaxWR() int { return s.Config.MaxWR }

// MaxSGE is what was asked for.
func (s *SRQ) MaxSGE() int { return s.Config.MaxSGE }

// PostRecv counts.
func (s *SRQ) PostRecv(wrs []ib.RecvWR) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return post(&s.recvs, len(wrs), s.Config.MaxWR)
}

// SetLimit keeps the limit.
func (s *SRQ) SetLimit(n int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limit = n
	return s.err()
}

// Limit returns it.
func (s *SRQ) Limit() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.limit
}
