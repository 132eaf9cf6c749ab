package wire

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// bounds are what findings must be within.
type bounds struct{ fairness, goodput, loss, p99 float64 }

func (b bounds) check(r *findings) error {
	if jain(r.shares) < b.fairness || r.goodput < b.goodput || r.loss > b.loss || b.p99 > 0 && r.p99 > b.p99 {
		return fmt.Errorf("%v; want %+v", r, b)
	}
	return nil
}

// both runs with congestion control and without: with it the bounds hold, without it they do not, for any of the seeds.
func both(t *testing.T, b bounds, run func(seed uint64, off bool) *findings) {
	t.Helper()
	for seed := range uint64(3) {
		r := run(seed, false)
		if err := b.check(r); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		was := run(seed, true)
		if b.check(was) == nil {
			t.Errorf("seed %d: without congestion control, too: %v", seed, was)
		}
		t.Logf("seed %d: %v; without: %v", seed, r, was)
	}
}

func same(n int, c flowConfig) (all []flowConfig) {
	for range n {
		all = append(all, c)
	}
	return all
}

// Many to one, through a link that marks packets: the link is used, everybody gets a share, the queue is short and nothing is lost.
func TestIncast(t *testing.T) {
	for _, op := range []ib.Opcode{ib.OpRDMAWrite, ib.OpRDMARead} {
		for _, n := range []int{2, 8, 32} {
			t.Run(fmt.Sprint(op, n), func(t *testing.T) {
				want := bounds{fairness: 0.85, goodput: 0.95, loss: 0.001, p99: 64}
				if op == ib.OpRDMARead {
					want.goodput = 0.9 // responses of one packet have headers that others have not
				}
				both(t, want, func(seed uint64, off bool) *findings {
					f := newFabric(t, seed, bottleneckOf(256, 20), same(n, flowConfig{delay: 10 * time.Microsecond, op: op, size: 32, off: off})...)
					f.run(6 * time.Millisecond)
					return f.measure(20 * time.Millisecond)
				})
			})
		}
	}
}

// The same where nobody marks: losses are all that there is to go by.
func TestIncastDropTail(t *testing.T) {
	for _, n := range []int{2, 8, 32} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			both(t, bounds{fairness: 0.65, goodput: 0.9, loss: 0.2}, func(seed uint64, off bool) *findings {
				f := newFabric(t, seed, bottleneckOf(256, 0), same(n, flowConfig{delay: 10 * time.Microsecond, op: ib.OpRDMAWrite, size: 32, off: off})...)
				f.run(4 * time.Millisecond)
				return f.measure(20 * time.Millisecond)
			})
		})
	}
}

// Those who come later get their share.
func TestNewcomers(t *testing.T) {
	both(t, bounds{fairness: 0.9, goodput: 0.95, loss: 0.001, p99: 64}, func(seed uint64, off bool) *findings {
		old := flowConfig{delay: 10 * time.Microsecond, op: ib.OpRDMAWrite, size: 32, off: off}
		young := old
		young.start = 10 * time.Millisecond
		f := newFabric(t, seed, bottleneckOf(256, 20), append(same(3, old), same(3, young)...)...)
		f.run(14 * time.Millisecond)
		return f.measure(20 * time.Millisecond)
	})
}

// Connections with eight times the distance get less, but not nothing.
func TestAsymmetricDistances(t *testing.T) {
	both(t, bounds{fairness: 0.6, goodput: 0.95, loss: 0.001, p99: 64}, func(seed uint64, off bool) *findings {
		near := flowConfig{delay: 5 * time.Microsecond, op: ib.OpRDMAWrite, size: 32, off: off}
		far := near
		far.delay = 40 * time.Microsecond
		f := newFabric(t, seed, bottleneckOf(256, 20), append(same(2, near), same(2, far)...)...)
		f.run(6 * time.Millisecond)
		return f.measure(20 * time.Millisecond)
	})
}

// Short messages do not wait long behind those who send all that they can.
func TestMiceBehindElephants(t *testing.T) {
	took := func(seed uint64, off bool) (p50, p99 time.Duration) {
		big := flowConfig{delay: 10 * time.Microsecond, op: ib.OpRDMAWrite, size: 32, off: off}
		mouse := flowConfig{delay: 10 * time.Microsecond, op: ib.OpRDMAWrite, size: 1, every: 100 * time.Microsecond, off: off}
		f := newFabric(t, seed, bottleneckOf(256, 20), append(same(4, big), mouse)...)
		f.run(6 * time.Millisecond)
		all := f.measure(20 * time.Millisecond).took[4]
		if len(all) < 100 {
			t.Logf("seed %d, off %v: only %d short messages ended", seed, off, len(all))
			return time.Hour, time.Hour
		}
		return all[len(all)/2], all[len(all)*99/100]
	}
	for seed := range uint64(3) {
		p50, p99 := took(seed, false)
		if p50 > 60*time.Microsecond || p99 > 120*time.Microsecond {
			t.Errorf("seed %d: p50 %v, p99 %v", seed, p50, p99)
		}
		if a, b := took(seed, true); a <= 60*time.Microsecond && b <= 120*time.Microsecond {
			t.Errorf("seed %d: without congestion control, too: %v, %v", seed, a, b)
		}
	}
}

