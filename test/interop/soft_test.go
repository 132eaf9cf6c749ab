package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// sizes are the messages that are exchanged: inline, a page, many packets. A datagram is one packet.
func sizes(s service) []int {
	if s == ud {
		return []int{1, 4096}
	}
	return []int{1, 4096, 65536}
}

// eachRun calls fn for every service, polling and with events, and every size.
func eachRun(t *testing.T, fn func(t *testing.T, o pingPong)) {
	for _, s := range []service{rc, uc, ud, srq} {
		for _, events := range []bool{false, true} {
			for _, size := range sizes(s) {
				o := defaults(s)
				o.events, o.size, o.check = events, size, true
				o.iters = 60
				if size > 4096 {
					o.iters, o.rxDepth, o.mtu = 20, 40, 4096
				}
				how := "poll"
				if events {
					how = "events"
				}
				t.Run(fmt.Sprintf("%s/%s/%d", s, how, size), func(t *testing.T) { fn(t, o) })
			}
		}
	}
}

// local returns a listener on a free port of this host.
func local(t *testing.T) (net.Listener, int) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l, l.Addr().(*net.TCPAddr).Port
}

// both runs the two sides and fails the test unless both succeed.
func both(t *testing.T, server, client func() (fmt.Stringer, error)) {
	t.Helper()
	end := make(chan error, 1)
	go func() {
		r, err := server()
		if err == nil {
			t.Log("server:", r)
		}
		end <- err
	}()
	r, err := client()
	if err != nil {
		t.Errorf("client: %v", err)
	} else {
		t.Log("client:", r)
	}
	if err := <-end; err != nil {
		t.Errorf("server: %v", err)
	}
}

// together returns what two sides call before they close: neither closes before the other is done.
func together(ctx context.Context) (a, b func()) {
	doneA, doneB := make(chan struct{}), make(chan struct{})
	meet := func(mine, theirs chan struct{}) func() {
		return func() {
			close(mine)
			select {
			case <-theirs:
			case <-ctx.Done():
			}
		}
	}
	return meet(doneA, doneB), meet(doneB, doneA)
}

func TestPingPongOnSoftwareNIC(t *testing.T) {
	eachRun(t, func(t *testing.T, o pingPong) {
		ctx := patient(t)
		o.device, o.gidIndex = "soft0", 0
		server, client := o, o
		server.listener, client.port = local(t)
		client.server = "127.0.0.1"
		server.beforeClose, client.beforeClose = together(ctx)
		both(t, func() (fmt.Stringer, error) { return server.run(ctx) }, func() (fmt.Stringer, error) { return client.run(ctx) })
	})
}

func TestIntegrityOnSoftwareNIC(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) {
			ctx := patient(t)
			server, client := integrityDefaults(), integrityDefaults()
			server.device, server.gidIndex = "soft0", 0
			client.device, client.gidIndex = "soft0", 0
			server.listener, client.port = local(t)
			client.server, client.seed, client.rounds = "127.0.0.1", seed, 60
			server.events, client.events = seed&1 != 0, seed&2 != 0
			both(t, func() (fmt.Stringer, error) { return server.run(ctx) }, func() (fmt.Stringer, error) { return client.run(ctx) })
		})
	}
}

// The commands themselves, in two processes.
func TestCommandsBetweenProcesses(t *testing.T) {
	for _, args := range []string{
		"rc -n 200", "uc -e -s 30000 -n 50", "ud -s 100 -n 200", "srq -e -n 100 -q 5",
		"integrity --rounds 30", "integrity -e --rounds 30 --seed 9",
	} {
		t.Run(args, func(t *testing.T) {
			port := freePort(t)
			f := append(strings.Fields(args), "-d", "soft0", "-g", "0", "-p", strconv.Itoa(port))
			if f[0] != "integrity" {
				f = append(f, "-c")
			}
			server := testutil.StartChild(t, "interop", f...)
			var out, errs strings.Builder
			code := run(patient(t), append(f, "localhost"), &out, &errs)
			if code != 0 || !strings.Contains(out.String(), "soft0: ") {
				t.Errorf("client: exit status %d: %s%s", code, out.String(), errs.String())
			}
			if err := server.Wait(); err != nil {
				t.Errorf("server: %v", err)
			}
		})
	}
}

// freePort returns a port that nothing listens on now. Programs that take no listener need one. It is none of those that the system gives
// out by itself, from 32768 on: tests beside this one would get it for a connection before the program listens there.
func freePort(t *testing.T) int {
	t.Helper()
	for range 1000 {
		port := 20000 + rand.IntN(12000)
		if l, err := net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(port))); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return 0
}
