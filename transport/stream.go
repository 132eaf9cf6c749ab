package transport

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// On the last rung, queue pairs are connected by a TCP connection of their own (qp.QP.UseStream). The dialler makes it, to the address
// that the bootstrap connection has gone to, which is known to let TCP pass. The bootstrap connection stays what it is: who has to say
// goodbye need not know where in the stream of packets that could stand.

// streamToken tells such connections apart. It is random: who knows it has read it in the handshake.
type streamToken [16]byte

// A streamHub gives connections that come to those who wait for them.
type streamHub struct {
	mu      sync.Mutex
	waiting map[streamToken]chan *net.TCPConn
}

// A streamWait is a connection that is to come.
type streamWait struct {
	h     *streamHub
	token streamToken
	ch    chan *net.TCPConn // has room for the one
}

func (h *streamHub) expect() *streamWait {
	w := &streamWait{h: h, ch: make(chan *net.TCPConn, 1)}
	rand.Read(w.token[:]) // never fails
	h.mu.Lock()
	if h.waiting == nil {
		h.waiting = map[streamToken]chan *net.TCPConn{}
	}
	h.waiting[w.token] = w.ch
	h.mu.Unlock()
	return w
}

// cancel ends the wait, and closes a connection that has come and was not taken.
func (w *streamWait) cancel() {
	w.h.mu.Lock()
	delete(w.h.waiting, w.token)
	w.h.mu.Unlock()
	select {
	case t := <-w.ch:
		t.Close()
	default:
	}
}

// pass gives t, on which body has come, to who waits for it.
func (h *streamHub) pass(t net.Conn, body []byte) error {
	var token streamToken
	tcp, ok := t.(*net.TCPConn)
	if !ok || len(body) != len(token) {
		return refuse(RefusedProtocol, nil, "a token of %d bytes, want %d", len(body), len(token))
	}
	copy(token[:], body)
	h.mu.Lock()
	defer h.mu.Unlock()
	ch := h.waiting[token]
	if ch == nil {
		return refuse(RefusedUnreachable, nil, "no handshake here waits for this connection: it must reach the process that the first one has reached, "+
			"which something on the way, such as a load balancer, prevents")
	}
	delete(h.waiting, token) // once
	ch <- tcp
	return nil
}

// acceptStream connects the queue pair by the connection that the peer makes, and tells the peer on it that it has come.
func (c *Conn) acceptStream(ctx context.Context, w *streamWait, mine, theirs *hello) error {
	select {
	case t := <-w.ch:
		if _, err := t.Write(appendFrame(nil, bootReady, nil)); err != nil {
			t.Close()
			return err
		}
		t.SetDeadline(time.Time{})
		return c.useStream(ctx, t, mine, theirs)
	case <-ctx.Done():
		return refuse(RefusedTimeout, ctx.Err(), "the TCP connection of the queue pairs did not come in time")
	}
}

// dialStream connects the queue pair by a connection that the peer waits for, and waits until it has done so, too.
func (c *Conn) dialStream(ctx context.Context, mine, theirs *hello) error {
	d := net.Dialer{}
	if local, ok := c.tcp.LocalAddr().(*net.TCPAddr); ok {
		d.LocalAddr = &net.TCPAddr{IP: local.IP, Zone: local.Zone}
	}
	to := c.tcp.RemoteAddr()
	t, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return refuse(RefusedUnreachable, err, "a second TCP connection to %v, for the queue pairs: %v", to, err)
	}
	stop := context.AfterFunc(ctx, func() { t.SetDeadline(time.Unix(1, 0)) })
	_, err = t.Write(appendFrame(nil, bootStream, theirs.Stream[:]))
	if err == nil {
		_, err = readFrame(t, bootReady)
	}
	if !stop() {
		err = errors.Join(ctx.Err(), err)
	}
	if err != nil {
		t.Close()
		return fmt.Errorf("the second TCP connection to %v, for the queue pairs: %w", to, err)
	}
	t.SetDeadline(time.Time{})
	if err := c.useStream(ctx, t.(*net.TCPConn), mine, theirs); err != nil {
		return err
	}
	_, err = readFrame(c.tcp, bootReady)
	return err
}

// useStream connects the queue pair by t, which it takes over.
func (c *Conn) useStream(ctx context.Context, t *net.TCPConn, mine, theirs *hello) error {
	if err := c.q.UseStream(t); err != nil {
		t.Close()
		return refuse(RefusedResources, err, "%v", err)
	}
	return c.connect(ctx, mine, theirs)
}
