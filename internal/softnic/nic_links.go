package softnic

import (
	"context"
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The links of a NIC, and how it comes by them.

func (n *NIC) eachLink(f func(*link)) {
	n.mu.Lock()
	list := make([]*link, 0, len(n.links))
	for _, l := range n.links {
		list = append(list, l)
	}
	n.mu.Unlock()
	for _, l := range list {
		f(l)
	}
}

func (n *NIC) dropLink(l *link) {
	n.mu.Lock()
	if n.links[l.peer] == l {
		delete(n.links, l.peer)
	}
	n.mu.Unlock()
}

// keepMapped notes a link that is down and may have memory mapped; forgetMapped, that it has not.
func (n *NIC) keepMapped(l *link) {
	n.mappedMu.Lock()
	if n.mapped == nil {
		n.mapped = map[*link]bool{}
	}
	n.mapped[l] = true
	n.mappedMu.Unlock()
}

func (n *NIC) forgetMapped(l *link) {
	n.mappedMu.Lock()
	delete(n.mapped, l)
	n.mappedMu.Unlock()
}

// dial is an attempt to reach a NIC of another process; others who want the same NIC wait for it.
type dial struct {
	done chan struct{}
	err  error
}

// linkTo returns the link to the NIC with the GID, setting it up if there is none.
func (n *NIC) linkTo(ctx context.Context, g ib.GID) (*link, error) {
	if n.sim != nil {
		return nil, fmt.Errorf("%w: a NIC on a simulated network meets others there only: use the GID at index 1", driver.ErrUnreachable)
	}
	if g.IsZero() {
		return nil, fmt.Errorf("%w: the peer's GID is zero", driver.ErrUnreachable)
	}
	for {
		n.mu.Lock()
		if n.closed {
			n.mu.Unlock()
			return nil, driver.ErrClosed
		}
		if l := n.links[g]; l != nil {
			n.mu.Unlock()
			return l, nil
		}
		if peer := lookupNIC(g); peer != nil && (!n.viaDoor || peer == n) {
			n.mu.Unlock()
			return n.linkLocal(peer)
		}
		if n.sharedE != nil {
			n.mu.Unlock()
			return nil, fmt.Errorf("%w: GID %v is not a NIC of this process, and other processes cannot be reached: %w",
				driver.ErrUnreachable, g, n.sharedE)
		}
		d := n.dials[g]
		mine := d == nil
		if mine {
			d = &dial{done: make(chan struct{})}
			n.dials[g] = d
		}
		n.mu.Unlock()
		if mine {
			l, err := n.dialShared(ctx, g)
			n.mu.Lock()
			delete(n.dials, g)
			n.mu.Unlock()
			d.err = err
			close(d.done)
			if err != nil {
				return nil, err
			}
			return l, nil
		}
		select {
		case <-d.done:
			if d.err != nil && !errors.Is(d.err, context.Canceled) && !errors.Is(d.err, context.DeadlineExceeded) {
				return nil, d.err
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// linkNow is linkTo without the wait for another process: what is not linked yet is unreachable.
func (n *NIC) linkNow(g ib.GID) (*link, error) {
	n.mu.Lock()
	l, closed := n.links[g], n.closed
	n.mu.Unlock()
	switch peer := lookupNIC(g); {
	case closed:
		return nil, driver.ErrClosed
	case l != nil:
		return l, nil
	case peer != nil && n.sim == nil && (!n.viaDoor || peer == n):
		return n.linkLocal(peer)
	}
	return nil, fmt.Errorf("%w: there is no link to GID %v yet", driver.ErrUnreachable, g)
}

// linkLocal joins two NICs of this process.
func (n *NIC) linkLocal(peer *NIC) (*link, error) {
	first, second := n, peer
	if string(peer.gid[:]) < string(n.gid[:]) {
		first, second = peer, n
	}
	first.mu.Lock()
	if second != first {
		second.mu.Lock()
		defer second.mu.Unlock()
	}
	defer first.mu.Unlock()
	if l := n.links[peer.gid]; l != nil {
		return l, nil
	}
	if n.closed {
		return nil, driver.ErrClosed
	}
	if peer.closed {
		return nil, fmt.Errorf("%w: the peer's software NIC is closed", driver.ErrUnreachable)
	}
	la, lb := localLinks(n, peer)
	n.links[peer.gid] = la
	if lb != la {
		peer.links[n.gid] = lb
	}
	return la, nil
}

// CheckReach implements driver.ReachChecker. What cannot be the GID of a NIC on this host (identify) is an address. So is what belongs to the
// site of one of this host's addresses: one of 2^40 GIDs of NICs does.
func (n *NIC) CheckReach(ctx context.Context, g ib.GID) (string, error) {
	switch address := g[0] != softGID && !g.IsZero() || n.gids.neighbour(g); {
	case address && n.sim != nil:
		return pathSim, nil
	case address:
		return pathUDP, nil // whether anybody is there shows when packets are answered
	}
	l, err := n.linkTo(ctx, g)
	if err != nil {
		return "", err
	}
	return l.path, nil
}
