package softnic

import (
	"fmt"
	"net/netip"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Datagrams over a network.

// wireUD is where a netPort puts the datagrams for one UD QP: a block of the QP's own. Guarded by the port's mu.
type wireUD struct {
	port *netPort
	q    *QP
	v    *peerView
	grh  [ib.GRHLen]byte // of the datagram that is taken: a local array would be on the heap, since foreign memory is behind an interface
}

// attachNet opens the QP to the ports that are open. Called with cfg held, in RTR.
func (q *QP) attachNet() error {
	ports := q.nic.netPorts.Load()
	if ports == nil {
		return nil
	}
	for _, p := range *ports {
		if err := q.attachPort(p); err != nil {
			return err
		}
	}
	return nil
}

// attachPort opens the QP to a port. Called with cfg held.
func (q *QP) attachPort(p *netPort) error {
	p.mu.Lock()
	there := p.uds[q.qpn] != nil
	p.unlock()
	if there {
		return nil
	}
	in, err := q.openInbound(p.link, 0)
	if err != nil {
		return err
	}
	p.mu.Lock()
	if len(p.uds) == 0 { // for the headers that datagrams come with
		p.sock.TellIP(true)
	}
	p.uds[q.qpn] = &wireUD{port: p, q: q, v: q.ownView(in)}
	p.users.Add(1)
	p.unlock()
	return nil
}

// attachUDs opens a port to the UD QPs that were there before it.
func (p *netPort) attachUDs() {
	p.nic.eachQP(func(q *QP) {
		if q.typ != ib.UD {
			return
		}
		q.cfg.Lock()
		defer q.cfg.Unlock()
		if s := ib.QPState(q.state.Load()); !q.closed.Load() && s >= ib.RTR && s != ib.Err {
			if err := q.attachPort(p); err != nil {
				q.nic.raise(driver.AsyncEvent{Type: ib.EventQPFatal, QP: q})
			}
		}
	})
}

// detachNet closes the QP to all ports. Called with cfg held.
func (q *QP) detachNet() {
	ports := q.nic.netPorts.Load()
	if ports == nil {
		return
	}
	for _, p := range *ports {
		p.mu.Lock()
		if p.uds[q.qpn] != nil {
			if delete(p.uds, q.qpn); len(p.uds) == 0 {
				p.sock.TellIP(false)
			}
			p.users.Add(-1)
		}
		p.unlock()
	}
}

// resolveNet makes a an address on a network.
func (a *AH) resolveNet(attr *ib.AHAttr) error {
	p, err := a.nic.netPortAt(attr.SGIDIndex)
	if err != nil {
		return fmt.Errorf("%w: %w", driver.ErrUnreachable, err)
	}
	peer, err := p.sock.Peer(peerAddr(attr), attr.UDPPort != 0)
	if err != nil {
		return fmt.Errorf("%w: %w", driver.ErrUnreachable, err)
	}
	peer.SetIP(attr.TrafficClass, attr.HopLimit)
	a.port, a.out = p, output{netPeer: peer, port: p}
	return nil
}

// sendNet sends a datagram of n bytes (b, if it is in one piece). Called with sq held: so it does not wait for the port, and leaves the system call to
// whoever lets go of sq.
func (q *QP) sendNet(a *AH, wr *ib.SendWR, b []byte, n uint32) (ib.WCStatus, uint32, stallKind) {
	p := a.port
	if int(n) > wireMTU(p.mtu).Bytes() {
		return ib.WCLocalLengthErr, 0, stallNone
	}
	if !p.mu.TryLock() {
		return 0, 0, stallNet
	}
	defer p.mu.Unlock()
	q.flushNet = p
	p.again.Store(true)
	op := uint8(roce.SendOnly)
	if wr.Opcode == ib.OpSendWithImm {
		op = roce.SendOnlyImm
	}
	p.pkt = roce.Packet{Opcode: roce.Op(roce.UD, op), PKey: roce.DefaultPKey, DestQP: uint32(wr.RemoteQPN & ib.MaxQPN), PSN: q.attr.SQPSN,
		Solicited: wr.Flags&ib.SendSolicited != 0, QKey: uint32(q.qkey(wr)), SrcQP: uint32(q.qpn), Imm: wr.Imm}
	payload, ok := a.out.Packet(&p.pkt, int(n))
	if !ok {
		return 0, 0, stallNet
	}
	q.payload(payload, wr, b, 0)
	a.out.Commit()
	q.attr.SQPSN = q.attr.SQPSN.Add(1)
	return ib.WCSuccess, n, stallNone
}

// receive puts a datagram, behind its GRH, into a receive of the QP, or drops it.
func (u *wireUD) receive(src netip.AddrPort, pkt *roce.Packet) {
	v, drops := u.v, &u.port.drops
	if !v.enter() {
		drops.State++
		return
	}
	defer v.leave()
	if atomic.LoadUint32(v.qkey) != pkt.QKey {
		drops.QKey++
		return
	}
	n := uint32(len(pkt.Payload))
	if int(n) > ib.MTU4096.Bytes() { // more than a packet can have (IBA 9.8.1.2.2)
		drops.Room++
		return
	}
	for {
		if !u.q.peekOwn(v, &v.slot) || v.slot.length() < n+ib.GRHLen {
			drops.Room++
			return
		}
		if v.take(&v.slot) {
			break
		}
	}
	u.grh = [ib.GRHLen]byte{}
	netGRH(&u.grh, src.Addr(), u.port.sock.Local().Addr(), pkt)
	st := u.q.nic.putSlot(&v.slot, 0, u.grh[:])
	if st == ib.WCSuccess {
		st = u.q.nic.putSlot(&v.slot, ib.GRHLen, pkt.Payload)
	}
	var flags uint8
	if pkt.Opcode.HasImm() {
		flags = cqeImm
	}
	if st != ib.WCSuccess {
		st, flags = ib.WCLocalProtErr, 0
	}
	v.complete(&v.slot, n+ib.GRHLen, pkt.Imm, flags, st, ib.QPN(pkt.SrcQP))
	v.port.notify(pkt.Solicited || st != ib.WCSuccess)
}

// netGRH builds what a datagram's receive buffer starts with: the IP header, an IPv4 one in the last 20 bytes (IBA A17.4.5.1). It is
// as it came but for IPv4's identification, of which the socket does not tell, and with it the checksum, which is right for 0.
func netGRH(b *[ib.GRHLen]byte, src, dst netip.Addr, pkt *roce.Packet) {
	n := pkt.Opcode.Datagram(len(pkt.Payload))
	if src.Is4() {
		pkt.IP.Put4((*[20]byte)(b[ib.GRHLen-20:]), src, dst, n)
		return
	}
	pkt.IP.Put6(b, src, dst, n)
}
