package transport

import (
	"encoding/binary"
	"fmt"

	"github.com/ringside-rdma/ringside/mr"
)

// headerLen is the length of the header that every SEND of a Conn starts with; see "Messages" in docs/protocol.md.
const headerLen = 8

// remoteLen is the length of a marshalled mr.RemoteKey, the body of an RTS.
const remoteLen = 24

// msgType is byte 0 of the header.
type msgType uint8

const (
	msgData   msgType = 1 // arg: payload length; the payload follows
	msgRTS    msgType = 2 // arg: rendezvous id; body: the source's remote key. Takes a credit, as msgData does
	msgFIN    msgType = 3 // arg: rendezvous id: the receiver has read, or refused (flagCancelled), the source
	msgCancel msgType = 4 // arg: rendezvous id: the sender would like the source back
	msgCredit msgType = 5 // arg: 0; carries nothing but credits
	msgEOS    msgType = 6 // arg: 0; the sender will send no more messages
	msgImm    msgType = 7 // arg: an immediate value, by devices that cannot send one with an RDMA WRITE. Takes a credit
)

var msgNames = [...]string{"type 0", "data", "RTS", "FIN", "cancel", "credit", "EOS", "immediate"}

func (t msgType) String() string {
	if int(t) < len(msgNames) {
		return msgNames[t]
	}
	return fmt.Sprintf("type %d", uint8(t))
}

const (
	// flagLow: the sender has no credit left after this message (or needs more than it has), and waits for any that can
	// be given back.
	flagLow = 1 << 0
	// flagCancelled, in a FIN: the source was not read.
	flagCancelled = 1 << 1
)

// header is the 8 bytes in front of each message, one little-endian word:
// type in bits 0..7, flags in 8..15, returned credits in 16..31, arg in 32..63.
type header uint64

func makeHeader(t msgType, flags uint8, credits uint16, arg uint32) header {
	return header(t) | header(flags)<<8 | header(credits)<<16 | header(arg)<<32
}

func (h header) typ() msgType    { return msgType(h) }
func (h header) flags() uint8    { return uint8(h >> 8) }
func (h header) credits() uint16 { return uint16(h >> 16) }
func (h header) arg() uint32     { return uint32(h >> 32) }

func (h header) put(b []byte) { binary.LittleEndian.PutUint64(b, uint64(h)) }

// parseHeader checks everything about a received message that does not depend on the connection's state. b is the
// whole message. It does not allocate unless the message is bad.
func parseHeader(b []byte) (header, error) {
	if len(b) < headerLen {
		return 0, protocolErrorf("message of %d bytes is shorter than its header", len(b))
	}
	h := header(binary.LittleEndian.Uint64(b))
	body := len(b) - headerLen
	allowed := uint8(0)
	switch h.typ() {
	case msgData:
		allowed = flagLow
		if uint64(h.arg()) != uint64(body) {
			return h, protocolErrorf("data message says %d bytes, and %d came", h.arg(), body)
		}
	case msgRTS:
		allowed = flagLow
		if body != remoteLen {
			return h, protocolErrorf("RTS with a body of %d bytes, want %d", body, remoteLen)
		}
	case msgFIN:
		allowed = flagCancelled
		if body != 0 {
			return h, protocolErrorf("FIN with a body of %d bytes", body)
		}
	case msgCancel:
		if body != 0 {
			return h, protocolErrorf("cancel with a body of %d bytes", body)
		}
	case msgImm:
		if body != 0 {
			return h, protocolErrorf("immediate with a body of %d bytes", body)
		}
	case msgCredit, msgEOS:
		if body != 0 || h.arg() != 0 {
			return h, protocolErrorf("%v with a body of %d bytes and argument %d", h.typ(), body, h.arg())
		}
		if h.typ() == msgCredit {
			allowed = flagLow // asks for credits, and may have none to give
			if h.credits() == 0 && h.flags()&flagLow == 0 {
				return h, protocolErrorf("credit message without credits")
			}
		}
	default:
		return h, protocolErrorf("unknown message %v", h.typ())
	}
	if f := h.flags() &^ allowed; f != 0 {
		return h, protocolErrorf("%v with unknown flags %#x", h.typ(), f)
	}
	return h, nil
}

// parseRTS checks the descriptor of a rendezvous source; the peer wrote it.
func parseRTS(body []byte, maxMessage int) (mr.RemoteKey, error) {
	var k mr.RemoteKey
	if err := k.UnmarshalBinary(body); err != nil {
		return k, protocolErrorf("RTS: %v", err)
	}
	if k.Len == 0 || k.Len > uint64(maxMessage) {
		return k, protocolErrorf("RTS announces %d bytes, and messages have 1 to %d", k.Len, maxMessage)
	}
	if k.Addr+k.Len < k.Addr {
		return k, protocolErrorf("RTS: %d bytes at %#x wrap around", k.Len, k.Addr)
	}
	return k, nil
}

// Rendezvous ids: the slot of the sender's table and a generation, so that a stale or invented FIN is found.
func rndvID(slot int, gen uint16) uint32         { return uint32(gen)<<16 | uint32(slot) }
func splitRndvID(id uint32) (slot int, g uint16) { return int(id & 0xffff), uint16(id >> 16) }