// Losses that come of no congestion do not slow a connection down: neither for their own sake, nor because what was lost is waited
// for, once it takes long to come (the queue of the link is longer than the window).
func TestRandomLoss(t *testing.T) {
	for _, op := range []ib.Opcode{ib.OpRDMAWrite, ib.OpRDMARead} {
		for seed := range uint64(3) {
			goodput := func(loss float64, off bool) float64 {
				f := newFabric(t, seed, bottleneckOf(2000, 0), flowConfig{delay: 20 * time.Microsecond, op: op, size: 60, loss: loss, off: off})
				f.run(4 * time.Millisecond)
				got := f.measure(30 * time.Millisecond).goodput
				if c := &f.flows[0].nodes[0].req.Counters; c.Slowed > 1 {
					t.Errorf("%v, seed %d: %.0f %% of losses make the window smaller again and again: %+v", op, seed, 100*loss, *c)
				}
				return got
			}
			for _, off := range []bool{false, true} {
				lossy, clean := goodput(0.01, off), goodput(0, off)
				t.Logf("%v, seed %d, congestion control off %v: %.2f of %.2f", op, seed, off, lossy, clean)
				if lossy < 0.9*clean && op == ib.OpRDMAWrite || lossy < 0.75*clean { // READs are asked for in parts, of which not many can wait
					t.Errorf("%v, seed %d, congestion control off %v: 1 %% of losses leave %.2f of %.2f", op, seed, off, lossy, clean)
				}
			}
		}
	}
}

// The request of a READ is one packet, however many it asks for: that it is lost now and then does not slow the READs down.
func TestLostReadRequests(t *testing.T) {
	n := newNetwork(t, 1, func(c *Config) {
		c.Selective, c.Congestion, c.AckTimeout = true, true, 67*time.Millisecond
		c.MaxRdAtomic, c.MaxDestRdAtomic = 16, 16
	})
	a, b := n.nodes[0], n.nodes[1]
	const reads, size = 1000, 60 * simMTU
	asked, lost := 0, 0
	n.drop = func(from *node, p *roce.Packet) bool {
		if p.Opcode.Op() != roce.ReadRequest {
			return false
		}
		if asked++; asked%100 != 0 {
			return false
		}
		lost++
		return true
	}
	for posted := 0; len(a.done) < reads; {
		for ; posted < reads && a.req.Queued() < 32; posted++ {
			a.post(Request{Op: ib.OpRDMARead, Len: size, RKey: roKey}, nil)
		}
		a.pump()
		n.run(func() bool { return a.req.Queued() < 32 && posted < reads || len(a.done) == reads })
	}
	for i, st := range a.done {
		if st != ib.WCSuccess || !bytes.Equal(a.sinks[i], b.readOnly[:size]) {
			t.Fatalf("READ %d ends with %v, or other bytes", i, st)
		}
	}
	if c := &a.req.Counters; c.Slowed != 0 || c.Again[SequenceNAK] < uint64(lost) || lost < 9 {
		t.Errorf("%d requests of READs were lost, a window of %d, %+v", lost, a.req.cc.packets(), *c)
	}
}

// What happens follows from the seed.
func TestFabricRepeats(t *testing.T) {
	run := func() string {
		f := newFabric(t, 9, bottleneckOf(100, 20), same(4, flowConfig{delay: 10 * time.Microsecond, op: ib.OpRDMAWrite, size: 32, loss: 0.01})...)
		return fmt.Sprint(f.measure(5*time.Millisecond), f.flows[3].nodes[0].req.Counters)
	}
	if a, b := run(), run(); a != b {
		t.Errorf("%s\n%s", a, b)
	}
}

