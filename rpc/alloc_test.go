package rpc

import (
	"context"
	"testing"

	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// Raw calls allocate nothing, on either side: both are in this process, and both are counted.
func TestAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	testutil.CheckLeaks(t)
	r := realRig(t, nil, nil)
	ctx := context.Background()
	withDeadline := ctxFor(t)
	check := func([]byte) error { return nil }
	q, err := r.cl.NewQueue(32)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	collect := func(_ uint64, _ []byte, err error) {
		if err != nil {
			t.Error(err)
		}
	}
	small, large := pattern(64), pattern(4000)
	in, out := wrapperspb.Int64(1), new(wrapperspb.Int64Value)
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name string
		max  float64
		call func()
	}{
		{"inline", 0, func() { must(r.cl.CallRaw(ctx, mEcho, small, check)) }},
		{"inline with a deadline", 0, func() { must(r.cl.CallRaw(withDeadline, mEcho, small, check)) }},
		{"inline, 4000 bytes", 0, func() { must(r.cl.CallRaw(ctx, mEcho, large, check)) }},
		{"worker", 0, func() { must(r.cl.CallRaw(ctx, mEchoSlow, small, check)) }},
		{"worker, 4000 bytes", 0, func() { must(r.cl.CallRaw(ctx, mEchoSlow, large, check)) }},
		{"in place", 0, func() {
			must(r.cl.CallFunc(ctx, mEcho, len(small), func(b []byte) error { copy(b, small); return nil }, check))
		}},
		{"queue", 0, func() {
			for tag := range uint64(32) {
				must(q.Start(ctx, mEcho, small, tag))
			}
			for q.Len() > 0 {
				_, err := q.Wait(ctx, collect)
				must(err)
			}
		}},
		// The handler's context.
		{"typed, scalars", 1, func() { must(r.cl.CallMethod(ctx, 101, in, out)) }},
		// Here: two messages, and the response's string. There: the context, two messages, and their strings.
		{"typed, strings", 8, func() {
			must(r.cl.Call(ctx, "test.Strings/Upper", wrapperspb.String("hello"), wrapperspb.String("")))
		}},
	} {
		for range 200 { // warm-up: slots, workers, pools
			tc.call()
		}
		if n := testing.AllocsPerRun(500, tc.call); n > tc.max {
			t.Errorf("%s: %v allocations, want at most %v", tc.name, n, tc.max)
		} else {
			t.Logf("%s: %v allocations", tc.name, n)
		}
	}
}
