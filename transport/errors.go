package transport

import (
	"errors"
	"fmt"
)

// Errors to decide by, with errors.Is. After a local Close, errors match net.ErrClosed.
var (
	// ErrPeerClosed: the peer has closed the connection in an orderly way.
	ErrPeerClosed = errors.New("transport: the peer closed the connection")
	// ErrPeerDied: the peer went away without closing: its process ended, or its host or the path to it failed.
	ErrPeerDied = errors.New("transport: the peer is gone")
	// ErrProtocol: the peer sent something that the protocol does not allow; the connection is closed.
	ErrProtocol = errors.New("transport: protocol violation by the peer")
	// ErrRefused: a handshake ended with a refusal, ours or the peer's; *HandshakeError has the reason.
	ErrRefused = errors.New("transport: connection refused")
	// ErrTooLarge: the message exceeds Conn.MaxMessage, or an argument exceeds a limit named in the text.
	ErrTooLarge = errors.New("transport: message too large")
	// ErrWouldBlock: the operation needs to wait, and was asked not to.
	ErrWouldBlock = errors.New("transport: operation would block")
	// ErrWriteClosed: CloseWrite was called: no more messages can be sent.
	ErrWriteClosed = errors.New("transport: sending side is closed")
	// ErrHandlerSet: Recv on a connection that has a Handler.
	ErrHandlerSet = errors.New("transport: the connection has a handler: messages go there")
	// ErrRange: a one-sided operation reaches outside the remote region that it names.
	ErrRange = errors.New("transport: outside the remote region")
	// ErrNoRoom: the poller's limits (PollerConfig.SharedDepth, CQDepth, MaxConns) do not admit another connection.
	ErrNoRoom = errors.New("transport: the poller has no room for another connection")
)

// A CloseError says why a connection ended. Conn.Err returns one, and operations that the end cut short do.
type CloseError struct {
	Err    error  // ErrPeerClosed, ErrPeerDied, ErrProtocol, net.ErrClosed, an ib.WCStatus, or an error wrapping one
	Reason string // in words; empty if Err says it all
	Remote bool   // the reason is the peer's, sent before it closed
}

func (e *CloseError) Error() string {
	s := e.Err.Error()
	if e.Reason != "" {
		s += ": "
		if e.Remote {
			s += "it says: "
		}
		s += e.Reason
	}
	return s
}

func (e *CloseError) Unwrap() error { return e.Err }

func protocolErrorf(format string, args ...any) error {
	return &CloseError{Err: ErrProtocol, Reason: fmt.Sprintf(format, args...)}
}

// HandshakeCode says why a handshake was refused. Values travel in the reject frame; see "Bootstrap" in docs/protocol.md.
type HandshakeCode uint16

// Handshake refusals.
const (
	RefusedProtocol    HandshakeCode = 1 // the bytes are no hello of this protocol
	RefusedVersion     HandshakeCode = 2 // no common protocol version
	RefusedTimeout     HandshakeCode = 3 // the hello did not come in time
	RefusedBusy        HandshakeCode = 4 // too many handshakes or connections
	RefusedUnreachable HandshakeCode = 5 // the devices cannot reach each other
	RefusedResources   HandshakeCode = 6 // queue pairs, memory or receive slots could not be had
	RefusedGeometry    HandshakeCode = 7 // the peers' limits have nothing in common
	RefusedClosed      HandshakeCode = 8 // the listener is closing
)

var codeNames = [...]string{"", "not the protocol", "version", "timeout", "busy", "unreachable", "resources", "geometry", "closing"}

func (c HandshakeCode) String() string {
	if c > 0 && int(c) < len(codeNames) {
		return codeNames[c]
	}
	return fmt.Sprintf("HandshakeCode(%d)", uint16(c))
}

// A HandshakeError is a refused handshake; it matches ErrRefused and its cause.
type HandshakeError struct {
	Code   HandshakeCode
	Reason string
	Remote bool  // the peer refused; otherwise this side did
	Err    error // the local cause, or nil
}

func (e *HandshakeError) Error() string {
	who := "refused here"
	if e.Remote {
		who = "refused by the peer"
	}
	return fmt.Sprintf("transport: connection %s (%v): %s", who, e.Code, e.Reason)
}

// Unwrap returns ErrRefused and, if there is one, the cause.
func (e *HandshakeError) Unwrap() []error {
	if e.Err != nil {
		return []error{ErrRefused, e.Err}
	}
	return []error{ErrRefused}
}

func refuse(code HandshakeCode, cause error, format string, args ...any) *HandshakeError {
	return &HandshakeError{Code: code, Reason: fmt.Sprintf(format, args...), Err: cause}
}
