//go:build !linux

package stream

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// sysSocket is the connection itself. There is no waiting without taking something: wait looks again a moment later.
type sysSocket struct {
	conn   *net.TCPConn
	closed atomic.Bool
	until  atomic.Int64 // Unix nanoseconds; 0: no deadline
}

func open(c *net.TCPConn) (system, error) { return &sysSocket{conn: c}, nil }

// atOnce is the time that a call has which does not wait: one that has passed would keep it from doing anything.
const atOnce = time.Microsecond

func outcome(n int, err error) (int, error) {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = nil
	case errors.Is(err, wsaReset):
		err = fmt.Errorf("%w: %w", syscall.ECONNRESET, err)
	}
	return n, err
}

// wsaReset is what Windows has for ECONNRESET, which is another number in package syscall.
const wsaReset = syscall.Errno(10054)

func (y *sysSocket) read(b []byte) (int, error) {
	y.conn.SetReadDeadline(time.Now().Add(atOnce))
	return outcome(y.conn.Read(b))
}

func (y *sysSocket) write(b []byte) (int, error) {
	y.conn.SetWriteDeadline(time.Now().Add(atOnce))
	return outcome(y.conn.Write(b))
}

func (y *sysSocket) setDeadline(t time.Time) {
	if t.IsZero() {
		y.until.Store(0)
	} else {
		y.until.Store(t.UnixNano())
	}
}

func (y *sysSocket) wait(bool) error {
	if y.closed.Load() {
		return net.ErrClosed
	}
	d := time.Millisecond
	if u := y.until.Load(); u != 0 {
		d = min(d, time.Until(time.Unix(0, u)))
	}
	time.Sleep(d)
	return nil
}

func (y *sysSocket) shutdown() {
	y.conn.CloseRead()
	y.conn.CloseWrite()
}

func (y *sysSocket) close() error {
	y.closed.Store(true)
	return y.conn.Close()
}
