package softnic

import (
	"encoding/binary"
	"errors"
)

// A ctl is a control message between the two ends of a link. Over a Unix socket it is ctlHeader bytes, little-endian, then
// data, with at most one descriptor attached; within a process it is passed as it is. What the fields mean depends on the
// kind; see link.handle, which checks them.
type ctl struct {
	kind   ctlKind
	status uint8
	flags  uint16
	id     uint32
	qpn    uint32
	dst    uint32
	a, b   uint32
	c, d   uint32
	x, y   uint64
	z      uint64
	data   []byte

	fd    int // attached descriptor, valid if hasFD; the sender keeps its own copy, the receiver owns what arrives
	hasFD bool
	obj   any // within a process: what the descriptor would stand for
}

type ctlKind uint8

const (
	ctlChunk      ctlKind = 1 + iota // id, size x, fd: a chunk of blocks and ports
	ctlChannel                       // id, fd: a completion channel
	ctlSRQ                           // id, ring a, sges b, fd: a shared receive queue
	ctlConnect                       // see connectMsg: a block for dst to send to
	ctlDisconnect                    // id, qpn, dst: the block of ctlConnect is going away
	ctlReleased                      // id: answer to ctlDisconnect: not touched any more
	ctlResolve                       // id, handle a or rkey b, qpn: asks for ctlRegion
	ctlRegion                        // see link.handleRegion
	ctlGone                          // handle a: forget the region
	ctlFault                         // dst, a, b, status: the sender's request broke a rule; the QP of that block must go to ERR
	ctlAssist                        // id, dst, opcode status, rkey a, length b, address x, y, z, data: do it for me
	ctlAssisted                      // id, status, value x, data: answer to ctlAssist
	ctlAttach                        // id, qpn: asks for a block to send datagrams to that QP
	ctlAttached                      // id, status; connectMsg follows: answer to ctlAttach
	ctlBye                           // data: why the link closes
	ctlDrop                          // id, status: a channel or SRQ that no block uses any more
	ctlRefill                        // qpn, dst, number x: asks for receives of dst that were not posted yet; see connectAsks
	ctlRefilled                      // number x: answer to ctlRefill: what there were is posted
	ctlKinds
)

const (
	ctlHeader  = 64
	ctlMaxData = 64 << 10
)

func (m *ctl) encode(b []byte) []byte {
	le := binary.LittleEndian
	b = append(b, byte(m.kind), m.status)
	b = le.AppendUint16(b, m.flags)
	for _, v := range [...]uint32{m.id, m.qpn, m.dst, m.a, m.b, m.c, m.d} {
		b = le.AppendUint32(b, v)
	}
	b = le.AppendUint64(b, m.x)
	b = le.AppendUint64(b, m.y)
	b = le.AppendUint64(b, m.z)
	b = le.AppendUint32(b, uint32(len(m.data)))
	var has uint32
	if m.hasFD {
		has = 1
	}
	b = le.AppendUint32(b, has)
	return append(b, m.data...)
}

var errCtl = errors.New("malformed control message")

// decode parses one message; data aliases b.
func (m *ctl) decode(b []byte) error {
	le := binary.LittleEndian
	if len(b) < ctlHeader {
		return errCtl
	}
	*m = ctl{kind: ctlKind(b[0]), status: b[1], flags: le.Uint16(b[2:]), id: le.Uint32(b[4:]), qpn: le.Uint32(b[8:]),
		dst: le.Uint32(b[12:]), a: le.Uint32(b[16:]), b: le.Uint32(b[20:]), c: le.Uint32(b[24:]), d: le.Uint32(b[28:]),
		x: le.Uint64(b[32:]), y: le.Uint64(b[40:]), z: le.Uint64(b[48:]), fd: -1}
	n, has := le.Uint32(b[56:]), le.Uint32(b[60:])
	if m.kind == 0 || m.kind >= ctlKinds || has > 1 || n > ctlMaxData || int(n) != len(b)-ctlHeader {
		return errCtl
	}
	m.hasFD = has == 1
	m.data = b[ctlHeader:]
	return nil
}

// connectMsg describes a block: where a peer sends to, and how it wakes the receiver.
type connectMsg struct {
	chunk, off         uint32 // the block
	geo                geometry
	portChunk, portOff uint32
	bit                uint32
	channel            uint32 // 0: none
	srq                uint32 // 0: none
	pd                 uint32
	tag                uint32 // see peerView.tag; 0 from versions that do not tell
	asks               bool   // see peerView.asks
}

// connectAsks is the flag of a block whose receives are to be asked for where there are none.
const connectAsks uint16 = 1 << 0

// into puts the description into a control message.
func (c *connectMsg) into(m *ctl) {
	m.a, m.b = c.chunk, c.off
	m.c = uint32(c.geo.depth)
	m.d = c.geo.sges | c.geo.cqeWords<<8
	if c.geo.srq {
		m.d |= 1 << 24
	}
	m.x = uint64(c.portChunk)<<32 | uint64(c.portOff)
	m.y = uint64(c.bit)<<32 | uint64(c.channel)
	m.z = uint64(c.srq)<<32 | uint64(c.pd)
	m.id = c.tag
	if c.asks {
		m.flags |= connectAsks
	}
}

func (c *connectMsg) from(m *ctl) error {
	*c = connectMsg{chunk: m.a, off: m.b, geo: geometry{depth: m.c, sges: m.d & 0xff, cqeWords: m.d >> 8 & 0xff, srq: m.d>>24 == 1},
		portChunk: uint32(m.x >> 32), portOff: uint32(m.x), bit: uint32(m.y >> 32), channel: uint32(m.y),
		srq: uint32(m.z >> 32), pd: uint32(m.z), tag: m.id, asks: m.flags&connectAsks != 0}
	if m.d>>24 > 1 || m.d>>16&0xff != 0 || !c.geo.valid() || c.bit >= portQPs || c.off%cacheLine != 0 || c.portOff%cacheLine != 0 {
		return errCtl
	}
	return nil
}
