package softnic

import "context"

// A waker wakes one sleeper; wakes while nobody sleeps are remembered as one.
type waker interface {
	wake()
	// wait returns after a wake, or with an error when ctx ends or the waker is closed.
	wait(ctx context.Context) error
	// waitThread is wait, until there is a wake, with the calling thread asleep.
	waitThread() error
	close()
	// fd is a descriptor that a peer wakes by writing to it, or -1.
	fd() int
}
