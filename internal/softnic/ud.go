package softnic

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// AH is an address handle: a link to the NIC that has the GID, or an address on a network.
type AH struct {
	nic  *NIC
	pd   *PD
	num  ib.AHNum
	link *link    // nil for a destination on a network
	ip   roce.IP  // of the headers of what goes by link
	port *netPort // for one on a network: from where
	out  output   // and where to
	once sync.Once
}

const maxAHs = ahIndex + 1

// ahIndex are the bits of a handle's number that are its index; above them it counts how often that was used.
const ahIndex = 1<<16 - 1

// CreateAH implements driver.PD. It sets up the path to the destination's NIC, and so fails if that cannot be reached.
func (pd *PD) CreateAH(attr ib.AHAttr) (driver.AH, error) { return pd.newAH(&attr, pd.nic.linkTo) }

// CreateAHNow is CreateAH for whoever must not wait: it fails if there is no link to the destination's NIC yet, and that is one of
// another process.
func (pd *PD) CreateAHNow(attr ib.AHAttr) (driver.AH, error) {
	return pd.newAH(&attr, func(_ context.Context, g ib.GID) (*link, error) { return pd.nic.linkNow(g) })
}

func (pd *PD) newAH(attr *ib.AHAttr, linkTo func(context.Context, ib.GID) (*link, error)) (driver.AH, error) {
	if attr.Port > 1 {
		return nil, fmt.Errorf("address handle: the software NIC has port 1 only, not %d", attr.Port)
	}
	if !pd.nic.hasGID(attr.SGIDIndex) {
		return nil, fmt.Errorf("address handle: the software NIC has no GID at index %d", attr.SGIDIndex)
	}
	a := &AH{nic: pd.nic, pd: pd}
	if err := a.resolve(attr, linkTo); err != nil {
		return nil, err
	}
	if err := pd.addChild(); err != nil {
		return nil, err
	}
	if err := pd.nic.addAH(a); err != nil {
		pd.dropChild()
		return nil, err
	}
	return a, nil
}

// resolve finds the way to the destination.
func (a *AH) resolve(attr *ib.AHAttr, linkTo func(context.Context, ib.GID) (*link, error)) error {
	if attr.SGIDIndex != 0 {
		return a.resolveNet(attr)
	}
	ctx, cancel := context.WithTimeout(context.Background(), linkTimeout)
	defer cancel()
	l, err := linkTo(ctx, attr.DGID)
	a.link, a.ip = l, roce.IP{Class: attr.TrafficClass, Hops: max(1, attr.HopLimit), Flow: attr.FlowLabel}
	return err
}

// Num implements driver.AH.
func (a *AH) Num() ib.AHNum { return a.num }

// Close implements driver.AH.
func (a *AH) Close() error {
	err := error(driver.ErrClosed)
	a.once.Do(func() {
		a.nic.dropAH(a)
		a.pd.dropChild()
		err = nil
	})
	return err
}

// udView is how this NIC sends datagrams to one QP of a peer: a block that the peer has given us for it.
type udView struct {
	mu      ring.SpinLock // one sender at a time; taken with the sender's sq held
	pv      *peerView     // nil: asked for, or refused
	missing bool
	until   time.Time // when a refusal is forgotten
}

// drop makes the view unusable, because the peer's QP or the link goes: later datagrams are lost.
func (v *udView) drop() {
	v.mu.Lock()
	v.pv, v.missing, v.until = nil, true, time.Now().Add(udRefused)
	v.mu.Unlock()
}

// udRefused is how long datagrams to a QP that did not exist are dropped without asking again.
const udRefused = 10 * time.Millisecond

// udView returns the way to a QP of the peer, which may not be known yet.
func (l *link) udView(qpn ib.QPN) *udView {
	l.mu.Lock()
	v := l.udViews[qpn]
	ask := v == nil && l.down == nil
	if ask {
		v = &udView{}
		l.udViews[qpn] = v
	}
	l.mu.Unlock()
	if ask {
		l.send(ctl{kind: ctlAttach, qpn: uint32(qpn)})
	}
	return v
}

