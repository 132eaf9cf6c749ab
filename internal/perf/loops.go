package perf

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"time"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The timed loops, one for each test as in perftest. They allocate nothing and make no calls but the library's own:
// everything they touch was prepared by side.connect.

// loadByte and loadWord read memory that a peer, and so possibly another goroutine of this process, writes without any
// synchronisation that Go knows of: that is what one-sided operations do, and what perftest polls on. Not inlined, so
// that no compiler can move the load out of a loop; not instrumented, so that the race detector does not report what
// is meant.
//
//go:norace
//go:noinline
func loadByte(p *byte) byte { return *p }

//go:norace
//go:noinline
func loadWord(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }

// A waiter decides what to do when polling one CQ finds nothing.
type waiter struct {
	s     *side
	cq    *verbs.CQ
	ch    *verbs.CompChannel
	mode  PollMode
	spins uint32 // polls in a row that found nothing
	looks uint32 // of those, how many times idle did something
	since time.Time
	armed bool
	until time.Time // the end of the grace period after a stop
}

// found is to be called after a poll that found something, if any before it did not.
func (w *waiter) found() { w.spins, w.looks = 0, 0 }

// nothing is to be called after each poll that found nothing; it may sleep. An error ends the loop.
func (w *waiter) nothing() error {
	w.spins++
	switch {
	case w.mode == PollEvent || w.spins%adaptiveEvery == 0 && w.mode == PollAdaptive || w.spins%idleEvery == 0:
		return w.idle()
	}
	return nil
}

// starved is nothing for a client that waits for credit: that is written into memory, and raises no event to sleep on.
func (w *waiter) starved() error {
	if w.mode == PollBusy {
		return w.nothing()
	}
	if w.s.halted.Load() || w.s.stopped.Load() {
		return w.idle()
	}
	if w.spins++; w.spins > adaptiveEvery {
		time.Sleep(20 * time.Microsecond)
	}
	return nil
}

func (w *waiter) idle() error {
	if w.s.halted.Load() {
		return errHalted
	}
	if w.s.stopped.Load() {
		now := time.Now()
		if w.until.IsZero() {
			w.until = now.Add(w.s.grace)
		}
		if !now.Before(w.until) {
			return errHalted
		}
		runtime.Gosched()
		return nil
	}
	w.looks++
	switch w.mode {
	case PollBusy:
		// A real preemption point: with more goroutines than processors the peer may be one that waits for this one.
		runtime.Gosched()
		if w.looks > yieldAfter {
			osYield()
		}
		return nil
	case PollAdaptive:
		if w.looks == 1 {
			w.since = time.Now()
			return nil
		}
		if time.Since(w.since) < w.s.spec.Spin {
			return nil
		}
	}
	if !w.armed {
		w.armed = true
		return w.cq.Arm(false) // and poll once more, as Arm's doc says
	}
	w.armed = false
	if _, err := w.ch.Wait(w.s.ctx); err != nil && w.s.ctx.Err() == nil {
		return err
	}
	w.looks = 0
	return nil
}

// yield lets the runtime schedule something else, which there is not: it only has to be seen doing so. The runtime's monitor
// takes what has not for 10 ms for a hog. It takes the processor from it in the middle of a system call, which posting is on
// some devices, and then comes back every 20 us for a while to see whether there is more to take; where both sides poll on
// all the processors that there are, each of these visits interrupts one of them.
func (s *side) yield() {
	runtime.Gosched()
	s.yieldAt = s.clk.after(yieldEvery)
}

// yieldSometimes is for loops that do not look at the clock, after they have posted so many bytes.
func (s *side) yieldSometimes(bytes int) {
	if s.unyielded += 1 + bytes/4096; s.unyielded < 16 {
		return
	}
	s.unyielded = 0
	if s.clk.now() >= s.yieldAt {
		s.yield()
	}
}

// postOne posts the latency loops' work request. Every signalEvery-th asks for a completion; those before it are taken
// while the message is on its way.
func (s *side) postOne() error {
	s.unsignaled++
	if s.unsignaled < s.spec.SignalEvery {
		_, err := s.q.PostSend(s.wr)
		return err
	}
	s.unsignaled = 0
	s.wr[0].Flags |= ib.SendSignaled
	_, err := s.q.PostSend(s.wr)
	s.wr[0].Flags &^= ib.SendSignaled
	if err != nil {
		return err
	}
	for s.owed++; s.owed > s.maxOwed; s.owed-- {
		if err := s.takeOne(&s.swait); err != nil {
			return err
		}
	}
	return nil
}

// takeOne waits for one completion.
func (s *side) takeOne(w *waiter) error {
	for {
		n, err := w.cq.Poll(s.wcs[:1])
		if n > 0 {
			if w.spins != 0 {
				w.found()
			}
			if s.wcs[0].Status != ib.WCSuccess {
				return s.failed(&s.wcs[0])
			}
			return nil
		}
		if err != nil {
			return err
		}
		if err := w.nothing(); err != nil {
			return err
		}
	}
}

