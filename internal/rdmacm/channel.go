package rdmacm

import (
	"errors"
	"sync"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// A Channel is an open file of the connection manager, with the IDs that were made in it. One goroutine of it takes the
// kernel's events and hands them to the IDs. It is safe for concurrent use; commands of different IDs run side by side.
type Channel struct {
	k      kernel
	pumped chan struct{} // closed when the goroutine has ended
	stop   chan struct{} // closed by Close

	mu    sync.Mutex
	uids  uint64 // given out so far; the kernel sends it back with an ID's events. Zero would mean none, so it starts at one
	ids   map[uint64]*ID
	cause error // why no more IDs can be made; nil while they can
}

// Open opens the kernel's connection manager, and has its module loaded if need be. Where there is none, the error matches
// errors.ErrUnsupported and says what is missing.
//
// The kernel ties the file to the credentials of the process: change user, group or capabilities first.
func Open() (*Channel, error) {
	k, err := openKernel()
	if err != nil {
		return nil, err
	}
	return newChannel(k), nil
}

func newChannel(k kernel) *Channel {
	c := &Channel{k: k, ids: make(map[uint64]*ID), pumped: make(chan struct{}), stop: make(chan struct{})}
	go c.pump()
	return c
}

// Close ends everything that was made in the channel: waits end with net.ErrClosed, connections are torn down, requests
// rejected. It waits for commands that the kernel is still at; of these only Connect over iWARP to a silent peer, and the
// Close of an ID after it, can take long. It may be called again.
func (c *Channel) Close() error {
	if !c.end(errClosed) {
		<-c.pumped
		return nil
	}
	close(c.stop)
	err := c.k.Close()
	<-c.pumped
	return err
}

// Fail ends everything with a reason, as when the device that the channel is for has gone: waits and connections end with it, and no
// new IDs are made. The kernel still has what there is, until it is closed.
func (c *Channel) Fail(cause error) { c.end(cause) }

// end ends all IDs, and lets no new ones be made. It reports whether this is the first time that it is told to close.
func (c *Channel) end(cause error) bool {
	c.mu.Lock()
	if c.cause == errClosed {
		c.mu.Unlock()
		return false
	}
	c.cause = cause
	ids := make([]*ID, 0, len(c.ids))
	for _, id := range c.ids {
		ids = append(ids, id)
	}
	c.mu.Unlock()
	for _, id := range ids {
		id.end(cause)
	}
	return true
}

// NewID makes an ID of a port space.
func (c *Channel) NewID(ps PortSpace) (*ID, error) {
	id, err := c.register(ps)
	if err != nil {
		return nil, &OpError{Op: "create_id", Err: err}
	}
	var resp abi.CMCreateIDResp
	if err := c.k.do(createID(id.uid, ps, &resp)); err != nil {
		c.forget(id.uid)
		return nil, &OpError{Op: "create_id", Err: err}
	}
	id.num = resp.ID
	return id, nil
}

// register makes an ID that does not know its number yet.
func (c *Channel) register(ps PortSpace) (*ID, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause != nil {
		return nil, c.cause
	}
	c.uids++
	id := &ID{
		ch: c, ps: ps, uid: c.uids, refs: 1,
		done: make(chan struct{}), timewait: make(chan struct{}), addrChanged: make(chan struct{}), gone: make(chan struct{}),
	}
	c.ids[id.uid] = id
	return id, nil
}

func (c *Channel) forget(uid uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.ids, uid)
}

// destroy destroys the kernel's ID of a number. Whatever it stood for ends with it: a request is rejected, a connection
// torn down.
func (c *Channel) destroy(num uint32) error {
	if err := c.k.do(destroyID(num)); err != nil && !errors.Is(err, errClosed) {
		return err
	}
	return nil // closing the file has destroyed everything
}

// memoryPause is how long the goroutine waits if the kernel has no memory for an event, which then stays in its queue.
const memoryPause = 10 * time.Millisecond

// pump takes events until the channel is closed, or the kernel refuses to give more: then everything ends with the reason.
func (c *Channel) pump() {
	defer close(c.pumped)
	b := make([]byte, eventSize)
	for {
		err := c.k.event(b)
		switch {
		case err == nil:
			if ev, err := decodeEvent(b); err == nil {
				c.dispatch(ev)
			}
		case errors.Is(err, errClosed):
			return
		case errors.Is(err, syscall.ENOMEM):
			select {
			case <-c.stop:
			case <-time.After(memoryPause):
			}
		default:
			c.end(&OpError{Op: "get_event", Err: err})
			return
		}
	}
}

// dispatch hands an event to its ID. One whose ID is unknown came too late, when the ID had been closed.
func (c *Channel) dispatch(ev *event) {
	c.mu.Lock()
	id := c.ids[ev.uid]
	c.mu.Unlock()
	if ev.kind == EventConnectRequest {
		// The kernel has made a new ID for it, whether anybody wants it or not.
		if id == nil || !id.request(ev) {
			_ = c.destroy(ev.id)
		}
		return
	}
	if id != nil {
		id.handle(ev)
	}
}
