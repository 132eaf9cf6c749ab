package verbs

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/life"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// CQConfig describes a completion queue. The zero value is good for a start.
type CQConfig struct {
	// Entries is how many completions the queue must hold; default 256. One completion more than the queue has room for
	// is an overrun, which breaks it and its queue pairs: count every send and every receive that may be outstanding. Unsignaled
	// sends are among them, since they complete, too, when their queue pair fails. Devices round up; CQ.Entries tells. An overrun
	// raises ib.EventCQErr for the queue, and ib.EventQPFatal for its queue pairs, which go to Err, and Poll fails. Devices do so as
	// the completion comes, the software NIC with the next Poll; rxe only raises the event of the queue.
	Entries int
	// Channel is told of armed completions; nil for a queue that is only polled.
	Channel *CompChannel
}

// A CQ is a completion queue. It is safe for concurrent use, but Polls take turns: give each CQ one polling goroutine.
// Close may be called at any time and waits for calls in progress.
type CQ struct {
	life life.Node
	drv  driver.CQ
	ctx  *Context
	ch   *CompChannel
}

// NewCQ makes a completion queue.
func (c *Context) NewCQ(cfg CQConfig) (*CQ, error) {
	d := driver.CQConfig{Entries: cfg.Entries}
	if d.Entries == 0 {
		d.Entries = 256
	}
	if d.Entries < 0 {
		return nil, c.err("create_cq", fmt.Errorf("invalid number of entries: %d", d.Entries))
	}
	attr, err := c.QueryDevice()
	if err != nil {
		return nil, err
	}
	if attr.MaxCQE > 0 && d.Entries > attr.MaxCQE {
		return nil, c.err("create_cq", fmt.Errorf("%d entries exceed the device's limit of %d", d.Entries, attr.MaxCQE))
	}
	cq := &CQ{ctx: c, ch: cfg.Channel}
	parents := []*life.Node{&c.life}
	if cq.ch != nil {
		if cq.ch.ctx != c {
			return nil, c.err("create_cq", errors.New("the completion channel belongs to another context"))
		}
		d.Channel = cq.ch.drv
		parents = append(parents, &cq.ch.life)
	}
	if err := cq.life.Attach(parents...); err != nil {
		return nil, c.err("create_cq", err)
	}
	if cq.drv, err = c.drv.CreateCQ(d); err != nil {
		cq.life.Abandon()
		return nil, c.err("create_cq", err)
	}
	track(c, cq.drv, cq)
	life.Watch(cq, &cq.life, "verbs.CQ", c.Name())
	return cq, nil
}

// Context returns the device that the queue belongs to.
func (cq *CQ) Context() *Context { return cq.ctx }

// Channel returns the completion channel that the queue was made with, or nil.
func (cq *CQ) Channel() *CompChannel { return cq.ch }

// Entries is the granted capacity.
func (cq *CQ) Entries() int { return cq.drv.Entries() }

// Poll moves up to len(wcs) completions into wcs and returns how many. It does not block. The error says that the queue
// itself has failed: it has overrun, was closed, or the device is gone; failed work requests are completions.
func (cq *CQ) Poll(wcs []ib.WC) (n int, err error) {
	if cq.life.Closed() {
		return 0, errPollClosed
	}
	if n = cq.drv.Poll(wcs); n < 0 {
		return 0, cq.pollErr()
	}
	return n, nil
}

func (cq *CQ) pollErr() error {
	err := cq.drv.Err()
	if err == nil {
		err = errors.New("the completion queue has failed for an unknown reason")
	}
	return cq.ctx.err("poll_cq", err)
}

// Arm asks for one event on the queue's channel when the next completion arrives; with solicitedOnly, the next one that
// its sender marked as solicited, or that failed. A completion that is already in the queue raises none: the order
// is Arm, Poll once more, and Wait only if that found nothing.
func (cq *CQ) Arm(solicitedOnly bool) error {
	if cq.life.Closed() {
		return errArmClosed
	}
	if err := cq.drv.Arm(solicitedOnly); err != nil {
		return cq.ctx.err("req_notify_cq", err)
	}
	return nil
}

// Resize changes the capacity to at least entries and keeps what is queued. It fails if more than that is queued, and
// with errors.ErrUnsupported if the device cannot do it.
func (cq *CQ) Resize(entries int) error {
	if cq.life.Closed() {
		return cq.ctx.err("resize_cq", errPollClosed.Err)
	}
	if entries <= 0 {
		return cq.ctx.err("resize_cq", fmt.Errorf("invalid number of entries: %d", entries))
	}
	r, ok := cq.drv.(driver.CQResizer)
	if !ok {
		return cq.ctx.err("resize_cq", errors.ErrUnsupported)
	}
	return cq.ctx.err("resize_cq", r.Resize(entries))
}

