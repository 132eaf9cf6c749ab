package roce

import (
	"fmt"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Syndrome is byte 0 of an AETH: what a responder says of a request (IBA 9.7.5.1.1, table 44).
type Syndrome uint8

const (
	// Ack with no limit on the requester's credits: the end-to-end flow control of IBA 9.7.7.2 is not used.
	Ack Syndrome = 0x1f

	rnrNak Syndrome = 0x20 // and a timer code in the lower five bits

	NakPSN          Syndrome = 0x60 // PSN sequence error: the AETH's packet has the PSN that was expected
	NakInvalid      Syndrome = 0x61 // invalid request
	NakAccess       Syndrome = 0x62 // remote access error
	NakOperation    Syndrome = 0x63 // remote operational error
	NakInvalidRD    Syndrome = 0x64 // invalid RD request
	maskSyndromeLow Syndrome = 0x1f
)

// RNRNak is the syndrome of a responder that has no receive posted, and asks to wait for t.
func RNRNak(t ib.RNRTimer) Syndrome { return rnrNak | Syndrome(t)&maskSyndromeLow }

// IsAck reports whether the request was accepted, with or without credits.
func (s Syndrome) IsAck() bool { return s&0xe0 == 0 }

// IsRNR reports whether the responder has no receive posted; t is how long it asks to wait.
func (s Syndrome) IsRNR() (t ib.RNRTimer, ok bool) {
	return ib.RNRTimer(s & maskSyndromeLow), s&0xe0 == rnrNak
}

// Status returns what the request ends with that was refused with s: WCSuccess for those that are not the end of it.
func (s Syndrome) Status() ib.WCStatus {
	switch s {
	case NakInvalid, NakInvalidRD:
		return ib.WCRemoteInvalidReqErr
	case NakAccess:
		return ib.WCRemoteAccessErr
	case NakOperation:
		return ib.WCRemoteOpErr
	}
	return ib.WCSuccess
}

func (s Syndrome) String() string {
	switch {
	case s.IsAck():
		return "ACK"
	case s&0xe0 == rnrNak:
		t, _ := s.IsRNR()
		return fmt.Sprintf("RNR NAK (%v)", t.Duration())
	}
	switch s {
	case NakPSN:
		return "NAK: PSN sequence error"
	case NakInvalid:
		return "NAK: invalid request"
	case NakAccess:
		return "NAK: remote access error"
	case NakOperation:
		return "NAK: remote operational error"
	case NakInvalidRD:
		return "NAK: invalid RD request"
	}
	return fmt.Sprintf("syndrome %#02x", uint8(s))
}
