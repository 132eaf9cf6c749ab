package transport

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"unicode/utf8"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The bootstrap protocol; see "Bootstrap" in docs/protocol.md. Everything is little-endian.
const (
	bootMagic   = "RSDE"
	bootVersion = 1

	bootHeaderLen = 12       // magic 4, version 2, kind 1, zero 1, body length 4
	maxBootBody   = 16 << 10 // nothing longer is read
	maxReason     = 1024     // bytes of text in a reject or goodbye
	maxDevices    = 16       // in a hello
)

type bootKind uint8

const (
	bootHello   bootKind = 1 // dialler to listener
	bootAccept  bootKind = 2 // listener to dialler: its hello
	bootReady   bootKind = 3 // its queue pair is connected; the listener says so only if the connection manager has done it
	bootReject  bootKind = 4 // either way, instead of the above: code and reason
	bootGoodbye bootKind = 5 // either way, at the end of a connection: code and reason
	bootStream  bootKind = 6 // dialler to listener, the first on another TCP connection: the token of the handshake that it belongs to
)

// Goodbye codes.
const (
	goodbyeClosed   uint16 = 1 // Close
	goodbyeAborted  uint16 = 2 // Abort, with a reason
	goodbyeProtocol uint16 = 3 // the receiver of the goodbye broke the protocol
	goodbyeError    uint16 = 4 // something failed at the sender
)

// hello is what the peers tell each other.
type hello struct {
	Features    uint64
	HostID      [16]byte // the same on one running host
	PIDNS       uint64   // namespaces: equal where the processes share them; 0: unknown
	MountNS     uint64
	UID         uint32
	PID         uint32
	GID         ib.GID
	QPN         ib.QPN
	PSN         ib.PSN
	MaxMessage  uint32
	Slot        uint32 // payload bytes of a receive slot
	Window      uint32 // messages that the receiver of the hello may have under way
	Rendezvous  uint16 // long ones of these
	MTU         ib.MTU
	ReadsOut    uint8 // RDMA READs and atomics in flight, as initiator
	ReadsIn     uint8 // and as target
	Port        uint8
	LID         ib.LID
	Devices     []PeerDevice
	Name        string
	PrivateData []byte
	CMPort      uint16 // featureCM, of the listener: where the dialler connects by the connection manager, at the address in GID
	CMToken     cmToken
	Sync        mr.RemoteKey // featureCM: a byte that means nothing, for the READ that makes writes certain (Batch.seal)
	UDP         udpEnd       // featureUDP
	Stream      streamToken  // featureStream, of the listener
	StreamWhy   string       // the same: why the path is no better one; empty: because it is wanted
}

// udpEnd is where a software NIC can be met by packets.
type udpEnd struct {
	GID  ib.GID // an address of the host
	Port uint16
	MTU  ib.MTU
}

// deviceName is the name of the device that the queue pair is on.
func (h *hello) deviceName() string {
	if len(h.Devices) == 0 {
		return "the peer's"
	}
	return h.Devices[0].Name
}

// Feature bits. Unknown ones are ignored: whoever needs one says so by the version.
const (
	// featureCM: the device is connected by the system's connection manager, and the hello ends with CMPort, CMToken and Sync.
	featureCM uint64 = 1 << 0
	// featureUDP: the device can be met over UDP as well, and the hello ends with where.
	featureUDP uint64 = 1 << 1
	// featureViaUDP: of the dialler, that it must be so; of the listener, that it is to be so.
	featureViaUDP uint64 = 1 << 2
	// featureTCP: the queue pair can be connected by a TCP connection of its own.
	featureTCP uint64 = 1 << 3
	// featureViaTCP is to featureTCP what featureViaUDP is to featureUDP.
	featureViaTCP uint64 = 1 << 4
	// featureStream: the hello ends with the token of that TCP connection. Of the listener only, and only if the dialler knows what it
	// means: others refuse a hello that is longer than its features say.
	featureStream uint64 = 1 << 5
)

