package conformance

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Loops, for what control messages are too slow for.

type pumpArgs struct {
	QP, CQ handle
	WRs    []ib.SendWR // every one signalled
	Rounds int         // 0: until the other side is gone, or the WRs fail
	Seed   uint64      // pauses between rounds, if not 0
	// After each round, the 8-byte words of Collect, if its handle is not 0, are appended to the result.
	Collect memRange
}

type pumpResult struct {
	Rounds int
	Words  []uint64
	Bad    []ib.WC // of the round that failed
}

// opPump posts all WRs and waits for all completions, Rounds times.
var opPump = newOp("pump", func(h *host, a pumpArgs) (r pumpResult, err error) {
	q, err := get[*qp.QP](h, a.QP)
	if err != nil {
		return r, err
	}
	cq, err := get[*verbs.CQ](h, a.CQ)
	if err != nil {
		return r, err
	}
	pause := rand.New(rand.NewPCG(a.Seed, 1))
	for ; a.Rounds == 0 || r.Rounds < a.Rounds; r.Rounds++ {
		if n, err := q.PostSend(a.WRs); err != nil {
			return r, fmt.Errorf("round %d: %d of %d accepted: %w", r.Rounds, n, len(a.WRs), err)
		}
		wcs, err := h.poll(cq, len(a.WRs), patience)
		if err != nil {
			return r, err
		}
		if len(wcs) != len(a.WRs) {
			return r, fmt.Errorf("round %d: %d of %d completions within %v", r.Rounds, len(wcs), len(a.WRs), patience)
		}
		if slices.ContainsFunc(wcs, func(wc ib.WC) bool { return wc.Status != ib.WCSuccess }) {
			r.Bad = wcs
			return r, nil
		}
		if a.Collect.H != 0 {
			b, err := h.bytes(a.Collect, a.Collect.N)
			if err != nil {
				return r, err
			}
			for i := 0; i+8 <= len(b); i += 8 {
				r.Words = append(r.Words, binary.NativeEndian.Uint64(b[i:]))
			}
		}
		switch {
		case a.Seed == 0:
		case pause.IntN(4) == 0:
			h.sleep(time.Duration(pause.IntN(200)) * time.Microsecond)
		default:
			runtime.Gosched()
		}
	}
	return r, nil
})

type drainArgs struct {
	Channel handle
	CQs     []handle
	N       int // completions, over all CQs
	// A receive of this QP is posted again for each one that completed.
	QP   handle
	Recv ib.RecvWR
}

type drainResult struct {
	Completions, Events int
	Bad                 []ib.WC
}

// opDrain takes N completions by the book: arm, poll until empty, wait for the event. It sleeps between completions, so
// one lost wake-up ends it with an error.
var opDrain = newOp("drain by events", func(h *host, a drainArgs) (r drainResult, err error) {
	ch, err := get[*verbs.CompChannel](h, a.Channel)
	if err != nil {
		return r, err
	}
	var q *qp.QP
	if a.QP != 0 {
		if q, err = get[*qp.QP](h, a.QP); err != nil {
			return r, err
		}
	}
	buf := make([]ib.WC, 16)
	recvs := make([]ib.RecvWR, 0, len(buf))
	drain := func(cq *verbs.CQ) error {
		for {
			n, err := cq.Poll(buf)
			if err != nil || n == 0 {
				return err
			}
			r.Completions += n
			recvs = recvs[:0]
			for _, wc := range buf[:n] {
				if wc.Status != ib.WCSuccess {
					r.Bad = append(r.Bad, wc)
				}
				recvs = append(recvs, a.Recv)
			}
			if len(r.Bad) > 0 {
				return nil // a receive that is posted now would be flushed, and so on for ever
			}
			if q != nil {
				if _, err := q.PostRecv(recvs); err != nil {
					return err
				}
			}
		}
	}
	for _, n := range a.CQs {
		cq, err := get[*verbs.CQ](h, n)
		if err != nil {
			return r, err
		}
		if err := cq.Arm(false); err != nil {
			return r, err
		}
		if err := drain(cq); err != nil {
			return r, err
		}
	}
	for r.Completions < a.N && len(r.Bad) == 0 {
		ctx, cancel := h.timeout(patience)
		cq, err := ch.Wait(ctx)
		cancel()
		if err != nil {
			return r, fmt.Errorf("after %d of %d completions and %d events: %w", r.Completions, a.N, r.Events, err)
		}
		r.Events++
		if err := cq.Arm(false); err != nil {
			return r, err
		}
		if err := drain(cq); err != nil {
			return r, err
		}
	}
	return r, nil
})

