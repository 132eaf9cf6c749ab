package netlink

import (
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A Wait ends at its deadline, and with the Listener.
func TestListenerEnds(t *testing.T) {
	l, err := Listen(unix.NETLINK_ROUTE, unix.RTMGRP_IPV4_MROUTE) // which nobody changes
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Wait(time.Now().Add(time.Millisecond)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("at the deadline: %v", err)
	}
	ended := make(chan error)
	go func() { ended <- l.Wait(time.Time{}) }()
	time.Sleep(time.Millisecond)
	l.Close()
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}
