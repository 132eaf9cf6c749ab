package transport

import "testing"

// Nobody sleeps in the channel whose event another goroutine has taken: the queue is not armed then, whatever was believed
// when it was looked at.
func TestNoSleepBehindAnEvent(t *testing.T) {
	p := &Poller{threads: true, armed: true}
	p.role.Store(1)
	was := channelAlways
	channelAlways = true
	defer func() { channelAlways = was }()
	var w Waiter
	p.fired.Store(true)
	if p.enterChannel(&w) || p.guard.Load() != nil || p.role.Load() != 1 {
		t.Error("a waiter would sleep, and no event come")
	}
	p.fired.Store(false)
	if !p.enterChannel(&w) || p.guard.Load() != &w {
		t.Error("a waiter does not sleep in a channel that is armed")
	}
	channelSleepers.Add(-1)
}
