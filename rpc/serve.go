package rpc

import (
	"context"
	"sync"

	"github.com/ringside-rdma/ringside/transport"
)

// Serve accepts connections from l, answers their calls, and drives the pollers of l's connections. It blocks.
//
// When Shutdown or Close was called, Serve closes l, waits for its connections to end, and returns ErrServerClosed. When
// ctx ends, it closes l and cuts its connections off, and returns ctx's error. If accepting fails otherwise, for example
// because l was closed, the connections that are there are served until they end, and Serve returns the error.
func (s *Server) Serve(ctx context.Context, l *transport.Listener) error {
	accept, done, err := s.enter(ctx)
	if err != nil {
		_ = l.Close()
		return err
	}
	defer done()
	var d driven
	defer d.stop()
	d.drive(l.Poller())
	var conns sync.WaitGroup
	for {
		var conn *transport.Conn
		if conn, err = l.Accept(accept); err != nil {
			break
		}
		sc, aerr := s.attach(newConnLink(conn), conn)
		if aerr != nil {
			conn.Abort(aerr)
			conns.Go(func() { _ = conn.Close() })
			continue
		}
		d.drive(conn.Poller())
		conns.Go(func() {
			sc.wait(ctx)
			_ = conn.Close() // it has ended: this lets go of its poller
		})
	}
	_ = l.Close()
	conns.Wait()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case s.draining.Load():
		return ErrServerClosed
	}
	return err
}

// ServeConn answers the calls of one connection, which belongs to the server from here on, and drives its poller. It
// returns when the connection has ended: ctx's error if that ended it, ErrServerClosed after Shutdown or Close, and else
// why it ended, which matches transport.ErrPeerClosed when the client has just closed it.
func (s *Server) ServeConn(ctx context.Context, conn *transport.Conn) error {
	_, done, err := s.enter(ctx)
	defer func() { _ = conn.Close() }() // it has ended by then: this lets go of its poller
	if err != nil {
		conn.Abort(err)
		return err
	}
	defer done()
	sc, err := s.attach(newConnLink(conn), conn)
	if err != nil {
		conn.Abort(err)
		return err
	}
	var d driven
	defer d.stop()
	d.drive(conn.Poller())
	sc.wait(ctx)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case s.draining.Load():
		return ErrServerClosed
	}
	return sc.endErr
}

// enter registers a running Serve. The context that it returns ends with the server as well; done has to be called.
func (s *Server) enter(ctx context.Context) (_ context.Context, done func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.draining.Load() {
		return nil, nil, ErrServerClosed
	}
	ctx, stop := context.WithCancel(ctx)
	s.stops[&stop] = struct{}{}
	s.wg.Add(1)
	return ctx, func() {
		s.mu.Lock()
		delete(s.stops, &stop)
		s.mu.Unlock()
		stop()
		s.wg.Done()
	}, nil
}

// wait returns when the connection has ended; it ends it when ctx does.
func (sc *serverConn) wait(ctx context.Context) {
	select {
	case <-sc.closedCh:
	case <-ctx.Done():
		sc.close(ErrServerClosed)
		<-sc.closedCh
	}
	<-sc.conn.Done() // everything is freed
	if f := sc.srv.cfg.OnConnClosed; f != nil {
		f(sc.conn, sc.endErr)
	}
}

// driven is a set of pollers that goroutines drive.
type driven struct {
	set    map[*transport.Poller]struct{}
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// drive drives p until stop.
func (d *driven) drive(p *transport.Poller) {
	if d.set == nil {
		d.set = make(map[*transport.Poller]struct{})
		d.ctx, d.cancel = context.WithCancel(context.Background())
	}
	if _, ok := d.set[p]; ok || p == nil {
		return
	}
	d.set[p] = struct{}{}
	d.wg.Go(func() { _ = p.Run(d.ctx) }) // it ends with the poller, too: then there is nothing to drive
}

func (d *driven) stop() {
	if d.set != nil {
		d.cancel()
		d.wg.Wait()
	}
}

// Dial connects to a server and returns a client that owns the connection. Nil configurations mean the defaults.
func Dial(ctx context.Context, addr string, tcfg *transport.Config, cfg *ClientConfig) (*Client, error) {
	conn, err := transport.Dial(ctx, addr, tcfg)
	if err != nil {
		return nil, err
	}
	return NewClient(conn, cfg), nil
}

// NewClient returns a client that makes its calls over conn, which belongs to it from here on. A nil cfg means the
// defaults.
func NewClient(conn *transport.Conn, cfg *ClientConfig) *Client {
	return newClient(newConnLink(conn), conn, cfg)
}

// Conn returns the client's connection, for one-sided operations beside calls.
func (c *Client) Conn() *transport.Conn { return c.conn }
