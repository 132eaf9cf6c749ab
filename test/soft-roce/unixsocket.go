//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Unix sockets by hand: package net would make this program link dynamically (see the package comment).

// maxSocketPath is what fits into sun_path, with its NUL.
const maxSocketPath = 107

// A listener accepts connections on a Unix socket.
type listener struct {
	f    *os.File
	path string
}

func listenUnix(path string) (*listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("the path of the socket %s is longer than %d bytes: set TMPDIR to a shorter one", path, maxSocketPath)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), path)
	if err = unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err == nil {
		err = unix.Listen(fd, 512)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return &listener{f, path}, nil
}

// accept waits for a connection. After Close it returns os.ErrClosed.
func (l *listener) accept() (*os.File, error) {
	raw, err := l.f.SyscallConn()
	if err != nil {
		return nil, err
	}
	conn := -1
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		for {
			conn, _, failed = unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			if failed != unix.EINTR && failed != unix.ECONNABORTED {
				return failed != unix.EAGAIN
			}
		}
	})
	if err = errors.Join(err, failed); err != nil {
		if conn >= 0 {
			unix.Close(conn)
		}
		return nil, fmt.Errorf("accept on %s: %w", l.path, err)
	}
	return os.NewFile(uintptr(conn), l.path), nil
}

func (l *listener) Close() error { return l.f.Close() }

func dialUnix(path string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil { // Unix sockets connect at once, or never
		unix.Close(fd)
		return nil, fmt.Errorf("connect to %s: %w", path, err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}
