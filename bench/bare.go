package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// What the kernel takes of a latency: two programs that pass a datagram of as many bytes back and forth, each by send and by
// receive in a loop, and do nothing else. No way through a UDP socket is shorter.

const (
	bareName = "bare sockets lat 64 B"

	bareBytes = 12 + 64 + 4 // BTH, payload, and invariant CRC: UDP's payload of a SEND of 64 bytes
)

// bare is one run of it.
type bare struct {
	client, server string // addresses; the server listens at the second
	pin            bool   // the client to clientCPU, the server to serverCPU
	iter           int
}

// bareArgs are what both sides are told.
type bareArgs struct {
	At   string // the address to be at
	To   string // the client: the server's address and port
	Iter int    // the client: round trips
	CPU  int    // the processor to stay on; -1: any
}

func (m bare) run(*config) (values, error) {
	c, s := bareArgs{At: m.client, Iter: m.iter, CPU: -1}, bareArgs{At: m.server, CPU: -1}
	if m.pin {
		c.CPU, s.CPU = clientCPU, serverCPU
	}
	server, err := start("bare-server", s)
	if err != nil {
		return nil, err
	}
	defer server.stop()
	if err := server.expect("addr", &c.To, 10*time.Second); err != nil {
		return nil, err
	}
	client, err := start("bare-client", c)
	if err != nil {
		return nil, err
	}
	defer client.stop()
	var v values
	err = client.expect("bare", &v, time.Minute)
	return v, err
}

// bareSocket has a UDP socket at the address of args, and the calling goroutine on a thread of its own, on the processor.
func bareSocket(args json.RawMessage) (a bareArgs, fd int, err error) {
	if err := json.Unmarshal(args, &a); err != nil {
		return a, -1, err
	}
	at, err := netip.ParseAddr(a.At)
	if err != nil {
		return a, -1, err
	}
	runtime.LockOSThread()
	if a.CPU >= 0 {
		var only unix.CPUSet
		only.Set(a.CPU)
		if err := unix.SchedSetaffinity(0, &only); err != nil {
			return a, -1, fmt.Errorf("processor %d: %w", a.CPU, err)
		}
	}
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return a, -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: at.As4()}); err != nil {
		unix.Close(fd)
		return a, -1, err
	}
	return a, fd, nil
}

// await takes the next datagram. While none has come it looks again and again, until the parent is gone: false.
func await(fd int, b []byte) (bool, error) {
	for i := 1; ; i++ {
		switch _, err := unix.Read(fd, b); {
		case err == nil:
			return true, nil
		case err != unix.EAGAIN:
			return false, err
		}
		if i%1024 == 0 {
			select {
			case <-childStdin:
				return false, nil
			default:
			}
		}
	}
}

// bareServer sends back what comes.
func bareServer(args json.RawMessage) error {
	a, fd, err := bareSocket(args)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	at, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	say("addr", net.JoinHostPort(a.At, strconv.Itoa(at.(*unix.SockaddrInet4).Port)))
	b := make([]byte, bareBytes)
	n, from, err := unix.Recvfrom(fd, b, 0)
	for ; err == unix.EAGAIN; n, from, err = unix.Recvfrom(fd, b, 0) {
		select {
		case <-childStdin: // the parent is gone
			return nil
		default:
		}
	}
	if err != nil || n != bareBytes {
		return fmt.Errorf("the first datagram has %d bytes: %v", n, err)
	}
	if err := unix.Connect(fd, from); err != nil {
		return err
	}
	for {
		if _, err := unix.Write(fd, b); err != nil {
			return err
		}
		if more, err := await(fd, b); !more || err != nil {
			return err
		}
	}
}

// bareClient measures half of a round trip.
func bareClient(args json.RawMessage) error {
	a, fd, err := bareSocket(args)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	to, err := netip.ParseAddrPort(a.To)
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil {
		return err
	}
	b, took := make([]byte, bareBytes), make([]float64, 0, a.Iter)
	for i := range a.Iter + a.Iter/20 {
		begin := time.Now()
		if _, err := unix.Write(fd, b); err != nil {
			return err
		}
		if more, err := await(fd, b); !more || err != nil {
			return err
		}
		if i >= a.Iter/20 { // warm
			took = append(took, float64(time.Since(begin).Nanoseconds())/2000)
		}
	}
	slices.Sort(took)
	say("bare", values{"p50": took[len(took)/2]})
	return nil
}
