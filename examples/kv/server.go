package main

import (
	"context"
	"errors"
	"net"

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
}

// serve runs a server on addr with a table of so many entries, until ctx ends. ready is told the address.
func serve(ctx context.Context, addr string, cfg *transport.Config, entries int, ready func(net.Addr)) (err error) {
	l, err := transport.Listen(ctx, addr, cfg)
	if err != nil {
		return err
	}
	// The region lives as long as connections can reach it, and no longer than the protection domain that it is in.
	defer func() { err = errors.Join(err, l.Close()) }()
	g := geometry{entries}
	mem, err := mr.Alloc(l.Poller().PD(), g.size(), ib.AccessLocalWrite|ib.AccessRemoteRead)
	if err != nil {
		return err
	}
	s := &server{table: newTable(entries, mem.Bytes()), mem: mem}
	defer func() { err = errors.Join(err, mem.Close()) }()

	srv := rpc.NewServer(nil)
	defer srv.Close()
	rpc.Handle(srv, methodOpen, s.open)
	rpc.Handle(srv, methodPut, s.put)
	rpc.Handle(srv, methodDelete, s.del)
	ready(l.Addr())
	if err := srv.Serve(ctx, l); ctx.Err() == nil {
		return err
	}
	return nil
}

// open lets the calling client read the table, for as long as its connection lasts.
func (s *server) open(ctx context.Context, _ *OpenRequest) (*OpenReply, error) {
	g, err := rpc.FromContext(ctx).Conn().Grant(ctx, s.mem, 0, s.table.size(), ib.AccessRemoteRead)
	if err != nil {
		return nil, err
	}
	region, err := g.Remote().MarshalBinary()
	if err != nil {
		return nil, err
	}
	return &OpenReply{Entries: uint32(s.table.n), Region: region}, nil
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
