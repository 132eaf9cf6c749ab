package observe

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Session captures NICs, as they come and go. Run does all of it; the fields are set before.
type Session struct {
	// Snap is how much of a packet is kept, bytes from the BTH on, and Ring the length of each NIC's ring, bytes.
	Snap, Ring int
	// Select says which NICs are meant, nil: all. What is done through memory is captured at the initiator's NIC, and so all NICs are
	// listened to, and what concerns those that are meant is kept.
	Select func(*Source) bool
	Filter Filter
	// Count ends the session after so many packets, unless it is 0.
	Count uint64
	// Calls, if it is not nil, brings the NICs, and no others are looked for. The session ends when it is closed and all have ended.
	Calls <-chan *Source
	// Sink takes packets, in the order of their times as far as they come together.
	Sink Sink
	// Attached, if it is not nil, is called for each NIC that is meant, when its packets are being captured.
	Attached func(*Source)
	// Warn is called for what went wrong with one NIC.
	Warn func(error)

	nics     []*captured
	known    map[ib.GID]bool
	selected map[netip.Addr]bool // GIDs
	batch    []Seen
	packets  uint64
}

// A Sink takes captured packets. It may not keep what it is given.
type Sink interface {
	Packet(*Seen) error
	// Flush is called when no more packets are there for the moment.
	Flush() error
	// Finish is called for a NIC that has ended, or when the session does.
	Finish(s *Source, lost uint64) error
}

// Seen is a packet of a NIC.
type Seen struct {
	Record
	Source *Source
	Lost   uint64 // packets of this NIC that were lost since its last one
}

// captured is a NIC of a session.
type captured struct {
	*Source
	meant bool
	lost  uint64 // that the Sink was told of
}

const (
	// lookEvery is how often new NICs are looked for, and idle how long nothing is done when there is nothing.
	lookEvery = 100 * time.Millisecond
	idle      = 2 * time.Millisecond
	// perTurn bounds what is read of a NIC before the others have their turn.
	perTurn = 4096
)

var errEnough = errors.New("enough")

// Packets returns how many packets the Sink was given.
func (s *Session) Packets() uint64 { return s.packets }

// Run captures until the context ends, or the session has nothing more to do. Only what the Sink says ends it with an error.
func (s *Session) Run(ctx context.Context) error {
	s.known, s.selected = map[ib.GID]bool{}, map[netip.Addr]bool{}
	defer func() {
		for _, n := range s.nics {
			n.Close()
		}
	}()
	var looked time.Time
	calls, ended := s.Calls, false
	for !ended {
		ended = ctx.Err() != nil // one more turn, for what has been sent until now
		if s.Calls == nil && time.Since(looked) >= lookEvery {
			if err := s.look(ctx); err != nil {
				return err
			}
			looked = time.Now()
		}
		for more := calls != nil; more; {
			select {
			case n, ok := <-calls:
				if !ok {
					calls, more = nil, false
					break
				}
				s.add(n)
			default:
				more = false
			}
		}
		some, err := s.turn()
		if errors.Is(err, errEnough) {
			break
		}
		if err != nil {
			return err
		}
		switch {
		case s.Calls != nil && calls == nil && len(s.nics) == 0:
			ended = true
		case !some && !ended:
			select {
			case <-ctx.Done():
			case <-time.After(idle):
			}
		}
	}
	for _, n := range s.nics {
		if err := s.Sink.Finish(n.Source, n.Lost()); err != nil {
			return err
		}
	}
	return s.Sink.Flush()
}

// look attaches to NICs that are new.
func (s *Session) look(ctx context.Context) error {
	all, err := GIDs()
	if err != nil {
		return err
	}
	for _, g := range all {
		if s.known[g] {
			continue
		}
		s.known[g] = true
		n, err := Attach(ctx, g, s.Snap, s.Ring)
		if err == nil {
			s.add(n)
		} else if !errors.Is(err, ErrGone) && ctx.Err() == nil {
			s.Warn(err)
		}
	}
	return nil
}

func (s *Session) add(n *Source) {
	s.known[n.GID] = true
	c := &captured{Source: n, meant: s.Select == nil || s.Select(n)}
	if c.meant {
		s.selected[netip.AddrFrom16(n.GID)] = true
		if s.Attached != nil {
			s.Attached(n)
		}
	}
	s.nics = append(s.nics, c)
}

// turn reads what there is, and hands it on. It reports whether there was anything.
func (s *Session) turn() (some bool, err error) {
	s.batch = s.batch[:0]
	for i := 0; i < len(s.nics); i++ {
		n := s.nics[i]
		ended := n.Ended() // and then all that it has sent is there
		read := 0
		for {
			if len(s.batch) == cap(s.batch) {
				s.batch = append(s.batch, Seen{})[:len(s.batch)]
			}
			k := &s.batch[:len(s.batch)+1][len(s.batch)]
			data := k.Data
			ok, err := n.Next(&k.Record)
			if err != nil {
				s.Warn(err)
				ended = true
			}
			if !ok {
				k.Data = data
				break
			}
			read++
			if s.wants(n, &k.Record) {
				k.Data = append(data[:0], k.Data...)
				k.Source, k.Lost = n.Source, n.Source.Lost()-n.lost
				n.lost += k.Lost
				s.batch = s.batch[:len(s.batch)+1]
			} else {
				k.Data = data
			}
			if read == perTurn && !ended {
				break
			}
		}
		some = some || read > 0
		if ended {
			if err := s.pass(); err != nil {
				return some, err // and Run closes it with the others
			}
			err := s.Sink.Finish(n.Source, n.Lost())
			n.Close()
			s.nics = slices.Delete(s.nics, i, i+1)
			i--
			if err != nil {
				return some, err
			}
		}
	}
	if err := s.pass(); err != nil {
		return some, err
	}
	if !some {
		err = s.Sink.Flush()
	}
	return some, err
}

// wants reports whether the packet of n is wanted.
func (s *Session) wants(n *captured, r *Record) bool {
	if !n.meant && (r.Path == UDP || !s.selected[r.Src.Addr()] && !s.selected[r.Dst.Addr()]) {
		return false
	}
	return s.Filter.Wants(r)
}

// pass hands on what was read.
func (s *Session) pass() error {
	slices.SortStableFunc(s.batch, func(a, b Seen) int {
		switch {
		case a.Time < b.Time:
			return -1
		case a.Time > b.Time:
			return 1
		}
		return 0
	})
	for i := range s.batch {
		if err := s.Sink.Packet(&s.batch[i]); err != nil {
			return err
		}
		if s.packets++; s.packets == s.Count {
			return errEnough
		}
	}
	s.batch = s.batch[:0]
	return nil
}

// Take accepts the NICs that call, and hands them on until the Listener is closed; then it closes to.
func (l *Listener) Take(snap, ring int, to chan<- *Source, warn func(error)) {
	defer close(to)
	for {
		n, err := l.Accept(snap, ring)
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			warn(err)
		default:
			to <- n
		}
	}
}
