package rpc

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"
)

func TestCallCtx(t *testing.T) {
	t.Run("ends once", func(t *testing.T) {
		c := new(callCtx)
		if c.Err() != nil {
			t.Fatal("ended at birth")
		}
		done := c.Done()
		c.end(context.Canceled)
		c.end(context.DeadlineExceeded)
		<-done
		if c.Err() != context.Canceled {
			t.Fatal(c.Err())
		}
	})
	t.Run("done after the end", func(t *testing.T) {
		c := new(callCtx)
		c.end(context.Canceled)
		<-c.Done()
	})
	t.Run("deadline seen without waiting", func(t *testing.T) {
		c := &callCtx{deadline: time.Now().Add(-time.Second)}
		if c.Err() != context.DeadlineExceeded {
			t.Fatal(c.Err())
		}
		if d, ok := c.Deadline(); !ok || d != c.deadline {
			t.Fatal("deadline")
		}
	})
	t.Run("deadline ends waiting", func(t *testing.T) {
		c := &callCtx{deadline: time.Now().Add(10 * time.Millisecond)}
		<-c.Done()
		if c.Err() != context.DeadlineExceeded {
			t.Fatal(c.Err())
		}
	})
	t.Run("derived contexts end with it", func(t *testing.T) {
		c := new(callCtx)
		d, cancel := context.WithCancel(c)
		defer cancel()
		e, cancelE := context.WithTimeout(c, time.Hour)
		cancelE()
		c.end(context.Canceled)
		<-d.Done()
		if !errors.Is(d.Err(), context.Canceled) || e.Err() == nil {
			t.Fatal("derived contexts")
		}
		f, cancelF := context.WithCancel(c) // from one that has ended
		defer cancelF()
		<-f.Done()
	})
	t.Run("concurrent", func(t *testing.T) {
		c := &callCtx{deadline: time.Now().Add(time.Millisecond)}
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				d, cancel := context.WithCancel(c)
				defer cancel()
				_ = c.Err()
				<-d.Done()
				<-c.Done()
			})
		}
		c.end(context.Canceled)
		wg.Wait()
	})
}
