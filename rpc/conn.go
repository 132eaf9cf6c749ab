package rpc

import (
	"context"
	"errors"
	"net"

	"github.com/ringside-rdma/ringside/transport"
)

// connLink is a link over a transport.Conn.
type connLink struct {
	conn    *transport.Conn
	poller  *transport.Poller
	handler linkHandler
}

func newConnLink(c *transport.Conn) *connLink { return &connLink{conn: c, poller: c.Poller()} }

func (l *connLink) tryAlloc(n int) (sendBuf, error) {
	b, err := l.conn.TryAlloc(n)
	if err != nil {
		if errors.Is(err, transport.ErrWouldBlock) {
			err = errWouldBlock
		}
		return sendBuf{}, err
	}
	return sendBuf{b.Bytes(), b}, nil
}

func (l *connLink) alloc(ctx context.Context, n int) (sendBuf, error) {
	b, err := l.conn.Alloc(ctx, n)
	if err != nil {
		return sendBuf{}, err
	}
	return sendBuf{b.Bytes(), b}, nil
}

func (l *connLink) post(b sendBuf, n int) error { return l.conn.Post(b.h.(*transport.SendBuf), n) }
func (l *connLink) postMore(b sendBuf, n int) error {
	return l.conn.PostMore(b.h.(*transport.SendBuf), n)
}
func (l *connLink) flush() error      { return l.conn.Flush() }
func (l *connLink) discard(b sendBuf) { b.h.(*transport.SendBuf).Discard() }

func (l *connLink) take(m message) message {
	t := m.h.(*transport.Message).Take()
	return message{t.Bytes(), t}
}

func (l *connLink) release(m message) { m.h.(*transport.Message).Release() }

func (l *connLink) wait(ctx context.Context, w *waiter) error { return l.poller.Wait(ctx, w) }
func (l *connLink) poll() int                                 { return l.poller.Poll() }
func (l *connLink) maxMessage() int                           { return l.conn.MaxMessage() }
func (l *connLink) recvDepth() int                            { return l.conn.RecvDepth() }
func (l *connLink) remoteAddr() net.Addr                      { return l.conn.RemoteAddr() }

func (l *connLink) setHandler(h linkHandler) {
	l.handler = h
	l.conn.SetHandler(l)
}

func (l *connLink) between(f func())   { l.poller.Do(f) }
func (l *connLink) closeWrite()        { _ = l.conn.CloseWrite() } // it has failed otherwise, which the handler hears of
func (l *connLink) closeGently() error { return l.conn.Close() }
func (l *connLink) abort(reason error) { l.conn.Abort(reason) }

// HandleMessage implements transport.Handler.
func (l *connLink) HandleMessage(_ *transport.Conn, m *transport.Message) {
	if _, ok := m.Imm(); ok {
		l.handler.handleMessage(message{}) // an immediate value is no frame: the header check refuses it
		return
	}
	l.handler.handleMessage(message{m.Bytes(), m})
}

// HandleClose implements transport.Handler.
func (l *connLink) HandleClose(_ *transport.Conn, err error) { l.handler.handleClose(err) }

// HandleEOF is told that the peer sends no more.
func (l *connLink) HandleEOF(*transport.Conn) { l.handler.handleEOF() }
