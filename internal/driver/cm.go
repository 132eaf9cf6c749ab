package driver

import (
	"context"
	"net/netip"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// ConnManager is an optional part of Context: queue pairs are connected by IP address. It takes a queue pair from Reset or
// Init to RTS, and, when the connection ends, whoever ended it, to Err.
//
// Waits end with their context; what was waited for can then only be closed.
type ConnManager interface {
	// CMListen listens on addr, of which the port may be 0, and the address unspecified. Up to backlog requests wait for Accept;
	// 0 stands for a default.
	CMListen(addr netip.AddrPort, backlog int) (CMListener, error)
	// CMDial connects q with who listens on dst. src may be the zero AddrPort; with port 0 one is chosen.
	CMDial(ctx context.Context, q QP, src, dst netip.AddrPort, p *CMParam) (CMConn, error)
}

// CMParam is what one side of a connection wants. Values beyond what device or wire can do are lowered.
type CMParam struct {
	PrivateData     []byte    // for the program on the other side; read during the call
	Access          ib.Access // what the peer may do through the QP
	MaxRdAtomic     uint8     // RDMA READs and atomics of this side in flight
	MaxDestRdAtomic uint8     // ... of the peer
	RetryCount      uint8     // 0..7, both ways; what the side says that dials
	RNRRetry        uint8     // 0..7, of the peer, when no receive is posted here
	MinRNRTimer     ib.RNRTimer
	SRQ             bool // the QP has a shared receive queue
}

// CMListener takes requests.
type CMListener interface {
	// Addr is where it listens, with the port that was chosen.
	Addr() netip.AddrPort
	Accept(ctx context.Context) (CMRequest, error)
	// Close ends Accept with net.ErrClosed, and refuses the requests that wait.
	Close() error
}

// CMRequest is a peer's wish to connect. It has to be answered, or closed, which refuses it.
type CMRequest interface {
	// PrivateData is the peer's. It may have zeros at its end that the peer did not send.
	PrivateData() []byte
	LocalAddr() netip.AddrPort
	RemoteAddr() netip.AddrPort
	// Accept connects q, and waits until the peer has confirmed it.
	Accept(ctx context.Context, q QP, p *CMParam) (CMConn, error)
	Reject(privateData []byte) error
	Close() error
}

// CMRejection is an error of CMDial: somebody has refused the connection. Other errors that refuse match syscall.ECONNREFUSED too.
type CMRejection interface {
	error
	// ByPeer reports whether it was the program on the other side, and not the system below it.
	ByPeer() bool
	// Data is what that program has sent along. Zeros may follow it.
	Data() []byte
}

// CMConn is a connection between queue pairs.
type CMConn interface {
	// PrivateData is what the peer has answered; nil on the side that has accepted. Zeros may follow it.
	PrivateData() []byte
	LocalAddr() netip.AddrPort
	RemoteAddr() netip.AddrPort
	// Done is closed when the connection is over and the queue pair in Err; Err then says why.
	Done() <-chan struct{}
	Err() error
	// Disconnect moves the queue pair to Err, and tells the peer. It does not wait for the peer. A queue pair that was reset since it
	// was connected may stay as it is.
	Disconnect() error
	// Close is Disconnect, and frees the connection.
	Close() error
}
