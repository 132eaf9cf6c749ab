package conformance

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/internal/softnic/simnet"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

const (
	// patience is how long a side waits for what must happen. It only bounds the time to a failure.
	patience = 2 * testutil.Patience
	// quiet is how long a case looks for what must not happen. A slow machine can hide a failure this way, not invent one.
	quiet = 15 * time.Millisecond
)

// handle names an object of a side.
type handle int

// host does what a script asks for: it holds the objects of one side.
type host struct {
	mu      sync.Mutex
	ctx     *verbs.Context
	sim     *simnet.Network // that the device is on; nil: the device is real
	next    handle
	objects map[handle]object
	raw     map[handle][]byte // memory of registered slices, which outlives the region
	conns   map[handle]handle // of QPs that the connection manager has connected
	before  *testutil.Snapshot
}

type object interface{ Close() error }

func newHost() *host {
	return &host{objects: map[handle]object{}, raw: map[handle][]byte{}, conns: map[handle]handle{}}
}

func (h *host) add(o object) handle {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.next++
	h.objects[h.next] = o
	return h.next
}

func get[T object](h *host, n handle) (T, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	o, ok := h.objects[n].(T)
	if !ok {
		return o, fmt.Errorf("%w: %T %d", errNotThere, o, n)
	}
	return o, nil
}

// use is for operations on one existing object.
func use[T object, R any](h *host, n handle, f func(T) (R, error)) (R, error) {
	o, err := get[T](h, n)
	if err != nil {
		var r R
		return r, err
	}
	return f(o)
}

func (h *host) context() (*verbs.Context, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ctx == nil {
		return nil, fmt.Errorf("%w: context", errNotThere)
	}
	return h.ctx, nil
}

type none struct{}

type deviceInfo struct {
	Name, Provider string
	Tier           string
	PID            int
	Attr           ib.DeviceAttr
	Port           ib.PortAttr
	GID            ib.GID
	GIDIndex       int
	Addr           netip.Addr // of its net device; not valid if it has none
	UDPPort        uint16     // where it receives, if that is not the standard port
	Net            bool       // the software NIC, over a network
}

// openArgs name a device. Net: of the software NIC, the part that meets a network, at this address; At: of another, the address that peers
// know it by, if it has several.
type openArgs struct {
	Device  string
	Net, At netip.Addr
}

var opOpen = newOp("open", func(h *host, a openArgs) (deviceInfo, error) {
	c, err := h.open(a)
	if err != nil {
		return deviceInfo{}, err
	}
	h.mu.Lock()
	h.ctx = c
	h.mu.Unlock()
	d := deviceInfo{Name: c.Name(), Provider: c.Provider(), Tier: fmt.Sprint(c.Tier()), PID: os.Getpid()}
	if d.Attr, err = c.QueryDevice(); err != nil {
		return d, err
	}
	if d.Port, err = c.QueryPort(1); err != nil {
		return d, err
	}
	best, err := c.SourceGID(1, netip.Addr{})
	if d.Net = a.Net.IsValid(); d.Net {
		if best, err = c.SourceGIDOf(1, a.Net, ib.GIDRoCEv2); err == nil {
			d.UDPPort, err = c.UDPPort(1, best.Index)
		}
	} else if a.At.IsValid() {
		best, err = c.SourceGIDOf(1, a.At, ib.GIDRoCEv2)
	}
	if err != nil {
		return d, err
	}
	d.GID, d.GIDIndex = best.GID, best.Index
	if best.MTU != 0 {
		d.Port.ActiveMTU = min(d.Port.ActiveMTU, best.MTU)
	}
	d.Addr = addrOf(c.Choice().Device.NetDevs)
	return d, nil
})

// addrOf is the first IPv4 address of net devices.
func addrOf(netdevs []string) netip.Addr {
	for _, name := range netdevs {
		dev, err := net.InterfaceByName(name)
		if err != nil {
			continue
		}
		addrs, _ := dev.Addrs()
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() {
				return p.Addr()
			}
		}
	}
	return netip.Addr{}
}

var opReach = newOp("check reach", func(h *host, g ib.GID) (string, error) {
	c, err := h.context()
	if err != nil {
		return "", err
	}
	ctx, cancel := h.timeout(patience)
	defer cancel()
	return c.CheckReach(ctx, g)
})

// opCloseAll closes what is left in reverse order of creation, so that children go before parents, then the context.
var opCloseAll = newOp("close all", func(h *host, _ none) (none, error) {
	h.mu.Lock()
	var order []handle
	for n := range h.objects {
		order = append(order, n)
	}
	c := h.ctx
	h.ctx = nil
	clear(h.raw)
	h.mu.Unlock()
	slices.Sort(order)
	slices.Reverse(order)
	var errs []error
	for _, n := range order {
		if err := closeHandle(h, n); err != nil {
			errs = append(errs, err)
		}
	}
	if c != nil {
		if err := c.Close(); err != nil {
			errs = append(errs, fmt.Errorf("context: %w", err))
		}
	}
	return none{}, errors.Join(errs...)
})

// closeConn closes the connection of a QP, if it has one.
func closeConn(h *host, q handle) error {
	h.mu.Lock()
	conn := h.conns[q]
	delete(h.conns, q)
	h.mu.Unlock()
	if conn == 0 {
		return nil
	}
	if err := closeHandle(h, conn); !errors.Is(err, errNotThere) {
		return err
	}
	return nil
}

func closeHandle(h *host, n handle) error {
	if err := closeConn(h, n); err != nil { // before its QP
		return err
	}
	o, err := get[object](h, n)
	if err != nil {
		return err
	}
	if err := o.Close(); err != nil {
		return fmt.Errorf("close %T: %w", o, err)
	}
	h.mu.Lock()
	delete(h.objects, n)
	h.mu.Unlock()
	return nil
}

var opClose = newOp("close", func(h *host, n handle) (none, error) { return none{}, closeHandle(h, n) })

// opCloseTwice closes an object twice more and keeps it: Close must be idempotent.
var opCloseTwice = newOp("close twice", func(h *host, n handle) (none, error) {
	if err := closeConn(h, n); err != nil {
		return none{}, err
	}
	o, err := get[object](h, n)
	if err != nil {
		return none{}, err
	}
	return none{}, errors.Join(o.Close(), o.Close())
})

var opCloseContext = newOp("close context", func(h *host, _ none) (none, error) {
	c, err := h.context()
	if err != nil {
		return none{}, err
	}
	return none{}, c.Close()
})

// Leak checks.

var opSnapshot = newOp("snapshot", func(h *host, _ none) (none, error) {
	h.before = testutil.TakeSnapshot()
	return none{}, nil
})

var opLeaks = newOp("leaks", func(h *host, _ none) (string, error) {
	deadline := time.Now().Add(patience / 2)
	for {
		left := h.before.Diff()
		if left == "" || time.Now().After(deadline) {
			return left, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
})

var opPD = newOp("alloc_pd", func(h *host, _ none) (handle, error) {
	c, err := h.context()
	if err != nil {
		return 0, err
	}
	pd, err := c.AllocPD()
	if err != nil {
		return 0, err
	}
	return h.add(pd), nil
})
