package wire

import (
	"slices"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What nobody waits for is acknowledged by the way, or a moment later, and never because a timer has come; what somebody waits for,
// at once.
func TestQuiet(t *testing.T) {
	n := newNetwork(t, 1, func(c *Config) { c.Selective, c.AckTimeout = true, 67*time.Millisecond })
	a, b := n.nodes[0], n.nodes[1]
	acks := 0
	n.trace = func(_ string, args ...any) {
		if args[2].(roce.Opcode).Op() == roce.Acknowledge {
			acks++
		}
	}
	send := func(quiet bool) {
		b.recvs++
		a.post(Request{Op: ib.OpSend, Len: 64, Quiet: quiet}, make([]byte, 64))
		a.pump()
	}
	began := n.now
	for i := range 3 { // one after another
		n.after(time.Duration(i)*12*time.Microsecond, func() { send(true) })
	}
	n.run(func() bool { return len(a.done) == 3 })
	if took := n.now - began; acks != 1 || took < LateAck || took > LateAck+100*time.Microsecond {
		t.Errorf("three that nobody waits for: %d acknowledgements, the last after %v", acks, took)
	}
	acks, began = 0, n.now
	send(true)
	send(false)
	n.run(func() bool { return len(a.done) == 5 })
	if took := n.now - began; acks != 1 || took >= LateAck {
		t.Errorf("one that somebody waits for, behind one: %d acknowledgements after %v", acks, took)
	}
	began = n.now
	b.recvs += 2
	a.post(Request{Op: ib.OpSend, Len: 64}, make([]byte, 64))
	a.post(Request{Op: ib.OpSend, Len: 64, Quiet: true}, make([]byte, 64))
	a.pump()
	n.run(func() bool { return len(a.done) == 7 })
	if took := n.now - began; took >= LateAck {
		t.Errorf("one that somebody waits for, in front of one: after %v", took)
	}
	acks = 0
	for range 3 * maxUnasked {
		send(true)
	}
	n.run(func() bool { return len(a.done) == 7+3*maxUnasked })
	if acks < 3 {
		t.Errorf("%d that nobody waits for: %d acknowledgements", 3*maxUnasked, acks)
	}
	if c := a.req.Counters; c.Timeouts != 0 || c.Resent != 0 {
		t.Errorf("%+v", c)
	}
}

// Nor does a READ wait whose response needs the whole window.
func TestQuietBeforeRead(t *testing.T) {
	n := newNetwork(t, 1, func(c *Config) {
		c.Selective, c.AckTimeout, c.Window, c.MaxRdAtomic = true, 67*time.Millisecond, 16, 1
	})
	a := n.nodes[0]
	n.nodes[1].recvs++
	a.post(Request{Op: ib.OpSend, Len: 64, Quiet: true}, make([]byte, 64))
	a.post(Request{Op: ib.OpRDMARead, Len: 16 * simMTU, RKey: roKey}, nil)
	a.pump()
	n.run(n.ended)
	if n.now >= LateAck {
		t.Errorf("it waited until %v", n.now)
	}
}

// Where messages take long, what nobody waits for is acknowledged as much later, but never so late that a timer has come; nor, if timers are
// short, beyond what it is elsewhere. The peer may not have measured anything.
func TestQuietFar(t *testing.T) {
	for _, test := range []struct {
		delay, timeout time.Duration
		late           time.Duration
	}{
		{20 * time.Microsecond, 67 * time.Millisecond, LateAck + 80*time.Microsecond},
		{80 * time.Microsecond, 67 * time.Millisecond, LateAck + 320*time.Microsecond},
		{200 * time.Microsecond, 67 * time.Millisecond, LateAck + patience/2},
		{450 * time.Microsecond, 67 * time.Millisecond, LateAck + patience/2},
		{80 * time.Microsecond, time.Millisecond, 250 * time.Microsecond},
		{20 * time.Microsecond, 300 * time.Microsecond, LateAck},
	} {
		for _, measured := range []bool{true, false} {
			n := newNetwork(t, 1, func(c *Config) { c.Selective, c.AckTimeout = true, test.timeout })
			n.delay = test.delay
			acks := 0
			n.trace = func(_ string, args ...any) {
				if args[2].(roce.Opcode).Op() == roce.Acknowledge {
					acks++
				}
			}
			a, b := n.nodes[0], n.nodes[1]
			for _, x := range n.nodes {
				if x == b || measured {
					n.nodes[1-x.id].recvs++
					x.post(Request{Op: ib.OpSend, Len: 64}, make([]byte, 64))
					x.pump()
					n.run(n.ended)
				}
			}
			if d := b.req.LateAck(); d != test.late {
				t.Errorf("%+v: %v", test, d)
			}
			for _, pause := range []time.Duration{100 * time.Microsecond, 300 * time.Microsecond, 550 * time.Microsecond, 700 * time.Microsecond} {
				const messages = 60
				before := len(a.done)
				acks = 0
				for i := range messages {
					n.after(time.Duration(i)*pause, func() {
						b.recvs++
						a.post(Request{Op: ib.OpSend, Len: 64, Quiet: true}, make([]byte, 64))
						a.pump()
					})
				}
				n.run(func() bool { return len(a.done) == before+messages })
				if most := int(messages*max(pause, LateAck)/max(test.late, pause)) + messages/maxUnasked + 2; acks > most {
					t.Errorf("%+v: %d acknowledgements, %d would do", test, acks, most)
				}
			}
			if c := a.req.Counters; c.Timeouts != 0 || c.Resent != 0 {
				t.Errorf("%+v, measured %v: %+v", test, measured, c)
			}
		}
	}
}

// Requests whose end is waited for are not all sent twice because the answer takes longer than the patience with a peer of which nothing is
// known: how long it takes is found out.
func TestFarFromTheFirst(t *testing.T) {
	for delay, timeout := range map[time.Duration]time.Duration{
		400 * time.Microsecond: 67 * time.Millisecond, 600 * time.Microsecond: 67 * time.Millisecond, time.Millisecond: 4 * time.Millisecond,
		5 * time.Millisecond: 67 * time.Millisecond, 16 * time.Millisecond: 67 * time.Millisecond, 100 * time.Millisecond: time.Second,
	} {
		for what, requests := range map[string][]Request{
			"SEND":                   {{Op: ib.OpSend, Len: 64}},
			"SEND, quiet":            {{Op: ib.OpSend, Len: 64, Quiet: true}},
			"SEND of two packets":    {{Op: ib.OpSend, Len: 2 * simMTU}},
			"READ":                   {{Op: ib.OpRDMARead, Len: 4 * simMTU, RKey: roKey}},
			"several SENDs":          slices.Repeat([]Request{{Op: ib.OpSend, Len: 64}}, 8),
			"several SENDs, quiet":   slices.Repeat([]Request{{Op: ib.OpSend, Len: 64, Quiet: true}}, 8),
			"SEND in front of quiet": {{Op: ib.OpSend, Len: 64}, {Op: ib.OpSend, Len: 64, Quiet: true}},
		} {
			n := newNetwork(t, 1, func(c *Config) { c.Selective, c.AckTimeout, c.RetryCount = true, timeout, 0 })
			n.delay = delay
			a, b := n.nodes[0], n.nodes[1]
			const times = 20
			resent := uint64(0)
			for i := range times {
				for _, r := range requests {
					b.recvs++
					a.post(r, make([]byte, r.Len))
				}
				a.pump()
				n.run(n.ended)
				if i == times-5 {
					resent = a.req.Counters.Resent
				}
			}
			if c := a.req.Counters; a.req.failed || c.Resent != resent {
				t.Errorf("%s, answers after %v: %d packets were sent again in the end, %d until then", what, 2*delay, c.Resent-resent, resent)
			}
			if s := a.req.sel; s.rtt < 2*delay/4 || s.guess != 0 && requests[0].Quiet == false {
				t.Errorf("%s, answers after %v: %v and %v are expected", what, 2*delay, s.rtt, s.guess)
			}
		}
	}
}

// Nor does it end a connection that what is guessed is longer than the time after which a retry counts.
func TestFartherThanTimeout(t *testing.T) {
	n := newNetwork(t, 1, func(c *Config) { c.Selective, c.AckTimeout, c.RetryCount = true, 4*time.Millisecond, 0 })
	n.delay = 2500 * time.Microsecond
	a, b := n.nodes[0], n.nodes[1]
	for range 20 {
		b.recvs++
		a.post(Request{Op: ib.OpSend, Len: 64}, make([]byte, 64))
		a.pump()
		n.run(n.ended)
	}
	if a.req.failed || len(b.got) != 20 {
		t.Errorf("%d messages came: %+v", len(b.got), a.req.Counters)
	}
}

// The timer of a flight goes by what was sent last in it.
func TestTimerOfFlight(t *testing.T) {
	for _, test := range []struct {
		what  string
		quiet []bool
		timer time.Duration
	}{
		{"one that somebody waits for", []bool{false}, patience},
		{"one that nobody does", []bool{true}, patience + LateAck + maxLateRTT},
		{"two, the last waited for", []bool{true, false}, patience},
		{"two, the first waited for", []bool{false, true}, patience},
		{"as many as ask, and one", append(slices.Repeat([]bool{true}, maxUnasked), true), patience + LateAck + maxLateRTT},
	} {
		a := newNetwork(t, 1, func(c *Config) { c.Selective, c.AckTimeout = true, 67*time.Millisecond }).nodes[0]
		for _, quiet := range test.quiet {
			a.post(Request{Op: ib.OpSend, Len: 64, Quiet: quiet}, make([]byte, 64))
		}
		a.pump()
		if d := a.req.Deadline(); d != test.timer {
			t.Errorf("%s: it waits for %v, not %v", test.what, d, test.timer)
		}
	}
}

// What only a timer finds costs about as much time as there is patience, however much is lost: a second answer that comes for another reason
// than a timer that came too early changes little.
func TestPatienceWithLoss(t *testing.T) {
	for _, test := range []struct {
		name     string
		flight   int // requests at a time
		refill   int // there are new ones when only so many are left
		loss     float64
		messages int
		most     time.Duration // for a flight, on average
	}{
		{"one at a time", 1, 0, 0.1, 400, 800 * time.Microsecond},
		{"one at a time, much lost", 1, 0, 0.2, 400, 4 * time.Millisecond},
		{"bursts", 64, 0, 0.05, 200 * 64, 500 * time.Microsecond},
		{"always many", 64, 63, 0.05, 200 * 64, 200 * time.Microsecond},
		{"always many, much lost", 64, 63, 0.2, 100 * 64, 4 * time.Millisecond},
	} {
		for _, quiet := range []bool{false, true} {
			for seed := range uint64(3) {
				n := newNetwork(t, seed, func(c *Config) { c.Selective, c.AckTimeout, c.RetryCount = true, time.Second, 0 })
				n.loss = test.loss
				n.duplicate = 0.01
				a, b := n.nodes[0], n.nodes[1]
				for posted := 0; len(a.done) < test.messages && !a.req.failed; {
					for ; posted < test.messages && posted-len(a.done) < test.flight; posted++ {
						b.recvs++
						a.post(Request{Op: ib.OpSend, Len: 64, Quiet: quiet}, make([]byte, 64))
					}
					a.pump()
					n.run(func() bool {
						return posted < test.messages && posted-len(a.done) <= test.refill || len(a.done) == posted
					})
				}
				each := n.now / time.Duration(test.messages/test.flight)
				if a.req.failed || len(b.got) != test.messages || each > test.most {
					t.Errorf("%s, quiet %v, seed %d: %d of %d came, each in %v: %+v", test.name, quiet, seed, len(b.got), test.messages, each, a.req.Counters)
				}
			}
		}
	}
}
