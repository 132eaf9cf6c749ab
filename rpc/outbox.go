package rpc

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// outbox holds frames that found no send slot and sends them, in order, from a goroutine of its own that lives only
// while there are any. It is for what must not wait: cancels, rejections, and responses of inline handlers, which run
// on the polling goroutine. It is safe for concurrent use.
type outbox struct {
	link  link
	limit int           // bytes; a push beyond it fails
	stall time.Duration // a frame that waits longer for a slot means that the peer does not take any; 0: wait for ever
	// onStall is called, with no lock held, when a frame could not be sent. The outbox is closed by then.
	onStall func(error)

	waiting atomic.Int32 // frames not sent yet

	mu      sync.Mutex
	frames  [][]byte
	bytes   int
	running bool
	closed  bool
}

// send sends a frame without waiting: at once if there is a send slot, through the outbox if there is none. The frame
// is copied. An error means that the connection is lost, or that the outbox is full: errPeerStalled.
func (o *outbox) send(frame []byte) error {
	if o.waiting.Load() == 0 {
		buf, err := o.link.tryAlloc(len(frame))
		if err == nil {
			copy(buf.b, frame)
			return o.link.post(buf, len(frame))
		}
		if !errors.Is(err, errWouldBlock) {
			return err
		}
	}
	if !o.push(append([]byte(nil), frame...)) {
		return errPeerStalled
	}
	return nil
}

// push takes over frame. It returns false if the outbox is full or closed. One frame it takes whatever its length: a response may be
// longer than the limit.
func (o *outbox) push(frame []byte) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed || o.bytes > 0 && o.bytes+len(frame) > o.limit {
		return false
	}
	o.frames = append(o.frames, frame)
	o.bytes += len(frame)
	o.waiting.Add(1)
	if !o.running {
		o.running = true
		go o.run()
	}
	return true
}

func (o *outbox) run() {
	for {
		o.mu.Lock()
		if len(o.frames) == 0 || o.closed {
			o.waiting.Add(-int32(len(o.frames)))
			o.frames, o.bytes, o.running = nil, 0, false
			o.mu.Unlock()
			return
		}
		frame := o.frames[0]
		o.frames[0] = nil
		o.frames = o.frames[1:]
		o.bytes -= len(frame)
		o.mu.Unlock()

		ctx, cancel := context.Background(), context.CancelFunc(func() {})
		if o.stall > 0 {
			ctx, cancel = context.WithTimeout(ctx, o.stall)
		}
		buf, err := o.link.alloc(ctx, len(frame))
		cancel()
		if err == nil {
			copy(buf.b, frame)
			err = o.link.post(buf, len(frame))
		}
		o.waiting.Add(-1)
		if err != nil {
			o.close()
			o.onStall(err)
		}
	}
}

// close drops what is left.
func (o *outbox) close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
}
