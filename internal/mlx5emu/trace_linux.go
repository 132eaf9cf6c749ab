package mlx5emu

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
)

// The trace: a line for each doorbell, WQE and CQE, which is the same for two drivers that do the same. So it has no numbers that
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
		d.trace("WQE qpn=%#x idx=%d dbr=%d %s", n.qpn, be.Uint16(w[1:]), counter, groups(w))
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
		d.trace("ARM ci=%d solicited=%t", v&(1<<24-1), v&armSolicited != 0)
	}
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
