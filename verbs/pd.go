package verbs

import (
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/life"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A PD is a protection domain: memory regions, windows, address handles and queue pairs work together only within one
// (IBA 10.2.3). A PD is safe for concurrent use.
type PD struct {
	life life.Node
	ctx  *Context
	drv  driver.PD
}

// AllocPD makes a protection domain.
func (c *Context) AllocPD() (*PD, error) {
	pd := &PD{ctx: c}
	if err := pd.life.Attach(&c.life); err != nil {
		return nil, c.err("alloc_pd", err)
	}
	drv, err := c.drv.AllocPD()
	if err != nil {
		pd.life.Abandon()
		return nil, c.err("alloc_pd", err)
	}
	pd.drv = drv
	life.Watch(pd, &pd.life, "verbs.PD", c.Name())
	return pd, nil
}

// Context returns the device that the domain belongs to.
func (pd *PD) Context() *Context { return pd.ctx }

// Close frees the domain. It fails with ErrBusy while a region, a queue pair or anything else made from it is open.
func (pd *PD) Close() error { return pd.ctx.err("dealloc_pd", pd.life.Close(pd.drv.Close)) }

// Driver is for the other packages of this module.
func (pd *PD) Driver() driver.PD { return pd.drv }

// Life is for the other packages of this module: what they make from the domain becomes its child.
func (pd *PD) Life() *life.Node { return &pd.life }

// An AH is an address handle: where a UD work request's datagram goes (IBA 11.2.2). It is safe for concurrent use.
type AH struct {
	life life.Node
	pd   *PD
	drv  driver.AH
	num  ib.AHNum
}

// NewAH makes an address handle.
func (pd *PD) NewAH(attr ib.AHAttr) (*AH, error) {
	a := &AH{pd: pd}
	if err := a.life.Attach(&pd.life); err != nil {
		return nil, pd.ctx.err("create_ah", err)
	}
	drv, err := pd.drv.CreateAH(attr)
	if err != nil {
		a.life.Abandon()
		return nil, pd.ctx.err("create_ah", err)
	}
	a.drv, a.num = drv, drv.Num()
	life.Watch(a, &a.life, "verbs.AH", pd.ctx.Name())
	return a, nil
}

// Num is what a work request's AH field takes.
func (a *AH) Num() ib.AHNum { return a.num }

// Close frees the handle. Work requests that were posted with it and are not complete may fail.
func (a *AH) Close() error { return a.pd.ctx.err("destroy_ah", a.life.Close(a.drv.Close)) }
