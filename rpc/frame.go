package rpc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"
	"unicode/utf8"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The frame format is specified in docs/protocol.md, section "RPC". One transport message is one frame: a header of
// headerLen bytes, bulk descriptors of bulkLen bytes each, and the payload. All integers are little-endian.
const (
	frameVersion = 1
	headerLen    = 32
	bulkLen      = 24

	// maxBulk is the largest number of bulk descriptors of a request.
	maxBulk = 16
	// maxMethodName is the longest method name in bytes.
	maxMethodName = 255
	// maxTimeoutMicros is the longest deadline that travels; it is what a time.Duration can hold.
	maxTimeoutMicros = math.MaxInt64 / uint64(time.Microsecond)
)

// frameKind is what a frame is for.
type frameKind uint8

const (
	kindRequest  frameKind = 1 // client to server: run a method
	kindResponse frameKind = 2 // server to client: its result or status; also the answer to kindResolve
	kindCancel   frameKind = 3 // client to server: nobody waits for this call any more
	kindGoAway   frameKind = 4 // server to client: start no more calls on this connection
	kindResolve  frameKind = 5 // client to server: what number has the method with this name
)

func (k frameKind) String() string {
	switch k {
	case kindRequest:
		return "request"
	case kindResponse:
		return "response"
	case kindCancel:
		return "cancel"
	case kindGoAway:
		return "goaway"
	case kindResolve:
		return "resolve"
	}
	return fmt.Sprintf("frame kind %d", uint8(k))
}

// flagNotExecuted on a response says that the handler never ran: the call can be repeated elsewhere without harm.
const flagNotExecuted uint16 = 1 << 0

// header is a decoded frame header.
type header struct {
	kind    frameKind
	flags   uint16
	word    uint32 // request: method number; response and goaway: status code
	id      uint64 // call id: slot index in the low half, generation in the high half; 0 for goaway
	timeout uint64 // request: microseconds until the deadline, 0 if there is none
	bulk    int    // request: number of bulk descriptors
	payload int    // bytes of payload
}

// errFrame is matched by every error about a frame that breaks the format.
var errFrame = errors.New("rpc: malformed frame")

func frameError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errFrame, fmt.Sprintf(format, args...))
}

// putHeader encodes h into the first headerLen bytes of b.
func putHeader(b []byte, h *header) {
	_ = b[headerLen-1]
	binary.LittleEndian.PutUint64(b[0:], frameVersion|uint64(h.kind)<<8|uint64(h.flags)<<16|uint64(h.word)<<32)
	binary.LittleEndian.PutUint64(b[8:], h.id)
	binary.LittleEndian.PutUint64(b[16:], h.timeout)
	binary.LittleEndian.PutUint64(b[24:], uint64(uint16(h.bulk))|uint64(uint32(h.payload))<<32)
}

// parseHeader decodes and checks the header of the frame msg. It checks every field against the frame's kind and the
// lengths against len(msg), so that what it accepts can be used without another look.
func parseHeader(msg []byte) (header, error) {
	if len(msg) < headerLen {
		return header{}, frameError("%d bytes are shorter than a header", len(msg))
	}
	w0 := binary.LittleEndian.Uint64(msg[0:])
	w3 := binary.LittleEndian.Uint64(msg[24:])
	h := header{
		kind:    frameKind(w0 >> 8),
		flags:   uint16(w0 >> 16),
		word:    uint32(w0 >> 32),
		id:      binary.LittleEndian.Uint64(msg[8:]),
		timeout: binary.LittleEndian.Uint64(msg[16:]),
		bulk:    int(uint16(w3)),
		payload: int(uint32(w3 >> 32)),
	}
	// The fast way through is one comparison a field; which one failed is worked out apart.
	if uint8(w0) != frameVersion || uint16(w3>>16) != 0 || h.bulk > maxBulk ||
		uint64(len(msg)) != uint64(headerLen+h.bulk*bulkLen)+uint64(h.payload) {
		return header{}, explainHeader(msg, &h, uint16(w3>>16))
	}
	switch h.kind {
	case kindRequest:
		if h.flags == 0 && h.timeout <= maxTimeoutMicros {
			return h, nil
		}
	case kindResponse:
		if h.flags&^flagNotExecuted == 0 && h.timeout == 0 && h.bulk == 0 {
			return h, nil
		}
	}
	return h, checkHeader(&h)
}