// failed explains a completion with an error.
func (s *side) failed(wc *ib.WC) error {
	side := "client"
	if s.server {
		side = "server"
	}
	return fmt.Errorf("%s: %w", side, verbs.CheckWC(fmt.Sprintf("%v of %d bytes", s.spec.Op, s.spec.Size), wc))
}

// refill posts the receives that were used, when there are enough of them for a batch.
func (s *side) refill(l *lane) error {
	l.toPost++
	if l.toPost < s.refillAt {
		return nil
	}
	return s.repost(l, s.refillAt)
}

// over reports whether a latency loop has to end before its next iteration.
func (s *side) over(now uint64) bool {
	return s.stopped.Load() || s.deadline != 0 && now >= s.deadline
}

// pingSend is the client of send lat: SEND, wait for the SEND that answers. It runs up to n iterations and returns how
// many are in s.rec.stamps.
func (s *side) pingSend(n int) (done int, err error) {
	l, stamps := &s.lanes[0], s.rec.stamps
	t := s.clk.now()
	stamps[0] = t
	for done < n && !s.over(t) {
		if err := s.postOne(); err != nil {
			return done, err
		}
		if err := s.takeOne(&s.rwait); err != nil {
			return done, err
		}
		t = s.clk.now()
		done++
		stamps[done] = t
		if t >= s.yieldAt {
			s.yield()
		}
		if err := s.refill(l); err != nil {
			return done, err
		}
	}
	return done, nil
}

// pongSend is the server of send lat. It posts receives again after it has answered, off the critical path.
func (s *side) pongSend() error {
	l := &s.lanes[0]
	for {
		if err := s.takeOne(&s.rwait); err != nil {
			return err
		}
		if err := s.postOne(); err != nil {
			return err
		}
		s.received++
		s.yieldSometimes(s.spec.Size)
		if err := s.refill(l); err != nil {
			return err
		}
	}
}

// awaitByte polls for the last byte of a message.
func (s *side) awaitByte() error {
	for loadByte(s.poll) != s.seq {
		s.rwait.spins++
		if s.port.udp != 0 { // without completions to poll for, nothing else takes packets as soon as they come
			s.pd.Context().Progress()
		}
		if s.rwait.spins%idleEvery == 0 {
			if err := s.rwait.idle(); err != nil {
				return err
			}
		}
	}
	if s.rwait.spins != 0 {
		s.rwait.found()
	}
	return nil
}

// pingWrite is the client of write lat: it writes a message whose last byte is a sequence number, and waits for the
// same number at the end of the message that the server writes back.
func (s *side) pingWrite(n int) (done int, err error) {
	stamps := s.rec.stamps
	t := s.clk.now()
	stamps[0] = t
	for done < n && !s.over(t) {
		*s.last = s.seq
		if err := s.postOne(); err != nil {
			return done, err
		}
		if err := s.awaitByte(); err != nil {
			return done, err
		}
		t = s.clk.now()
		done++
		stamps[done] = t
		if t >= s.yieldAt {
			s.yield()
		}
		s.seq++
	}
	return done, nil
}

// pongWrite is the server of write lat.
func (s *side) pongWrite() error {
	for {
		if err := s.awaitByte(); err != nil {
			return err
		}
		*s.last = s.seq
		if err := s.postOne(); err != nil {
			return err
		}
		s.received++
		s.yieldSometimes(s.spec.Size)
		s.seq++
	}
}

// operate is the client of read lat and atomic lat: post, wait for the completion. With nobody else involved this is the
// shortest of the loops, and what a call costs shows: takeOne is written out.
func (s *side) operate(n int) (done int, err error) {
	stamps, wr, q, cq, wcs := s.rec.stamps, s.wr, s.q, s.scq, s.wcs[:1]
	t := s.clk.now()
	stamps[0] = t
	for done < n && !s.over(t) {
		if _, err := q.PostSend(wr); err != nil {
			return done, err
		}
		for {
			k, err := cq.Poll(wcs)
			if k > 0 {
				break
			}
			if err == nil {
				err = s.swait.nothing()
			}
			if err != nil {
				return done, err
			}
		}
		if wcs[0].Status != ib.WCSuccess {
			return done, s.failed(&wcs[0])
		}
		if s.swait.spins != 0 {
			s.swait.found()
		}
		t = s.clk.now()
		done++
		stamps[done] = t
		if t >= s.yieldAt {
			s.yield()
		}
	}
	return done, nil
}

