package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// completions hands out the completions of one queue, found by polling or by completion events. It is for one goroutine.
type completions struct {
	dev    *verbs.Context
	cq     *verbs.CQ
	ch     *verbs.CompChannel // nil: poll
	wcs    []ib.WC
	armed  bool
	events int // how often it has slept and was woken
}

// newCompletions makes a queue of that many entries, and a channel for it if it shall sleep on events. Both are added to
// the objects to close.
func newCompletions(dev *verbs.Context, entries int, events bool, objects *closers) (*completions, error) {
	c := &completions{dev: dev, wcs: make([]ib.WC, 16)}
	var err error
	if events {
		if c.ch, err = dev.NewCompChannel(); err != nil {
			return nil, err
		}
		objects.add(c.ch)
	}
	if c.cq, err = dev.NewCQ(verbs.CQConfig{Entries: entries, Channel: c.ch}); err != nil {
		return nil, err
	}
	objects.add(c.cq)
	return c, nil
}

// next waits for completions and returns at least one; they are valid until the next call. It ends with ctx; what has come then that
// no event has told of is returned with the error.
func (c *completions) next(ctx context.Context) ([]ib.WC, error) {
	for empty := 1; ; empty++ {
		if c.ch != nil && !c.armed {
			if err := c.cq.Arm(false); err != nil {
				return nil, err
			}
			c.armed = true
		}
		n, err := c.cq.Poll(c.wcs)
		if n > 0 || err != nil {
			return c.wcs[:n], err
		}
		if c.ch != nil {
			// What came between Poll and here has fired the queue: that Wait returns for it is what is tested.
			cq, err := c.ch.Wait(ctx)
			if err != nil {
				n, pollErr := c.cq.Poll(c.wcs)
				if pollErr != nil {
					return nil, errors.Join(err, pollErr)
				}
				if n > 0 {
					err = fmt.Errorf("no event has told of %d completions that are there: %w", n, err)
				}
				return c.wcs[:n], err
			}
			if cq != c.cq {
				return nil, fmt.Errorf("the channel has an event of another queue than its only one: %p, not %p", cq, c.cq)
			}
			c.armed = false
			c.events++
			continue
		}
		c.dev.Progress()
		if empty%64 == 0 {
			runtime.Gosched()
			if err := ctx.Err(); err != nil {
				return nil, err
			}
		}
	}
}

// closers are objects to close, children after their parents.
type closers []interface{ Close() error }

func (c *closers) add(o interface{ Close() error }) { *c = append(*c, o) }

// closeAll closes in reverse order, and reports the first failure if *err is nil.
func (c *closers) closeAll(err *error) {
	for i := len(*c) - 1; i >= 0; i-- {
		if e := (*c)[i].Close(); e != nil && *err == nil {
			*err = e
		}
	}
	*c = nil
}

// openPort opens a device and returns the address of its port with the GID in the slot gidIndex of its table.
func openPort(name string, port uint8, gidIndex int, objects *closers) (*verbs.Context, ib.PortAttr, ib.GID, error) {
	fail := func(err error) (*verbs.Context, ib.PortAttr, ib.GID, error) { return nil, ib.PortAttr{}, ib.GID{}, err }
	dev, err := verbs.Open(name)
	if err != nil {
		return fail(err)
	}
	objects.add(dev)
	attr, err := dev.QueryPort(port)
	if err != nil {
		return fail(err)
	}
	if gidIndex < 0 {
		if attr.LinkLayer != ib.LinkInfiniBand {
			return fail(fmt.Errorf("peers reach port %d of %s by its GID only: name a slot of its table with -g", port, dev.Name()))
		}
		return dev, attr, ib.GID{}, nil
	}
	gid, err := dev.GID(port, gidIndex)
	if err != nil {
		return fail(err)
	}
	return dev, attr, gid, nil
}
