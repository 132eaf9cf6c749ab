//go:build !linux

package softnic

import (
	"context"
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
)

// chanWaker is a waker for producers of this process.
type chanWaker struct {
	c    chan struct{}
	done chan struct{}
	once sync.Once
}

func newWaker() (waker, error) {
	return &chanWaker{c: make(chan struct{}, 1), done: make(chan struct{})}, nil
}

func (w *chanWaker) wake() {
	select {
	case w.c <- struct{}{}:
	default:
	}
}

func (w *chanWaker) wait(ctx context.Context) error {
	select {
	case <-w.c:
		return nil
	case <-w.done:
		return driver.ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *chanWaker) waitThread() error { return w.wait(context.Background()) }

func (w *chanWaker) close()  { w.once.Do(func() { close(w.done) }) }
func (w *chanWaker) fd() int { return -1 }
