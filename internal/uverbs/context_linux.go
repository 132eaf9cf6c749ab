package uverbs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Context is what the contexts of all kernel devices have in common; providers embed it, and add their queues.
type Context struct {
	*File
	// Link is the link layer of the device's first port.
	Link ib.LinkLayer
	// CompVectors is how many completion vectors the device has.
	CompVectors int

	optional bool          // see ContextInfo.OptionalFlags
	caps     atomic.Uint64 // deviceCaps' answer

	index *uint32 // the device's, in the kernel's list; nil if it is not known
	guid  ib.GUID // the node's; 0 if it is not known
	cm    connManager

	async  *EventFile
	events chan driver.AsyncEvent // what AsyncEvent has not returned yet; the oldest go when it is full
	pumped chan struct{}          // closed when no event of the kernel's will be added any more
	noMore error                  // why; valid once pumped is closed
	closed chan struct{}

	removed  chan struct{} // closed when the device is known to have gone
	gone     atomic.Bool   // the same, for the data path
	stop     func()        // ends the watch for removal
	chanMu   sync.Mutex
	channels map[*CompChannel]struct{} // guarded by chanMu

	cookieMu sync.RWMutex
	cookie   uint64         // guarded by cookieMu: the last one given; none is given twice
	objects  map[uint64]any // guarded by cookieMu
}

// A notified is a completion queue that hears of each of its events that is taken from a channel. Its device counts them.
type notified interface {
	// Notified is called by the goroutine that waits; it must not block.
	Notified()
}

// An eventTarget is an object of a provider that hears of its own asynchronous events first.
type eventTarget interface {
	// Event is called on the context's own goroutine; it must not block.
	Event(ib.EventType)
}

// A portTarget is an object of a provider that hears of its port's asynchronous events first.
type portTarget interface {
	// PortEvent is called on the context's own goroutine; it must not block.
	PortEvent(ib.EventType)
}

// OpenContext opens a device and makes its context. uhwIn and uhwOut are what the provider's driver takes and gives.
func OpenContext(d *Device, uhwIn, uhwOut []byte) (*Context, error) {
	w := &removalWatch{}
	stop, err := WatchRemoval(d.Chardev, w.fire) // before the device is opened, so that what happens in between is noticed
	if err != nil {
		stop = func() {} // nothing will tell of a removal: the device works all the same
	}
	f, err := OpenDevice(d)
	if err != nil {
		stop()
		return nil, err
	}
	c, err := NewContext(f, uhwIn, uhwOut)
	if err != nil {
		stop()
		return nil, ExplainOpen(d, err)
	}
	c.know(d)
	c.stop = stop
	w.arm(c)
	return c, nil
}

// know notes what the connection manager may name d by.
func (c *Context) know(d *Device) {
	c.guid = ib.GUID(d.NodeGUID)
	if d.HasIndex {
		c.index = &d.Index
	}
}

// A removalWatch tells a context that its device has gone, also if that is known before there is a context.
type removalWatch struct {
	mu    sync.Mutex
	c     *Context
	fired bool
}

func (w *removalWatch) fire() {
	w.mu.Lock()
	w.fired = true
	c := w.c
	w.mu.Unlock()
	if c != nil {
		c.Remove()
	}
}

func (w *removalWatch) arm(c *Context) {
	w.mu.Lock()
	w.c = c
	fired := w.fired
	w.mu.Unlock()
	if fired {
		c.Remove()
	}
}

// NewContext makes the context of an open device, and closes the File if it fails.
func NewContext(f *File, uhwIn, uhwOut []byte) (*Context, error) {
	info, err := f.GetContext(uhwIn, uhwOut)
	if err != nil {
		f.Close()
		return nil, err
	}
	c := &Context{
		File: f, CompVectors: info.CompVectors, optional: info.OptionalFlags,
		events: make(chan driver.AsyncEvent, 1024), pumped: make(chan struct{}), closed: make(chan struct{}), removed: make(chan struct{}),
		stop: func() {}, channels: map[*CompChannel]struct{}{}, objects: map[uint64]any{},
	}
	if c.async, err = NewEventFile(info.AsyncFD, f.device, "get_async_event"); err != nil {
		f.Close()
		return nil, err
	}
	if err := c.async.Park(); err != nil { // now, when there is somebody to tell
		c.async.Close()
		f.Close()
		return nil, err
	}
	go c.pump()
	if p, err := f.QueryPort(1); err == nil {
		c.Link = linkLayer(p.LinkLayer)
	}
	return c, nil
}

// Close ends the context. What was made from it must have been closed.
func (c *Context) Close() error {
	c.stop()
	c.cm.close()
	close(c.closed)
	c.async.Close()
	<-c.pumped
	return c.File.Close()
}

