package perf

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// Queue pairs over TCP: the server listens at a port of its own for one test, and the client makes a connection for each of its queue
// pairs, which begins with the queue pair's number and PSN. The server's loop begins when all have come; what the client sends until then
// waits in the connections.

// streamHead is what a connection begins with, little-endian: that the peer has heard both shows that it is who it says.
func (q qpAddr) streamHead() (b [8]byte) {
	binary.LittleEndian.PutUint32(b[:], uint32(q.qpn))
	binary.LittleEndian.PutUint32(b[4:], uint32(q.psn))
	return b
}

// dialStreams makes the connections for local's queue pairs.
func dialStreams(ctx context.Context, to string, local *endpoint) (conns []*net.TCPConn, err error) {
	var d net.Dialer
	for _, q := range local.qps {
		c, err := d.DialContext(ctx, "tcp", to)
		if err == nil {
			conns = append(conns, c.(*net.TCPConn))
			head := q.streamHead()
			_, err = c.Write(head[:])
		}
		if err != nil {
			closeAll(conns)
			return nil, fmt.Errorf("a TCP connection for a queue pair: %w", err)
		}
	}
	return conns, nil
}

// acceptStreams waits for the connections of peer's queue pairs.
func acceptStreams(ctx context.Context, l net.Listener, peer *endpoint) ([]*net.TCPConn, error) {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	conns := make([]*net.TCPConn, len(peer.qps))
	for left := len(conns); left > 0; {
		c, err := l.Accept()
		if err != nil {
			closeAll(conns)
			if errors.Is(err, net.ErrClosed) {
				return nil, errHalted
			}
			return nil, err
		}
		var head [8]byte
		c.SetDeadline(time.Now().Add(helloTimeout))
		_, err = io.ReadFull(c, head[:])
		c.SetDeadline(time.Time{})
		taken := false
		for i, q := range peer.qps {
			if err == nil && head == q.streamHead() && conns[i] == nil {
				conns[i], taken = c.(*net.TCPConn), true
				left--
				break
			}
		}
		if !taken {
			c.Close() // a stranger
		}
	}
	return conns, nil
}

func closeAll(conns []*net.TCPConn) {
	for _, c := range conns {
		if c != nil {
			c.Close()
		}
	}
}

// joinHost is the address of a port of the server's where the client has found the server.
func joinHost(control net.Conn, service string) (string, error) {
	host, _, err := net.SplitHostPort(control.RemoteAddr().String())
	if err != nil {
		return "", err
	}
	_, port, err := net.SplitHostPort(service)
	if err != nil {
		return "", fmt.Errorf("the server listens at %q: %w", service, err)
	}
	return net.JoinHostPort(host, port), nil
}

// listenNear listens at a port of the address at which the client has found the server.
func listenNear(control net.Conn) (net.Listener, error) {
	host, _, err := net.SplitHostPort(control.LocalAddr().String())
	if err != nil {
		return nil, err
	}
	return net.Listen("tcp", net.JoinHostPort(host, "0"))
}
