package observe

import "github.com/ringside-rdma/ringside/internal/roce"

// A Verdict is what became of a packet that was received.
type Verdict uint8

const (
	Taken Verdict = iota // by a queue pair, as what it expects
	// Dropped by the port:
	NoQP     // no such queue pair, or one that is not connected
	Stranger // the connection's peer has another address
	PKey     // another partition
	Service  // a packet of another transport service than the queue pair's
	QKey     // another queue key
	NoRoom   // a datagram without a receive, or longer than it
	State    // the queue pair does not receive
	// Dropped before: it is no packet (roce.Drop).
	Short
	Version
	Opcode
	Pad
	Length
	ICRC
	// By a connection:
	Duplicate // it was executed before
	Early     // it came before one that is missing
	NotReady  // no receive is posted: the sender hears of it (RNR NAK)
	Refused   // a request that ends the connection
	Useless   // it says nothing new, or makes no sense
	// By the port, again: others know verdicts by their numbers.
	Probes   // of the path, more than are answered
	Verdicts // how many there are
)

var verdicts = [Verdicts]struct{ key, text string }{
	NoQP:      {"no_qp", "dropped: no such queue pair"},
	Stranger:  {"source", "dropped: the queue pair's peer has another address"},
	PKey:      {"pkey", "dropped: another partition"},
	Service:   {"service", "dropped: another transport service than the queue pair's"},
	QKey:      {"qkey", "dropped: another queue key"},
	NoRoom:    {"no_room", "dropped: no receive, or too short a one"},
	State:     {"state", "dropped: the queue pair does not receive"},
	Short:     {"short", "dropped: shorter than its headers"},
	Version:   {"version", "dropped: unknown transport version"},
	Opcode:    {"opcode", "dropped: unknown opcode"},
	Pad:       {"pad", "dropped: bad padding"},
	Length:    {"length", "dropped: bad length"},
	ICRC:      {"icrc", "dropped: bad ICRC"},
	Duplicate: {"duplicate", "duplicate"},
	Early:     {"early", "out of order: one before it is missing"},
	NotReady:  {"not_ready", "no receive is posted"},
	Refused:   {"refused", "refused"},
	Useless:   {"useless", "says nothing new"},
	Probes:    {"probes", "dropped: more probes than are answered"},
}

// Key is the verdict's name in the counters; String is a comment on a packet. Both are empty for Taken, and for what is none.
func (v Verdict) Key() string {
	if v < Verdicts {
		return verdicts[v].key
	}
	return ""
}

func (v Verdict) String() string {
	if v < Verdicts {
		return verdicts[v].text
	}
	return ""
}

// Dropped is the Verdict on what is no packet.
func Dropped(d roce.Drop) Verdict {
	switch d {
	case roce.DropShort:
		return Short
	case roce.DropVersion:
		return Version
	case roce.DropOpcode:
		return Opcode
	case roce.DropPad:
		return Pad
	case roce.DropICRC:
		return ICRC
	}
	return Length
}
