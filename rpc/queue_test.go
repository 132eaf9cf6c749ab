package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestQueue(t *testing.T) {
	onEach(t, nil, &ClientConfig{MaxInFlight: 100}, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		q, err := r.cl.NewQueue(64)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.cl.NewQueue(64); CodeOf(err) != ResourceExhausted {
			t.Error("a second queue beyond MaxInFlight:", err)
		}
		if _, err := r.cl.NewQueue(0); CodeOf(err) != InvalidArgument {
			t.Error("an empty queue:", err)
		}
		if n, err := q.Wait(ctx, nil); n != 0 || err != nil {
			t.Error("waiting for nothing:", n, err)
		}
		seen := make(map[uint64]bool)
		collect := func(tag uint64, resp []byte, err error) {
			if err != nil || seen[tag] || !bytes.Equal(resp, pattern(int(tag)%700)) {
				t.Errorf("result of call %d: %d bytes, %v, seen before: %v", tag, len(resp), err, seen[tag])
			}
			seen[tag] = true
		}
		const calls = 2000
		for tag := range uint64(calls) {
			for q.Len() == q.Depth() {
				if tag%2 == 0 {
					q.TryWait(collect)
				} else if _, err := q.Wait(ctx, collect); err != nil {
					t.Fatal(err)
				}
			}
			m := []Method{mEcho, mEchoSlow}[tag%3%2]
			if err := q.Start(ctx, m, pattern(int(tag)%700), tag); err != nil {
				t.Fatal(err)
			}
		}
		for q.Len() > 0 {
			if n, err := q.Wait(ctx, collect); err != nil || n == 0 {
				t.Fatal(n, err)
			}
		}
		if len(seen) != calls {
			t.Errorf("%d results, want %d", len(seen), calls)
		}
		for range q.Depth() {
			if err := q.Start(ctx, mBlock, nil, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := q.Start(ctx, mEcho, nil, 0); err != ErrQueueFull {
			t.Error("beyond the depth:", err)
		}
		short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
		defer cancel()
		if n, err := q.Wait(short, collect); n != 0 || CodeOf(err) != DeadlineExceeded {
			t.Error("waiting past the context:", n, err)
		}
		// A blocking call beside a full queue.
		if err := echo(ctx, r.cl, mEcho, pattern(5000)); err != nil {
			t.Error(err)
		}
		_ = q.Close()
		_ = q.Close()
		if err := q.Start(ctx, mEcho, nil, 0); CodeOf(err) != FailedPrecondition {
			t.Error("after Close:", err)
		}
		if free := countFree(r.cl); free != r.cl.nslots {
			t.Errorf("%d slots of %d are free", free, r.cl.nslots)
		}
	})
}

func TestQueueMessagesAndErrors(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		q, err := r.cl.NewQueue(8)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		if err := q.StartMessage(ctx, 101, wrapperspb.Int64(41), 1); err != nil {
			t.Fatal(err)
		}
		if err := q.Start(ctx, mFail, []byte("k"), 2); err != nil {
			t.Fatal(err)
		}
		if err := q.Start(ctx, mPanic, nil, 3); err != nil {
			t.Fatal(err)
		}
		mine := errors.New("mine")
		if err := q.StartFunc(ctx, mEcho, 5, func([]byte) error { return mine }, 4); err != mine {
			t.Fatal(err)
		}
		for q.Len() > 0 {
			if _, err := q.Wait(ctx, func(tag uint64, resp []byte, err error) {
				switch tag {
				case 1:
					out := new(wrapperspb.Int64Value)
					if err != nil || proto.Unmarshal(resp, out) != nil || out.Value != 42 {
						t.Error(out, err)
					}
				case 2:
					wantCode(t, err, NotFound)
				case 3:
					wantCode(t, err, Internal)
				default:
					t.Error("tag", tag)
				}
			}); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// A Queue whose results nobody collects does not keep others from theirs.
func TestIdleQueueDoesNotBlockCalls(t *testing.T) {
	onEach(t, nil, &ClientConfig{MaxInFlight: 200}, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		q, err := r.cl.NewQueue(150)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		for tag := range uint64(150) {
			if err := q.Start(ctx, mEchoSlow, pattern(300), tag); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 100 {
			if err := echo(ctx, r.cl, mEchoSlow, pattern(300+i)); err != nil {
				t.Fatal(err)
			}
		}
		n := 0
		for q.Len() > 0 {
			if _, err := q.Wait(ctx, func(_ uint64, resp []byte, err error) {
				n++
				if err != nil || !bytes.Equal(resp, pattern(300)) {
					t.Error(len(resp), err)
				}
			}); err != nil {
				t.Fatal(err)
			}
		}
		if n != 150 {
			t.Errorf("%d results", n)
		}
	})
}

func TestQueueAtConnectionLoss(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		q, err := r.cl.NewQueue(16)
		if err != nil {
			t.Fatal(err)
		}
		for tag := range uint64(16) {
			if err := q.Start(ctx, mBlock, nil, tag); err != nil {
				t.Fatal(err)
			}
		}
		<-r.ts.entered
		r.cutOff()
		n := 0
		for q.Len() > 0 {
			if _, err := q.Wait(ctx, func(_ uint64, _ []byte, err error) {
				n++
				wantCode(t, err, Unavailable)
			}); err != nil {
				t.Fatal(err)
			}
		}
		if n != 16 {
			t.Errorf("%d results", n)
		}
		wantCode(t, q.Start(ctx, mEcho, nil, 0), Unavailable)
		_ = q.Close()
	})
}

// With a Batch, requests go out together; Flush, Wait, TryWait and Close send those that are kept back.
func TestQueueBatch(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		q, err := r.cl.NewQueue(32)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		q.Batch = 8
		started, done := uint64(0), uint64(0)
		collect := func(tag uint64, resp []byte, err error) {
			if err != nil || !bytes.Equal(resp, pattern(int(tag)%200)) {
				t.Errorf("call %d: %d bytes, %v", tag, len(resp), err)
			}
			done++
		}
		for round := range 200 {
			for q.Len() < q.Depth() && started < uint64(round*7+9) {
				m := []Method{mEcho, mEchoSlow}[started%5/4]
				if err := q.Start(ctx, m, pattern(int(started)%200), started); err != nil {
					t.Fatal(err)
				}
				started++
			}
			switch round % 3 {
			case 0:
				_, err = q.Wait(ctx, collect)
			case 1:
				q.TryWait(collect)
			default:
				err = q.Flush()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		for q.Len() > 0 {
			if _, err := q.Wait(ctx, collect); err != nil {
				t.Fatal(err)
			}
		}
		// Each by itself, with fewer requests than a batch.
		for _, send := range []func(){
			func() {}, // Wait
			func() { q.TryWait(collect) },
			func() {
				if err := q.Flush(); err != nil {
					t.Error(err)
				}
			},
		} {
			for range 3 {
				if err := q.Start(ctx, mEcho, pattern(int(started)%200), started); err != nil {
					t.Fatal(err)
				}
				started++
			}
			send()
			for q.Len() > 0 {
				if _, err := q.Wait(ctx, collect); err != nil {
					t.Fatal(err)
				}
			}
		}
		if done != started {
			t.Errorf("%d results of %d calls", done, started)
		}
		if err := q.Start(ctx, mEcho, nil, 0); err != nil { // Close finds one that is kept back
			t.Fatal(err)
		}
	})
}

// A queue may be closed by the functions that its user gives it.
func TestQueueClosedFromWithin(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		broken := errors.New("fill fails")
		fill := func(q *Queue, err error) error {
			return q.StartFunc(ctx, mEcho, 8, func([]byte) error {
				_ = q.Close()
				return err
			}, 9)
		}
		for name, closes := range map[string]func(*Queue) error{
			"Wait": func(q *Queue) error {
				_, err := q.Wait(ctx, func(uint64, []byte, error) { _ = q.Close() })
				return err
			},
			"StartFunc": func(q *Queue) error {
				if err := fill(q, nil); CodeOf(err) != FailedPrecondition {
					return fmt.Errorf("StartFunc: %w", err)
				}
				return nil
			},
			"StartFunc that fails": func(q *Queue) error {
				if err := fill(q, broken); !errors.Is(err, broken) {
					return fmt.Errorf("StartFunc: %w", err)
				}
				return nil
			},
		} {
			q, err := r.cl.NewQueue(4)
			if err != nil {
				t.Fatal(err)
			}
			for tag := range uint64(3) {
				if err := q.Start(ctx, mEcho, nil, tag); err != nil {
					t.Fatal(err)
				}
			}
			if err := closes(q); err != nil {
				t.Errorf("closed by the function of %s: %v", name, err)
			}
			if err := q.Start(ctx, mEcho, nil, 9); CodeOf(err) != FailedPrecondition {
				t.Errorf("closed by the function of %s, then: %v", name, err)
			}
			if free := countFree(r.cl); free != r.cl.nslots {
				t.Errorf("closed by the function of %s: %d slots of %d are free", name, free, r.cl.nslots)
			}
		}
	})
}
