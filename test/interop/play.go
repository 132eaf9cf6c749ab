package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// sendID marks the IDs of sends; the rest is the player. The ID of a receive is its slot.
const sendID = 1 << 32

// play exchanges the messages: the client sends, and each side answers what it receives once its previous send is complete.
// As in the C programs, each side stops by itself, when it has seen as many sends and receives complete as there are
// exchanges; with several queue pairs a few messages are then under way that nobody waits for.
func (g *game) play() error {
	if g.o.server != "" {
		for i := range g.players {
			if err := g.serve(i); err != nil {
				return err
			}
		}
	}
	for !g.over() {
		wcs, err := g.done.next(g.ctx)
		if err != nil {
			return fmt.Errorf("after %d of %d sends and %d receives: %w", g.sent, g.o.iters, g.received, err)
		}
		for i := range wcs {
			if g.over() {
				break // the peer has ended already, and the rest is flushed
			}
			if err := g.complete(&wcs[i]); err != nil {
				return fmt.Errorf("after %d of %d sends and %d receives: %w", g.sent, g.o.iters, g.received, err)
			}
		}
		if g.posted <= g.o.numQP {
			if err := g.postReceives(); err != nil {
				return err
			}
		}
	}
	return nil
}

// over reports whether everything that was to be seen has been.
func (g *game) over() bool { return g.sent >= g.o.iters && g.received >= g.o.iters }

func (g *game) complete(wc *ib.WC) error {
	p := g.byQPN[wc.QPN]
	if p == nil {
		return fmt.Errorf("a completion of QP %#x, which is none of this run's: %+v", wc.QPN, *wc)
	}
	if wc.ID&sendID != 0 {
		if err := verbs.CheckWC("sending", wc); err != nil {
			return err
		}
		if wc.Opcode != ib.WCSend || !p.sending || g.players[wc.ID&^sendID] != p {
			return fmt.Errorf("an unexpected completion: %+v", *wc)
		}
		p.sending = false
		g.sent++
		if g.o.server == "" {
			g.release(p.out)
			p.out = -1
		}
	} else {
		if err := verbs.CheckWC("receiving", wc); err != nil {
			return err
		}
		if err := g.arrived(p, wc); err != nil {
			return err
		}
	}
	if p.sending || p.waiting || g.sent >= g.o.iters {
		return nil
	}
	for i := range g.players {
		if g.players[i] == p {
			return g.serve(i)
		}
	}
	return nil
}

// arrived takes a message.
func (g *game) arrived(p *player, wc *ib.WC) error {
	slot := int(wc.ID)
	if slot < 0 || slot*g.slotSize() >= g.mem.Len() {
		return fmt.Errorf("a completion of a receive that was never posted: %+v", *wc)
	}
	g.posted--
	switch {
	case wc.Opcode != ib.WCRecv || wc.Flags&(ib.WCWithImm|ib.WCWithInv) != 0:
		return fmt.Errorf("not a completion of a plain receive: %+v", *wc)
	case int(wc.ByteLen) != g.header()+g.o.size:
		return fmt.Errorf("received %d bytes instead of %d", wc.ByteLen, g.header()+g.o.size)
	case g.o.service == ud && (wc.Flags&ib.WCGRH == 0 || wc.SrcQPN != p.to.QPN):
		return fmt.Errorf("not a datagram of QP %#x with a GRH: %+v", p.to.QPN, *wc)
	case !p.waiting:
		return fmt.Errorf("a message on QP %#x before the previous one was answered", wc.QPN)
	}
	p.waiting = false
	g.received++
	if g.o.check {
		if err := g.checkMessage(p, g.message(slot)); err != nil {
			return fmt.Errorf("message %d: %w", g.received, err)
		}
	}
	if g.o.server == "" {
		p.in = slot
		return nil
	}
	g.release(slot)
	return nil
}

// checkMessage compares a message with what must be in it.
func (g *game) checkMessage(p *player, got []byte) error {
	if g.o.server != "" {
		return differ(got, g.message(p.out))
	}
	want := bytes.Clone(got)
	if g.o.fill >= 0 {
		for i := range want {
			want[i] = byte(g.o.fill)
		}
	}
	zeroPageStarts(want)
	return differ(got, want)
}

// differ returns where got is not want, or nil.
func differ(got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	first, n := -1, 0
	for i := range want {
		if got[i] != want[i] {
			if first < 0 {
				first = i
			}
			n++
		}
	}
	return fmt.Errorf("%d of %d bytes are wrong, the first at %d: %#02x instead of %#02x",
		n, len(want), first, got[first], want[first])
}

// zeroPageStarts makes a message one that the C servers accept with -c: they look at the first byte of each page.
func zeroPageStarts(b []byte) {
	for i := 0; i < len(b); i += os.Getpagesize() {
		b[i] = 0
	}
}

// serve sends a player's next message: the client a new one, the server the one it has received.
func (g *game) serve(i int) error {
	p := g.players[i]
	if g.o.server == "" {
		p.out, p.in = p.in, -1
	} else {
		if p.out < 0 {
			p.out = g.take()
		}
		g.write(g.message(p.out))
	}
	if p.out < 0 {
		return errors.New("nothing was received that could be sent back")
	}
	wr := ib.SendWR{ID: sendID | uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled}
	if g.o.size <= p.qp.Cap().MaxInline {
		wr.Inline = g.message(p.out)
	} else {
		wr.SGEs = []ib.SGE{g.mem.SGE(p.out*g.slotSize()+g.header(), g.o.size)}
	}
	if g.o.service == ud {
		wr.AH, wr.RemoteQPN, wr.RemoteQKey = p.ah.Num(), p.to.QPN, udKey
	}
	if _, err := p.qp.PostSend([]ib.SendWR{wr}); err != nil {
		return err
	}
	p.sending, p.waiting = true, true
	return nil
}

// write makes a message of the client. With check each is another one, except with a shared receive queue: all queue pairs
// of a C server receive into one buffer and send from it, so that what it answers is what came last on any of them.
func (g *game) write(b []byte) {
	if g.o.check && (g.o.service != srq || g.content == 0) {
		g.content++
	}
	random := splitMix(g.content)
	random.fill(b)
	zeroPageStarts(b)
}

// take returns a slot that nothing uses. There always is one: see open.
func (g *game) take() int {
	i := g.free[len(g.free)-1]
	g.free = g.free[:len(g.free)-1]
	return i
}

// release gives a slot back, and with check spoils it, so that what arrives in it next is what was sent.
func (g *game) release(slot int) {
	if g.o.check {
		b := g.slot(slot)
		for i := range b {
			b[i] = 0xe5
		}
	}
	g.free = append(g.free, slot)
}

// postReceives posts as many receives as there may be.
func (g *game) postReceives() error {
	g.recvs = g.recvs[:0]
	for g.posted+len(g.recvs) < g.o.rxDepth {
		slot := g.take()
		g.recvs = append(g.recvs, ib.RecvWR{ID: uint64(slot), SGEs: []ib.SGE{g.mem.SGE(slot*g.slotSize(), len(g.slot(slot)))}})
	}
	post := g.players[0].qp.PostRecv
	if g.srq != nil {
		post = g.srq.PostRecv
	}
	n, err := post(g.recvs)
	g.posted += n
	return err
}
