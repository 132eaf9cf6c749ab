package transport

import (
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// PostRaw sends bytes as they are, as a broken peer would.
func (c *Conn) PostRaw(b []byte) error {
	s := &c.snd
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wr[0].Opcode, s.wr[0].Inline, s.wr[0].SGEs = ib.OpSend, b, nil
	return c.postLocked(true)
}

// WaitLongForPeers makes connections that cannot send any more wait for the peer's word as good as for ever, from now to the
// end of the test.
func WaitLongForPeers(t *testing.T) {
	was := peerGrace
	peerGrace = time.Hour
	t.Cleanup(func() { peerGrace = was })
}

// Refused reports whether the peer's device has refused a request.
func (c *Conn) Refused() bool { return c.cause.Load() != nil }

// DropBootstrap ends the bootstrap connection without a goodbye, as the death of the process does.
func (c *Conn) DropBootstrap() { c.tcp.Close() }

// Guarded reports whether a waiter sleeps in the completion channel.
func (p *Poller) Guarded() bool { return p.guard.Load() != nil }

// Sleepers is how many waiters sleep, the one in the channel included.
func (p *Poller) Sleepers() int { return int(p.sleepers.Load()) }

// SleepInChannel makes all waiters sleep in the completion channel that can, from now to the end of the test.
func SleepInChannel(t *testing.T) {
	channelAlways = true
	t.Cleanup(func() { channelAlways = false })
}

// HasCorked reports whether messages of the connection were ever kept back to be posted together.
func (c *Conn) HasCorked() bool {
	c.snd.mu.Lock()
	defer c.snd.mu.Unlock()
	return c.snd.cork != nil
}

// Received is how many long messages that came are held in the poller's memory.
func Received(p *Poller) int { return p.received.Stats().InUse }

// Stalled is how many of the connection's messages wait for memory.
func Stalled(c *Conn) int {
	n := make(chan int)
	go c.p.Do(func() { n <- len(c.rcv.stalled) })
	return <-n
}

// Tasks is how many functions wait for Do to run them.
func Tasks(p *Poller) int { return int(p.ntasks.Load()) }

// ForgeCredits makes the connection send n messages more than the peer has room for.
func (c *Conn) ForgeCredits(n uint32) {
	c.snd.mu.Lock()
	defer c.snd.mu.Unlock()
	c.snd.credits += n
}

// EOSCame reports whether the peer's EOS is here, be it before messages that are still being read.
func EOSCame(c *Conn) bool {
	came := make(chan bool)
	go c.p.Do(func() { came <- c.rcv.eof })
	return <-came
}

// Queued reports whether messages wait to be sent.
func (c *Conn) Queued() bool {
	c.snd.mu.Lock()
	defer c.snd.mu.Unlock()
	return c.snd.pend != nil
}

// HoldRevoke makes g look as if a Revoke were under way; false: its memory was registered, and nothing is posted for that.
func HoldRevoke(g *Grant) (release func(), ok bool) {
	if g.revoking == nil {
		return nil, false
	}
	g.revoking <- struct{}{}
	return func() { <-g.revoking }, true
}