func appendFrame(b []byte, kind bootKind, body []byte) []byte {
	b = append(b, bootMagic...)
	b = binary.LittleEndian.AppendUint16(b, bootVersion)
	b = append(b, byte(kind), 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	return append(b, body...)
}

func appendString(b []byte, s string, limit int) []byte {
	if len(s) > limit {
		s = s[:limit]
	}
	return append(append(b, byte(len(s))), s...)
}

func (h *hello) append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint64(b, h.Features)
	b = append(b, h.HostID[:]...)
	b = le.AppendUint64(b, h.PIDNS)
	b = le.AppendUint64(b, h.MountNS)
	b = le.AppendUint32(b, h.UID)
	b = le.AppendUint32(b, h.PID)
	b = append(b, h.GID[:]...)
	b = le.AppendUint32(b, uint32(h.QPN))
	b = le.AppendUint32(b, uint32(h.PSN))
	b = le.AppendUint32(b, h.MaxMessage)
	b = le.AppendUint32(b, h.Slot)
	b = le.AppendUint32(b, h.Window)
	b = le.AppendUint16(b, h.Rendezvous)
	b = append(b, byte(h.MTU), h.ReadsOut, h.ReadsIn, h.Port)
	b = le.AppendUint16(b, uint16(h.LID))
	b = append(b, byte(min(len(h.Devices), maxDevices)))
	b = append(b, 0, 0, 0) // reserved
	b = le.AppendUint16(b, uint16(len(h.PrivateData)))
	b = append(b, 0, 0) // reserved
	for i, d := range h.Devices {
		if i == maxDevices {
			break
		}
		b = append(b, d.GID[:]...)
		b = appendString(b, d.Provider, 32)
		b = appendString(b, d.Name, 64)
	}
	b = appendString(b, h.Name, maxName)
	b = append(b, h.PrivateData...)
	if h.Features&featureCM != 0 {
		b = le.AppendUint16(b, h.CMPort)
		b = append(b, h.CMToken[:]...)
		b, _ = h.Sync.AppendBinary(b) // our own, or one that was parsed
	}
	if h.Features&featureUDP != 0 {
		b = append(b, h.UDP.GID[:]...)
		b = le.AppendUint16(b, h.UDP.Port)
		b = append(b, byte(h.UDP.MTU), 0)
	}
	if h.Features&featureStream != 0 {
		b = append(b, h.Stream[:]...)
		why := toValid(h.StreamWhy[:min(len(h.StreamWhy), maxReason)])
		b = le.AppendUint16(b, uint16(len(why)))
		b = append(b, why...)
	}
	return b
}

// reader takes fields off a byte slice; after the first failure everything is zero.
type reader struct {
	b    []byte
	fail bool
}