// stream is the client of every bw and rate test: it keeps up to depth work requests in flight on each QP, in batches,
// until n messages are complete, or those in flight when it is to end. The end may add one message a QP, signaled, that shows
// when the unsignaled ones before it are done.
func (s *side) stream(n int64) (done int64, err error) {
	lanes, spec := s.lanes, &s.spec
	for i := range lanes {
		lanes[i].left = n / int64(len(lanes))
		if int64(i) < n%int64(len(lanes)) {
			lanes[i].left++
		}
	}
	inFlight := int64(0)
	stopping := false
	for {
		if !stopping && (s.expired.Load() || s.stopped.Load()) {
			stopping = true
			for i := range lanes {
				lanes[i].left = 0
				if lanes[i].unsignaled > 0 {
					lanes[i].left = 1
				}
			}
		}
		more, posted, starved := false, false, false
		for i := range lanes {
			l := &lanes[i]
			for l.left > 0 {
				b := int(min(int64(spec.Batch), l.left))
				if l.outstanding == l.unsignaled {
					// No completion is to come that would make room for a whole batch.
					b = min(b, spec.Depth-l.outstanding)
				}
				if l.outstanding+b > spec.Depth {
					more = true
					break
				}
				if !l.mayQueue(b) {
					more, starved = true, true
					break
				}
				if err := s.postBatch(i, l, b); err != nil {
					return done, err
				}
				inFlight += int64(b)
				posted = true
			}
		}
		if inFlight == 0 && !more {
			return done, nil
		}
		k, err := s.scq.Poll(s.wcs)
		if err != nil {
			return done, err
		}
		if k == 0 {
			switch {
			case posted:
			case starved:
				err = s.swait.starved()
			default:
				err = s.swait.nothing()
			}
			if err != nil {
				return done, err
			}
			continue
		}
		if s.swait.spins != 0 {
			s.swait.found()
		}
		for j := range s.wcs[:k] {
			wc := &s.wcs[j]
			if wc.Status != ib.WCSuccess {
				return done, s.failed(wc)
			}
			c := int(uint32(wc.ID))
			lanes[wc.ID>>32].outstanding -= c
			inFlight -= int64(c)
			done += int64(c)
		}
	}
}

// mayQueue reports whether the peer has room for n more SENDs.
func (l *lane) mayQueue(n int) bool {
	if l.credit == nil || l.sent+uint64(n) <= l.limit {
		return true
	}
	// The first credit to arrive is larger than what the spec promised; until then the word is 0.
	l.limit = max(l.limit, loadWord(l.credit))
	return l.sent+uint64(n) <= l.limit
}

// postBatch posts the lane's next b messages. Every signalEvery-th asks for a completion, and the last of a run; the ID
// says which lane it frees how many work requests of.
func (s *side) postBatch(i int, l *lane, b int) error {
	wrs := l.wrs[l.pos : l.pos+b]
	for j := range wrs {
		l.unsignaled++
		l.left--
		if l.unsignaled == s.spec.SignalEvery || l.left == 0 {
			wrs[j].ID = uint64(i)<<32 | uint64(l.unsignaled)
			wrs[j].Flags |= ib.SendSignaled
			l.unsignaled = 0
		} else {
			wrs[j].Flags &^= ib.SendSignaled
		}
	}
	if _, err := l.q.PostSend(wrs); err != nil {
		return err
	}
	l.pos = (l.pos + b) & s.slotMask
	l.outstanding += b
	l.sent += uint64(b)
	s.yieldSometimes(b * s.spec.Size)
	return nil
}

// sink is the server of send bw and rate: it takes messages until it has as many as the client says it has sent.
func (s *side) sink() error {
	window := uint64(max(1, s.spec.recvDepth(true)/4))
	for {
		n, err := s.rcq.Poll(s.wcs)
		if err != nil {
			return err
		}
		if n == 0 {
			if s.received >= s.target.Load() {
				return nil
			}
			if err := s.rwait.nothing(); err != nil {
				return err
			}
			continue
		}
		if s.rwait.spins != 0 {
			s.rwait.found()
		}
		for j := range s.wcs[:n] {
			wc := &s.wcs[j]
			if wc.Status != ib.WCSuccess {
				return s.failed(wc)
			}
			l := &s.lanes[wc.ID]
			if err := s.refill(l); err != nil {
				return err
			}
			if l.creditW != nil && l.posted-l.told >= window {
				if err := s.grant(l); err != nil {
					return err
				}
			}
		}
		s.received += uint64(n)
	}
}

// grant tells the client how many receives have been posted in all.
func (s *side) grant(l *lane) error {
	done := s.creditWCs // not s.wcs, which the caller is walking through
	for {
		n, err := s.scq.Poll(done)
		if err != nil {
			return err
		}
		for j := range done[:n] {
			if done[j].Status != ib.WCSuccess {
				return s.failed(&done[j])
			}
			s.lanes[done[j].ID].outstanding--
		}
		if l.outstanding < creditDepth {
			break
		}
		if err := s.swait.nothing(); err != nil {
			return err
		}
	}
	binary.LittleEndian.PutUint64(l.word, l.posted)
	if _, err := l.q.PostSend(l.creditW); err != nil {
		return err
	}
	l.outstanding++
	l.told = l.posted
	return nil
}
