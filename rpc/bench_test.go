package rpc

import (
	"context"
	"fmt"
	"testing"

	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Client and server share this process, and the cores that the Go runtime has: the numbers say what a change does to
// the cost of a call, not what a call costs between processes; bench/ measures that.

func BenchmarkEcho(b *testing.B) {
	r := realRig(b, nil, nil)
	ctx := context.Background()
	fn := func([]byte) error { return nil }
	for _, bc := range []struct {
		name string
		m    Method
		size int
	}{{"inline/64", mEcho, 64}, {"inline/4096", mEcho, 4096}, {"worker/64", mEchoSlow, 64}} {
		b.Run(bc.name, func(b *testing.B) {
			req := pattern(bc.size)
			b.ReportAllocs()
			for b.Loop() {
				if err := r.cl.CallRaw(ctx, bc.m, req, fn); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkQueue(b *testing.B) {
	r := realRig(b, nil, nil)
	ctx := context.Background()
	for _, depth := range []int{1, 16, 64} {
		b.Run(fmt.Sprint(depth), func(b *testing.B) {
			q, err := r.cl.NewQueue(depth)
			if err != nil {
				b.Fatal(err)
			}
			defer q.Close()
			req := pattern(64)
			collect := func(_ uint64, _ []byte, err error) {
				if err != nil {
					b.Error(err)
				}
			}
			b.ReportAllocs()
			for b.Loop() {
				if q.Len() == depth {
					if _, err := q.Wait(ctx, collect); err != nil {
						b.Fatal(err)
					}
				}
				if err := q.Start(ctx, mEcho, req, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkParallel(b *testing.B) {
	r := realRig(b, nil, nil)
	ctx := context.Background()
	req := pattern(64)
	fn := func([]byte) error { return nil }
	b.SetParallelism(32)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := r.cl.CallRaw(ctx, mEcho, req, fn); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func BenchmarkTyped(b *testing.B) {
	r := realRig(b, nil, nil)
	ctx := context.Background()
	in, out := wrapperspb.Int64(1), new(wrapperspb.Int64Value)
	b.ReportAllocs()
	for b.Loop() {
		if err := r.cl.CallMethod(ctx, 101, in, out); err != nil {
			b.Fatal(err)
		}
	}
}
