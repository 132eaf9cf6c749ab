package rpc

import (
	"context"
	"testing"

	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
)

// BenchmarkCost is the code of a 64-byte echo on both sides, run by one goroutine that drives both ends through one
// poller: no cache line moves between cores, and nobody waits.
func BenchmarkCost(b *testing.B) {
	vctx := transporttest.Context(b)
	p, err := transport.NewPoller(vctx, &transport.PollerConfig{Mode: transport.Busy})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := p.Close(); err != nil {
			b.Error(err)
		}
	})
	cc, sc := transporttest.Pair(b, &transport.Config{Poller: p})
	s := NewServer(nil)
	s.HandleRaw(Spec{Number: 1, Inline: true}, func(c *Call, req []byte) error { return c.ReplyBytes(req) })
	if _, err := s.attach(newConnLink(sc), sc); err != nil {
		b.Fatal(err)
	}
	cl := NewClient(cc, nil)
	ctx := context.Background()
	req := pattern(64)
	fn := func([]byte) error { return nil }
	b.ReportAllocs()
	for b.Loop() {
		if err := cl.CallRaw(ctx, 1, req, fn); err != nil {
			b.Fatal(err)
		}
	}
}
