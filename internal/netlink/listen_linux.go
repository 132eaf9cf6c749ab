package netlink

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Listener hears that the kernel announces something to multicast groups of a protocol. Wait is for one goroutine; Close may be
// called from any, and ends a Wait.
type Listener struct {
	f    *os.File
	conn syscall.RawConn
}

// Listen opens a Listener. groups is a mask, such as unix.RTMGRP_LINK of unix.NETLINK_ROUTE.
func Listen(protocol int, groups uint32) (*Listener, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, fmt.Errorf("netlink: no socket of protocol %d: %w", protocol, err)
	}
	f := os.NewFile(uintptr(fd), "netlink")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		f.Close()
		return nil, fmt.Errorf("netlink: groups %#x of protocol %d: %w", groups, protocol, err)
	}
	conn, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &Listener{f, conn}, nil
}

// Wait waits until something was announced, or too much to be kept, and forgets it: who wants to know what has changed looks. The
// error matches os.ErrDeadlineExceeded when the deadline (zero: none) has passed, and os.ErrClosed after Close.
func (l *Listener) Wait(deadline time.Time) error {
	if err := l.f.SetReadDeadline(deadline); err != nil {
		return err
	}
	var buf [4096]byte
	heard := false
	err := l.conn.Read(func(fd uintptr) bool {
		for {
			switch _, err := unix.Read(int(fd), buf[:]); err {
			case unix.EAGAIN:
				return heard
			case unix.EINTR:
			default: // a message, or news that some were lost
				heard = true
			}
		}
	})
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return os.ErrClosed
	}
	return err
}

// Close ends the Listener.
func (l *Listener) Close() error { return l.f.Close() }