// bytes returns the next n bytes; after a failure, at most 64 zeroes: enough for any fixed field.
func (r *reader) bytes(n int) []byte {
	if r.fail || n > len(r.b) {
		r.fail = true
		return make([]byte, min(n, 64))
	}
	b := r.b[:n:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) u8() uint8   { return r.bytes(1)[0] }
func (r *reader) u16() uint16 { return binary.LittleEndian.Uint16(r.bytes(2)) }
func (r *reader) u32() uint32 { return binary.LittleEndian.Uint32(r.bytes(4)) }
func (r *reader) u64() uint64 { return binary.LittleEndian.Uint64(r.bytes(8)) }

func (r *reader) text(limit int) string {
	n := int(r.u8())
	if n > limit {
		r.fail = true
		return ""
	}
	b := r.bytes(n)
	if r.fail {
		return ""
	}
	return string(b)
}

var errTruncated = errors.New("truncated")

// parseHello decodes and checks a hello's body; anybody may have written it.
func parseHello(b []byte) (*hello, error) {
	r := &reader{b: b}
	h := &hello{}
	h.Features = r.u64()
	copy(h.HostID[:], r.bytes(16))
	h.PIDNS, h.MountNS = r.u64(), r.u64()
	h.UID, h.PID = r.u32(), r.u32()
	copy(h.GID[:], r.bytes(16))
	h.QPN, h.PSN = ib.QPN(r.u32()), ib.PSN(r.u32())
	h.MaxMessage, h.Slot, h.Window = r.u32(), r.u32(), r.u32()
	h.Rendezvous = r.u16()
	h.MTU = ib.MTU(r.u8())
	h.ReadsOut, h.ReadsIn, h.Port = r.u8(), r.u8(), r.u8()
	h.LID = ib.LID(r.u16())
	ndev := int(r.u8())
	r.bytes(3)
	npriv := int(r.u16())
	r.bytes(2)
	if r.fail {
		return nil, errTruncated
	}
	if ndev > maxDevices || npriv > maxPrivateData {
		return nil, fmt.Errorf("%d devices and %d bytes of private data: too many", ndev, npriv)
	}
	for range ndev {
		var d PeerDevice
		copy(d.GID[:], r.bytes(16))
		d.Provider = r.text(32)
		d.Name = r.text(64)
		h.Devices = append(h.Devices, d)
		if r.fail {
			return nil, errTruncated
		}
		if !utf8.ValidString(d.Provider) || !utf8.ValidString(d.Name) {
			return nil, errors.New("a device's name is not UTF-8")
		}
	}
	h.Name = r.text(maxName)
	h.PrivateData = append([]byte(nil), r.bytes(npriv)...)
	if h.Features&featureCM != 0 {
		h.CMPort = r.u16()
		copy(h.CMToken[:], r.bytes(len(h.CMToken)))
		if err := h.Sync.UnmarshalBinary(r.bytes(mr.RemoteKeySize)); err != nil {
			return nil, err
		}
		if !r.fail && (h.Sync.Len == 0 || h.Sync.Access&ib.AccessRemoteRead == 0) {
			return nil, errors.New("no byte to read")
		}
	}
	if h.Features&featureUDP != 0 {
		copy(h.UDP.GID[:], r.bytes(16))
		h.UDP.Port, h.UDP.MTU = r.u16(), ib.MTU(r.u8())
		r.u8()
		if !r.fail && (h.UDP.GID.IsZero() || h.UDP.Port == 0 || h.UDP.MTU.Bytes() == 0) {
			return nil, fmt.Errorf("UDP at %v, port %d, MTU code %d", h.UDP.GID, h.UDP.Port, uint8(h.UDP.MTU))
		}
	}
	if h.Features&featureStream != 0 {
		copy(h.Stream[:], r.bytes(len(h.Stream)))
		n := int(r.u16())
		if n > maxReason {
			return nil, fmt.Errorf("a reason of %d bytes: at most %d", n, maxReason)
		}
		if why := r.bytes(n); !r.fail {
			h.StreamWhy = toValid(string(why))
		}
	}
	switch {
	case r.fail:
		return nil, errTruncated
	case h.Features&(featureTCP|featureViaTCP) == featureViaTCP:
		return nil, errors.New("TCP is wanted, and not offered")
	case h.Features&(featureUDP|featureViaUDP) == featureViaUDP:
		return nil, errors.New("UDP is wanted, and not offered")
	case len(r.b) != 0:
		return nil, fmt.Errorf("%d bytes too many", len(r.b))
	case !utf8.ValidString(h.Name):
		return nil, errors.New("the name is not UTF-8")
	case h.QPN > ib.MaxQPN || h.PSN > ib.MaxPSN:
		return nil, fmt.Errorf("QPN %#x and PSN %#x: 24 bits are possible", uint32(h.QPN), uint32(h.PSN))
	case h.MTU.Bytes() == 0:
		return nil, fmt.Errorf("MTU code %d", uint8(h.MTU))
	case h.MaxMessage == 0 || h.MaxMessage > maxMaxMessage,
		h.Slot < minEager || h.Slot > maxEager,
		h.Window < 2 || h.Window > maxDepth,
		h.Rendezvous < 1 || h.Rendezvous > 256:
		return nil, fmt.Errorf("messages of %d bytes, slots of %d, window of %d, %d rendezvous: out of range",
			h.MaxMessage, h.Slot, h.Window, h.Rendezvous)
	}
	return h, nil
}

// readFrame reads one frame of the bootstrap protocol. Errors are *HandshakeError or the connection's.
func readFrame(conn io.Reader, want bootKind) ([]byte, error) {
	kind, body, err := readAnyFrame(conn)
	if err == nil && kind != want {
		return nil, refuse(RefusedProtocol, nil, "frame of kind %d, want %d", kind, want)
	}
	return body, err
}

// readAnyFrame is readFrame for frames of any kind but a reject, which is an error.
func readAnyFrame(conn io.Reader) (bootKind, []byte, error) {
	var hd [bootHeaderLen]byte
	if n, err := io.ReadFull(conn, hd[:]); err != nil {
		return 0, nil, readError(err, n, "header")
	}
	if string(hd[:4]) != bootMagic {
		return 0, nil, refuse(RefusedProtocol, nil, "this is no ringside peer: its first bytes are % x", hd[:4])
	}
	version := binary.LittleEndian.Uint16(hd[4:])
	kind := bootKind(hd[6])
	n := binary.LittleEndian.Uint32(hd[8:])
	if version != bootVersion && kind != bootReject {
		return 0, nil, refuse(RefusedVersion, nil, "bootstrap protocol version %d, and this side speaks %d", version, bootVersion)
	}
	if hd[7] != 0 || n > maxBootBody {
		return 0, nil, refuse(RefusedProtocol, nil, "frame of kind %d with flags %#x and %d bytes: at most %d", kind, hd[7], n, maxBootBody)
	}
	body := make([]byte, n)
	if k, err := io.ReadFull(conn, body); err != nil {
		return 0, nil, readError(err, k+bootHeaderLen, "body")
	}
	if kind == bootReject {
		code, reason, err := parseReason(body)
		if err != nil {
			return 0, nil, refuse(RefusedProtocol, nil, "reject frame: %v", err)
		}
		return 0, nil, &HandshakeError{Code: HandshakeCode(code), Reason: reason, Remote: true}
	}
	return kind, body, nil
}

func readError(err error, got int, part string) error {
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		return refuse(RefusedTimeout, err, "the peer sent %d bytes and no complete %s in time", got, part)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return refuse(RefusedProtocol, err, "the peer hung up after %d bytes of a frame", got)
	}
	return err
}