// Moderate has the event that Arm asks for wait until count completions have come or, if that is sooner, until period has passed since
// the first of them: fewer events for more completions at a time. Where count is 0 only the period counts, and where period is 0 only
// the count, so that fewer completions than that raise no event at all. With 0 and 0, as in the beginning, the first completion raises
// it. What the device can do is in ib.DeviceAttr; period is in microseconds there, and rounded up to them. Moderate fails with
// errors.ErrUnsupported if the device cannot do it.
func (cq *CQ) Moderate(count int, period time.Duration) error {
	if cq.life.Closed() {
		return cq.ctx.err("modify_cq", errPollClosed.Err)
	}
	attr, err := cq.ctx.QueryDevice()
	if err != nil {
		return err
	}
	m, ok := cq.drv.(driver.CQModerator)
	switch {
	case !ok || attr.MaxModerateCount == 0 && attr.MaxModeratePeriod == 0:
		err = errors.ErrUnsupported
	case count < 0 || count > attr.MaxModerateCount:
		err = fmt.Errorf("an event each %d completions: 0 to %d are possible", count, attr.MaxModerateCount)
	case period < 0 || period > attr.MaxModeratePeriod:
		err = fmt.Errorf("events that wait for %v: 0 to %v are possible", period, attr.MaxModeratePeriod)
	default:
		err = m.Moderate(count, period)
	}
	return cq.ctx.err("modify_cq", err)
}

// Close destroys the queue. It fails with ErrBusy while a queue pair uses it.
func (cq *CQ) Close() error {
	return cq.ctx.err("destroy_cq", cq.life.Close(func() error {
		if err := cq.drv.Close(); err != nil {
			return err
		}
		cq.ctx.untrack(cq.drv)
		return nil
	}))
}

// Driver is for the other packages of this module.
func (cq *CQ) Driver() driver.CQ { return cq.drv }

// Life is for the other packages of this module: what uses the queue becomes its child.
func (cq *CQ) Life() *life.Node { return &cq.life }

// A CompChannel delivers the events of armed completion queues. It is safe for concurrent use; each event goes to one
// waiter.
type CompChannel struct {
	life life.Node
	ctx  *Context
	drv  driver.CompChannel
}

// NewCompChannel makes a completion channel, for any number of completion queues.
func (c *Context) NewCompChannel() (*CompChannel, error) {
	ch := &CompChannel{ctx: c}
	if err := ch.life.Attach(&c.life); err != nil {
		return nil, c.err("create_comp_channel", err)
	}
	drv, err := c.drv.CreateCompChannel()
	if err != nil {
		ch.life.Abandon()
		return nil, c.err("create_comp_channel", err)
	}
	ch.drv = drv
	life.Watch(ch, &ch.life, "verbs.CompChannel", c.Name())
	return ch, nil
}

// Wait waits until an armed queue has fired and returns it; the queue is then no longer armed. It ends with ctx, or
// with net.ErrClosed when the channel is closed.
func (ch *CompChannel) Wait(ctx context.Context) (*CQ, error) {
	for {
		drv, err := ch.drv.Wait(ctx)
		if err != nil {
			return nil, ch.ctx.err("get_cq_event", err)
		}
		if cq, ok := ch.ctx.object(drv).(*CQ); ok {
			return cq, nil
		}
		// The queue was closed after it fired: its event means nothing any more.
	}
}

// WaitThread is Wait for a goroutine that may put its thread to sleep: it waits in a system call instead of the runtime's
// netpoller, which saves the wake-ups of the Go scheduler. The thread is one of those that GOMAXPROCS counts until the
// runtime has noticed that it sleeps, so few goroutines should wait like this at a time. It returns nil and no error after
// Interrupt. One goroutine at a time may call it, and none may be in Wait. It fails with errors.ErrUnsupported if the
// device has no such wait. It does not allocate.
func (ch *CompChannel) WaitThread() (*CQ, error) {
	t, ok := ch.drv.(driver.ThreadWaiter)
	if !ok {
		return nil, ch.ctx.err("get_cq_event", errors.ErrUnsupported)
	}
	drv, err := t.WaitThread()
	if err != nil || drv == nil {
		return nil, ch.ctx.err("get_cq_event", err)
	}
	cq, _ := ch.ctx.object(drv).(*CQ) // nil: closed after it fired
	return cq, nil
}

// Interrupt ends the WaitThread in progress or, if there is none, the next one. It never blocks; any goroutine may call it.
func (ch *CompChannel) Interrupt() {
	if t, ok := ch.drv.(driver.ThreadWaiter); ok {
		t.Interrupt()
	}
}

// HasWaitThread reports whether the device has WaitThread.
func (ch *CompChannel) HasWaitThread() bool {
	_, ok := ch.drv.(driver.ThreadWaiter)
	return ok
}

// Close destroys the channel. It fails with ErrBusy while a completion queue uses it. Calls of Wait end with
// net.ErrClosed.
func (ch *CompChannel) Close() error {
	return ch.ctx.err("destroy_comp_channel", ch.life.Close(ch.drv.Close))
}
