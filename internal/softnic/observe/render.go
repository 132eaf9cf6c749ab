package observe

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/ringside-rdma/ringside/internal/roce"
)

// A Renderer makes of records the IP packets that they are, or would have been. It is for one goroutine at a time.
type Renderer struct {
	// KeepPorts leaves UDP ports as they are. Otherwise a packet neither of whose ports is roce.Port, by which others know that it is
	// RoCEv2, is shown as one to that port, and its comment says so.
	KeepPorts bool

	icrc roce.ICRC
	udp  []byte
	out  []byte
}

// Render returns the packet, and how long it is as a whole; of one that was not captured whole, the start. comment says what is
// special about it. The packet is valid until the next call.
func (x *Renderer) Render(r *Record) (ip []byte, length int, comment string) {
	src, dst := r.Src, r.Dst
	whole := len(r.Data) == r.Length || r.Path != UDP && len(r.Data) == r.Length-roce.ICRCLen
	x.udp = append(x.udp[:0], r.Data...)
	var notes []string
	if r.Again != 0 {
		notes = append(notes, "sent again: "+r.Again.String())
	}
	if r.Verdict != Taken {
		notes = append(notes, r.Verdict.String())
	}
	if r.Marked {
		notes = append(notes, "has met congestion")
	}
	head, right := r.IP, false
	switch {
	case !whole:
		x.udp = append(x.udp, make([]byte, r.Length-len(x.udp))...)
	case r.Path != UDP:
		if right = len(x.udp) >= roce.BTHLen; right {
			x.icrc.Init(src, dst)
			x.udp = x.icrc.Put(x.udp)
		}
	default:
		x.icrc.Init(src, dst)
		head.ID, right = x.icrc.ID(x.udp)
	}
	if src.Port() != roce.Port && dst.Port() != roce.Port && !x.KeepPorts {
		notes = append(notes, fmt.Sprintf("UDP port %d", dst.Port()))
		dst = netip.AddrPortFrom(dst.Addr(), roce.Port)
		if right { // the invariant CRC covers the ports
			n := len(x.udp) - roce.ICRCLen
			was := binary.LittleEndian.Uint32(x.udp[n:]) ^ x.icrc.Sum(x.udp[:n]) // the identification's part
			x.icrc.Init(src, dst)
			binary.LittleEndian.PutUint32(x.udp[n:], x.icrc.Sum(x.udp[:n])^was)
		}
	}
	x.out = head.AppendDatagram(x.out[:0], src, dst, x.udp)
	length = len(x.out)
	if !whole {
		x.out = x.out[:length-(r.Length-len(r.Data))]
	}
	return x.out, length, strings.Join(notes, "; ")
}

// Line is a packet in one line, for people: where it was seen, from where to where it went, and what it says.
func Line(r *Record, where, comment string) string {
	var b strings.Builder
	dir := "In "
	if r.Out {
		dir = "Out"
	}
	fmt.Fprintf(&b, "%s %s %v > %v: ", dir, where, r.Src, r.Dst)
	pkt := r.Data
	cut := len(pkt) < r.Length-roce.ICRCLen
	if !cut {
		pkt = pkt[:max(r.Length-roce.ICRCLen, 0)]
	}
	var p roce.Packet
	if op, ok := opcodeOf(r); ok && cut {
		fmt.Fprintf(&b, "%v QP %d, %d bytes", op, r.destQP(), r.Length)
	} else if err := p.Decode(pkt); err != nil {
		fmt.Fprintf(&b, "%d bytes", r.Length)
	} else {
		fmt.Fprintf(&b, "%v QP %d PSN %d", p.Opcode, p.DestQP, p.PSN)
		describe(&b, &p)
	}
	if comment != "" {
		b.WriteString(" (" + comment + ")")
	}
	return b.String()
}

// describe says what else is in a packet.
func describe(b *strings.Builder, p *roce.Packet) {
	op := p.Opcode
	switch o := op.Op(); {
	case op == roce.CNP:
		return
	case op.IsResponse() && o != roce.ReadResponseMiddle:
		fmt.Fprintf(b, " %v, MSN %d", p.Syndrome, p.MSN)
	case o == roce.CompareSwap || o == roce.FetchAdd:
		fmt.Fprintf(b, " at %#x, rkey %#x", p.Addr, p.RKey)
	case op.HasRETH():
		fmt.Fprintf(b, " of %d bytes at %#x, rkey %#x", p.Len, p.Addr, p.RKey)
	case op.Service() == roce.UD:
		fmt.Fprintf(b, " from QP %d", p.SrcQP)
	}
	if op.HasPayload() {
		fmt.Fprintf(b, ", %d bytes", len(p.Payload))
	}
	if op.HasImm() {
		fmt.Fprintf(b, ", immediate %#x", p.Imm)
	}
	if op.HasInv() {
		fmt.Fprintf(b, ", invalidates %#x", p.InvKey)
	}
	if p.AckReq {
		b.WriteString(", asks for an acknowledgement")
	}
}
