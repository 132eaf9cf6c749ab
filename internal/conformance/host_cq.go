package conformance

import (
	"fmt"
	"runtime"
	"time"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

type cqArgs struct {
	Entries int
	Channel handle
}

type cqInfo struct {
	H       handle
	Entries int
}

var opCQ = newOp("create_cq", func(h *host, a cqArgs) (cqInfo, error) {
	c, err := h.context()
	if err != nil {
		return cqInfo{}, err
	}
	cfg := verbs.CQConfig{Entries: a.Entries}
	if a.Channel != 0 {
		if cfg.Channel, err = get[*verbs.CompChannel](h, a.Channel); err != nil {
			return cqInfo{}, err
		}
	}
	cq, err := c.NewCQ(cfg)
	if err != nil {
		return cqInfo{}, err
	}
	return cqInfo{h.add(cq), cq.Entries()}, nil
})

var opChannel = newOp("create_comp_channel", func(h *host, _ none) (handle, error) {
	c, err := h.context()
	if err != nil {
		return 0, err
	}
	ch, err := c.NewCompChannel()
	if err != nil {
		return 0, err
	}
	return h.add(ch), nil
})

type pollArgs struct {
	CQ   handle
	N    int
	Wait time.Duration // until N have come; what came is returned in any case
}

// waitFor repeats f until it reports true or d is over; it gives way to whoever has work.
func (h *host) waitFor(d time.Duration, f func() bool) bool {
	if h.sim != nil {
		return h.sim.Poll(d, f)
	}
	deadline := time.Now().Add(d)
	for i := 0; ; i++ {
		if f() {
			return true
		}
		if i < 200 {
			runtime.Gosched()
			continue
		}
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(min(time.Duration(i)*time.Microsecond, time.Millisecond))
	}
}

func (h *host) poll(cq *verbs.CQ, n int, wait time.Duration) (wcs []ib.WC, err error) {
	buf := make([]ib.WC, n)
	got := 0
	h.waitFor(wait, func() bool {
		var k int
		k, err = cq.Poll(buf[got:])
		if err == nil {
			got += k
		}
		return got == n || err != nil
	})
	return buf[:got], err
}

var opPoll = newOp("poll_cq", func(h *host, a pollArgs) ([]ib.WC, error) {
	return use(h, a.CQ, func(cq *verbs.CQ) ([]ib.WC, error) { return h.poll(cq, a.N, a.Wait) })
})

type armArgs struct {
	CQ            handle
	SolicitedOnly bool
}

var opArm = newOp("req_notify_cq", func(h *host, a armArgs) (none, error) {
	return use(h, a.CQ, func(cq *verbs.CQ) (none, error) { return none{}, cq.Arm(a.SolicitedOnly) })
})

type resizeArgs struct {
	CQ      handle
	Entries int
}

var opResize = newOp("resize_cq", func(h *host, a resizeArgs) (int, error) {
	return use(h, a.CQ, func(cq *verbs.CQ) (int, error) {
		err := cq.Resize(a.Entries)
		return cq.Entries(), err
	})
})

type waitArgs struct {
	H    handle
	Wait time.Duration
}

// opChannelWait returns the handle of the CQ whose event came.
var opChannelWait = newOp("get_cq_event", func(h *host, a waitArgs) (handle, error) {
	return use(h, a.H, func(ch *verbs.CompChannel) (handle, error) {
		ctx, cancel := h.timeout(a.Wait)
		defer cancel()
		cq, err := ch.Wait(ctx)
		if err != nil {
			return 0, err
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		for n, o := range h.objects {
			if o == object(cq) {
				return n, nil
			}
		}
		return 0, fmt.Errorf("event for a CQ that is not ours: %p", cq)
	})
})

type asyncEvent struct {
	Type   ib.EventType
	QPN    ib.QPN
	Object handle // 0 if the event names none of ours
}

var opAsync = newOp("get_async_event", func(h *host, a waitArgs) (asyncEvent, error) {
	c, err := h.context()
	if err != nil {
		return asyncEvent{}, err
	}
	ctx, cancel := h.timeout(a.Wait)
	defer cancel()
	ev, err := c.AsyncEvent(ctx)
	if err != nil {
		return asyncEvent{}, err
	}
	e := asyncEvent{Type: ev.Type, QPN: ev.QPN}
	h.mu.Lock()
	defer h.mu.Unlock()
	for n, o := range h.objects {
		if ev.Object == any(o) {
			e.Object = n
		}
	}
	return e, nil
})
