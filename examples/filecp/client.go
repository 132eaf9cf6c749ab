package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/rpc"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// opened is a file of a server: a remoteFile.
type opened struct {
	client *rpc.Client
	conn   *transport.Conn
	reply  *OpenReply
	region transport.Remote
	local  *mr.MR // one chunk
}

// open asks the server behind client for a file.
func open(ctx context.Context, client *rpc.Client, path string) (_ *opened, err error) {
	f := &opened{client: client, conn: client.Conn()}
	if f.reply, err = rpc.Invoke[*OpenReply](ctx, client, methodOpen, &OpenRequest{Path: path}); err != nil {
		return nil, err
	}
	if err := f.region.UnmarshalBinary(f.reply.Region); err != nil {
		return nil, fmt.Errorf("the server's memory: %w", err)
	}
	r := f.reply
	if r.Chunk != chunkBytes || r.Slots != slots || f.region.Len < stagingBytes || r.Size > math.MaxInt64-chunkBytes {
		return nil, errors.New("the server is of another version: its chunks are cut differently")
	}
	f.local, err = mr.Alloc(f.conn.PD(), chunkBytes, ib.AccessLocalWrite)
	return f, err
}

func (f *opened) close() error { return f.local.Close() }

func (f *opened) size() int64       { return int64(f.reply.Size) }
func (f *opened) mode() fs.FileMode { return fs.FileMode(f.reply.Mode).Perm() }

func (f *opened) load(ctx context.Context, k uint64) (int, error) {
	r, err := rpc.Invoke[*LoadReply](ctx, f.client, methodLoad, &LoadRequest{Handle: f.reply.Handle, Chunk: k})
	return int(r.GetBytes()), err
}

// fetch is a one-sided READ: the server's threads have no part in it.
func (f *opened) fetch(ctx context.Context, k uint64, n int) ([]byte, error) {
	if err := f.conn.Read(ctx, f.local.SGE(0, n), f.region, k%slots*chunkBytes); err != nil {
		return nil, err
	}
	return f.local.Bytes()[:n], nil
}

func (f *opened) finish(ctx context.Context) ([]byte, error) {
	r, err := rpc.Invoke[*FinishReply](ctx, f.client, methodFinish, &FinishRequest{Handle: f.reply.Handle})
	return r.GetSha256(), err
}
