package transport_test

import (
	"bytes"
	"context"
	"testing"

	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
)

func TestSendRecv(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	ctx := t.Context()
	for _, n := range []int{0, 1, 64, 247, 248, 249, 4096, 8192, 8193, 1 << 20} {
		msg := bytes.Repeat([]byte{byte(n), byte(n >> 8), 7}, n/3+1)[:n]
		if err := a.Send(ctx, msg); err != nil {
			t.Fatalf("send %d: %v", n, err)
		}
		err := b.Recv(ctx, func(m *transport.Message) error {
			if !bytes.Equal(m.Bytes(), msg) {
				t.Errorf("message of %d bytes differs", n)
			}
			return nil
		})
		if err != nil {
			t.Fatalf("recv %d: %v", n, err)
		}
	}
	_ = context.Background
}
