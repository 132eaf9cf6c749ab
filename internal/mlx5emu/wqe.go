package mlx5emu

import (
	"errors"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Send WQEs: segments of 16 bytes, in blocks of 64 (basic blocks, BBs). The first is a control segment.

const (
	bbSize  = 64
	segSize = 16
	maxSegs = 63
	maxWQE  = maxSegs * segSize
)

// Opcodes of send WQEs.
const (
	opNop       = 0x00
	opSendInval = 0x01
	opWrite     = 0x08
	opWriteImm  = 0x09
	opSend      = 0x0a
	opSendImm   = 0x0b
	opRead      = 0x10
	opCompSwap  = 0x11
	opFetchAdd  = 0x12
	opUMR       = 0x25
)

// Bits of fm_ce_se.
const (
	ceSolicited = 0x02
	ceUpdate    = 0x08 // a CQE is wanted
	ceFence     = 0x80
)

const (
	inlineBit    = 1 << 31
	invalidLKey  = 0x100 // ends a list of scatter entries
	segZeroBytes = 1 << 31
	inlineMask   = 0x3ff
)

// A dataSeg is a data segment: byte_count, lkey, address.
type dataSeg struct {
	n    uint32
	lkey uint32
	addr uint64
}

// dataSegAt reads a data segment. A count of 0 is 2 GiB.
func dataSegAt(b []byte) dataSeg {
	s := dataSeg{be32(b), be32(b[4:]), be.Uint64(b[8:])}
	if s.n == 0 {
		s.n = segZeroBytes
	}
	return s
}

// A sendWQE is a send WQE taken apart. Slices are reused from one to the next.
type sendWQE struct {
	opcode, opmod byte
	index         uint16
	qpn           uint32
	segs          int // its length in segments
	signaled      bool
	solicited     bool
	fence         bool
	imm           uint32
	av            avSeg
	raddr         uint64
	rkey          uint32
	swapAdd, cmp  uint64
	data          []dataSeg
	inline        []byte
	eth           ethSeg
	bind          bindSegs
}

// An avSeg is the address vector of a datagram, as far as it means anything here: the MAC address is the software NIC's affair.
type avSeg struct {
	qkey      uint32
	qpn       uint32
	tclass    uint8
	hopLimit  uint8
	sgidIndex uint8
	lid       ib.LID // on InfiniBand; on Ethernet, the UDP source port
	global    bool   // on InfiniBand: there is a global route
	flowLabel uint32
	gid       ib.GID
}

// An ethSeg is what is done with an Ethernet frame, and how it begins.
type ethSeg struct {
	checksums uint8
	header    []byte
}

// What an ethSeg asks for.
const (
	ethL3Checksum = 1 << 6
	ethL4Checksum = 1 << 7
)

const (
	ethHeaderAt = 14 // in the segment: the bytes before are flags, and how long the header is
	ethSegSize  = 16 // at least
)

// decode reads the segment at the beginning of b, and returns how long it is.
func (s *ethSeg) decode(b []byte) (int, error) {
	if len(b) < ethSegSize {
		return 0, errShortWQE
	}
	n := int(be.Uint16(b[12:]) & inlineMask)
	if ethHeaderAt+n > len(b) {
		return 0, errShortWQE
	}
	if s.checksums = b[4]; s.checksums&^(ethL3Checksum|ethL4Checksum) != 0 || be.Uint16(b[6:]) != 0 {
		return 0, errEth
	}
	s.header = append(s.header[:0], b[ethHeaderAt:][:n]...)
	return max((ethHeaderAt+n+segSize-1)&^(segSize-1), ethSegSize), nil
}

// bindSegs is what binds a memory window, or ends its binding: a UMR.
type bindSegs struct {
	unbind bool
	key    uint32 // of the window: now that of ctrl, then with the key byte of the mkey segment
	access ib.Access
	addr   uint64
	length uint64
	lkey   uint32
}

// Why a WQE cannot be taken apart. They are made once.
var (
	errShortWQE  = errors.New("the WQE ends before its segments do")
	errOpcode    = errors.New("no such operation on this kind of queue pair")
	errMixed     = errors.New("inline data beside data segments")
	errInlineLen = errors.New("inline data where there can be none")
	errUMR       = errors.New("a UMR other than to bind a type 2 window, or to end that")
	errEth       = errors.New("a frame that is to be segmented, or encapsulated")
	errAtomic    = errors.New("an atomic of other than 8 bytes")
)

// control reads the control segment: enough to know how long the WQE is, and whether it can be believed.
func (w *sendWQE) control(b []byte) {
	v := be32(b)
	w.opmod, w.index, w.opcode = byte(v>>24), uint16(v>>8), byte(v)
	v = be32(b[4:])
	w.qpn, w.segs = v>>8, int(v&0x3f)
	ce := b[11]
	w.signaled, w.solicited, w.fence = ce&ceUpdate != 0, ce&ceSolicited != 0, ce&ceFence != 0
	w.imm = be32(b[12:])
}

// bbs is how many basic blocks the WQE takes.
func (w *sendWQE) bbs() int { return (w.segs*segSize + bbSize - 1) / bbSize }

// decode takes a WQE of a queue pair of that type apart. b is all of it, w.segs segments; control has been called.
func (w *sendWQE) decode(b []byte, t ib.QPType) error {
	w.data, w.inline = w.data[:0], w.inline[:0]
	b = b[segSize:]
	switch {
	case w.opmod != 0 && w.opcode != opUMR:
		return errOpcode
	case t == ib.UD && w.opcode != opSend && w.opcode != opSendImm && w.opcode != opNop:
		return errOpcode
	case t == ib.UC && (w.opcode == opRead || w.opcode == opCompSwap || w.opcode == opFetchAdd || w.opcode == opSendInval):
		return errOpcode
	}
	if w.opcode == opNop {
		return nil
	}
	if t == ib.RawPacket {
		if w.opcode != opSend {
			return errOpcode
		}
		n, err := w.eth.decode(b)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	if t == ib.UD {
		if len(b) < avSize {
			return errShortWQE
		}
		w.av.decode(b)
		b = b[avSize:]
	}
	switch w.opcode {
	case opSend, opSendImm, opSendInval:
	case opWrite, opWriteImm, opRead, opCompSwap, opFetchAdd:
		if len(b) < segSize {
			return errShortWQE
		}
		w.raddr, w.rkey = be.Uint64(b), be32(b[8:])
		b = b[segSize:]
		if w.opcode == opCompSwap || w.opcode == opFetchAdd {
			if len(b) < segSize {
				return errShortWQE
			}
			w.swapAdd, w.cmp = be.Uint64(b), be.Uint64(b[8:])
			b = b[segSize:]
		}
	case opUMR:
		return w.decodeUMR(b)
	default:
		return errOpcode
	}
	return w.payload(b)
}

// payload reads data segments and inline data until the WQE ends.
func (w *sendWQE) payload(b []byte) error {
	for len(b) >= segSize {
		head := be32(b)
		if head&inlineBit == 0 {
			w.data = append(w.data, dataSegAt(b))
			b = b[segSize:]
			continue
		}
		n := int(head & inlineMask)
		if n > len(b)-4 {
			return errShortWQE
		}
		w.inline = append(w.inline, b[4:4+n]...)
		b = b[(4+n+segSize-1)&^(segSize-1):]
	}
	switch atomic := w.opcode == opCompSwap || w.opcode == opFetchAdd; {
	case len(w.inline) > 0 && len(w.data) > 0:
		return errMixed
	case len(w.inline) > 0 && (atomic || w.opcode == opRead):
		return errInlineLen
	case atomic && (len(w.data) != 1 || w.data[0].n != 8):
		return errAtomic
	}
	return nil
}

// length is how many bytes the message has.
func (w *sendWQE) length() uint64 {
	n := uint64(len(w.inline))
	for i := range w.data {
		n += uint64(w.data[i].n)
	}
	return n
}

const avSize = 48

func (a *avSeg) decode(b []byte) {
	a.qkey, a.qpn = be32(b), be32(b[8:])&uint32(ib.MaxQPN)
	a.tclass, a.hopLimit = b[26], b[27]
	v := be32(b[28:])
	a.sgidIndex, a.flowLabel, a.global = uint8(v>>20), v&(1<<20-1), v>>30&1 != 0
	a.lid = ib.LID(be.Uint16(b[14:]))
	copy(a.gid[:], b[32:])
}

// The UMR that libmlx5 binds windows with: a control segment, an mkey context, and one KLM.
const (
	umrCtrlSize  = 48
	umrMkeySize  = 64
	umrKLMSize   = 64
	umrCheckFree = 1 << 5 // flags: bind a window that is free
	umrCheckQPN  = 1 << 3 // flags: end the binding of this queue pair's
	umrInline    = 1 << 7
	mkeyFree     = 1 << 6
)

func (w *sendWQE) decodeUMR(b []byte) error {
	if len(b) < umrCtrlSize+umrMkeySize {
		return errShortWQE
	}
	flags, octowords := b[0], be.Uint16(b[4:])
	mkey := b[umrCtrlSize:]
	w.bind = bindSegs{key: w.imm, unbind: flags&umrCheckQPN != 0}
	if w.bind.unbind {
		if mkey[0]&mkeyFree == 0 || flags&umrCheckFree != 0 {
			return errUMR
		}
		return nil
	}
	if flags&umrCheckFree == 0 || flags&umrInline == 0 || octowords == 0 || mkey[0]&mkeyFree != 0 {
		return errUMR
	}
	if len(b) < umrCtrlSize+umrMkeySize+umrKLMSize {
		return errShortWQE
	}
	access := mkey[2]
	for _, r := range []struct {
		bit byte
		as  ib.Access
	}{{1 << 4, ib.AccessRemoteRead}, {1 << 5, ib.AccessRemoteWrite}, {1 << 6, ib.AccessRemoteAtomic}} {
		if access&r.bit != 0 {
			w.bind.access |= r.as
		}
	}
	w.bind.key = w.imm&^0xff | be32(mkey[4:])&0xff
	w.bind.addr, w.bind.length = be.Uint64(mkey[16:]), be.Uint64(mkey[24:])
	klm := mkey[umrMkeySize:]
	w.bind.lkey = be32(klm[4:])
	if n := be32(klm); uint64(n) != w.bind.length || be.Uint64(klm[8:]) != w.bind.addr {
		return errUMR // a window onto another range than it says
	}
	return nil
}

// scatterList reads the data segments of a receive WQE, up to the one that ends the list.
func scatterList(to []dataSeg, b []byte) []dataSeg {
	for ; len(b) >= segSize; b = b[segSize:] {
		s := dataSegAt(b)
		if s.lkey == invalidLKey {
			break
		}
		to = append(to, s)
	}
	return to
}