// Track remembers obj, and returns the number by which the kernel's events name it. Forget it when it is destroyed.
func (c *Context) Track(obj any) (cookie uint64) {
	c.cookieMu.Lock()
	defer c.cookieMu.Unlock()
	c.cookie++
	c.objects[c.cookie] = obj
	return c.cookie
}

// Forget ends Track. Events that are still on their way are dropped.
func (c *Context) Forget(cookie uint64) {
	c.cookieMu.Lock()
	delete(c.objects, cookie)
	c.cookieMu.Unlock()
}

func (c *Context) tracked(cookie uint64) any {
	c.cookieMu.RLock()
	defer c.cookieMu.RUnlock()
	return c.objects[cookie]
}

func (c *Context) portTargets() (list []portTarget) {
	c.cookieMu.RLock()
	defer c.cookieMu.RUnlock()
	for _, obj := range c.objects {
		if t, ok := obj.(portTarget); ok {
			list = append(list, t)
		}
	}
	return list
}

// Removed returns driver.ErrDeviceRemoved once the device is known to have gone. It costs one load.
func (c *Context) Removed() error {
	if c.gone.Load() {
		return errRemoved
	}
	return nil
}

// Gone implements driver.Remover.
func (c *Context) Gone() <-chan struct{} { return c.removed }

var errRemoved error = driver.ErrDeviceRemoved // made once, for the data path

// Remove says that the device has gone: every wait ends. What exists can only be closed.
func (c *Context) Remove() {
	if c.gone.Swap(true) {
		return
	}
	c.addEvent(driver.AsyncEvent{Type: ib.EventDeviceFatal})
	close(c.removed)
	c.chanMu.Lock()
	for ch := range c.channels {
		ch.e.Fail(errRemoved)
	}
	c.chanMu.Unlock()
	c.cm.fail(errRemoved)
}

const asyncEventSize = 16 // struct ib_uverbs_async_event_desc

// pump takes asynchronous events from the kernel as they come, so that objects hear of them whether or not the program
// asks.
func (c *Context) pump() {
	defer close(c.pumped)
	var b [asyncEventSize]byte
	for {
		n, err := c.async.Wait(context.Background(), b[:])
		if errors.Is(err, driver.ErrDeviceRemoved) {
			c.Remove()
		}
		if err != nil {
			c.noMore = err
			return
		}
		if n != len(b) {
			continue
		}
		c.event(binary.NativeEndian.Uint64(b[0:]), binary.NativeEndian.Uint32(b[8:]))
	}
}

func (c *Context) event(element uint64, typ uint32) {
	if typ > 0xff {
		return
	}
	e := driver.AsyncEvent{Type: ib.EventType(typ)}
	switch e.Type {
	case ib.EventDeviceFatal:
		c.Remove()
		return
	case ib.EventPortActive, ib.EventPortErr, ib.EventLIDChange, ib.EventPKeyChange, ib.EventSMChange, ib.EventClientRereg, ib.EventGIDChange:
		e.Port = uint8(element)
		for _, t := range c.portTargets() {
			t.PortEvent(e.Type)
		}
	default:
		obj := c.tracked(element)
		if t, ok := obj.(eventTarget); ok {
			t.Event(e.Type)
		}
		switch o := obj.(type) {
		case driver.QP:
			if e.QP = o; e.Type == ib.EventCommEst {
				c.cm.commEst(o)
			}
		case driver.CQ:
			e.CQ = o
		case driver.SRQ:
			e.SRQ = o
		default:
			return // of an object that is closed
		}
	}
	c.addEvent(e)
}

func (c *Context) addEvent(e driver.AsyncEvent) {
	for {
		select {
		case c.events <- e:
			return
		default:
		}
		select {
		case <-c.events:
		default:
		}
	}
}

// AsyncEvent implements driver.Context.
func (c *Context) AsyncEvent(ctx context.Context) (driver.AsyncEvent, error) {
	select {
	case e := <-c.events:
		return e, nil
	default:
	}
	select {
	case e := <-c.events:
		return e, nil
	case <-c.closed:
		return driver.AsyncEvent{}, net.ErrClosed
	case <-ctx.Done():
		return driver.AsyncEvent{}, ctx.Err()
	case <-c.removed:
		return c.lastEvent(errRemoved)
	case <-c.pumped:
		err := c.noMore
		select {
		case <-c.closed:
			err = net.ErrClosed
		case <-c.removed:
			err = errRemoved
		default:
		}
		return c.lastEvent(err)
	}
}

// lastEvent is AsyncEvent when no more will come, because of err.
func (c *Context) lastEvent(err error) (driver.AsyncEvent, error) {
	select {
	case e := <-c.events:
		return e, nil
	default:
		return driver.AsyncEvent{}, err
	}
}

