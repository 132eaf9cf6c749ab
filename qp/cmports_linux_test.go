package qp_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"

	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The port that the kernel chooses for a connection may be one that TCP uses, and even with the same peer's.
func TestCMTakenPorts(t *testing.T) {
	forCM(t, func(t *testing.T, here, there *cmNode, from, to netip.Addr) {
		if !must(here.ctx.QueryDevice()).Caps.Has(ib.CapCMOnly) {
			t.Skip("only iWARP's connections are TCP's")
		}
		const taken, connections = 1500, 80 // of 28,232 ports: one time in eighty, chance avoids them
		var first, last int
		if _, err := fmt.Sscan(string(must(os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"))), &first, &last); err != nil {
			t.Fatal(err)
		}
		tcp := must(net.Listen("tcp", netip.AddrPortFrom(to, 0).String()))
		addr := tcp.Addr().(*net.TCPAddr).AddrPort()
		for i := range taken {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice(), Port: first + i*(last-first)/taken}}
			if i%2 == 0 { // as the kernel's driver does: it can bind the port, and not connect. Others it cannot bind
				d.Control = func(_, _ string, c syscall.RawConn) (err error) {
					if e := c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) }); e != nil {
						return e
					}
					return err
				}
			}
			c, err := d.Dial("tcp", addr.String())
			if err != nil {
				continue // somebody has it
			}
			defer c.Close()
			peer, err := tcp.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer peer.Close()
		}
		if err := tcp.Close(); err != nil {
			t.Fatal(err)
		}
		l, err := qp.Listen(there.ctx, addr, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				r, err := l.Accept(context.Background())
				if err != nil {
					return
				}
				r.Reject(nil)
			}
		}()
		for range connections {
			q := must(here.ready())
			if _, err := q.Dial(timeout(t), netip.AddrPortFrom(from, 0), addr, qp.CMParams{}); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Fatal(err)
			}
			if err := q.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}
