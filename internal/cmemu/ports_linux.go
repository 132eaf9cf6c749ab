package cmemu

import (
	"math/rand/v2"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// Who has which port, as the kernel's rdma_cm sees to it (cma.c, cma_get_port). All is called with the Manager's mu held.

// A portKey is a port of a port space.
type portKey struct {
	space uint16
	port  uint16
}

// The ports that are given to those who do not care: what the kernel's net.ipv4.ip_local_port_range is by default.
const (
	firstFree = 32768
	lastFree  = 60999
)

// takePort gives the ID the port of its address, or with 0 any.
func (m *Manager) takePort(x *id) syscall.Errno {
	if x.src.port != 0 {
		if errno := m.checkPort(x, x.reuse); errno != 0 {
			return errno
		}
		m.bindPort(x, x.src.port)
		return 0
	}
	const n = lastFree - firstFree + 1
	start := rand.IntN(n)
	for i := range n {
		p := uint16(firstFree + (start+i)%n)
		if p != m.lastPort && m.unique(x, p) {
			m.lastPort = p // a port that was just let go of is not given again at once
			m.bindPort(x, p)
			return 0
		}
	}
	return unix.EADDRNOTAVAIL
}

func (m *Manager) bindPort(x *id, port uint16) {
	x.src.port, x.bound = port, portKey{x.space, port}
	m.ports[x.bound] = append(m.ports[x.bound], x)
}

// freePort lets go of the ID's port.
func (m *Manager) freePort(x *id) {
	if x.bound == (portKey{}) {
		return
	}
	l := slices.DeleteFunc(m.ports[x.bound], func(o *id) bool { return o == x })
	if m.ports[x.bound] = l; len(l) == 0 {
		delete(m.ports, x.bound)
	}
	x.bound = portKey{}
}

// checkPort says whether the ID may have the port of its address, or, if it has it, may listen there.
func (m *Manager) checkPort(x *id, reuse bool) syscall.Errno {
	for _, o := range m.ports[portKey{x.space, x.src.port}] {
		switch {
		case o == x, reuse && o.reuse, x.afOnly && o.afOnly && x.src.family != o.src.family:
		case x.src.isAny() || o.src.isAny():
			return unix.EADDRNOTAVAIL
		case x.src.family == o.src.family && x.src.gid() == o.src.gid():
			return unix.EADDRINUSE
		}
	}
	return 0
}

// unique reports whether a connection of the ID from a port would be mistaken for none of another's.
func (m *Manager) unique(x *id, port uint16) bool {
	return !slices.ContainsFunc(m.ports[portKey{x.space, port}], func(o *id) bool {
		switch {
		case x.dst.port != 0 && o.dst.port != 0 && x.dst.port != o.dst.port:
		case !x.src.isAny() && !o.src.isAny() && x.src.gid() != o.src.gid():
		case !x.dst.isAny() && !o.dst.isAny() && x.dst.gid() != o.dst.gid():
		default:
			return true
		}
		return false
	})
}
