package qp

import (
	"errors"
	"fmt"
	"net"

	"github.com/ringside-rdma/ringside/internal/driver"
)

// UseStream gives an RC queue pair in Init, of a software NIC, a TCP connection to connect it by: for peers between which neither memory
// nor UDP is to be had. The peer's queue pair gets the other end. What follows is as without, to the step to RTR with an address, which
// then counts for nothing: Connect with a Remote.GID of the peer's, SGIDIndex 0, and the MTU that the peer uses, 4096 at best.
//
// The queue pair takes c over, which must not be used any more, and ends the stream when it is closed or reset. Nothing may be left to
// read or write of what the program has sent on c before. If the stream ends otherwise, or the peer sends on it what is no packet, the
// queue pair goes to Err at once: the oldest request fails with ib.WCRetryExceeded, and StreamErr says why. What TCP takes care of is not
// done twice: AckTimeout and RetryCount only bound how long the peer may say nothing, which is 2 s at least.
//
// If UseStream fails, c stays as it was. The error matches errors.ErrUnsupported for other devices and types of queue pairs, and
// verbs.ErrState in other states.
func (q *QP) UseStream(c *net.TCPConn) error {
	q.modify <- struct{}{}
	defer func() { <-q.modify }()
	if q.life.Closed() {
		return q.err("use_stream", net.ErrClosed)
	}
	u, ok := q.drv.(driver.StreamUser)
	if !ok {
		return q.err("use_stream", fmt.Errorf("%w: only queue pairs of the software NIC are connected by TCP connections", errors.ErrUnsupported))
	}
	return q.err("use_stream", u.UseStream(c))
}

// StreamErr says why the stream of UseStream has ended; nil: it has not, or there is none.
func (q *QP) StreamErr() error {
	if u, ok := q.drv.(driver.StreamUser); ok && !q.life.Closed() {
		return u.StreamErr()
	}
	return nil
}
