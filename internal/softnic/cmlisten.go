package softnic

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/cm"
)

// defaultBacklog is how many requests wait if the program does not say.
const defaultBacklog = 128

// A cmListener takes requests. It implements driver.CMListener, and cm.Service for each of the ports that it listens at.
type cmListener struct {
	nic     *NIC
	addr    netip.AddrPort
	ports   []*netPort
	backlog int
	some    chan struct{} // there are requests
	closed  chan struct{}

	mu    sync.Mutex // a leaf
	queue []*cmConn
	over  bool
}

// CMListen implements driver.ConnManager. On an unspecified address it listens at those addresses of the host that there are now,
// and at which this NIC has the UDP port.
func (n *NIC) CMListen(addr netip.AddrPort, backlog int) (driver.CMListener, error) {
	if n.isClosed() {
		return nil, driver.ErrClosed
	}
	if backlog <= 0 {
		backlog = defaultBacklog
	}
	a := addr.Addr().Unmap()
	l := &cmListener{nic: n, backlog: min(backlog, 1<<16), some: make(chan struct{}, 1), closed: make(chan struct{})}
	at := []netip.Addr{a}
	if !a.IsValid() || a.IsUnspecified() {
		at = n.gids.addresses(!a.Is4(), true)
	}
	err := fmt.Errorf("%w: the host has no addresses", driver.ErrUnreachable)
	for _, a := range at {
		var p *netPort
		if p, _, err = n.cmPort(a); err == nil {
			l.ports = append(l.ports, p)
		}
	}
	if len(l.ports) == 0 {
		return nil, err
	}
	port, err := l.bind(addr.Port())
	if err != nil {
		return nil, err
	}
	l.addr = netip.AddrPortFrom(a, port)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listeners = append(n.listeners, l)
	return l, nil
}

// bind has all ports' connection managers listen on one port, and returns it.
func (l *cmListener) bind(port uint16) (uint16, error) {
	any := port == 0
	for range 1000 {
		if any {
			l.ports[0].manage(func(e *cm.Engine, _ time.Duration) error {
				port = e.FreePort()
				return nil
			})
			if port == 0 {
				break
			}
		}
		var err error
		for i, p := range l.ports {
			if err = p.manage(func(e *cm.Engine, _ time.Duration) error { return e.Listen(port, l) }); err != nil {
				l.unbind(l.ports[:i], port)
				break
			}
		}
		if err == nil || !any || !errors.Is(err, cm.ErrPortInUse) {
			return port, err
		}
	}
	return 0, cm.ErrPortInUse
}

func (l *cmListener) unbind(from []*netPort, port uint16) {
	for _, p := range from {
		p.manage(func(e *cm.Engine, _ time.Duration) error {
			e.Unlisten(port)
			return nil
		})
	}
}

// Addr implements driver.CMListener.
func (l *cmListener) Addr() netip.AddrPort { return l.addr }

// Request implements cm.Service. Called with a port's mu held.
func (l *cmListener) Request(c *cm.Conn) (cm.Handler, roce.RejectReason) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over || len(l.queue) == l.backlog {
		return nil, roce.RejectNoResources
	}
	i := slices.IndexFunc(l.ports, func(p *netPort) bool { return p.sock.Local().Addr() == c.LocalAddr().Addr() })
	n := newCMConn(l.nic, l.ports[i])
	n.c, n.local, n.remote, n.listener = c, c.LocalAddr(), c.RemoteAddr(), l
	l.queue = append(l.queue, n)
	l.signal()
	return n, 0
}

func (l *cmListener) signal() {
	select {
	case l.some <- struct{}{}:
	default:
	}
}

// drop takes a request away whose peer has given up. Called with a port's mu held.
func (l *cmListener) drop(n *cmConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = slices.DeleteFunc(l.queue, func(x *cmConn) bool { return x == n })
}

// next returns the request that has waited longest; nil: there is none.
func (l *cmListener) next() (*cmConn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return nil, net.ErrClosed
	}
	if len(l.queue) == 0 {
		return nil, nil
	}
	n := l.queue[0]
	l.queue = slices.Delete(l.queue, 0, 1)
	if len(l.queue) > 0 {
		l.signal() // for others who wait
	}
	return n, nil
}

// Accept implements driver.CMListener.
func (l *cmListener) Accept(ctx context.Context) (driver.CMRequest, error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n, err := l.next()
		if n != nil || err != nil {
			return (*cmRequest)(n), err
		}
		select {
		case <-l.some:
		case <-l.closed:
		case <-ctx.Done():
		}
	}
}

// Close implements driver.CMListener.
func (l *cmListener) Close() error {
	l.unbind(l.ports, l.addr.Port())
	l.mu.Lock()
	queue := l.queue
	was := l.over
	l.queue, l.over = nil, true
	l.mu.Unlock()
	if was {
		return net.ErrClosed
	}
	close(l.closed)
	for _, n := range queue {
		n.abandon()
	}
	l.nic.mu.Lock()
	defer l.nic.mu.Unlock()
	l.nic.listeners = slices.DeleteFunc(l.nic.listeners, func(x *cmListener) bool { return x == l })
	return nil
}
