package verbs

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"weak"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/life"
	"github.com/ringside-rdma/ringside/internal/remedy"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Context is an open device. Contexts of one device are independent of each other: objects of one cannot be used
// with another's. A Context is safe for concurrent use.
type Context struct {
	life   life.Node
	drv    driver.Context
	prog   driver.Progresser // nil if the device needs no help
	choice Choice

	attrMu sync.Mutex
	attr   *ib.DeviceAttr // as first queried: a device's limits do not change while it is open

	objMu   sync.Mutex
	objects map[any]func() any // what the provider made -> the public object, for asynchronous events
}

func openDevice(d driver.Device, ch Choice) (*Context, error) {
	ch.Device = infoOf(d)
	drv, err := d.Open()
	if err != nil {
		return nil, opErr("open_device", ch.Device.Name, err)
	}
	c := &Context{drv: drv, choice: ch, objects: map[any]func() any{}}
	c.prog, _ = drv.(driver.Progresser)
	life.Watch(c, &c.life, "verbs.Context", c.Name())
	return c, nil
}

// usable returns why a device that can be opened is still not worth choosing.
func (c *Context) usable() error {
	a, err := c.QueryDevice()
	if err != nil {
		return err
	}
	err = errors.New("it has no port")
	for p := 1; p <= a.Ports; p++ {
		pa, perr := c.QueryPort(uint8(p))
		switch {
		case perr != nil:
			err = perr
		case pa.State == ib.PortActive:
			return nil
		default:
			err = fmt.Errorf("no port is active: port %d is %s", p, pa.State)
		}
	}
	return err
}

// Choice returns which device this is, and why no better one was opened.
func (c *Context) Choice() Choice { return c.choice }

// Name returns the device's name, such as "soft0".
func (c *Context) Name() string { return c.choice.Device.Name }

// Provider returns the short name of the device's provider, such as "soft".
func (c *Context) Provider() string { return c.choice.Device.Provider }

// Tier returns what kind of device it is.
func (c *Context) Tier() Tier { return c.choice.Device.Tier }

func (c *Context) err(op string, err error) error { return opErr(op, c.Name(), err) }

// QueryDevice returns the device's attributes and limits. They are asked for once.
func (c *Context) QueryDevice() (ib.DeviceAttr, error) {
	c.attrMu.Lock()
	defer c.attrMu.Unlock()
	if c.attr == nil {
		a, err := c.drv.QueryDevice()
		if err != nil {
			return ib.DeviceAttr{}, c.err("query_device", err)
		}
		c.attr = &a
	}
	return *c.attr, nil
}

// QueryPort returns a port's attributes; ports count from 1.
func (c *Context) QueryPort(port uint8) (ib.PortAttr, error) {
	a, err := c.drv.QueryPort(port)
	return a, c.err("query_port", err)
}

// GIDs returns the used entries of a port's GID table, ordered by index.
func (c *Context) GIDs(port uint8) ([]ib.GIDEntry, error) {
	g, err := c.drv.GIDs(port)
	return g, c.err("query_gid", err)
}

// GID returns the entry of a port's GID table at index. It fails if the slot is empty.
func (c *Context) GID(port uint8, index int) (ib.GID, error) {
	gids, err := c.GIDs(port)
	if err != nil {
		return ib.GID{}, err
	}
	for i := range gids {
		if gids[i].Index == index {
			return gids[i].GID, nil
		}
	}
	return ib.GID{}, c.err("query_gid", errors.New(remedy.NoGIDAt(port, index, gids, c.choice.Device.NetDevs)))
}

// CheckReach returns by which path a peer's GID can be reached, such as "inproc" or "shm", or why it cannot: the error
// then matches ErrUnreachable. It may block until ctx ends. Devices that find out only by connecting answer
// errors.ErrUnsupported.
func (c *Context) CheckReach(ctx context.Context, gid ib.GID) (path string, err error) {
	r, ok := c.drv.(driver.ReachChecker)
	if !ok {
		return "", c.err("check_reach", errors.ErrUnsupported)
	}
	path, err = r.CheckReach(ctx, gid)
	return path, c.err("check_reach", err)
}

// Progress gives the device's software a chance to do pending work, and reports whether there was any. It never blocks.
// Polling loops call it when they have found nothing; for devices that work by themselves it does nothing.
func (c *Context) Progress() bool { return c.prog != nil && c.prog.Progress() }

// Removed returns a channel that is closed when the device is known to have gone: it was unplugged, its link was deleted, its driver was
// unloaded. Whatever waits for the device ends with ErrDeviceRemoved, and what begins afterwards fails with that; what exists can only be
// closed, and the kernel may wait for that. The channel is the same with every call, any number of goroutines may wait for it, and Close
// does not close it. It is nil for devices that cannot go, such as the software NIC. See also ib.EventDeviceFatal, of which AsyncEvent
// tells one caller.
func (c *Context) Removed() <-chan struct{} {
	if r, ok := c.drv.(driver.Remover); ok {
		return r.Gone()
	}
	return nil
}

// Close closes the device. It fails with ErrBusy while anything made from it is open. AsyncEvent calls in progress end
// with net.ErrClosed.
func (c *Context) Close() error { return c.err("close_device", c.life.Close(c.drv.Close)) }

// Driver is for the other packages of this module.
func (c *Context) Driver() driver.Context { return c.drv }

// Life is for the other packages of this module: what they make from the context becomes its child.
func (c *Context) Life() *life.Node { return &c.life }

// track remembers that obj stands for what the provider made as drv, without keeping obj reachable.
func track[T any](c *Context, drv any, obj *T) {
	w := weak.Make(obj)
	c.objMu.Lock()
	c.objects[drv] = func() any {
		if p := w.Value(); p != nil {
			return p
		}
		return nil
	}
	c.objMu.Unlock()
}

func (c *Context) untrack(drv any) {
	c.objMu.Lock()
	delete(c.objects, drv)
	c.objMu.Unlock()
}

// object returns what was tracked for drv, or nil if that is closed or garbage.
func (c *Context) object(drv any) any {
	c.objMu.Lock()
	f := c.objects[drv]
	c.objMu.Unlock()
	if f == nil {
		return nil
	}
	return f()
}

// Track is for the other packages of this module: asynchronous events about drv carry obj, which is not kept reachable.
// The caller calls the result when obj is closed.
func Track[T any](c *Context, drv any, obj *T) (untrack func()) {
	track(c, drv, obj)
	return func() { c.untrack(drv) }
}
