//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"time"
)

// An interrupt turns signals into the end of a context, so that what was set up is removed: at once while no command runs,
// and else with the second signal or a while after the first. The command gets the first and decides what it means.
type interrupt struct {
	ctx     context.Context
	cancel  context.CancelCauseFunc
	signals chan os.Signal

	mu      sync.Mutex
	running bool
	forward func(os.Signal)
}

// signalGrace is what a command gets to end by itself.
const signalGrace = 10 * time.Second

func watchSignals() *interrupt {
	in := &interrupt{signals: make(chan os.Signal, 4)}
	in.ctx, in.cancel = context.WithCancelCause(context.Background())
	signal.Notify(in.signals, forwarded...)
	go in.watch()
	return in
}

func (in *interrupt) watch() {
	var s os.Signal
	select {
	case s = <-in.signals:
	case <-in.ctx.Done():
		return
	}
	in.mu.Lock()
	running, forward := in.running, in.forward
	in.mu.Unlock()
	if running {
		if forward != nil {
			forward(s)
		}
		select {
		case s = <-in.signals:
		case <-time.After(signalGrace):
		case <-in.ctx.Done():
		}
	}
	in.cancel(fmt.Errorf("stopped by a signal: %v", s))
}

// commandRuns says that there is a command that deals with signals. forward passes one on; nil: it gets them by itself.
func (in *interrupt) commandRuns(forward func(os.Signal)) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.running, in.forward = true, forward
}

func (in *interrupt) Close() {
	signal.Stop(in.signals)
	in.cancel(nil)
}