// QueryDevice implements driver.Context, but for what only the provider knows: MaxInline, and CapResizeCQ.
func (c *Context) QueryDevice() (ib.DeviceAttr, error) {
	if err := c.Removed(); err != nil {
		return ib.DeviceAttr{}, err
	}
	r, err := c.File.QueryDevice()
	if err != nil {
		return ib.DeviceAttr{}, err
	}
	b := &r.Base
	a := ib.DeviceAttr{
		NodeGUID: ib.GUID(abi.FromBE64(b.NodeGUID)), SysImageGUID: ib.GUID(abi.FromBE64(b.SysImageGUID)),
		VendorID: b.VendorID, VendorPartID: b.VendorPartID, HWVersion: b.HwVer, Ports: int(b.PhysPortCnt),
		MaxMRSize: b.MaxMRSize, PageSizeCap: b.PageSizeCap,
		MaxQP: clampInt(b.MaxQP), MaxQPWR: clampInt(b.MaxQPWR), MaxSGE: clampInt(b.MaxSGE), MaxSGERead: clampInt(b.MaxSGERd),
		MaxCQ: clampInt(b.MaxCQ), MaxCQE: clampInt(b.MaxCQE), MaxMR: clampInt(b.MaxMR), MaxPD: clampInt(b.MaxPD),
		MaxQPRdAtomic: min(clampInt(b.MaxQPRdAtom), 255), MaxQPInitRdAtom: min(clampInt(b.MaxQPInitRdAtom), 255),
		MaxMW: clampInt(b.MaxMW), MaxAH: clampInt(b.MaxAH), MaxSRQ: clampInt(b.MaxSRQ), MaxSRQWR: clampInt(b.MaxSRQWR),
		MaxSRQSGE: clampInt(b.MaxSRQSGE), MaxPKeys: int(b.MaxPKeys), Caps: ib.CapImm, // all but iWARP's have that
		MaxModerateCount:  int(r.CQModerationCaps.MaxCQModerationCount),
		MaxModeratePeriod: time.Duration(r.CQModerationCaps.MaxCQModerationPeriod) * time.Microsecond,
	}
	if b.FWVer != 0 {
		a.Firmware = fmt.Sprintf("%d.%d.%d", b.FWVer>>32, b.FWVer>>16&0xffff, b.FWVer&0xffff)
	}
	if b.DeviceCapFlags&(abi.IB_UVERBS_DEVICE_MEM_WINDOW_TYPE_2A|abi.IB_UVERBS_DEVICE_MEM_WINDOW_TYPE_2B) != 0 {
		a.Caps |= ib.CapMW2 | ib.CapMWBounds
	}
	if b.MaxSRQ > 0 {
		a.Caps |= ib.CapSRQ
	}
	const hca, global = 1, 2 // enum ib_atomic_cap, which is in no header for user space
	switch b.AtomicCap {
	case hca:
		a.Caps |= ib.CapAtomic
	case global:
		a.Caps |= ib.CapAtomic | ib.CapAtomicGlobal
	}
	if b.DeviceCapFlags&abi.IB_UVERBS_DEVICE_MANAGED_FLOW_STEERING != 0 {
		a.Caps |= ib.CapFlowSteering
	}
	if b.DeviceCapFlags&abi.IB_UVERBS_DEVICE_RAW_IP_CSUM != 0 {
		a.Caps |= ib.CapFrameChecksum
	}
	if r.ODPCaps.GeneralCaps != 0 {
		a.Caps |= ib.CapODP
	}
	for bit, c := range map[uint64]ib.DeviceCaps{
		abi.IB_UVERBS_DEVICE_FLUSH_GLOBAL:     ib.CapFlush,
		abi.IB_UVERBS_DEVICE_FLUSH_PERSISTENT: ib.CapFlushPersistent,
		abi.IB_UVERBS_DEVICE_ATOMIC_WRITE:     ib.CapAtomicWrite,
	} {
		if r.DeviceCapFlagsEx&bit != 0 {
			a.Caps |= c
		}
	}
	return a, nil
}

func clampInt(v uint32) int { return int(min(v, 1<<31-1)) }

func linkLayer(v uint8) ib.LinkLayer {
	const infiniBand, ethernet = 1, 2 // enum rdma_link_layer
	switch v {
	case infiniBand:
		return ib.LinkInfiniBand
	case ethernet:
		return ib.LinkEthernet
	}
	return ib.LinkUnspecified
}

