package softnic

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/netlink"
)

// settled is how long the system's news are waited for to be complete: an address that is replaced, or a device that is made, is
// announced in many messages.
const settled = 20 * time.Millisecond

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
	l, err := netlink.Listen(unix.NETLINK_ROUTE, unix.RTMGRP_LINK|unix.RTMGRP_IPV4_IFADDR|unix.RTMGRP_IPV6_IFADDR)
	if err != nil {
		return
	}
	ended := make(chan struct{})
	n.unfollow = func() {
		l.Close()
		<-ended
	}
	go func() {
		defer close(ended)
		var next time.Time
		for {
			switch err := l.Wait(next); {
			case err == nil:
				time.Sleep(settled)
			case !errors.Is(err, os.ErrDeadlineExceeded):
				return
			}
			next = n.lookAtNet(time.Now())
		}
	}()
}
