package rpc

import (
	"context"
	"errors"
	"net"

	"github.com/ringside-rdma/ringside/transport"
)

// link is what this package needs of a transport.Conn; tests put a fake in its place.
//
// Handlers run on the goroutine that polls, one at a time for a link.
type link interface {
	// tryAlloc returns a send slot of n bytes, or errWouldBlock.
	tryAlloc(n int) (sendBuf, error)
	// alloc waits for one, and drives the poller meanwhile.
	alloc(ctx context.Context, n int) (sendBuf, error)
	// post sends the first n bytes of b, and takes it back in any case. It never blocks.
	post(b sendBuf, n int) error
	// postMore is post for a frame that others are about to follow: it may go out with them, at the latest with flush.
	postMore(b sendBuf, n int) error
	flush() error
	// discard gives b back unsent.
	discard(b sendBuf)

	// take keeps a received message past handleMessage, until release.
	take(m message) message
	release(m message)

	// wait returns when w is done, or with ctx's error, and drives the poller meanwhile.
	wait(ctx context.Context, w *waiter) error

	setHandler(h linkHandler)
	maxMessage() int
	recvDepth() int // receive slots: messages that can be held before the peer must wait
	remoteAddr() net.Addr

	// poll drives the poller once, and returns how many completions it has handled.
	poll() int

	// between runs f while no handler runs: at once, or on the goroutine that runs one, behind it. It does not wait for that.
	between(f func())
	// closeWrite closes the sending side: what was posted goes out, and then the peer hears of the end. Whoever wants to send more gets
	// errWriteClosed.
	closeWrite()
	// closeGently sends what was posted, and closes then. It blocks, and must not be called from handlers.
	closeGently() error
	// abort closes the link at once; reason is told to the peer if possible. It may be called from handlers.
	abort(reason error)
}

// linkHandler is told what arrives on a link.
type linkHandler interface {
	// handleMessage lends m until it returns.
	handleMessage(m message)
	// handleEOF is called when the peer sends no more messages.
	handleEOF()
	// handleClose is called once when the link has ended.
	handleClose(err error)
}

// sendBuf is a send slot: b is its memory.
type sendBuf struct {
	b []byte
	h any
}

// message is a received message.
type message struct {
	b []byte
	h any
}

var errWouldBlock = errors.New("rpc: no send slot is free")

// errWriteClosed: closeWrite was called.
var errWriteClosed = transport.ErrWriteClosed

// waiter is one pending completion: Done may be called more than once here, and a stale Done is only a wake-up in vain.
type waiter = transport.Waiter
