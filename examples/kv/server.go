package main

import (
	"context"
	"errors"
	"net"
	"sync"

	"github.com/ringside-rdma/ringside/examples/internal/device"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/rpc"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

const (
	methodOpen   = "kv/Open"
	methodPut    = "kv/Put"
	methodDelete = "kv/Delete"
)

// server owns a table, which clients read without it and write through it.
type server struct {
	table *table
	mem   *mr.MR
	wg    sync.WaitGroup // one a client's grant

	mu      sync.Mutex
	granted map[*transport.Conn]bool // the connections with a grant, or about to have one
}

// serve runs a server on addr with a table of so many entries, until ctx ends. ready is told the address.
func serve(ctx context.Context, addr string, opts *device.Options, entries int, ready func(net.Addr)) (err error) {
	dev, err := opts.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	g := geometry{entries}
	// With memory windows (MWBind) each client gets a key of its own, for what it is granted and no more.
	mem, err := mr.Alloc(dev.PD(), g.size(), ib.AccessLocalWrite|ib.AccessRemoteRead|ib.AccessMWBind)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, mem.Close()) }()
	s := &server{table: newTable(entries, mem.Bytes()), mem: mem, granted: map[*transport.Conn]bool{}}
	l, err := transport.Listen(ctx, addr, dev.Config("kv server"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()

	srv := rpc.NewServer(nil)
	rpc.Handle(srv, methodOpen, s.open)
	rpc.Handle(srv, methodPut, s.put)
	rpc.Handle(srv, methodDelete, s.del)
	ready(l.Addr())
	err = srv.Serve(ctx, l)
	srv.Close()
	s.wg.Wait() // the connections have ended: nobody reads the table any more
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// open lets the calling client read the table, for as long as its connection lasts. Once: each grant takes a memory window,
// of which the device has so many, and no client shall be able to take those of the others.
func (s *server) open(ctx context.Context, _ *OpenRequest) (*OpenReply, error) {
	conn := rpc.FromContext(ctx).Conn()
	s.mu.Lock()
	again := s.granted[conn]
	s.granted[conn] = true
	s.mu.Unlock()
	if again {
		return nil, rpc.Errorf(rpc.FailedPrecondition, "this connection has opened the table already")
	}
	g, err := conn.Grant(ctx, s.mem, 0, s.table.size(), ib.AccessRemoteRead)
	if err != nil {
		s.forget(conn)
		return nil, err
	}
	s.wg.Go(func() {
		<-conn.Done()
		s.forget(conn)
		g.Revoke(context.Background()) // frees the window; the access has ended with the connection
	})
	region, err := g.Remote().MarshalBinary()
	if err != nil {
		return nil, err
	}
	return &OpenReply{Entries: uint32(s.table.n), Region: region}, nil
}

func (s *server) forget(conn *transport.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.granted, conn)
}

func (s *server) put(_ context.Context, req *PutRequest) (*PutReply, error) {
	switch err := s.table.put(req.Key, req.Value); {
	case errors.Is(err, errFull):
		return nil, rpc.Errorf(rpc.ResourceExhausted, "%v", err)
	case err != nil:
		return nil, rpc.Errorf(rpc.InvalidArgument, "%v", err)
	}
	return &PutReply{}, nil
}

func (s *server) del(_ context.Context, req *DeleteRequest) (*DeleteReply, error) {
	return &DeleteReply{Found: s.table.remove(req.Key)}, nil
}
