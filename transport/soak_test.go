package transport_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"

	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
)

// On a network that loses, doubles and reorders packets, no message is lost, doubled, reordered or changed. MESSAGES=n sends more than
// the test does by itself.
func TestLossyNetwork(t *testing.T) {
	softOnly(t)
	messages := 50_000
	if testing.Short() || raceEnabled {
		messages = 5_000
	}
	if s := os.Getenv("MESSAGES"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("MESSAGES: %v", err)
		}
		messages = n
	}
	t.Setenv("RINGSIDE_SOFT_FAULTS", "loss=1%,duplicate=1%,reorder=5%,seed=1")
	a, b := transporttest.Pair(t, &transport.Config{Device: transporttest.Device, Path: transport.PathUDP})
	ctx := t.Context()
	sent := make(chan error, 1)
	go func() {
		var buf []byte
		for i := range messages {
			buf = appendNumbered(buf[:0], uint64(i))
			if err := a.Send(ctx, buf); err != nil {
				sent <- fmt.Errorf("message %d: %w", i, err)
				return
			}
		}
		sent <- nil
	}()
	var want []byte
	for i := range messages {
		want = appendNumbered(want[:0], uint64(i))
		err := b.Recv(ctx, func(m *transport.Message) error {
			if got := m.Bytes(); !slices.Equal(got, want) {
				return fmt.Errorf("%d bytes that begin with %x came, want %d that begin with %x", len(got), got[:min(16, len(got))], len(want), want[:16])
			}
			return nil
		})
		if err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
}

// appendNumbered appends message i: its number, and bytes and a length that follow from it. Few are long.
func appendNumbered(b []byte, i uint64) []byte {
	r := rand.NewPCG(i, 0)
	n := r.Uint64() % 120
	switch k := r.Uint64() % 1000; {
	case k == 0:
		n = 40_000 + r.Uint64()%60_000 // by rendezvous
	case k < 20:
		n = r.Uint64() % 5_000
	}
	b = binary.LittleEndian.AppendUint64(b, i)
	b = binary.LittleEndian.AppendUint64(b, n)
	for end := len(b) + int(n); len(b) < end; {
		b = binary.LittleEndian.AppendUint64(b, r.Uint64())
	}
	return b
}
