package perf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The control protocol: frames on a TCP connection, everything little-endian.
//
//	frame   length uint32 (of what follows the type) | type uint16 | payload
//
//	client                                   server
//	hello                    ->
//	                         <-              hello
//	setup (spec, endpoint)   ->                              once for each message size:
//	                         <-              ready (endpoint)
//	mark                     ->                              if a connection manager connects the devices
//	                         <-              marked
//	    ... warm-up ...
//	mark                     ->
//	                         <-              marked
//	    ... measurement ...
//	stop (messages sent)     ->
//	                         <-              report
//
// Instead of any frame, either side may send an error, which ends the connection. Both sides refuse a frame that they
// do not expect, that is longer than maxFrame, or whose payload has bytes missing or left over.

type frameType uint16

const (
	frameHello  frameType = 1
	frameSetup  frameType = 2
	frameReady  frameType = 3
	frameMark   frameType = 4
	frameMarked frameType = 5
	frameStop   frameType = 6
	frameReport frameType = 7
	frameError  frameType = 8
)

func (t frameType) String() string {
	names := [...]string{"", "hello", "setup", "ready", "mark", "marked", "stop", "report", "error"}
	if t > 0 && int(t) < len(names) {
		return names[t]
	}
	return fmt.Sprintf("type %d", uint16(t))
}

const (
	frameHeader = 6
	maxFrame    = 64 << 10
	maxText     = 1 << 10 // bytes of one string

	helloMagic   = 0x46525052 // "RPRF"
	protoVersion = 2
)

var (
	errTruncated = errors.New("frame ends too early")
	errTrailing  = errors.New("frame has bytes left over")
)

// A message is the decoded payload of one frame.
type message interface {
	frame() frameType
	append(b []byte) []byte
	decode(d *decoder)
}

// hello introduces a side.
type hello struct {
	version uint16
	host    Host
}

// setup asks the server for one test.
type setup struct {
	spec     Spec
	endpoint endpoint // the client's
}

// endpoint is where one side's queue pairs are. For rpc, only service is set, by the server, and as well for queue pairs that are
// connected over TCP or by a connection manager.
type endpoint struct {
	gid     ib.GID
	lid     ib.LID
	mtu     ib.MTU
	udpPort uint16
	qps     []qpAddr // one for each of the spec's QPs
	buffer  [24]byte // mr.RemoteKey of the whole region
	service string   // where the server listens for this test, "host:port"
}

type qpAddr struct {
	qpn ib.QPN
	psn ib.PSN
}

// ready says that the server's queue pairs are connected and its receives are posted; over TCP, and by a connection manager, that it waits
// for the connections.
type ready struct{ endpoint endpoint }

// mark separates warm-up and measurement; marked answers it.
type (
	mark   struct{}
	marked struct{}
)

// stop ends a test: the client has sent this many messages in all, warm-up included.
type stop struct{ messages uint64 }

// report is the server's side of the measurement, from mark to stop.
type report struct {
	messages  uint64 // messages that the server has handled, warm-up included; 0 where it takes no part
	cpu       cpuTime
	path      string
	atomicSum uint64 // atomic: what the target word holds at the end
}

// wireError carries a reason to the other side.
type wireError struct{ text string }

func (*hello) frame() frameType     { return frameHello }
func (*setup) frame() frameType     { return frameSetup }
func (*ready) frame() frameType     { return frameReady }
func (*mark) frame() frameType      { return frameMark }
func (*marked) frame() frameType    { return frameMarked }
func (*stop) frame() frameType      { return frameStop }
func (*report) frame() frameType    { return frameReport }
func (*wireError) frame() frameType { return frameError }

func newMessage(t frameType) message {
	switch t {
	case frameHello:
		return new(hello)
	case frameSetup:
		return new(setup)
	case frameReady:
		return new(ready)
	case frameMark:
		return new(mark)
	case frameMarked:
		return new(marked)
	case frameStop:
		return new(stop)
	case frameReport:
		return new(report)
	case frameError:
		return new(wireError)
	}
	return nil
}

func (m *hello) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, helloMagic)
	b = binary.LittleEndian.AppendUint16(b, m.version)
	return m.host.append(b)
}

func (m *hello) decode(d *decoder) {
	if magic := d.u32(); d.err == nil && magic != helloMagic {
		d.fail(fmt.Errorf("the peer does not speak ringside's perf protocol (magic %#x)", magic))
	}
	if m.version = d.u16(); d.err == nil && m.version != protoVersion {
		d.fail(fmt.Errorf("the peer speaks version %d of the perf protocol, this program version %d: use the same ringside on both sides",
			m.version, protoVersion))
	}
	m.host.decode(d)
}