// execUD executes a datagram: it arrives, or is lost without a word. Called with sq held.
func (q *QP) execUD(wr *ib.SendWR) (ib.WCStatus, uint32, stallKind) {
	b, n, st := q.local(wr, 0)
	if st != ib.WCSuccess {
		return st, 0, stallNone
	}
	if n > maxUDMTU {
		return ib.WCLocalLengthErr, 0, stallNone
	}
	if b == nil {
		if b, st = q.fetch(wr, n); st != ib.WCSuccess {
			return st, 0, stallNone
		}
	}
	a := q.nic.ah(wr.AH)
	if a == nil {
		return ib.WCLocalQPOpErr, 0, stallNone
	}
	if a.port != nil {
		return q.sendNet(a, wr, b, n)
	}
	u := a.link.udView(wr.RemoteQPN & ib.MaxQPN)
	if u == nil {
		return ib.WCSuccess, n, stallNone
	}
	u.mu.Lock()
	v := u.pv
	if v == nil {
		missing, again := u.missing, u.missing && time.Now().After(u.until)
		u.mu.Unlock()
		switch {
		case again:
			a.link.forgetUD(wr.RemoteQPN&ib.MaxQPN, u)
			a.link.udView(wr.RemoteQPN & ib.MaxQPN)
			return 0, 0, stallResolve
		case missing:
			return ib.WCSuccess, n, stallNone
		}
		return 0, 0, stallResolve
	}
	s := stallNone
	if v.enter() {
		if atomic.LoadUint32(v.qkey) == uint32(q.qkey(wr)) {
			s = q.deliverUD(v, a, wr, b, n)
		}
		v.leave()
	}
	u.mu.Unlock()
	return ib.WCSuccess, n, s
}

// qkey is the key that a datagram has: the QP's own for one with the highest bit set (IBA 10.2.5). Called with sq held.
func (q *QP) qkey(wr *ib.SendWR) ib.QKey {
	if wr.RemoteQKey&(1<<31) != 0 {
		return q.attr.QKey
	}
	return wr.RemoteQKey
}

// deliverUD copies a datagram (b, if it is in one piece), behind its GRH, into a receive of the peer's QP, or drops it.
func (q *QP) deliverUD(v *peerView, a *AH, wr *ib.SendWR, b []byte, n uint32) stallKind {
	var slot recvSlot
	for {
		if !v.peek(&slot) {
			if found, s := q.noReceive(v, &slot); !found {
				return s
			}
		}
		if slot.length() < n+ib.GRHLen {
			return stallNone
		}
		// Every element must be mapped before the receive is taken: a taken receive has to be completed.
		var parts [maxSGE]struct {
			r    *remoteRegion
			addr uint64
			n    uint32
		}
		np := 0
		bad := ib.WCSuccess
		list := slot.list
		count := int(slot.addr)
		one := [2]uint64{slot.addr, slot.lenHdl}
		if slot.handle() != sgeList {
			list, count = one[:], 1
		}
		if uint64(count) > uint64(len(list)/2) {
			v.link.fault("receive with %d scatter elements", slot.addr)
			return stallNone
		}
		left := n + ib.GRHLen
		for i := 0; i < count && left > 0; i++ {
			addr, lenHdl := list[2*i], list[2*i+1]
			k := min(uint32(lenHdl), left)
			if k == 0 {
				continue
			}
			r := v.link.regionByHandle(uint32(lenHdl >> 32))
			if r == nil {
				return stallResolve
			}
			if r.missing || !r.ok() || r.mem == nil && r.own == nil || !r.contains(addr, uint32(lenHdl)) {
				v.dropBad(r)
				bad = ib.WCLocalProtErr
				break
			}
			parts[np].r, parts[np].addr, parts[np].n = r, addr, k
			np++
			left -= k
		}
		if !v.take(&slot) {
			continue
		}
		if bad == ib.WCSuccess {
			var h [ib.GRHLen]byte
			grh(&h, q.nic.gid, a.link.peer, &a.ip, int(n))
			head, skip := h[:], uint32(0)
			for i := range np {
				p := &parts[i]
				var whole []byte
				if p.r.own != nil {
					whole = q.piece(n + p.n)[n:] // b may be the start of it
				} else {
					whole = p.r.bytes(p.addr, p.n)
				}
				k := dma(whole, head)
				head = head[k:]
				if dst := whole[k:]; len(dst) > 0 {
					q.payload(dst, wr, b, skip)
					skip += uint32(len(dst))
				}
				if p.r.own != nil && !p.r.own.store(p.addr, whole) {
					bad = ib.WCLocalProtErr
					break
				}
			}
		}
		var flags uint8
		if wr.Opcode == ib.OpSendWithImm {
			flags |= cqeImm
		}
		if wr.Flags&ib.SendSolicited != 0 {
			flags |= cqeSolicited
		}
		v.complete(&slot, n+ib.GRHLen, wr.Imm, flags, bad, q.qpn)
		v.port.notify(bad != ib.WCSuccess || flags&cqeSolicited != 0)
		return stallNone
	}
}

