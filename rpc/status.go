package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Code is a call's status. Names and values are gRPC's.
//
// A Code is also an error to compare with: errors.Is(err, rpc.NotFound).
type Code uint32

const (
	// OK is success. No error has it.
	OK Code = 0
	// Canceled: the caller gave up.
	Canceled Code = 1
	// Unknown: an error that says no more, such as a plain error returned by a handler.
	Unknown Code = 2
	// InvalidArgument: the request is wrong whatever the state of the server.
	InvalidArgument Code = 3
	// DeadlineExceeded: the deadline passed first; the handler may have run.
	DeadlineExceeded Code = 4
	// NotFound: a thing that the request names is not there.
	NotFound Code = 5
	// AlreadyExists: a thing that the request would create is there.
	AlreadyExists Code = 6
	// PermissionDenied: the caller may not do this.
	PermissionDenied Code = 7
	// ResourceExhausted: a limit was reached; the server's queue is full, or a message is over the maximum.
	ResourceExhausted Code = 8
	// FailedPrecondition: the system is not in the state that the call needs.
	FailedPrecondition Code = 9
	// Aborted: a conflict with another call; try the whole transaction again.
	Aborted Code = 10
	// OutOfRange: past the end of something.
	OutOfRange Code = 11
	// Unimplemented: no such method.
	Unimplemented Code = 12
	// Internal: something broke, for example a handler panicked.
	Internal Code = 13
	// Unavailable: the connection was lost or the server is shutting down.
	Unavailable Code = 14
	// DataLoss: data is lost or damaged beyond repair.
	DataLoss Code = 15
	// Unauthenticated: the caller is not known.
	Unauthenticated Code = 16

	maxCode = Unauthenticated
)

var codeNames = [...]string{"OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound",
	"AlreadyExists", "PermissionDenied", "ResourceExhausted", "FailedPrecondition", "Aborted", "OutOfRange",
	"Unimplemented", "Internal", "Unavailable", "DataLoss", "Unauthenticated"}

// String returns the code's name, "NotFound".
func (c Code) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return "Code(" + strconv.FormatUint(uint64(c), 10) + ")"
}

// Error makes a Code a target for errors.Is.
func (c Code) Error() string { return c.String() }

// Error is the outcome of a call that failed. Handlers return one to choose the status that the client sees; every
// error of a client's calls is one.
//
// errors.Is matches an Error with its Code, with context.DeadlineExceeded and context.Canceled by its code, and with
// whatever its local cause is (a lost connection matches net.ErrClosed where the transport says so). Causes do not
// travel.
type Error struct {
	Code    Code
	Message string       // for people, in UTF-8; invalid bytes are replaced when it is sent
	Details []*anypb.Any // machine-readable additions, as in google.rpc.Status

	// NotExecuted says that the handler never ran, so that repeating the call elsewhere does no harm.
	NotExecuted bool

	cause error
}

// Error returns "rpc: <code>: <message>".
func (e *Error) Error() string {
	s := "rpc: " + e.Code.String()
	if e.Message != "" {
		s += ": " + e.Message
	}
	if e.cause != nil && e.Message == "" {
		s += ": " + e.cause.Error()
	}
	return s
}

// Unwrap returns the local cause, or nil.
func (e *Error) Unwrap() error { return e.cause }

// Is reports whether target is e's Code, or the context error that the code stands for.
func (e *Error) Is(target error) bool {
	switch t := target.(type) {
	case Code:
		return e.Code == t
	case *Error:
		return t.Code == e.Code && (t.Message == "" || t.Message == e.Message) && len(t.Details) == 0
	}
	switch target {
	case context.DeadlineExceeded:
		return e.Code == DeadlineExceeded
	case context.Canceled:
		return e.Code == Canceled
	}
	return false
}

// WithDetails returns a copy of e that carries the messages in addition. It fails if one cannot be marshalled.
func (e *Error) WithDetails(details ...proto.Message) (*Error, error) {
	c := *e
	c.Details = append([]*anypb.Any(nil), e.Details...)
	for _, d := range details {
		a, err := anypb.New(d)
		if err != nil {
			return nil, fmt.Errorf("rpc: error detail: %w", err)
		}
		c.Details = append(c.Details, a)
	}
	return &c, nil
}

// Errorf returns an Error with a formatted message; %w sets its cause.
func Errorf(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), cause: errors.Unwrap(err)}
}