func (h *Host) append(b []byte) []byte {
	for _, s := range h.texts() {
		b = appendText(b, *s)
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(h.Cores))
	b = binary.LittleEndian.AppendUint32(b, uint32(h.GOMAXPROCS))
	return binary.LittleEndian.AppendUint32(b, uint32(int32(h.PollCPU)))
}

func (h *Host) decode(d *decoder) {
	for _, s := range h.texts() {
		*s = d.text()
	}
	h.Cores = int(d.u32())
	h.GOMAXPROCS = int(d.u32())
	h.PollCPU = int(int32(d.u32()))
}

// texts lists the string fields in the order of the wire.
func (h *Host) texts() []*string {
	return []*string{&h.Name, &h.OS, &h.Arch, &h.Kernel, &h.CPU, &h.Go, &h.Version, &h.Device, &h.Provider, &h.Tier}
}

func (m *setup) append(b []byte) []byte {
	s := &m.spec
	b = append(b, byte(s.Op), byte(s.Kind), byte(s.Poll), byte(s.Atomic), byte(s.Flow), byte(s.Path))
	for _, v := range s.ints() {
		b = binary.LittleEndian.AppendUint64(b, uint64(*v))
	}
	b = binary.LittleEndian.AppendUint64(b, uint64(s.Iters))
	b = binary.LittleEndian.AppendUint64(b, uint64(s.Duration))
	b = binary.LittleEndian.AppendUint64(b, uint64(s.Spin))
	return m.endpoint.append(b)
}

func (m *setup) decode(d *decoder) {
	s := &m.spec
	s.Op, s.Kind, s.Poll, s.Atomic, s.Flow, s.Path = Op(d.u8()), Kind(d.u8()), PollMode(d.u8()), AtomicOp(d.u8()), Flow(d.u8()), Path(d.u8())
	for _, v := range s.ints() {
		n := int64(d.u64())
		if *v = int(n); int64(*v) != n { // 32-bit platforms
			d.fail(fmt.Errorf("%d is out of range", n))
		}
	}
	s.Iters = int64(d.u64())
	s.Duration = time.Duration(d.u64())
	s.Spin = time.Duration(d.u64())
	if d.err == nil {
		if err := s.Validate(); err != nil {
			d.fail(err)
		}
	}
	m.endpoint.decode(d)
	if d.err == nil && s.Op != OpRPC && len(m.endpoint.qps) != s.QPs {
		d.fail(fmt.Errorf("the peer offers %d queue pairs for a test with %d", len(m.endpoint.qps), s.QPs))
	}
}

// ints lists the int fields in the order of the wire.
func (s *Spec) ints() []*int {
	return []*int{&s.Size, &s.Warmup, &s.Inline, &s.Depth, &s.Batch, &s.QPs, &s.SignalEvery, &s.InFlight}
}

func (e *endpoint) append(b []byte) []byte {
	b = append(b, e.gid[:]...)
	b = binary.LittleEndian.AppendUint16(b, uint16(e.lid))
	b = append(b, byte(e.mtu))
	b = binary.LittleEndian.AppendUint16(b, e.udpPort)
	b = append(b, e.buffer[:]...)
	b = appendText(b, e.service)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(e.qps)))
	for _, q := range e.qps {
		b = binary.LittleEndian.AppendUint32(b, uint32(q.qpn))
		b = binary.LittleEndian.AppendUint32(b, uint32(q.psn))
	}
	return b
}

func (e *endpoint) decode(d *decoder) {
	copy(e.gid[:], d.bytes(len(e.gid)))
	e.lid = ib.LID(d.u16())
	e.mtu = ib.MTU(d.u8())
	e.udpPort = d.u16()
	copy(e.buffer[:], d.bytes(len(e.buffer)))
	e.service = d.text()
	n := int(d.u16())
	if d.err == nil && n > MaxQPs {
		d.fail(fmt.Errorf("%d queue pairs: the limit is %d", n, MaxQPs))
	}
	if d.err != nil || n == 0 {
		return
	}
	if e.mtu.Bytes() == 0 {
		d.fail(fmt.Errorf("MTU code %d is not valid", uint8(e.mtu)))
		return
	}
	if n*8 > len(d.b) { // before memory is allocated for them
		d.fail(errTruncated)
		return
	}
	e.qps = make([]qpAddr, n)
	for i := range e.qps {
		q := qpAddr{qpn: ib.QPN(d.u32()), psn: ib.PSN(d.u32())}
		if q.qpn == 0 || q.qpn > ib.MaxQPN || q.psn > ib.MaxPSN {
			d.fail(fmt.Errorf("queue pair number %#x with PSN %#x is not valid", uint32(q.qpn), uint32(q.psn)))
			return
		}
		e.qps[i] = q
	}
}

