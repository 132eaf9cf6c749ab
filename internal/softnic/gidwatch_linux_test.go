package softnic

import (
	"errors"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// fakeAnnouncer ends a Wait for each thing that is sent to it; close of c breaks it.
type fakeAnnouncer struct {
	c      chan struct{}
	closed chan struct{}
}

func (a *fakeAnnouncer) Wait(deadline time.Time) error {
	var late <-chan time.Time
	if !deadline.IsZero() {
		late = time.After(time.Until(deadline))
	}
	select {
	case <-late:
		return os.ErrDeadlineExceeded
	case <-a.closed:
		return os.ErrClosed
	case _, ok := <-a.c:
		if !ok {
			return errors.New("broken")
		}
		return nil
	}
}

func (a *fakeAnnouncer) Close() error {
	select {
	case <-a.closed:
	default:
		close(a.closed)
	}
	return nil
}

// Who cannot listen to the system's news, or cannot any more, tries again, and looks meanwhile.
func TestFollowerGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex // guards what follows
		var a *fakeAnnouncer
		tries, looks, works := 0, 0, false
		var next time.Duration
		f := newFollower(func() (announcer, error) {
			mu.Lock()
			defer mu.Unlock()
			if tries++; !works {
				return nil, errors.New("no descriptor")
			}
			a = &fakeAnnouncer{c: make(chan struct{}), closed: make(chan struct{})}
			return a, nil
		}, func(now time.Time) time.Time {
			mu.Lock()
			defer mu.Unlock()
			looks++
			if next == 0 {
				return time.Time{}
			}
			return now.Add(next)
		})
		after := func(d time.Duration, what string, wantTries, wantLooks int) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if tries != wantTries || looks != wantLooks {
				t.Errorf("%s: it has tried %d times to listen, and looked %d times; want %d, %d", what, tries, looks, wantTries, wantLooks)
			}
		}
		after(followRetry/2, "it cannot listen", 1, 0)
		after(2*followRetry, "it cannot listen", 3, 2)
		set := func(f func()) {
			mu.Lock()
			defer mu.Unlock()
			f()
		}
		set(func() { works = true })
		after(followRetry, "it can", 4, 3)
		after(time.Hour, "nothing new", 4, 3)
		a.c <- struct{}{}
		after(settled, "something new", 4, 4)
		set(func() { next = time.Minute })
		a.c <- struct{}{}
		after(settled+2*time.Minute, "it is to look again", 4, 7)
		set(func() { next = 0 })
		after(time.Minute, "the last time", 4, 8)
		close(a.c)
		after(followRetry, "what it listened to has broken", 5, 9)
		a.c <- struct{}{}
		after(settled, "something new", 5, 10)
		f.end()
		select {
		case <-a.closed:
		default:
			t.Error("it has left something open")
		}
	})
}
