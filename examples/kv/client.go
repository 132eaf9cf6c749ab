package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/examples/internal/device"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/rpc"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// maxEntries bounds what a client believes of a server's table, and a server's flag.
const maxEntries = 1 << 24

// client reads a server's table one-sided, and writes it by calls. It belongs to one goroutine.
type client struct {
	geometry
	dev    *device.Device
	rpc    *rpc.Client
	conn   *transport.Conn
	local  *mr.MR // windowBytes, where READs put what they bring
	region transport.Remote
	stats  lookupStats
}

func dial(ctx context.Context, addr string, opts *device.Options) (_ *client, err error) {
	c := &client{}
	if c.dev, err = opts.Open(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if c.local, err = mr.Alloc(c.dev.PD(), windowBytes, ib.AccessLocalWrite); err != nil {
		return nil, err
	}
	if c.rpc, err = rpc.Dial(ctx, addr, c.dev.Config("kv client"), nil); err != nil {
		return nil, err
	}
	c.conn = c.rpc.Conn()
	open, err := rpc.Invoke[*OpenReply](ctx, c.rpc, methodOpen, &OpenRequest{})
	if err != nil {
		return nil, err
	}
	if err := c.region.UnmarshalBinary(open.Region); err != nil {
		return nil, fmt.Errorf("the server's table: %w", err)
	}
	c.geometry = geometry{int(open.Entries)}
	if open.Entries < 1 || open.Entries > maxEntries || uint64(c.size()) > c.region.Len {
		return nil, fmt.Errorf("the server's table: %d entries do not fit into %d bytes", open.Entries, c.region.Len)
	}
	return c, nil
}

// read implements source: a one-sided READ, in which the server's threads have no part.
func (c *client) read(ctx context.Context, to, off, n int) error {
	return c.conn.Read(ctx, c.local.SGE(to, n), c.region, uint64(off))
}

// get returns a key's value, lent until the next get; nil if there is none.
func (c *client) get(ctx context.Context, key []byte) ([]byte, error) {
	return c.lookup(ctx, c, c.local.Bytes(), key, &c.stats)
}

func (c *client) put(ctx context.Context, key, value []byte) error {
	_, err := rpc.Invoke[*PutReply](ctx, c.rpc, methodPut, &PutRequest{Key: key, Value: value})
	return err
}

// del reports whether there was such a key.
func (c *client) del(ctx context.Context, key []byte) (bool, error) {
	r, err := rpc.Invoke[*DeleteReply](ctx, c.rpc, methodDelete, &DeleteRequest{Key: key})
	return r.GetFound(), err
}

func (c *client) close() error {
	var errs []error
	if c.rpc != nil {
		errs = append(errs, c.rpc.Close())
	}
	if c.local != nil {
		errs = append(errs, c.local.Close())
	}
	return errors.Join(append(errs, c.dev.Close())...)
}
