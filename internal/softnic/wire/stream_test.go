package wire

import (
	"fmt"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// tally is a SendQueue and an Output that keep count.
type tally struct {
	packets int
	ended   []ib.WCStatus
	buf     [4096]byte
}

func (s *tally) Gather(_, _ uint32, dst []byte) bool     { return true }
func (s *tally) Scatter(_, _ uint32, src []byte) bool    { return true }
func (s *tally) Complete(_ uint32, st ib.WCStatus)       { s.ended = append(s.ended, st) }
func (s *tally) Packet(*roce.Packet, int) ([]byte, bool) { return s.buf[:], true }
func (s *tally) Commit()                                 { s.packets++ }
func (s *tally) Abort()                                  {}
func ack(psn ib.PSN, syndrome roce.Syndrome) *roce.Packet {
	return &roce.Packet{Opcode: roce.Op(roce.RC, roce.Acknowledge), PSN: psn, Syndrome: syndrome}
}

// On a stream, nothing is sent again because of a timer. A peer that says nothing is given up after as long as on a network, but not
// before what holds up a stream can have passed.
func TestStreamSilence(t *testing.T) {
	for _, c := range []struct {
		timeout time.Duration
		retries uint8
		want    time.Duration
	}{
		{67 * time.Millisecond, 7, streamSilence},
		{time.Second, 7, 8 * time.Second},
		{time.Second, 0, streamSilence},
		{0, 7, 0},
	} {
		s := &tally{}
		r := NewRequester(Config{MTU: 4096, AckTimeout: c.timeout, RetryCount: c.retries, RNRRetry: ib.RNRRetryForever, SendDepth: 16, Selective: true, Stream: true}, s)
		now := time.Second
		for range 3 {
			r.Post(&Request{Op: ib.OpSend, Len: 100})
		}
		r.Pump(now, s)
		// Each word of the peer's gives it the same time again.
		now += c.want - 1
		r.Expire(now)
		r.Pump(now, s)
		r.Receive(ack(0, roce.Ack), now)
		if fmt.Sprint(s.ended) != fmt.Sprint([]ib.WCStatus{ib.WCSuccess}) || s.packets != 3 {
			t.Fatalf("%+v: %v, %d packets", c, s.ended, s.packets)
		}
		at := now + c.want
		if c.want == 0 {
			at = 0
		}
		if r.Deadline() != at {
			t.Errorf("%+v: the peer has time until %v, want %v", c, r.Deadline(), at)
		}
		if c.want == 0 {
			continue
		}
		r.Expire(at)
		r.Pump(at, s)
		if want := []ib.WCStatus{ib.WCSuccess, ib.WCRetryExceeded, ib.WCFlushErr}; fmt.Sprint(s.ended) != fmt.Sprint(want) || s.packets != 3 || !r.Failed() {
			t.Errorf("%+v: %v, want %v; %d packets", c, s.ended, want, s.packets)
		}
	}
}

// What the peer has no receive for is sent again, on a stream, too.
func TestStreamRNR(t *testing.T) {
	s := &tally{}
	r := NewRequester(Config{MTU: 4096, AckTimeout: time.Second, RetryCount: 7, RNRRetry: 1, SendDepth: 16, Selective: true, Stream: true}, s)
	for range 2 {
		r.Post(&Request{Op: ib.OpSend, Len: 100})
	}
	now := time.Second
	r.Pump(now, s)
	rnr := roce.Syndrome(0x20 | 1)
	if _, ok := rnr.IsRNR(); !ok {
		t.Fatal("no RNR NAK")
	}
	r.Receive(ack(0, rnr), now)
	r.Pump(now, s)
	if s.packets != 2 || r.Deadline() <= now {
		t.Fatalf("%d packets, deadline %v", s.packets, r.Deadline())
	}
	now = r.Deadline()
	r.Expire(now)
	r.Pump(now, s)
	if s.packets != 4 || r.Failed() {
		t.Errorf("%d packets after the receiver has had its time", s.packets)
	}
	r.Receive(ack(0, rnr), now)
	if fmt.Sprint(s.ended) != fmt.Sprint([]ib.WCStatus{ib.WCRNRRetryExceeded, ib.WCFlushErr}) {
		t.Errorf("%v", s.ended)
	}
}