// explainHeader says what is wrong with the fields that all kinds share.
func explainHeader(msg []byte, h *header, reserved uint16) error {
	switch {
	case msg[0] != frameVersion:
		return frameError("version %d, this side speaks %d", msg[0], frameVersion)
	case reserved != 0:
		return frameError("reserved field is %#x", reserved)
	case h.bulk > maxBulk:
		return frameError("%d bulk descriptors, at most %d are allowed", h.bulk, maxBulk)
	}
	return frameError("header announces %d bulk descriptors and %d bytes of payload, the frame has %d bytes",
		h.bulk, h.payload, len(msg))
}

// checkHeader checks the fields whose meaning depends on the kind.
func checkHeader(h *header) error {
	known := uint16(0)
	if h.kind == kindResponse {
		known = flagNotExecuted
	}
	switch {
	case h.kind < kindRequest || h.kind > kindResolve:
		return frameError("unknown %v", h.kind)
	case h.flags&^known != 0:
		return frameError("%v: unknown flags %#x", h.kind, h.flags&^known)
	case h.kind == kindRequest && h.timeout > maxTimeoutMicros:
		return frameError("request: deadline in %d µs is out of range", h.timeout)
	case h.kind != kindRequest && h.timeout != 0:
		return frameError("%v: has a deadline", h.kind)
	case h.kind != kindRequest && h.bulk != 0:
		return frameError("%v: has bulk descriptors", h.kind)
	}
	switch h.kind {
	case kindCancel:
		if h.word != 0 || h.payload != 0 {
			return frameError("cancel: status or payload present")
		}
	case kindGoAway:
		if h.id != 0 {
			return frameError("goaway: has call id %#x", h.id)
		}
	case kindResolve:
		if h.word != 0 {
			return frameError("resolve: method number present")
		}
		if h.payload == 0 || h.payload > maxMethodName {
			return frameError("resolve: name of %d bytes, want 1 to %d", h.payload, maxMethodName)
		}
	}
	return nil
}

// checkMethodName returns why s cannot be a method's name, or nil.
func checkMethodName(s string) error {
	if len(s) == 0 || len(s) > maxMethodName || !utf8.ValidString(s) {
		return fmt.Errorf("rpc: method name %.40q: want 1 to %d bytes of UTF-8", s, maxMethodName)
	}
	return nil
}

// bulkAccess is what a bulk descriptor can allow the server to do with the client's memory.
const bulkAccess = ib.AccessRemoteRead | ib.AccessRemoteWrite

// putBulk encodes k into the first bulkLen bytes of b.
func putBulk(b []byte, k mr.RemoteKey) error {
	if k.Access&^bulkAccess != 0 || k.Access == 0 {
		return frameError("bulk descriptor: access %#x, want read, write or both", uint32(k.Access))
	}
	_, err := k.AppendBinary(b[:0:bulkLen])
	return err
}

// parseBulk decodes and checks a bulk descriptor.
func parseBulk(b []byte) (mr.RemoteKey, error) {
	var k mr.RemoteKey
	if err := k.UnmarshalBinary(b[:bulkLen]); err != nil {
		return k, fmt.Errorf("%w: %w", errFrame, err)
	}
	if k.Access&^bulkAccess != 0 || k.Access == 0 {
		return k, frameError("bulk descriptor: access %#x, want read, write or both", uint32(k.Access))
	}
	return k, nil
}

// timeoutMicros returns the value of a request's timeout field for a deadline in d: at least 1, rounded up so that a
// server never ends a call before its client does.
func timeoutMicros(d time.Duration) uint64 {
	if d <= 0 {
		return 1
	}
	return min((uint64(d)+uint64(time.Microsecond)-1)/uint64(time.Microsecond), maxTimeoutMicros)
}

// Call ids: the index of the client's slot in the low half, the slot's generation in the high half.
func makeID(index, gen uint32) uint64   { return uint64(gen)<<32 | uint64(index) }
func splitID(id uint64) (i, gen uint32) { return uint32(id), uint32(id >> 32) }
