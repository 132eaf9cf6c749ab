package transport_test

import (
	"bytes"
	"errors"
	"net"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// sharedPair returns what connects pairs whose accepted ends take from one small shared receive queue.
func sharedPair(t *testing.T) func() (a, b *transport.Conn) {
	t.Helper()
	p, err := transport.NewPoller(transporttest.Context(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	cfg := transport.Config{SharedReceive: true, RecvDepth: 16}
	bcfg := cfg
	bcfg.Poller = p
	return func() (a, b *transport.Conn) { return transporttest.PairConfig(t, &cfg, &bcfg) }
}

// TestSharedReceivesComeBack: however a connection ends, the receives that its messages have taken are there for the next one.
func TestSharedReceivesComeBack(t *testing.T) {
	imm := head(7, 0, 0, 5)
	for name, c := range map[string]struct {
		bad  int // messages that the protocol does not allow
		end  func(t *testing.T, b *transport.Conn)
		want error
	}{
		"ended here, not polled": {0, func(t *testing.T, b *transport.Conn) { b.Abort(nil) }, net.ErrClosed},
		"ended here, queued": {0, func(t *testing.T, b *transport.Conn) {
			testutil.Eventually(t, "all have been polled", func() bool { return b.Poller().Poll() == 0 })
			b.Abort(nil)
		}, net.ErrClosed},
		"broke the protocol": {16, func(t *testing.T, b *transport.Conn) { b.SetHandler(newEcho(t)) }, transport.ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := patience(t)
			pair := sharedPair(t)
			for range 6 { // more messages than there are receives
				a, b := pair()
				near := alloc(t, a, 8, ib.AccessLocalWrite)
				far := grant(t, b, alloc(t, b, 8, allAccess), 0, 8, ib.AccessRemoteRead).Remote()
				for i := range uint64(12) {
					if err := a.Send(ctx, pattern(40, i)); err != nil {
						t.Fatal(err)
					}
				}
				for range 4 {
					if err := a.PostRaw(imm); err != nil {
						t.Fatal(err)
					}
				}
				if err := a.Read(ctx, near.SGE(0, 8), far, 0); err != nil { // then they have arrived, though nobody polls
					t.Fatal(err)
				}
				for range c.bad {
					a.PostRaw(head(77, 0, 0, 0)) // fails once the first has ended the connection
				}
				c.end(t, b)
				select {
				case <-b.Done():
				case <-ctx.Done():
					t.Fatal("the connection has not ended")
				}
				if err := b.Err(); !errors.Is(err, c.want) {
					t.Errorf("ended with %v, want %v", err, c.want)
				}
				a.Close()
				if err := b.Close(); err != nil {
					t.Error(err)
				}
			}
			a, b := pair()
			for i := range uint64(100) {
				if err := a.Send(ctx, pattern(40, i)); err != nil {
					t.Fatal(err)
				}
				if err := b.Recv(ctx, func(m *transport.Message) error {
					if _, ok := m.Imm(); ok || !bytes.Equal(m.Bytes(), pattern(40, i)) {
						t.Errorf("message %d differs", i)
					}
					return nil
				}); err != nil {
					t.Fatalf("message %d: %v", i, err)
				}
			}
		})
	}
}
