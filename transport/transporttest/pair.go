// Package transporttest connects two transport.Conns within the test's process, for the tests of rpc and of programs
// that use package transport. They go over the software NIC, which needs no hardware and no privileges, or over the device
// that RINGSIDE_DEVICE names.
package transporttest

import (
	"cmp"
	"context"
	"os"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs"
)

// Device is the device that pairs are made on: what RINGSIDE_DEVICE says, or soft0.
var Device = cmp.Or(os.Getenv(verbs.EnvDevice), "soft0")

// Context opens Device for the length of the test.
func Context(tb testing.TB) *verbs.Context {
	tb.Helper()
	vctx, err := verbs.Open(Device)
	if err != nil {
		tb.Fatalf("open %s: %v", Device, err)
	}
	tb.Cleanup(func() {
		if err := vctx.Close(); err != nil {
			tb.Errorf("close %s: %v", Device, err)
		}
	})
	return vctx
}

// Pair returns two connected Conns, each with a poller of its own; a was dialled, b accepted. cfg (nil for the defaults) is
// used for both; unless it names a device, a context or a poller, both are on Device. They are closed when the test ends.
func Pair(tb testing.TB, cfg *transport.Config) (a, b *transport.Conn) {
	tb.Helper()
	return PairConfig(tb, cfg, cfg)
}

// PairConfig is Pair with a Config for each side.
func PairConfig(tb testing.TB, acfg, bcfg *transport.Config) (a, b *transport.Conn) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	l, err := transport.Listen(ctx, "127.0.0.1:0", onDevice(bcfg))
	if err != nil {
		tb.Fatalf("listen: %v", err)
	}
	defer l.Close()
	a, b = Connect(tb, l, onDevice(acfg))
	return a, b
}

func onDevice(cfg *transport.Config) *transport.Config {
	c := transport.Config{}
	if cfg != nil {
		c = *cfg
	}
	if c.Device == "" && c.Context == nil && c.Poller == nil {
		c.Device = Device
	}
	if c.HandshakeTimeout == 0 {
		c.HandshakeTimeout = 30 * time.Second // a test is about something else, and its machine may be slow
	}
	return &c
}

// Connect dials l, accepts, and returns both ends. They are closed when the test ends.
func Connect(tb testing.TB, l *transport.Listener, cfg *transport.Config) (a, b *transport.Conn) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	type result struct {
		c   *transport.Conn
		err error
	}
	ch := make(chan result, 1)
	go func() {
		c, err := l.Accept(ctx)
		ch <- result{c, err}
	}()
	a, err := transport.Dial(ctx, l.Addr().String(), cfg)
	if err != nil {
		cancel() // ends Accept
		<-ch
		tb.Fatalf("dial: %v", err)
	}
	tb.Cleanup(func() { a.Close() })
	r := <-ch
	if r.err != nil {
		tb.Fatalf("accept: %v", r.err)
	}
	tb.Cleanup(func() { r.c.Close() })
	return a, r.c
}