// payload copies a datagram, from byte skip on, to dst. b is the datagram if it is in one piece, which it is if it was in foreign
// memory.
func (q *QP) payload(dst []byte, wr *ib.SendWR, b []byte, skip uint32) {
	if b != nil {
		dma(dst, b[skip:])
		return
	}
	q.gather(dst, wr, skip)
}

func (l *link) forgetUD(qpn ib.QPN, v *udView) {
	l.mu.Lock()
	if l.udViews != nil && l.udViews[qpn] == v {
		delete(l.udViews, qpn)
	}
	l.mu.Unlock()
}

var errNotUD = errors.New("no such UD QP")

// handleAttach gives a peer a block to send datagrams to one of our UD QPs.
func (l *link) handleAttach(m *ctl) error {
	answer := ctl{kind: ctlAttached, qpn: m.qpn}
	if q := l.nic.qp(ib.QPN(m.qpn)); q != nil && q.typ == ib.UD {
		if c, err := q.attachPeer(l); err == nil {
			c.into(&answer)
			answer.status = 1
		}
	}
	l.send(answer)
	return nil
}

// attachPeer opens a block for one more peer.
func (q *QP) attachPeer(l *link) (*connectMsg, error) {
	q.cfg.Lock()
	defer q.cfg.Unlock()
	if s := ib.QPState(q.state.Load()); q.closed.Load() || s != ib.RTR && s != ib.RTS && s != ib.SQD && s != ib.SQE {
		return nil, errNotUD
	}
	if ins := q.ins.Load(); ins != nil {
		for _, in := range *ins {
			if in.link == l {
				return &in.connect, nil // asked twice
			}
		}
	}
	in, err := q.openInbound(l, 0)
	if err != nil {
		return nil, err
	}
	return &in.connect, nil
}

// dropPeer closes the block of a peer that has gone, once the datagrams that had arrived before have been polled. wait is how
// long to wait if some have not.
func (q *QP) dropPeer(l *link, wait time.Duration) {
	q.cfg.Lock()
	defer q.cfg.Unlock()
	var gone *inbound
	q.rcq.mu.Lock()
	if ins := q.ins.Load(); ins != nil {
		for _, in := range *ins {
			if in.link == l && !in.broken && in.at(in.head) == in.head+1 {
				q.rcq.mu.Unlock()
				time.AfterFunc(wait, func() { q.nic.later(func() { q.dropPeer(l, min(2*wait, time.Second)) }) })
				return
			}
		}
		keep := make([]*inbound, 0, len(*ins))
		for _, in := range *ins {
			if in.link == l {
				gone = in
			} else {
				keep = append(keep, in)
			}
		}
		q.ins.Store(&keep)
	}
	q.rcq.mu.Unlock()
	if gone != nil {
		q.srq.giveUp(gone)
		gone.release()
	}
}

// handleAttached takes the answer to ctlAttach.
func (l *link) handleAttached(m *ctl) error {
	l.mu.Lock()
	u := l.udViews[ib.QPN(m.qpn)]
	l.mu.Unlock()
	if u == nil {
		return nil // forgotten meanwhile
	}
	var v *peerView
	if m.status != 0 {
		var c connectMsg
		if err := c.from(m); err != nil {
			return err
		}
		if !c.geo.srq {
			return errCtl
		}
		var err error
		if v, err = l.view(&c, m.qpn); err != nil {
			return err
		}
	}
	u.mu.Lock()
	if v == nil {
		u.missing, u.until = true, time.Now().Add(udRefused)
	} else if u.pv == nil {
		u.pv = v
	}
	u.mu.Unlock()
	l.nic.progressStalled()
	return nil
}
