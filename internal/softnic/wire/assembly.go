package wire

import (
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Target is the memory and the receive queue that a Responder works on. Methods that return a status say WCSuccess,
// WCRemoteAccessErr, WCRemoteInvalidReqErr or WCRemoteOpErr, as the peer is to see it; Read and Atomic also WCRetryExceeded, which
// it sees if nobody answers any more.
type Target interface {
	// Take takes the next receive for a message. false: there is none.
	Take() bool
	// Put copies a part of the message, from byte off on, to the receive that was taken.
	Put(off uint32, data []byte) ib.WCStatus
	// Complete ends the receive that was taken. st is not WCSuccess if the message was refused on the way.
	Complete(m Message, st ib.WCStatus)

	// Check says whether n bytes at addr may be used as need says.
	Check(rkey uint32, addr uint64, n uint32, need ib.Access) ib.WCStatus
	// Write copies data to addr, if it may still.
	Write(rkey uint32, addr uint64, data []byte) ib.WCStatus
	// Read fills dst from addr, if it may still.
	Read(rkey uint32, addr uint64, dst []byte) ib.WCStatus
	// Atomic executes an atomic on the 8 bytes at addr, or an ATOMIC WRITE of swap.
	Atomic(rkey uint32, addr uint64, op ib.Opcode, compareAdd, swap uint64) (old uint64, st ib.WCStatus)
	// Flush has what was written before where f wants it.
	Flush(rkey uint32, addr uint64, f ib.Flush) ib.WCStatus
	// Invalidate ends a window's key.
	Invalidate(rkey uint32) ib.WCStatus

	// Fail is called once, when a request was refused that ends the connection (IBA 9.9.3).
	Fail(st ib.WCStatus)
}

// A Message is what the completion of a receive says.
type Message struct {
	Len       uint32
	Write     bool // an RDMA WRITE with immediate
	HasImm    bool
	HasInv    bool
	Imm       uint32 // as it is on the wire, or the key that was invalidated
	Solicited bool
}

// An assembly puts SENDs and WRITEs together, packet by packet, in order.
type assembly struct {
	mtu    int
	t      Target
	doing  uint8 // what it is in the middle of: idle, sending or writing
	taken  bool  // a receive was taken, and not completed yet
	spoilt bool  // a receive has ended with an error
	off    uint32
	addr   uint64 // of a WRITE
	rkey   uint32
	len    uint32
}

const (
	idle = iota
	sending
	writing
)

// begun reports whether a message is there in part.
func (a *assembly) begun() bool { return a.doing != idle }

// drop forgets the part of a message that is there. Its receive is kept for the next.
func (a *assembly) drop() { a.doing, a.off = idle, 0 }

// inPlace stands for payloads that are where they belong already. Nobody reads it.
var inPlace [4096]byte

// place writes the payload of a packet that comes d packets before its turn to where it belongs, if that is known by now: it is in
// the middle of the WRITE that is there in part. It looks at the packet as its turn will: one that does not fit stays for that. So
// does the end of the WRITE, since programs wait for its last byte in memory.
func (a *assembly) place(p *roce.Packet, d int32) bool {
	n := len(p.Payload)
	off := uint64(a.off) + uint64(d)*uint64(a.mtu)
	if a.doing != writing || p.Opcode.Op() != roce.WriteMiddle || n != a.mtu || n > len(inPlace) || off+uint64(n) >= uint64(a.len) {
		return false
	}
	return a.t.Write(a.rkey, a.addr+off, p.Payload) == ib.WCSuccess
}

// add takes the next packet, whose payload may be in its place already. there is false if it needs a receive, and there is none: it may come again. A status other than
// WCSuccess ends the message: so it was refused, and a receive that it has taken has ended.
func (a *assembly) add(p *roce.Packet, placed bool) (st ib.WCStatus, there bool) {
	if !a.fits(p) {
		st = ib.WCRemoteInvalidReqErr
	} else if op := p.Opcode.Op(); op >= roce.WriteFirst && op <= roce.WriteOnlyImm {
		st, there = a.write(p, placed)
	} else {
		st, there = a.send(p)
	}
	switch {
	case st != ib.WCSuccess:
		if a.taken {
			local := ib.WCLocalProtErr
			if st == ib.WCRemoteInvalidReqErr {
				local = ib.WCLocalLengthErr
			}
			a.taken, a.spoilt = false, true
			a.t.Complete(Message{Len: a.off}, local)
		}
		a.drop()
		return st, true
	case there && p.Opcode.Last():
		a.drop()
	}
	return st, there
}

// fits reports whether the packet may come in this place, and has the length that it must have there (IBA 9.7.4.1.3 to 5).
func (a *assembly) fits(p *roce.Packet) bool {
	n := len(p.Payload)
	doing := idle
	switch op := p.Opcode.Op(); {
	case op == roce.SendMiddle, op == roce.SendLast, op == roce.SendLastImm, op == roce.SendLastInv:
		doing = sending
	case op == roce.WriteMiddle, op == roce.WriteLast, op == roce.WriteLastImm:
		doing = writing
	case op > roce.WriteOnlyImm && op != roce.SendOnlyInv:
		return false
	}
	if int(a.doing) != doing {
		return false
	}
	if n == 0 && !(p.Opcode.First() && p.Opcode.Last()) {
		return false // only a message of one packet can be empty
	}
	return n <= a.mtu && (n == a.mtu || p.Opcode.Last()) && a.off <= maxMessage-uint32(n)
}

// send takes a packet of a SEND.
func (a *assembly) send(p *roce.Packet) (st ib.WCStatus, there bool) {
	if a.doing == idle {
		if !a.take() {
			return ib.WCSuccess, false
		}
		a.doing, a.off = sending, 0
	}
	if len(p.Payload) > 0 {
		if st := a.t.Put(a.off, p.Payload); st != ib.WCSuccess {
			return st, true
		}
		a.off += uint32(len(p.Payload))
	}
	if !p.Opcode.Last() {
		return ib.WCSuccess, true
	}
	m := Message{Len: a.off, HasImm: p.Opcode.HasImm(), HasInv: p.Opcode.HasInv(), Imm: p.Imm, Solicited: p.Solicited}
	if m.HasInv {
		m.Imm = p.InvKey
		if st := a.t.Invalidate(p.InvKey); st != ib.WCSuccess {
			return st, true
		}
	}
	a.complete(m)
	return ib.WCSuccess, true
}

// take takes a receive, if there is one.
func (a *assembly) take() bool {
	a.taken = a.taken || a.t.Take()
	return a.taken
}

func (a *assembly) complete(m Message) {
	a.taken = false
	a.t.Complete(m, ib.WCSuccess)
}

// write takes a packet of a WRITE.
func (a *assembly) write(p *roce.Packet, placed bool) (st ib.WCStatus, there bool) {
	n := uint32(len(p.Payload))
	if a.doing == idle {
		if p.Len > maxMessage {
			return ib.WCRemoteInvalidReqErr, true
		}
		if p.Len > 0 { // a WRITE of nothing does not look at the rkey (IBA 9.7.5.2.7)
			if st := a.t.Check(p.RKey, p.Addr, p.Len, ib.AccessRemoteWrite); st != ib.WCSuccess {
				return st, true
			}
		}
		a.off, a.addr, a.rkey, a.len = 0, p.Addr, p.RKey, p.Len
	}
	if left := a.len - a.off; n > left || p.Opcode.Last() != (n == left) {
		return ib.WCRemoteInvalidReqErr, true
	}
	if p.Opcode.HasImm() && !a.take() {
		return ib.WCSuccess, false
	}
	if n > 0 && !placed {
		if st := a.t.Write(a.rkey, a.addr+uint64(a.off), p.Payload); st != ib.WCSuccess {
			return st, true
		}
	}
	a.doing = writing
	a.off += n
	if p.Opcode.HasImm() {
		a.complete(Message{Len: a.len, Write: true, HasImm: true, Imm: p.Imm, Solicited: p.Solicited})
	}
	return ib.WCSuccess, true
}
