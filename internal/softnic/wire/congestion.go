package wire

import (
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Congestion control (Config.Congestion): how much of Config.Window a Requester uses.
//
// The signal is a mark on packets: FECN of the BTH when they get here, which stands for the ECN mark of a switch, and for a socket
// of the receiver's that has begun to fill. Both say that a queue is longer than it should be, and neither depends on clocks:
// round trips of polled receivers on busy hosts say more about the hosts' schedulers than about queues. So nothing here slows
// down because somebody did not run for a while, and the window, which acknowledgements move, is a bound on the queue by itself.
//
// Between two of this package's (Config.Selective) a Responder counts the packets that came with a mark, and tells in its
// acknowledgements: each has the count in the MSN field (notes), and BECN if there were new ones. One that is lost, or is overtaken, is
// made up for by the next. For responses to READs the Requester sees the marks itself, and asks
// for less. With anybody else a Responder sends a CNP (A17.9.3) instead, and a Requester takes one.
//
// The window follows DCTCP (RFC 8257): it is cut by half the share of marked packets, at most once a round trip, and grows by a
// packet a round trip otherwise, or by as many as were acknowledged until the first cut. Without marks there is only loss to go
// by, and a network that loses one packet in a hundred for other reasons must not be taken for a full one: losses count when they
// are more than lossTolerated of lossSpan packets: of the latest that were acknowledged, or of those that were sent since, if these
// are more. A go-back-N connection does not slow down for losses: it repeats a whole window for each, and who talks that to it
// (hardware, rxe) does not either.
//
// A window below one packet is a pause between packets, as long as the timers are fine enough for it: many senders to one
// receiver would otherwise have one packet each in its queue.
type congestion struct {
	on     bool
	losses bool // loss is a signal, too, and windows below one packet are possible
	most   int  // Config.Window
	window int  // packets that may be on their way, in 1/one
	slow   int  // below it the window grows by what is acknowledged
	share  int  // of packets with marks, smoothed, in 1/one

	// Of this round, which ends when everything before round is acknowledged.
	round   ib.PSN
	acked   int
	marked  int
	limited bool // the window was used

	cut    ib.PSN // the window is not cut again before this is acknowledged
	cutted bool   // cut means something
	lost   int    // of the latest lossSpan packets, in 1/one

	before   int    // the window, before it was cut because nothing was heard; 0: it was not, or rightly
	silent   ib.PSN // what was not sent yet then
	answered bool   // something was heard since

	heard  uint32        // the peer's count of marks, its lower bits (notes)
	echoes bool          // an acknowledgement has had BECN: the peer is of this package, and counts marks
	pause  time.Duration // nothing is sent before; only if the window is less than one packet
	paused bool          // something waits for that
}

const (
	one = 1 << 10

	// initialWindow is how many packets a connection begins with, and begins again with after a pause: what is received in a socket
	// of the size that systems allow, from a few dozen of senders at once.
	initialWindow = 16
	// minWindow bounds how slow a connection becomes; maxPause does in time.
	minWindow = one / 16
	maxPause  = 2 * time.Millisecond
	// shareGain is by how much of the difference the smoothed share of marks follows that of a round: one in so many.
	shareGain = 16

	lossSpan      = 256
	lossTolerated = lossSpan / 32
	// lossWeight: a share of losses cuts the window so many times as much, but no more than half.
	lossWeight = 4
)

func (c *congestion) init(cfg *Config) {
	*c = congestion{on: cfg.Congestion, losses: cfg.Selective, most: cfg.Window * one, share: one, round: cfg.SQPSN}
	c.window, c.slow = c.most, c.most
	if c.losses {
		c.window = min(initialWindow*one, c.most)
	}
}

// packets is how many packets may be on their way.
func (c *congestion) packets() int {
	if !c.on {
		return c.most / one
	}
	return max(1, c.window/one)
}

// restart is called when the connection was idle, so that the window says nothing about the network any more.
func (c *congestion) restart() {
	if c.on && c.losses && c.window > initialWindow*one {
		c.slow = max(c.slow, c.window)
		c.window = initialWindow * one
	}
}

// progress notes that n more packets were acknowledged, all before una; what is before nxt was sent.
func (c *congestion) progress(n int, una, nxt ib.PSN) {
	if !c.on {
		return
	}
	c.acked += n
	if c.losses {
		c.lost -= c.lost * min(n, lossSpan) / lossSpan
	}
	if c.cutted && distance(c.cut, una) >= 0 {
		c.cutted = false
	}
	c.answered = true
	if c.before != 0 && distance(c.silent, una) >= 0 { // all is there, and hardly anything was lost: the peer was away, no more
		c.window, c.slow = max(c.window, c.before), max(c.slow, c.before)
		c.before = 0
	}
	if c.window < c.slow && c.limited && !c.cutted {
		c.window = min(c.window+n*one, c.most)
	}
	if distance(c.round, una) < 0 {
		return
	}
	c.share += (min(c.marked, c.acked)*one/c.acked - c.share) / shareGain
	if c.marked == 0 && !c.cutted && c.limited && c.window >= c.slow {
		// In smaller steps below eight packets: whole ones of many connections would fill the queue at once.
		c.window = min(c.window+max(one/2, min(one, c.window/8)), c.most)
	}
	c.round, c.acked, c.marked, c.limited = nxt, 0, 0, false
}

// mark notes that n more packets have met congestion. nxt is what is sent next. It reports whether the window was cut.
func (c *congestion) mark(n int, nxt ib.PSN) bool {
	if !c.on || n <= 0 {
		return false
	}
	c.marked += n
	c.before = 0 // after a silence, too: it was not for nothing
	if c.cutted {
		return false
	}
	c.shrink(c.share/2, nxt)
	return true
}

// lose notes that n packets are sent again, of open that were sent and are not acknowledged: behind a gap all losses among these are
// found out about before any of them counts as arrived. Packets that somebody has missed were lost, and those that are still not there
// when the peer has answered after a silence; as long as nothing is heard it may be away (see silence). It reports whether the window
// was cut.
func (c *congestion) lose(n, open int, why Reason, nxt ib.PSN) bool {
	if !c.on || !c.losses || why == Timeout && (c.before == 0 || !c.answered) {
		return false
	}
	c.lost = min(c.lost+n*one, lossSpan*one)
	span := max(lossSpan, open)
	if c.lost*lossSpan < lossTolerated*one*span {
		return false
	}
	c.before = 0
	if c.cutted {
		return false
	}
	c.shrink(min(one/2, c.lost*lossWeight/span), nxt)
	c.lost = 0 // these have had their effect
	return true
}

// silence notes that nothing was heard for the time that answers take, repeatedly. Hosts whose processors others have are away for
// as long: if what was sent turns out to have arrived, the window becomes what it was. given up: all of it is sent again, and nobody
// will know.
func (c *congestion) silence(nxt ib.PSN, givenUp bool) {
	if !c.on || !c.losses {
		return
	}
	if c.before == 0 {
		c.before, c.silent = c.window, nxt
	}
	c.answered = false
	if givenUp {
		c.before = 0
	}
	c.shrink(one/2, nxt)
}

// shrink takes a part of the window away, in 1/one.
func (c *congestion) shrink(part int, nxt ib.PSN) {
	least := one
	if c.losses && c.limited { // who sends little waits for nobody's sake
		least = minWindow
	}
	c.window = max(c.window-c.window*part/one, least)
	c.slow = c.window
	c.cut, c.cutted = nxt, true
}

// sent notes that a packet has left. Answers take rtt; 0: unknown.
func (c *congestion) sent(now, rtt time.Duration) {
	if c.on && c.window < one {
		c.pause = now + min(rtt*one/time.Duration(c.window), maxPause)
	}
}

// wait reports whether the next packet has to wait: until c.pause.
func (c *congestion) wait(now time.Duration) bool {
	c.paused = c.on && c.window < one && now < c.pause
	c.limited = c.limited || c.paused
	return c.paused
}

// echo takes what an acknowledgement says of packets that were marked on their way to the peer. It may be news without BECN: the one
// that had it was lost, or comes later, and then says less than is known.
func (r *Requester) echo(p *roce.Packet) {
	r.cc.echoes = r.cc.echoes || p.BECN
	if !r.cfg.Selective || !r.cc.echoes { // who is taken for ours, and is not, counts messages there
		return
	}
	_, marked := notes(p.MSN)
	n := (marked - r.cc.heard) & notesMax
	if n > notesMax/2 {
		return
	}
	r.cc.heard = marked
	r.marks(int(min(n, uint32(r.cfg.Window))))
}

// marks notes that so many packets have met congestion.
func (r *Requester) marks(n int) {
	r.Counters.Marked += uint64(n)
	if r.cc.mark(n, r.end) {
		r.Counters.Slowed++
	}
}

// Notify takes a CNP of a peer that is none of this package's: since it sends one now and then only, for all that is on its way.
func (r *Requester) Notify() {
	if r.failed || r.cfg.Selective {
		return
	}
	r.Counters.Notified++
	r.marks(max(1, int(distance(r.una, r.nxt))))
}

// noticePause is the least time between two CNPs of a connection, as in the NICs that have them.
const noticePause = 50 * time.Microsecond

// notice tells a peer that is none of this package's that its packets have met congestion, if that is due. false: there is no room.
func (r *Responder) notice(now time.Duration, out Output) bool {
	if r.toldAt != 0 && now-r.toldAt < noticePause {
		return true
	}
	r.pkt = roce.Packet{Opcode: roce.CNP, PKey: roce.DefaultPKey, DestQP: r.cfg.DestQP, BECN: true}
	if _, ok := out.Packet(&r.pkt, 0); !ok {
		return false
	}
	out.Commit()
	r.told, r.toldAt = r.marked, now
	r.Counters.Notices++
	return true
}