// QueryPort implements driver.Context.
func (c *Context) QueryPort(port uint8) (ib.PortAttr, error) {
	if err := c.Removed(); err != nil {
		return ib.PortAttr{}, err
	}
	p, err := c.File.QueryPort(port)
	if errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("there is no port %d: %w", port, err)
	}
	return ib.PortAttr{
		State: ib.PortState(p.State), MaxMTU: ib.MTU(p.MaxMTU), ActiveMTU: ib.MTU(p.ActiveMTU), GIDTable: clampInt(p.GIDTblLen),
		PKeyTable: int(p.PKeyTblLen), MaxMessage: p.MaxMsgSz, LID: ib.LID(p.LID), SMLID: ib.LID(p.SMLID), LinkLayer: linkLayer(p.LinkLayer),
	}, err
}

// GIDs implements driver.Context.
func (c *Context) GIDs(port uint8) ([]ib.GIDEntry, error) {
	p, err := c.QueryPort(port)
	if err != nil {
		return nil, err
	}
	raw, err := c.QueryGIDTable(max(p.GIDTable, 1) * 4) // the table of all ports
	if noSuchMethod(err) {
		return gidsFromSysfs("/sys", c.device, port, p.GIDTable), nil
	}
	if err != nil {
		return nil, err
	}
	var list []ib.GIDEntry
	for i := range raw {
		g := &raw[i]
		if g.PortNum != uint32(port) {
			continue
		}
		e := ib.GIDEntry{Index: clampInt(g.GIDIndex), GID: g.GID, Type: ib.GIDType(g.GIDType), PortNum: port}
		if g.NetdevIfindex != 0 {
			if dev, err := net.InterfaceByIndex(int(g.NetdevIfindex)); err == nil {
				e.NetDev = dev.Name
			}
		}
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b ib.GIDEntry) int { return a.Index - b.Index })
	return list, nil
}

// A CompChannel is a completion channel of a kernel device.
type CompChannel struct {
	c      *Context
	fd     int
	e      *EventFile
	record [compEventSize]byte // WaitThread's
	soft   *firing             // nil: the kernel's events are all there are
}

const compEventSize = 8 // struct ib_uverbs_comp_event_desc

// CreateCompChannel implements driver.Context.
func (c *Context) CreateCompChannel() (driver.CompChannel, error) {
	if err := c.Removed(); err != nil {
		return nil, err
	}
	fd, err := c.File.CreateCompChannel()
	if err != nil {
		return nil, err
	}
	e, err := NewEventFile(fd, c.device, "get_cq_event")
	if err != nil {
		return nil, err
	}
	ch := &CompChannel{c: c, fd: fd, e: e}
	c.chanMu.Lock()
	c.channels[ch] = struct{}{}
	c.chanMu.Unlock()
	if err := c.Removed(); err != nil { // meanwhile
		e.Fail(err)
	}
	return ch, nil
}

// ChannelFD is the descriptor of a channel of this context, for the kernel; -1 for none.
func (c *Context) ChannelFD(ch driver.CompChannel) (int, error) {
	if ch == nil {
		return -1, nil
	}
	k, ok := ch.(*CompChannel)
	if !ok || k.c != c {
		return 0, errors.New("the completion channel belongs to another device")
	}
	return k.fd, nil
}

// Wait implements driver.CompChannel.
func (ch *CompChannel) Wait(ctx context.Context) (driver.CQ, error) {
	var b [compEventSize]byte
	for {
		if cq := ch.next(); cq != nil {
			return cq, nil
		}
		n, err := ch.e.Wait(ctx, b[:])
		if err != nil {
			return nil, err
		}
		if cq := ch.fired(b[:n]); cq != nil {
			return cq, nil
		}
	}
}

// fired returns the queue that an event is about, or nil if it is closed.
func (ch *CompChannel) fired(b []byte) driver.CQ {
	if len(b) != compEventSize {
		return nil
	}
	cq, _ := ch.c.tracked(binary.NativeEndian.Uint64(b)).(driver.CQ)
	if n, ok := cq.(notified); ok {
		n.Notified()
	}
	return cq
}

// WaitThread implements driver.ThreadWaiter.
func (ch *CompChannel) WaitThread() (driver.CQ, error) {
	for {
		if cq := ch.next(); cq != nil {
			return cq, nil
		}
		n, err := ch.e.WaitThread(ch.record[:])
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return ch.next(), nil
		}
		if cq := ch.fired(ch.record[:n]); cq != nil {
			return cq, nil
		}
	}
}

// Interrupt implements driver.ThreadWaiter.
func (ch *CompChannel) Interrupt() { ch.e.Interrupt() }

// Close implements driver.CompChannel.
func (ch *CompChannel) Close() error {
	ch.c.chanMu.Lock()
	delete(ch.c.channels, ch)
	ch.c.chanMu.Unlock()
	return ch.e.Close()
}
