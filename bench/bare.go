package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// What the kernel takes of a latency: two programs that pass a datagram of as many bytes back and forth, each by send and by
// receive in a loop, and do nothing else. No way through a UDP socket is shorter.

const (
	bareName = "bare sockets lat 64 B"

	bareBytes = 12 + 64 + 4 // BTH, payload, and invariant CRC: UDP's payload of a SEND of 64 bytes
)

// netBare is one run of it between the namespaces.
type netBare struct{ iter int }

// bareArgs are what the client is told.
type bareArgs struct {
	From, To string // its address, the server's address and port
	Iter     int
}

func (m netBare) run(*config) (values, error) {
	server, err := start("bare-server", struct{}{})
	if err != nil {
		return nil, err
	}
	defer server.stop()
	a := bareArgs{From: network.client, Iter: m.iter}
	if err := server.expect("addr", &a.To, 10*time.Second); err != nil {
		return nil, err
	}
	client, err := start("bare-client", a)
	if err != nil {
		return nil, err
	}
	defer client.stop()
	var v values
	err = client.expect("bare", &v, time.Minute)
	return v, err
}

// bareSocket has a UDP socket at an address.
func bareSocket(at netip.AddrPort) (fd int, err error) {
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
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
func bareServer(json.RawMessage) error {
	runtime.LockOSThread()
	host, err := netip.ParseAddr(listenHost())
	if err != nil {
		return err
	}
	fd, err := bareSocket(netip.AddrPortFrom(host, 0))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	at, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	say("addr", netip.AddrPortFrom(host, uint16(at.(*unix.SockaddrInet4).Port)).String())
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
	runtime.LockOSThread()
	var a bareArgs
	if err := json.Unmarshal(args, &a); err != nil {
		return err
	}
	from, err1 := netip.ParseAddr(a.From)
	to, err2 := netip.ParseAddrPort(a.To)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	fd, err := bareSocket(netip.AddrPortFrom(from, 0))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
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