func (m *ready) append(b []byte) []byte { return m.endpoint.append(b) }
func (m *ready) decode(d *decoder)      { m.endpoint.decode(d) }

func (*mark) append(b []byte) []byte   { return b }
func (*mark) decode(*decoder)          {}
func (*marked) append(b []byte) []byte { return b }
func (*marked) decode(*decoder)        {}

func (m *stop) append(b []byte) []byte { return binary.LittleEndian.AppendUint64(b, m.messages) }
func (m *stop) decode(d *decoder)      { m.messages = d.u64() }

func (m *report) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, m.messages)
	b = binary.LittleEndian.AppendUint64(b, uint64(m.cpu.user))
	b = binary.LittleEndian.AppendUint64(b, uint64(m.cpu.system))
	b = binary.LittleEndian.AppendUint64(b, m.atomicSum)
	return appendText(b, m.path)
}

func (m *report) decode(d *decoder) {
	m.messages = d.u64()
	m.cpu.user = time.Duration(d.u64())
	m.cpu.system = time.Duration(d.u64())
	m.atomicSum = d.u64()
	m.path = d.text()
}

func (m *wireError) append(b []byte) []byte { return appendText(b, m.text) }
func (m *wireError) decode(d *decoder)      { m.text = d.text() }

func appendText(b []byte, s string) []byte {
	if len(s) > maxText {
		s = s[:maxText]
	}
	b = binary.LittleEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

// A decoder takes values off the front of b. After the first failure it returns zeros, and err says why.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) fail(err error) {
	if d.err == nil {
		d.err, d.b = err, nil
	}
}

var zeros [64]byte

// bytes returns the next n bytes, at most 64, or zeros.
func (d *decoder) bytes(n int) []byte {
	if d.err != nil || len(d.b) < n {
		d.fail(errTruncated)
		return zeros[:n]
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

func (d *decoder) u8() uint8   { return d.bytes(1)[0] }
func (d *decoder) u16() uint16 { return binary.LittleEndian.Uint16(d.bytes(2)) }
func (d *decoder) u32() uint32 { return binary.LittleEndian.Uint32(d.bytes(4)) }
func (d *decoder) u64() uint64 { return binary.LittleEndian.Uint64(d.bytes(8)) }

func (d *decoder) text() string {
	n := int(d.u16())
	if d.err == nil && n > maxText {
		d.fail(fmt.Errorf("a string of %d bytes: the limit is %d", n, maxText))
	}
	if d.err != nil || len(d.b) < n {
		d.fail(errTruncated)
		return ""
	}
	s := string(d.b[:n])
	d.b = d.b[n:]
	return s
}

// appendFrame appends m as a frame.
func appendFrame(b []byte, m message) []byte {
	start := len(b)
	b = append(b, 0, 0, 0, 0)
	b = binary.LittleEndian.AppendUint16(b, uint16(m.frame()))
	b = m.append(b)
	binary.LittleEndian.PutUint32(b[start:], uint32(len(b)-start-frameHeader))
	return b
}

// decodeMessage decodes the payload of a frame of type t.
func decodeMessage(t frameType, payload []byte) (message, error) {
	m := newMessage(t)
	if m == nil {
		return nil, fmt.Errorf("unknown frame %v", t)
	}
	d := decoder{b: payload}
	m.decode(&d)
	if d.err == nil && len(d.b) > 0 {
		d.fail(errTrailing)
	}
	if d.err != nil {
		return nil, fmt.Errorf("bad %v frame: %w", t, d.err)
	}
	return m, nil
}

// readMessage reads one frame from r, using buf (at least maxFrame long) for it.
func readMessage(r io.Reader, buf []byte) (message, error) {
	var h [frameHeader]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(h[:])
	t := frameType(binary.LittleEndian.Uint16(h[4:]))
	if newMessage(t) == nil {
		return nil, fmt.Errorf("unknown frame %v: the peer does not speak ringside's perf protocol", t)
	}
	if n > maxFrame {
		return nil, fmt.Errorf("%v frame of %d bytes: the limit is %d", t, n, maxFrame)
	}
	if _, err := io.ReadFull(r, buf[:n]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return decodeMessage(t, buf[:n])
}