// With a peer that is none of ours, CNPs are sent for marked packets, now and then, and whoever gets one slows down.
func TestNotices(t *testing.T) {
	n := newNetwork(t, 1, func(c *Config) { c.Congestion = true })
	n.link = bottleneckOf(1000, 20)
	a, b := n.nodes[0], n.nodes[1]
	for range 60 {
		a.post(Request{Op: ib.OpRDMAWrite, Len: 1 << 13, RKey: memKey}, payloadOf(1<<13))
	}
	a.pump()
	n.run(n.ended)
	c, d := &a.req.Counters, &b.resp.Counters
	if slices.ContainsFunc(a.done, func(st ib.WCStatus) bool { return st != ib.WCSuccess }) || c.Resent != 0 {
		t.Errorf("%v, %+v", a.done, *c)
	}
	if d.Marked == 0 || d.Notices == 0 || d.Notices > uint64(n.now/noticePause)+1 || c.Notified != d.Notices || c.Slowed == 0 || a.req.cc.packets() >= defaultWindow {
		t.Errorf("after %v: %+v, %+v, a window of %d", n.now, *c, *d, a.req.cc.packets())
	}
}

// READs that a peer of none of ours answers come in the parts that were asked for, however the window has changed since, and are asked for again in
// the same, which is all that such a peer takes.
func TestReadsWhileSlowed(t *testing.T) {
	for seed := range uint64(20) {
		n := newNetwork(t, seed, func(c *Config) { c.Congestion = true })
		a, b := n.nodes[0], n.nodes[1]
		n.loss = []float64{0, 0.01}[seed%2]
		const reads, size = 30, 50 * simMTU
		parts := map[ib.PSN]ib.PSN{} // ends of what was asked for, by its beginning
		first := a.req.nxt
		n.drop = func(from *node, p *roce.Packet) bool {
			switch {
			case from == b && p.Opcode.IsResponse() && n.r.IntN(20) == 0:
				p.FECN = true
			case from == b && n.r.IntN(40) == 0:
				a.req.Notify()
			case p.Opcode.Op() == roce.ReadRequest:
				begins := ib.PSN(distance(first, p.PSN))
				ends := begins + ib.PSN(packets(p.Len, simMTU))
				for x, y := range parts {
					if begins >= x && begins < y && ends != y {
						t.Errorf("seed %d: packets %d to %d are asked for, and %d to %d were", seed, begins, ends, x, y)
					}
				}
				if _, again := parts[begins]; !again {
					parts[begins] = ends
				}
			}
			return false
		}
		for i := range reads {
			a.post(Request{Op: ib.OpRDMARead, Len: size, RKey: roKey, Addr: uint64(i)}, nil)
		}
		a.pump()
		n.run(n.ended)
		for i, st := range a.done {
			if st != ib.WCSuccess || !bytes.Equal(a.sinks[i], b.readOnly[i:][:size]) {
				t.Fatalf("seed %d: READ %d ends with %v, or other bytes", seed, i, st)
			}
		}
		if a.req.Counters.Slowed == 0 {
			t.Errorf("seed %d: %+v", seed, a.req.Counters)
		}
	}
}

// A peer that was away for some timeouts, and then takes what had come meanwhile, is no congestion: once all that was sent before has
// been acknowledged, the window is what it was. If that was lost, or has met congestion, it is.
func TestAway(t *testing.T) {
	for _, op := range []ib.Opcode{ib.OpRDMAWrite, ib.OpRDMARead} {
		for _, c := range []struct {
			what         string
			lost, marked bool
		}{{what: "away"}, {"lost", true, false}, {"marked", false, true}} {
			t.Run(fmt.Sprint(op, " ", c.what), func(t *testing.T) { away(t, op, c.lost, c.marked) })
		}
	}
}

func away(t *testing.T, op ib.Opcode, lost, marked bool) {
	n := newNetwork(t, 1, func(c *Config) {
		c.Selective, c.Congestion, c.AckTimeout = true, true, 67*time.Millisecond
		c.MaxRdAtomic, c.MaxDestRdAtomic = 16, 16
	})
	a, b := n.nodes[0], n.nodes[1]
	var act func()
	act = func() {
		for a.req.Queued() < 60 {
			a.post(Request{Op: op, Len: 1 << 13, RKey: memKey}, payload[:1<<13])
		}
		a.pump()
		n.after(10*time.Microsecond, act)
	}
	const leaves, back = 2 * time.Millisecond, 40 * time.Millisecond
	before, smallest := 0, 1<<30
	var sent ib.PSN // before it came back
	n.drop = func(from *node, p *roce.Packet) bool {
		if (from == a) == (op == ib.OpRDMARead) || n.now < leaves || n.now >= back {
			return false
		}
		if before == 0 {
			before = a.req.cc.packets()
		}
		smallest, sent = min(smallest, a.req.cc.packets()), a.req.end
		if late := *p; !lost {
			late.Payload, late.FECN = bytes.Clone(p.Payload), marked
			n.after(back-n.now, func() {
				to := b
				if from == b {
					to = a
				}
				to.takes(&late)
			})
		}
		return true
	}
	act()
	n.run(func() bool { return n.now > back && distance(sent, a.req.una) >= 0 })
	if c, after := &a.req.Counters, a.req.cc.packets(); before < 100 || smallest > before/2 || (lost || marked) != (after <= before/2) || !(lost || marked) && after < before || c.Timeouts < 4 {
		t.Errorf("a window of %d, then %d, in the end %d; %+v", before, smallest, after, *c)
	}
}

