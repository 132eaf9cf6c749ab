package rpc

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// What comes of a call: an answer, or the word that there is none.

// What was executed is answered, whatever goes on while the server shuts down: a call has its answer, or was not executed.
func TestShutdownUnderCalls(t *testing.T) {
	testutil.CheckLeaks(t)
	rounds := 30
	if testing.Short() {
		rounds = 5
	}
	for range rounds {
		r := realRig(t, nil, nil)
		var executed, answered, refused atomic.Int64
		count := func(c *Call, req []byte) error {
			executed.Add(1)
			return c.ReplyBytes(req)
		}
		r.ts.HandleRaw(Spec{Number: 300, Inline: true}, count)
		r.ts.HandleRaw(Spec{Number: 301}, count)
		ctx := ctxFor(t)
		var wg sync.WaitGroup
		begun := make(chan struct{}, 100)
		for i := range 8 {
			size := []int{10, 3000, 60_000, 300_000}[i/2]
			wg.Go(func() {
				for {
					err := echo(ctx, r.cl, Method(300+i%2), pattern(size))
					var e *Error
					switch {
					case err == nil:
						answered.Add(1)
						select {
						case begun <- struct{}{}:
						default:
						}
						continue
					case !errors.As(err, &e) || e.Code != Unavailable || !e.NotExecuted:
						t.Errorf("a call that is neither answered nor refused: %v", err)
					default:
						refused.Add(1)
					}
					return
				}
			})
		}
		for range cap(begun) {
			<-begun
		}
		// Of two, either returns.
		for range 2 {
			wg.Go(func() {
				if err := r.ts.Shutdown(ctx); err != nil {
					t.Error("Shutdown:", err)
				}
			})
		}
		wg.Wait()
		if e, a := executed.Load(), answered.Load(); e != a || refused.Load() != 8 {
			t.Errorf("%d calls were executed, %d answered, %d refused, want the first two alike, and 8", e, a, refused.Load())
		}
	}
}

// An inline method's response may be longer than what is kept for a client that takes none.
func TestInlineLongResponses(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		most := min(r.cl.maxMessage-headerLen, 3<<20)
		r.ts.HandleRaw(Spec{Number: 300, Inline: true}, func(c *Call, req []byte) error {
			b, err := c.Reply(most)
			if err == nil {
				copy(b[most-len(req):], req)
			}
			return err
		})
		const n = 150 // more than there are send slots
		q, err := r.cl.NewQueue(n)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		for tag := range uint64(n) {
			if err := q.Start(ctx, 300, pattern(9), tag); err != nil {
				t.Fatal(err)
			}
		}
		for q.Len() > 0 {
			if _, err := q.Wait(ctx, func(_ uint64, resp []byte, err error) {
				if err != nil || len(resp) != most || !bytes.Equal(resp[most-9:], pattern(9)) {
					t.Errorf("%d bytes, %v", len(resp), err)
				}
			}); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// badError is an error whose methods panic, as those of many types do on a nil pointer.
type badError struct{ text string }

func (e *badError) Error() string { return e.text }

// What a handler returns as an error may be a nil pointer in an interface.
func TestNilErrors(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		for _, inline := range []bool{false, true} {
			m := Method(300)
			if inline {
				m = 310
			}
			r.ts.HandleRaw(Spec{Number: m, Inline: inline}, func(c *Call, req []byte) error { return FromError(c.ReplyBytes(req)) })
			r.ts.HandleRaw(Spec{Number: m + 1, Inline: inline}, func(*Call, []byte) error { return (*badError)(nil) })
			r.ts.HandleRaw(Spec{Number: m + 2, Inline: inline}, func(*Call, []byte) error { return fmt.Errorf("wrapped: %w", (*badError)(nil)) })
			if err := echo(ctx, r.cl, m, pattern(20)); err != nil {
				t.Error("a handler that returns the FromError of no error:", err)
			}
			wantCode(t, r.cl.CallRaw(ctx, m+1, nil, nil), Internal)
			wantCode(t, r.cl.CallRaw(ctx, m+2, nil, nil), Unknown)
			if n := r.ts.panics.Swap(0); n != 1 {
				t.Errorf("%d panics were reported, want that of Error", n)
			}
		}
	})
}