// CodeOf returns the status that err stands for: OK for nil, the code of an Error or Code found in its tree, Canceled
// and DeadlineExceeded for the context errors, Unavailable for net.ErrClosed and io.EOF, else Unknown.
func CodeOf(err error) Code {
	if e := errorIn(err); e != nil {
		return e.Code
	}
	if none(err) {
		return OK
	}
	var c Code
	if errors.As(err, &c) {
		return c
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return Canceled
	case errors.Is(err, net.ErrClosed), errors.Is(err, io.EOF):
		return Unavailable
	}
	return Unknown
}

// FromError returns err as an Error: the one in its tree, or a new one with CodeOf(err) and err's text, that unwraps to
// err. FromError(nil) is nil, and so is that of a nil *Error, which is what `return rpc.FromError(err)` makes of no error.
func FromError(err error) *Error {
	if e := errorIn(err); e != nil || none(err) {
		return e
	}
	return &Error{Code: CodeOf(err), Message: err.Error(), cause: err}
}

// none reports whether err is no error.
func none(err error) bool {
	e, ok := err.(*Error)
	return err == nil || ok && e == nil
}

// errorIn is the Error in err's tree, or nil.
func errorIn(err error) *Error {
	if err == nil {
		return nil
	}
	if e, ok := err.(*Error); ok {
		return e
	}
	var e *Error
	errors.As(err, &e)
	return e
}

// maxStatusLen bounds the encoded status that a server sends; details, then the message's end, are dropped to fit it.
const maxStatusLen = 4 << 10

// A status on the wire is google.rpc.Status without its code, which the header has: string message = 2, repeated
// google.protobuf.Any details = 3.
const (
	statusFieldMessage = 2
	statusFieldDetails = 3
	anyFieldTypeURL    = 1
	anyFieldValue      = 2
)

// appendStatus appends the encoded message and details of e, at most maxStatusLen bytes.
func appendStatus(b []byte, e *Error) []byte {
	start := len(b)
	if msg := e.Message; msg != "" {
		msg = clipUTF8(msg, maxStatusLen/2)
		b = protowire.AppendTag(b, statusFieldMessage, protowire.BytesType)
		b = protowire.AppendString(b, msg)
	}
	for _, d := range e.Details {
		if d == nil {
			continue
		}
		n := protowire.SizeTag(anyFieldTypeURL) + protowire.SizeBytes(len(d.TypeUrl)) +
			protowire.SizeTag(anyFieldValue) + protowire.SizeBytes(len(d.Value))
		if len(b)-start+n+8 > maxStatusLen || !utf8.ValidString(d.TypeUrl) {
			continue
		}
		b = protowire.AppendTag(b, statusFieldDetails, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(n))
		b = protowire.AppendTag(b, anyFieldTypeURL, protowire.BytesType)
		b = protowire.AppendString(b, d.TypeUrl)
		b = protowire.AppendTag(b, anyFieldValue, protowire.BytesType)
		b = protowire.AppendBytes(b, d.Value)
	}
	return b
}

// clipUTF8 returns at most n bytes of s, as valid UTF-8.
func clipUTF8(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	s = toValidUTF8(s) // may grow: a bad byte becomes three
	for len(s) > n {
		_, size := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-size]
	}
	return s
}

func toValidUTF8(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	b := make([]byte, 0, len(s))
	for _, r := range s { // range yields RuneError for invalid bytes
		b = utf8.AppendRune(b, r)
	}
	return string(b)
}

// parseStatus decodes a status. Codes that this side does not know become Unknown, as in gRPC; unknown fields are
// skipped.
func parseStatus(word uint32, flags uint16, b []byte) (*Error, error) {
	if len(b) > maxStatusLen { // and each of its many details would take a hundred times its bytes
		return nil, frameError("status: %d bytes are more than %d", len(b), maxStatusLen)
	}
	e := &Error{Code: Code(word), NotExecuted: flags&flagNotExecuted != 0}
	if e.Code > maxCode {
		e.Code = Unknown
	}
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil, frameError("status: %v", protowire.ParseError(n))
		}
		b = b[n:]
		if typ == protowire.BytesType && (num == statusFieldMessage || num == statusFieldDetails) {
			v, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return nil, frameError("status: %v", protowire.ParseError(n))
			}
			b = b[n:]
			if num == statusFieldMessage {
				e.Message = toValidUTF8(string(v))
				continue
			}
			d := new(anypb.Any)
			if err := proto.Unmarshal(v, d); err != nil {
				return nil, frameError("status detail: %v", err)
			}
			e.Details = append(e.Details, d)
			continue
		}
		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return nil, frameError("status: %v", protowire.ParseError(n))
		}
		b = b[n:]
	}
	if word > uint32(maxCode) {
		e.Message = fmt.Sprintf("unknown status code %d: %s", word, e.Message)
	}
	return e, nil
}