// What is heard after a silence decides what it was: marks, and more losses than are tolerated, are congestion; packets that were sent
// again because nothing was heard are not.
func TestSilenceWithCongestion(t *testing.T) {
	for _, c := range []struct {
		what     string
		hears    func(c *congestion)
		restored bool
	}{
		{"nothing", func(c *congestion) {}, true},
		{"a mark", func(c *congestion) { c.mark(1, 500) }, false},
		{"some losses", func(c *congestion) { c.lose(lossTolerated-1, 0, SequenceNAK, 500) }, true},
		{"losses", func(c *congestion) {
			for range lossTolerated {
				c.lose(1, 0, SequenceNAK, 500)
			}
		}, false},
		{"what is sent again unanswered", func(c *congestion) { c.lose(2*lossTolerated, 0, Timeout, 500) }, true},
		{"what is missing when it has answered", func(c *congestion) { c.progress(1, 1, 600); c.lose(lossTolerated, 0, Timeout, 500) }, false},
		{"a mark, and silence again", func(c *congestion) { c.mark(1, 500); c.silence(500, false) }, false},
	} {
		cfg := Config{Selective: true, Congestion: true}
		cfg.fill()
		var cc congestion
		cc.init(&cfg)
		cc.window, cc.slow, cc.limited = 200*one, 200*one, true
		cc.silence(400, false)
		cc.silence(450, false)
		c.hears(&cc)
		for una := range ib.PSN(600) {
			cc.progress(1, una+1, 600)
			if una+1 == 500 {
				break
			}
		}
		if restored := cc.packets() >= 200; restored != c.restored {
			t.Errorf("%s: a window of %d", c.what, cc.packets())
		}
	}
}

// However acknowledgements overtake each other, and some are lost, a Requester hears of each marked packet once.
func TestEchoesOutOfOrder(t *testing.T) {
	for seed := range uint64(10) {
		n := newNetwork(t, seed, func(c *Config) { c.Selective, c.Congestion, c.AckTimeout = true, true, 67*time.Millisecond })
		n.link, n.loss = bottleneckOf(1000, 8), 0.01
		a, b := n.nodes[0], n.nodes[1]
		n.drop = func(from *node, p *roce.Packet) bool {
			if from == a || !p.Syndrome.IsAck() || n.r.IntN(3) == 0 {
				return false
			}
			if late := *p; n.r.IntN(4) != 0 {
				n.after(time.Duration(n.r.IntN(200))*time.Microsecond, func() { a.takes(&late) })
			}
			return true
		}
		const messages = 400
		posted := 0
		var act func()
		act = func() {
			for ; posted < messages && a.req.Queued() < 60; posted++ {
				a.post(Request{Op: ib.OpRDMAWrite, Len: 1 << 12, RKey: memKey}, payload[:1<<12])
			}
			a.pump()
			if posted < messages {
				n.after(10*time.Microsecond, act)
			}
		}
		act()
		n.run(func() bool { return posted == messages && n.ended() })
		n.link.mark, n.loss, n.drop = 0, 0, nil
		a.post(Request{Op: ib.OpRDMAWrite, Len: 8, RKey: memKey}, payload[:8]) // whose acknowledgement is the last word
		a.pump()
		n.run(n.ended)
		if was, heard := b.resp.Counters.Marked, a.req.Counters.Marked; was < 100 || heard != was {
			t.Errorf("seed %d: %d packets came with a mark, the requester has heard of %d", seed, was, heard)
		}
	}
}

// Whatever a peer says of marks, the connection goes on.
func TestStrangeEchoes(t *testing.T) {
	r := NewRequester(Config{Selective: true, Congestion: true, MTU: simMTU, SendDepth: 4}, nil)
	for i := range uint32(1000) {
		r.cc.progress(1, r.una, r.nxt)
		r.cc.cutted = false
		r.marks(int(min((i*0x9e3779)&0xffffff, uint32(r.cfg.Window))))
		if r.cc.window < minWindow || r.cc.packets() < 1 || r.cc.share < 0 || r.cc.share > one {
			t.Fatalf("%+v", r.cc)
		}
	}
}
