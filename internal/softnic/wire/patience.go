package wire

import (
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// How long answers take with selective repeat, and so how long to wait for one, and with one.

// sent notes that what is before psn was sent for the first time; idle: nothing else was on its way; asked: it will be
// acknowledged at once.
func (s *selective) sent(psn ib.PSN, now time.Duration, idle, asked bool) (long bool) {
	if idle {
		long = now-s.since > patience+4*s.rtt
		s.since, s.backoff = now, 0
	}
	if !s.probing && asked {
		s.probe, s.probeAt, s.probing = psn, now, true
	}
	return long
}

// progress notes that what is before una was acknowledged.
func (s *selective) progress(una ib.PSN, now time.Duration) {
	s.since, s.backoff = now, 0
	if s.probing && distance(s.probe, una) >= 0 {
		if took := now - s.probeAt; s.twice {
			s.took, s.until = took, now+took
		} else {
			s.measured(took)
		}
		s.probing, s.twice = false, false
	}
}

func (s *selective) measured(took time.Duration) {
	if s.rtt == 0 {
		s.rtt = took
	}
	s.rtt += (took - s.rtt) / 8
	s.guess = 0
}

// again notes that una is sent again. If it was sent at since, when nothing else was on its way, and two answers come, the first one is to
// what was sent then, and has taken so long. Without that, a requester that waits for the end of each request, and whose answers take
// longer than timeout, would send each of them twice: what was sent once is the only thing that is measured.
func (s *selective) again(una ib.PSN) {
	switch {
	case una != s.from:
		s.probing, s.twice = false, false
	case !s.twice:
		s.probe, s.probeAt, s.probing, s.twice = una.Add(1), s.since, true, true
	}
}

// repeated notes that something was answered a second time. It may have been the network that has doubled it: this is no measurement.
func (s *selective) repeated(now time.Duration) {
	if now <= s.until {
		s.guess, s.until = max(s.guess, s.took), 0
	}
}

// wonders reports whether something has to be acknowledged at once to measure what there is a guess of.
func (s *selective) wonders() bool { return s.guess > 0 && !s.probing }

// patience is how long an answer may take beyond what it took before. Pollers that pause are late by about that much.
const patience = time.Millisecond

// LateAck is how long an acknowledgement takes at least that the peer does not wait for: longer than a few messages with which one may be
// asked for.
const LateAck = 100 * time.Microsecond

// maxLateRTT is how much longer it takes at most because messages do.
const maxLateRTT = patience / 2

// LateAck is how long an acknowledgement may take that the peer does not wait for: the longer messages take, the later comes one that asks,
// and an acknowledgement costs about what a message does. The peer's patience takes it into account.
func (r *Requester) LateAck() time.Duration {
	d := LateAck + min(2*r.sel.rtt, maxLateRTT)
	if t := r.cfg.AckTimeout; t != 0 { // the peer's is often the same
		d = min(d, max(t/4, LateAck))
	}
	return d
}

// timeout is how long to wait before something is sent again that nobody has asked for. What is only guessed leaves time for another try
// before AckTimeout, which counts as a retry.
func (r *Requester) timeout() time.Duration {
	d := patience + 4*r.sel.rtt
	if g := r.sel.guess; g != 0 {
		d = max(d, min(patience+g, r.cfg.AckTimeout/4*3))
	}
	if r.unasked > 0 && r.sel.backoff == 0 { // the peer takes its time
		d += LateAck + maxLateRTT
	}
	return min(d<<min(r.sel.backoff, 8), r.cfg.AckTimeout)
}

// patient sends the oldest that is missing again, when the time for an answer is over; false: AckTimeout is, too.
func (r *Requester) patient(now time.Duration) bool {
	s := &r.sel
	if now-s.since >= r.cfg.AckTimeout {
		s.since, s.backoff, s.probing, s.twice = now, 0, false, false
		return false
	}
	s.again(r.una)
	if s.backoff++; s.backoff > 1 {
		r.cc.silence(r.end, false)
	}
	n := r.find(r.una)
	if n == r.tail || distance(r.una, r.nxt) <= 0 {
		return false
	}
	s.lost.n, s.repeats.n = 0, 0 // what else is missing is found out again
	if e := r.at(n); e.response() {
		to := e.end()
		if distance(to, r.nxt) < 0 {
			to = r.nxt
		}
		s.top = r.una
		r.holes(to, Timeout)
	} else {
		s.lost.push(span{r.una, 1, Timeout})
		r.inquire(Timeout)
	}
	r.watch(now)
	return true
}
