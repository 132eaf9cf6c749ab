package perf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
)

// Time limits of the control connection.
const (
	connectTimeout = 10 * time.Second
	helloTimeout   = 5 * time.Second  // for a peer that has just connected to say hello
	stepTimeout    = 60 * time.Second // for the peer to set a test up: large regions take time to map
)

// ErrPeerGone is matched by the error of a test whose other side has closed the connection or died.
var ErrPeerGone = errors.New("the other side of the measurement has gone")

// A PeerError is a reason that the other side gave for ending the connection.
type PeerError struct{ Text string }

func (e *PeerError) Error() string { return "the other side says: " + e.Text }

// control is the connection between the two sides. A goroutine of its own reads it, so that the peer's end is seen
// while a timed loop runs; send and expect are for one goroutine.
type control struct {
	conn net.Conn
	in   chan message  // closed when nothing more will come; alive has the reason
	done chan struct{} // closed by close
	once sync.Once
	wbuf []byte

	alive context.Context // ends with the connection; its cause is why
	end   context.CancelCauseFunc
}

// near is this host's address that the peer talks to.
func (c *control) near() netip.Addr {
	if a, ok := c.conn.LocalAddr().(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// newControl exchanges hellos on conn and returns the connection and what the peer said about itself. It closes conn
// if it fails.
func newControl(conn net.Conn, self Host) (*control, Host, error) {
	c := &control{conn: conn, in: make(chan message, 4), done: make(chan struct{})}
	c.alive, c.end = context.WithCancelCause(context.Background())
	fail := func(err error) (*control, Host, error) {
		// The peer may be waiting for our hello; the reason serves it better than a closed connection.
		if !isNetError(err) {
			c.sendError(err)
		}
		conn.Close()
		return nil, Host{}, err
	}
	if err := conn.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return fail(err)
	}
	if err := c.send(&hello{version: protoVersion, host: self}); err != nil {
		return fail(err)
	}
	buf := make([]byte, maxFrame)
	m, err := readMessage(conn, buf)
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("no hello within %v: the port does not belong to a ringside perf server: %w", helloTimeout, err)
		} else if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w before it said hello: is the port that of a ringside perf server?", ErrPeerGone)
		}
		return fail(err)
	}
	switch m := m.(type) {
	case *hello:
		if err := conn.SetReadDeadline(time.Time{}); err != nil {
			return fail(err)
		}
		go c.read(buf)
		return c, m.host, nil
	case *wireError:
		conn.Close()
		return nil, Host{}, &PeerError{m.text}
	}
	return fail(fmt.Errorf("a %v frame came instead of a hello", m.frame()))
}

func isNetError(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) || errors.Is(err, io.EOF) || errors.Is(err, ErrPeerGone)
}

// read delivers frames until the connection ends.
func (c *control) read(buf []byte) {
	for {
		m, err := readMessage(c.conn, buf)
		if e, ok := m.(*wireError); ok {
			err = &PeerError{e.text}
		}
		if err != nil {
			switch {
			case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
				err = ErrPeerGone
			case isNetError(err):
				err = fmt.Errorf("%w: %w", ErrPeerGone, err)
			}
			c.end(err)
			close(c.in)
			return
		}
		select {
		case c.in <- m:
		case <-c.done:
			return
		}
	}
}

// send writes one frame.
func (c *control) send(m message) error {
	c.wbuf = appendFrame(c.wbuf[:0], m)
	if err := c.conn.SetWriteDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	if _, err := c.conn.Write(c.wbuf); err != nil {
		// What the peer said before it closed explains more than a failed write.
		return fmt.Errorf("%w: %w", ErrPeerGone, err)
	}
	return nil
}

// sendError tells the peer why the connection ends, if it can.
func (c *control) sendError(err error) { _ = c.send(&wireError{text: err.Error()}) }

// next waits for a frame.
func (c *control) next(ctx context.Context) (message, error) {
	select {
	case m, ok := <-c.in:
		if !ok {
			return nil, context.Cause(c.alive)
		}
		return m, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// expect waits for a frame of M's type.
func expect[M message](ctx context.Context, c *control, limit time.Duration) (M, error) {
	var want M
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no %v frame from the other side within %v", want.frame(), limit))
	defer cancel()
	m, err := c.next(ctx)
	if err != nil {
		return want, err
	}
	got, ok := m.(M)
	if !ok {
		return want, fmt.Errorf("a %v frame came instead of a %v frame", m.frame(), want.frame())
	}
	return got, nil
}

func (c *control) close() {
	c.once.Do(func() {
		close(c.done)
		c.end(net.ErrClosed)
		c.conn.Close()
	})
}
