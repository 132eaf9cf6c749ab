package wire

// A Reason is why a packet of a request was sent again.
type Reason uint8

const (
	First           Reason = iota // it was not
	Timeout                       // nothing was acknowledged in time
	SequenceNAK                   // the peer has said that a packet is missing
	NoReceive                     // the peer had no receive posted (RNR NAK)
	MissingResponse               // what came later has shown that a response was lost
	Reasons                       // how many there are
)

var reasons = [Reasons]string{Timeout: "timeout", SequenceNAK: "sequence NAK", NoReceive: "RNR NAK", MissingResponse: "missing response"}

// String is a word or two; empty for First, and for what is none.
func (r Reason) String() string {
	if r < Reasons {
		return reasons[r]
	}
	return ""
}

// Again returns why the packet is sent again that is being sent: while the Requester is in Output.Commit.
func (r *Requester) Again() Reason { return r.again }

// count counts the packet that was sent.
func (r *Requester) count() {
	r.Counters.Sent++
	if r.again != First {
		r.Counters.Resent++
		r.Counters.Again[r.again]++
	}
}