type stormArgs struct {
	QP, CQ    handle
	WR        ib.SendWR // signalled
	Posters   int
	PerPoster int
	Pollers   int
}

// opStorm posts from many goroutines and polls from many others, each taking what it gets. Every ID must come back once.
var opStorm = newOp("storm", func(h *host, a stormArgs) (none, error) {
	q, err := get[*qp.QP](h, a.QP)
	if err != nil {
		return none{}, err
	}
	cq, err := get[*verbs.CQ](h, a.CQ)
	if err != nil {
		return none{}, err
	}
	total := a.Posters * a.PerPoster
	seen := make([]atomic.Int32, total)
	var got atomic.Int64
	errs := make(chan error, a.Posters+a.Pollers)
	for p := range a.Posters {
		go func() {
			wrs := make([]ib.SendWR, 0, 4)
			for i := 0; i < a.PerPoster; {
				wrs = wrs[:0]
				for k := i; k < min(i+4, a.PerPoster); k++ {
					wr := a.WR
					wr.ID = uint64(p*a.PerPoster + k)
					wrs = append(wrs, wr)
				}
				n, err := 0, error(nil)
				if !h.waitFor(patience, func() bool {
					n, err = q.PostSend(wrs)
					return n > 0 || !errors.Is(err, verbs.ErrQueueFull)
				}) || err != nil && !errors.Is(err, verbs.ErrQueueFull) {
					errs <- fmt.Errorf("poster %d at %d: %w", p, i, err)
					return
				}
				i += n
			}
			errs <- nil
		}()
	}
	for range a.Pollers {
		go func() {
			buf := make([]ib.WC, 5)
			var err error
			done := h.waitFor(patience, func() bool {
				var n int
				if n, err = cq.Poll(buf); err != nil {
					return true
				}
				for _, wc := range buf[:n] {
					if wc.Status != ib.WCSuccess || wc.ID >= uint64(total) || seen[wc.ID].Add(1) != 1 {
						err = fmt.Errorf("completion %s", showWC(wc))
						return true
					}
				}
				return got.Add(int64(n)) >= int64(total)
			})
			if !done {
				err = fmt.Errorf("%d of %d completions", got.Load(), total)
			}
			errs <- err
		}()
	}
	for range a.Posters + a.Pollers {
		if e := <-errs; e != nil {
			err = e
		}
	}
	return none{}, err
})

type useUntilClosedArgs struct {
	QP, CQ handle
	WR     ib.SendWR
	Recv   ib.RecvWR
}

// opUseUntilClosed posts and polls until both objects are closed under it and all calls say so, and returns how often it did.
var opUseUntilClosed = newOp("use until closed", func(h *host, a useUntilClosedArgs) (n int, err error) {
	q, err := get[*qp.QP](h, a.QP)
	if err != nil {
		return 0, err
	}
	cq, err := get[*verbs.CQ](h, a.CQ)
	if err != nil {
		return 0, err
	}
	buf := make([]ib.WC, 8)
	done := h.waitFor(patience, func() bool {
		n++
		_, e1 := q.PostSend([]ib.SendWR{a.WR})
		_, e2 := q.PostRecv([]ib.RecvWR{a.Recv})
		_, e3 := cq.Poll(buf)
		for _, e := range []error{e1, e2, e3} {
			if e != nil && !errors.Is(e, net.ErrClosed) && !errors.Is(e, verbs.ErrQueueFull) {
				err = e
			}
		}
		return err != nil || errors.Is(e1, net.ErrClosed) && errors.Is(e2, net.ErrClosed) && errors.Is(e3, net.ErrClosed)
	})
	if !done {
		err = fmt.Errorf("not all calls say %q within %v", net.ErrClosed, patience)
	}
	return n, err
})
