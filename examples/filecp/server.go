package main

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"sync"

	"github.com/ringside-rdma/ringside/examples/internal/device"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/rpc"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

const (
	methodOpen   = "filecp/Open"
	methodLoad   = "filecp/Load"
	methodFinish = "filecp/Finish"

	maxSessions = 64 // of a server: each has stagingBytes of registered memory
)

// server lends the files of a folder.
type server struct {
	root *os.Root
	wg   sync.WaitGroup // one a session

	mu       sync.Mutex
	sessions map[uint64]*served
	handles  uint64
}

// served is a session with its memory and its client.
type served struct {
	*session
	mem   *mr.MR
	grant *transport.Grant
	conn  *transport.Conn
	done  chan struct{} // closed by finish
	once  sync.Once
}

// serve lends the files below dir on addr until ctx ends. ready is told the address.
func serve(ctx context.Context, addr string, opts *device.Options, dir string, ready func(net.Addr)) (err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	dev, err := opts.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	l, err := transport.Listen(ctx, addr, dev.Config("filecp server"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	s := &server{root: root, sessions: map[uint64]*served{}}
	srv := rpc.NewServer(nil)
	rpc.Handle(srv, methodOpen, s.open)
	rpc.Handle(srv, methodLoad, s.load)
	rpc.Handle(srv, methodFinish, s.finish)
	ready(l.Addr())
	err = srv.Serve(ctx, l)
	srv.Close()
	s.wg.Wait() // the connections have ended, and so do the sessions
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// status makes a call's error of a file's.
func status(err error) error {
	code := rpc.Internal
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		code = rpc.NotFound
	case errors.Is(err, fs.ErrPermission):
		code = rpc.PermissionDenied
	case errors.Is(err, errChanged):
		code = rpc.Aborted
	case errors.Is(err, errOrder), errors.Is(err, fs.ErrClosed):
		code = rpc.FailedPrecondition
	default:
		if _, ok := errors.AsType[*fs.PathError](err); ok {
			code = rpc.InvalidArgument
		}
	}
	return rpc.Errorf(code, "%v", err)
}

func (s *server) open(ctx context.Context, req *OpenRequest) (*OpenReply, error) {
	conn := rpc.FromContext(ctx).Conn()
	s.mu.Lock()
	s.handles++
	handle := s.handles
	full := len(s.sessions) >= maxSessions
	if !full {
		s.sessions[handle] = nil // a place, until the session is there
	}
	s.mu.Unlock()
	if full {
		return nil, rpc.Errorf(rpc.ResourceExhausted, "%d files are being copied already; try again later", maxSessions)
	}
	sess, err := s.newSession(ctx, conn, req.Path)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		delete(s.sessions, handle)
		return nil, err
	}
	s.sessions[handle] = sess
	s.wg.Go(func() {
		select {
		case <-sess.done:
		case <-conn.Done():
		}
		s.mu.Lock()
		delete(s.sessions, handle)
		s.mu.Unlock()
		sess.end()
	})
	region, err := sess.grant.Remote().MarshalBinary()
	return &OpenReply{
		Handle: handle, Size: uint64(sess.size), Mode: uint32(sess.mode), Chunk: chunkBytes, Slots: slots, Region: region,
	}, err
}

func (s *server) newSession(ctx context.Context, conn *transport.Conn, path string) (_ *served, err error) {
	d := &served{conn: conn, done: make(chan struct{})}
	if d.mem, err = mr.Alloc(conn.PD(), stagingBytes, ib.AccessLocalWrite|ib.AccessRemoteRead|ib.AccessMWBind); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.end()
		}
	}()
	if d.session, err = openSession(s.root, path, d.mem.Bytes()); err != nil {
		return nil, status(err)
	}
	d.grant, err = conn.Grant(ctx, d.mem, 0, stagingBytes, ib.AccessRemoteRead)
	return d, err
}

// end gives everything back: the client's right to read first, the memory last.
func (d *served) end() {
	if d.grant != nil {
		d.grant.Revoke(context.Background())
	}
	if d.session != nil {
		d.session.close()
	}
	d.mem.Close()
}

// find returns a session of the calling client.
func (s *server) find(ctx context.Context, handle uint64) (*served, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.sessions[handle]; d != nil && d.conn == rpc.FromContext(ctx).Conn() {
		return d, nil
	}
	return nil, rpc.Errorf(rpc.FailedPrecondition, "no file is open under this handle")
}

func (s *server) load(ctx context.Context, req *LoadRequest) (*LoadReply, error) {
	d, err := s.find(ctx, req.Handle)
	if err != nil {
		return nil, err
	}
	n, err := d.session.load(req.Chunk)
	return &LoadReply{Bytes: uint32(n)}, status(err)
}

func (s *server) finish(ctx context.Context, req *FinishRequest) (*FinishReply, error) {
	d, err := s.find(ctx, req.Handle)
	if err != nil {
		return nil, err
	}
	sum, err := d.session.finish()
	d.once.Do(func() { close(d.done) })
	return &FinishReply{Sha256: sum}, status(err)
}
