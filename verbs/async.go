package verbs

import (
	"context"
	"fmt"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// An AsyncEvent is something that happened to a device, a port or an object, outside of any work request (IBA 11.6.3).
type AsyncEvent struct {
	Type ib.EventType
	Port uint8 // for events about a port
	// QPN is the queue pair's number, for events about one.
	QPN ib.QPN
	// CQ is the completion queue, for ib.EventCQErr.
	CQ *CQ
	// Object is what the event is about: a *CQ, a *qp.QP or a *qp.SRQ; nil for events about a port or the device, and
	// for objects that were closed meanwhile.
	Object any
}

func (e AsyncEvent) String() string {
	switch {
	case e.QPN != 0:
		return fmt.Sprintf("%s (qp %d)", e.Type, e.QPN)
	case e.Port != 0:
		return fmt.Sprintf("%s (port %d)", e.Type, e.Port)
	}
	return e.Type.String()
}

// AsyncEvent waits for the next asynchronous event. It ends with ctx, or with net.ErrClosed when the context is closed.
// Each event is returned to one caller.
func (c *Context) AsyncEvent(ctx context.Context) (AsyncEvent, error) {
	d, err := c.drv.AsyncEvent(ctx)
	if err != nil {
		return AsyncEvent{}, c.err("get_async_event", err)
	}
	e := AsyncEvent{Type: d.Type, Port: d.Port}
	switch {
	case d.CQ != nil:
		e.Object = c.object(d.CQ)
		e.CQ, _ = e.Object.(*CQ)
	case d.QP != nil:
		e.QPN = d.QP.QPN()
		e.Object = c.object(d.QP)
	case d.SRQ != nil:
		e.Object = c.object(d.SRQ)
	}
	return e, nil
}
