package softnic

import (
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/netlink"
)

const (
	// settled is how long the system's news are waited for to be complete: an address that is replaced, or a device that is made, is
	// announced in many messages.
	settled = 20 * time.Millisecond
	// followRetry is how long after the system could not be listened to that is tried again. Until then it is asked as often.
	followRetry = time.Second
)

// followNet has the NIC notice what becomes of the host's addresses by itself, from the first time on that somebody has use for it.
// Without, the table of GIDs is looked at when it is asked for.
func (n *NIC) followNet() {
	if n.sim != nil || n.following.Load() {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed || n.following.Load() {
		return
	}
	n.following.Store(true)
	f := newFollower(func() (announcer, error) {
		return netlink.Listen(unix.NETLINK_ROUTE, unix.RTMGRP_LINK|unix.RTMGRP_IPV4_IFADDR|unix.RTMGRP_IPV6_IFADDR)
	}, n.lookAtNet)
	n.unfollow = f.end
}

// An announcer is a netlink.Listener, but in tests.
type announcer interface {
	Wait(deadline time.Time) error
	Close() error
}

// A follower looks at the host's addresses whenever something is announced. It goes on until end, also where there is no announcer, or
// none any more: a process may have no descriptor left for a while.
type follower struct {
	listen func() (announcer, error)
	look   func(now time.Time) (next time.Time) // lookAtNet
	over   chan struct{}
	ended  chan struct{}

	mu sync.Mutex
	a  announcer // nil: there is none
}

// newFollower returns one that listens already, if it can.
func newFollower(listen func() (announcer, error), look func(time.Time) time.Time) *follower {
	f := &follower{listen: listen, look: look, over: make(chan struct{}), ended: make(chan struct{})}
	f.open()
	go f.run()
	return f
}

// open opens an announcer, if it can, and there is to be one.
func (f *follower) open() {
	a, err := f.listen()
	if err != nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-f.over:
		a.Close()
	default:
		f.a = a
	}
}

func (f *follower) run() {
	defer close(f.ended)
	var next time.Time
	for f.wait(next) {
		next = f.look(time.Now())
	}
}

// wait waits until there may be something new to look at, or until the deadline; false: end was called.
func (f *follower) wait(deadline time.Time) bool {
	f.mu.Lock()
	a := f.a
	f.mu.Unlock()
	if a != nil {
		switch err := a.Wait(deadline); {
		case err == nil:
			time.Sleep(settled)
			return true
		case errors.Is(err, os.ErrDeadlineExceeded):
			return true
		}
		a.Close()
		f.mu.Lock()
		f.a = nil
		f.mu.Unlock()
	}
	select {
	case <-f.over:
		return false
	case <-time.After(followRetry):
		f.open()
		return true
	}
}

// end ends it, and returns when it has ended.
func (f *follower) end() {
	close(f.over)
	f.mu.Lock()
	if f.a != nil {
		f.a.Close()
	}
	f.mu.Unlock()
	<-f.ended
}
