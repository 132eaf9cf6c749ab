package mlx5emu

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// An engine is what moves a device's data. Its buffers are used with the device's mu held.
type engine struct {
	stopping atomic.Bool
	done     chan struct{} // closed when the goroutine has ended; nil without one

	wqe   [maxWQE + bbSize]byte
	send  sendWQE
	sges  []ib.SGE
	wrs   [1]ib.SendWR
	bind  ib.BindMW
	frame [maxFrame]byte
	slot  [nextSegSize + 1<<maxRQStride]byte // the receive that a frame goes to
	segs  []dataSeg
	wcs   [64]ib.WC
	later []*qp // to be put into the error state
}

// How much one step does for one queue, so that none keeps the others waiting.
const (
	sendBudget = 64
	recvBudget = 256
)

// start starts the goroutine, if the device has one.
func (d *Device) start() {
	if d.cfg.Manual {
		return
	}
	d.engine.done = make(chan struct{})
	go d.run()
}

func (d *Device) stop() {
	d.engine.stopping.Store(true)
	if d.engine.done != nil {
		<-d.engine.done
	}
}

// run steps until the device is closed. It has nobody to wake it, as doorbells are stores to memory: so it looks again and again, less
// often the longer nothing happens.
func (d *Device) run() {
	defer close(d.engine.done)
	const shortest, longest = 20 * time.Microsecond, time.Millisecond
	const patience = 200 // steps without a pause
	idle, pause := 0, shortest
	for !d.engine.stopping.Load() {
		some, waits := d.step()
		switch {
		case some:
			idle, pause = 0, shortest
			runtime.Gosched() // or a client that spins on our processor would not see it
		case waits:
			time.Sleep(shortest)
		case idle < patience:
			idle++
			runtime.Gosched()
		default:
			time.Sleep(pause)
			pause = min(pause*5/4, longest)
		}
	}
}

// Step looks once at everything that the client and its peers may have changed, and does what there is to do; it reports whether there
// was anything. With Config.Manual, a client's request that involves no other process is done when it has returned false. It never
// waits.
func (d *Device) Step() bool {
	some, _ := d.step()
	return some
}

// step is Step. waits: the software NIC has requests that wait for a peer, and must be tried again, or events wait for their time.
func (d *Device) step() (some, waits bool) {
	d.mu.Lock()
	waits = d.nic.Progress()
	hasty := false
	for _, c := range d.order {
		rang, h := c.look()
		some, hasty = rang || some, h || hasty
	}
	if hasty {
		d.mu.Unlock()
		eachDevice(d, (*Device).readRecvs)
		d.mu.Lock()
		for _, c := range d.order { // and all of this device, as work does one after the other
			c.readRecvs()
		}
	}
	for _, c := range d.order {
		some = c.readRecvs() || some
	}
	for _, c := range d.order {
		some = c.work() || some
	}
	some = d.receiveFrames() || some
	some = d.collect() || some
	for _, c := range d.order {
		ripe, later := c.ripen()
		some, waits = ripe || some, later || waits
	}
	some = d.asyncEvents() || some
	later := d.engine.later
	d.engine.later = nil
	d.mu.Unlock()
	for _, n := range later {
		if n.toError() {
			some = true
		} else {
			waits = true
		}
	}
	return some, waits
}

// look takes a client's doorbells. It reports whether there were any, and whether some are for hasty queue pairs. Called with dev.mu
// held, as those below.
func (c *Context) look() (some, hasty bool) {
	for id := range c.uarIDs {
		u := c.uars[uint32(id)]
		if u == nil {
			continue
		}
		sends, arms := c.rings(u, func(b *doorbell) { c.dev.traceDoorbell(u, b) }), c.arms(u)
		some = some || sends || arms
		if sends {
			for _, n := range c.qps {
				if n.uar == u {
					n.rung = true
					hasty = hasty || n.hasty
				}
			}
		}
	}
	return some, hasty
}

// work passes a client's events on, and sends what it has posted.
func (c *Context) work() (some bool) {
	if c.async != nil {
		c.async.flush()
	}
	for _, ch := range c.channels {
		ch.flush()
	}
	for _, n := range c.qps {
		if n.rung && !n.frozen {
			some = n.fetchSends() || some
		}
	}
	return some
}

func (c *Context) readRecvs() (some bool) {
	for _, n := range c.srqs {
		some = n.fetch() || some
	}
	for _, n := range c.qps {
		some = n.fetchRecvs() || some
	}
	return some
}

// readRecvs reads the receive queues of all clients of a device. A device reads them when a message comes, but software NICs of the
// same process do not ask for it: so before a hasty queue pair sends, all devices of this process look.
func (d *Device) readRecvs() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.order {
		c.readRecvs()
	}
}

// The devices of this process.
var (
	devicesMu sync.Mutex
	devices   []*Device
)

func (d *Device) register() {
	devicesMu.Lock()
	defer devicesMu.Unlock()
	devices = append(slices.Clone(devices), d)
}

func (d *Device) unregister() {
	devicesMu.Lock()
	defer devicesMu.Unlock()
	devices = slices.DeleteFunc(slices.Clone(devices), func(o *Device) bool { return o == d })
	forgetPort(d)
}

// eachDevice calls f for every device but one.
func eachDevice(but *Device, f func(*Device)) {
	devicesMu.Lock()
	all := devices
	devicesMu.Unlock()
	for _, d := range all {
		if d != but {
			f(d)
		}
	}
}

// raise adds an asynchronous event about an object to the client's.
func (c *Context) raise(about object, user uint64, count *uint32, t ib.EventType) {
	if c.async == nil {
		return
	}
	*count++
	b := make([]byte, maxRecord)
	native.PutUint64(b, user)
	native.PutUint32(b[8:], uint32(t))
	c.async.send(b, about)
}

// asyncEvents passes on what the software NIC has to say of queue pairs, shared receive queues and addresses.
func (d *Device) asyncEvents() (some bool) {
	for {
		ev, err := d.nic.AsyncEvent(alreadyOver)
		if err != nil {
			return some
		}
		some = true
		switch {
		case ev.Type == ib.EventGIDChange:
			select {
			case d.gidsChanged <- struct{}{}:
			default:
			}
		case ev.QP != nil:
			if n := d.qps[uint32(ev.QP.QPN())]; n != nil && driver.QP(n.soft) == ev.QP && !(n.frozen && ev.Type == ib.EventLastWQEReached) {
				n.c.raise(n, n.user, &n.events, ev.Type)
			}
		case ev.SRQ != nil:
			for _, c := range d.order {
				for _, n := range c.srqs {
					if n.soft == ev.SRQ {
						c.raise(n, n.user, &n.events, ev.Type)
					}
				}
			}
		}
	}
}

// alreadyOver is a context that waits for nothing.
var alreadyOver = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()
