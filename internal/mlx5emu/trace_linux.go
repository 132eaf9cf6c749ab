package mlx5emu

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The trace: a line for each doorbell, WQE, completed receive and CQE, which is the same for two drivers that do the same. So it has no numbers that
// the kernel chooses, and no time.

func (d *Device) trace(format string, args ...any) {
	if d.cfg.Trace != nil {
		fmt.Fprintf(d.cfg.Trace, "EMU "+format+"\n", args...)
	}
}

func (d *Device) traceDoorbell(u *uar, b *doorbell) {
	if d.cfg.Trace != nil {
		d.trace("DB uar=%d+%#x first8=%x bf=%x", u.id, b.offset, b.word, b.bf)
	}
}

func (d *Device) traceWQE(n *qp, counter uint16, w []byte) {
	if d.cfg.Trace != nil {
		d.trace("WQE qpn=%#x idx=%d dbr=%d%s %s", n.qpn, be.Uint16(w[1:]), counter, n.c.reserved(n.db+4), groups(w))
	}
}

func (d *Device) traceCQE(n *cq, e *cqe) {
	if d.cfg.Trace == nil {
		return
	}
	const time = 15 // where the first of its two words is, behind three bars
	d.trace("CQE pi=%d %s ", n.pi, strings.Join(slices.Replace(strings.Fields(groups(e[:])), time, time+2, "TIMESTAMP"), " "))
	if op := e[cqeOwner] >> 4; op == cqeRequesterErr || op == cqeResponderErr {
		d.trace("SYNDROME %#x", e[cqeSyndrome]) // which lies where others have the time
	}
}

func (d *Device) traceArm(n *cq, v uint32) {
	if d.cfg.Trace != nil {
		d.trace("ARM cqn=%#x ci=%d solicited=%t", n.cqn, v&(1<<24-1), v&armSolicited != 0)
	}
}

// traceRecv shows the receive that has completed, whose slot is the client's again only with the CQE: its segments, with the one that
// ends the list if it is there.
func (d *Device) traceRecv(n *qp, wc *ib.WC) {
	if d.cfg.Trace == nil {
		return
	}
	at, size, skip, db := n.buf+uint64(uint32(uint16(wc.ID))&(n.rqCount-1))<<n.rqShift, uint32(1)<<n.rqShift, uint32(0), n.db
	if q := n.srq; q != nil {
		at, size, skip, db = q.buf+uint64(uint16(wc.ID))*uint64(q.stride), q.stride, nextSegSize, q.db
	}
	b := make([]byte, size)
	if n.c.mem.ReadAt(b, at) != nil {
		return // the client has unmapped it
	}
	segs := scatterList(nil, b[skip:])
	d.trace("RECV qpn=%#x idx=%d%s %s", n.qpn, uint16(wc.ID), n.c.reserved(db), groups(b[skip:min(size, skip+uint32(len(segs)+1)*segSize)]))
}

// reserved shows the half of a doorbell record that has no meaning, if the driver has left anything in it: a counter is 16 bits long.
func (c *Context) reserved(db uint64) string {
	var b [4]byte
	if c.mem.ReadAt(b[:], db) != nil || be32(b[:])>>16 == 0 {
		return ""
	}
	return fmt.Sprintf("+reserved=%#x", be32(b[:])>>16)
}

// groups shows bytes as words of four, four to a segment.
func groups(b []byte) string {
	var s strings.Builder
	for i := 0; i < len(b); i += 4 {
		if i%16 == 0 && i > 0 {
			s.WriteString("| ")
		}
		s.WriteString(hex.EncodeToString(b[i:min(i+4, len(b))]))
		s.WriteByte(' ')
	}
	return s.String()
}