// appendReason encodes the body of a reject or goodbye: a code and a text.
func appendReason(b []byte, code uint16, reason string) []byte {
	if len(reason) > maxReason {
		reason = reason[:maxReason]
	}
	reason = toValid(reason)
	b = binary.LittleEndian.AppendUint16(b, code)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(reason)))
	return append(b, reason...)
}

func parseReason(b []byte) (code uint16, reason string, err error) {
	r := &reader{b: b}
	code = r.u16()
	n := int(r.u16())
	if r.fail || n > maxReason || n != len(r.b) {
		return 0, "", errTruncated
	}
	return code, toValid(string(r.b)), nil
}

// toValid makes text from a peer printable: valid UTF-8 without control characters.
func toValid(s string) string {
	out := make([]rune, 0, len(s))
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == utf8.RuneError {
			r = '?'
		}
		out = append(out, r)
	}
	if t := string(out); len(t) <= maxReason {
		return t
	}
	return s[:0]
}

func appendReject(b []byte, e *HandshakeError) []byte {
	return appendFrame(b, bootReject, appendReason(nil, uint16(e.Code), e.Reason))
}

func appendGoodbye(b []byte, code uint16, reason string) []byte {
	return appendFrame(b, bootGoodbye, appendReason(nil, code, reason))
}

// readGoodbye reads the only frame that comes after the handshake.
func readGoodbye(conn io.Reader) (code uint16, reason string, err error) {
	body, err := readFrame(conn, bootGoodbye)
	var he *HandshakeError
	switch {
	case errors.As(err, &he) && he.Err != nil: // the connection ended
		return 0, "", he.Err
	case errors.As(err, &he):
		return 0, "", protocolErrorf("on the bootstrap connection: %s", he.Reason)
	case err != nil:
		return 0, "", err
	}
	if code, reason, err = parseReason(body); err != nil {
		return 0, "", protocolErrorf("goodbye: %v", err)
	}
	return code, reason, nil
}
