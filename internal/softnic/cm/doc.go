// Package cm is the connection manager's protocol (IBA volume 1, chapter 12, and annex A11 for programs that know each other by IP
// address): what is said between the queue pairs 1 of two ports so that two other queue pairs are connected, and what ends that. It
// neither knows sockets nor clocks: datagrams come and go through interfaces, and the time is an argument, so that a network of
// managers can be run in virtual time and a run that failed be repeated exactly.
//
//	active                              passive
//	Connect     REQ ->                  Service.Request
//	             <- MRA                 a REQ that comes again while the program makes up its mind
//	Replied      <- REP                 Conn.Accept            or REJ: Conn.Reject
//	Ready       RTU ->                  Established
//	           DREQ <->                 Disconnect, of either; Ended on both
//	            <-> DREP
//
// An Engine is for one goroutine at a time. What strangers can make it keep is bounded: requests by what its services take, the
// rest by maxMemory.
package cm

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The most that messages carry for programs, in bytes.
const (
	MaxRequest = 92 - roce.IPHelloLen
	MaxReply   = 196
	MaxReject  = 148
)

// What two engines of this package find out about each other by the enhanced connection establishment (see roce.REQ.VendorID).
const (
	// Vendor is the letters RSD: an OUI of those that anybody may use (its bit for locally administered ones is set).
	Vendor = 'R'<<16 | 'S'<<8 | 'D'
	// OptionSelective: both sides are software NICs of this library, whose reliable connections may leave plain go-back-N. It is the whole
	// field, since others answer with the vendor that they were asked by and options of their own (librdmacm).
	OptionSelective = Vendor<<8 | '1'
)

// Times. A message is sent again at first soon, since a network that loses nothing loses no time by it, then after double the
// time, up to what the receiver has for its answer.
const (
	firstRepeat = 64 * time.Millisecond
	// responseTimeout is what peers are asked to keep: 4.096 us << 17 is 0.54 s. They are asked maxRetries times more.
	responseTimeout = 17
	maxRetries      = 15
	// disconnectRetries is for a DREQ, which the peer's program need not be there to answer: about 4 s.
	disconnectRetries = 10
	// serviceTimeout is what a peer is asked to wait while the program here makes up its mind: 8.6 s. Then it asks again.
	serviceTimeout = 21
	// maxPatience bounds what peers say of such times.
	maxPatience = 2 * time.Minute
	// memory is how long an answer is remembered that may have been lost, longer than the peer waits before it asks again;
	// maxMemory, how many are.
	memory    = 20 * time.Second
	maxMemory = 1 << 12
	// timewait is how long the peer's queue pair must not be connected again: packets of it may be on their way.
	timewait = time.Second
)

// ackDelay is the TargetAckDelay that is told (4 ms), and ackTimeout the time for acknowledgements of our peers (67 ms), if they
// need no more.
const (
	ackDelay   = 10
	ackTimeout = 14
)

// A Handler hears what becomes of a connection. Its methods are called within those of the Engine and the Conn, and must not call
// these.
type Handler interface {
	// Replied says that the peer has accepted: Ready or Abandon is due. Only who has called Connect hears it.
	Replied(*roce.REP)
	// Established says that the peer has confirmed. Only who has called Accept hears it.
	Established()
	// Resolved is the answer to a question, and the last that is heard. Only who has called Resolve hears it.
	Resolved(*roce.SIDRREP)
	// Ended says that the connection is over, or never was, and why. It is the last that is heard.
	Ended(err error)
}

// A Service takes requests for a port.
type Service interface {
	// Request returns who is to hear of the peer's request c; nil: it is refused, and why. It must not call methods that take the time.
	Request(c *Conn) (Handler, roce.RejectReason)
}

// An Output takes datagrams.
type Output interface {
	// Send sends a datagram to queue pair 1 at an address and UDP port. It is the caller's again on return. Whether it arrives is open.
	Send(to netip.AddrPort, b *[roce.MADLen]byte)
}

// Why connections end.
var (
	// ErrDisconnected: one of the sides has ended the connection.
	ErrDisconnected = errors.New("disconnected")
	// ErrGivenUp: the peer has waited long enough for an answer.
	ErrGivenUp = errors.New("the peer has given up")
	// ErrNoAnswer: nothing comes back from the peer.
	ErrNoAnswer = fmt.Errorf("%w: its connection manager does not answer (is the address an RDMA device's or a software NIC's, and does UDP port %d pass?)",
		driver.ErrUnreachable, roce.Port)
	// ErrPortInUse: the port has a service, or a connection of its own.
	ErrPortInUse = fmt.Errorf("the port is taken: %w", syscall.EADDRINUSE)
)

// A RejectError is a peer, or a peer's connection manager, that refused the connection. It matches syscall.ECONNREFUSED.
type RejectError struct {
	Reason  roce.RejectReason
	Private []byte // for the program: as much as the message carries
}

func (e *RejectError) Error() string {
	s := fmt.Sprintf("rejected: %v (reason %d)", e.Reason, uint16(e.Reason))
	switch e.Reason {
	case roce.RejectStale:
		s += ": take a fresh QP"
	case roce.RejectInvalidGID:
		s += ": the peer's connection manager has another address"
	case roce.RejectInvalidMTU:
		s += ": the peer's net device has a smaller MTU"
	case roce.RejectNoResources:
		s += ": as many requests as the listener takes are waiting"
	}
	return s
}

// ByPeer implements driver.CMRejection.
func (e *RejectError) ByPeer() bool { return e.Reason == roce.RejectConsumer }

// Data implements driver.CMRejection.
func (e *RejectError) Data() []byte { return e.Private }

func (e *RejectError) Unwrap() error { return syscall.ECONNREFUSED }

// timeout is what a code of a message stands for (IBA 12.7.14), within reason.
func timeout(code uint8) time.Duration {
	return min(max(ib.AckTimeout(code).Duration(), firstRepeat), maxPatience)
}
