package softnic

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Whether packets pass between two software NICs, and how long they may be, is found out by sending some: a probe is answered by
// one of its length. Nothing else tells of a firewall, or of a link on the way that drops what is too long for it in silence.

const (
	// probeTime is how long probes are sent, if none is answered.
	probeTime = 1500 * time.Millisecond
	// probeMore is how many more there are of each length that is not answered, once a shorter one was.
	probeMore = 4
	// The time between two rounds of probes doubles from the first to the last of these.
	probePause, probePauseMax = 5 * time.Millisecond, 200 * time.Millisecond
	// An answer is a packet by itself, and costs system calls, which a flood of probes must not. So many are answered at once, and one
	// in each probeEvery: a probe that is dropped is sent again.
	probeBurst = 256
	probeEvery = 100 * time.Microsecond
)

// A probe is somebody who waits for answers.
type probe struct {
	to      netip.AddrPort
	qpn     uint32
	came    chan ib.MTU // the path MTUs of answers; has room for one of each
	sent    int
	refused error // why the system has refused to send one, other than for its length
}

// ProbePath implements driver.PathProber.
func (n *NIC) ProbePath(ctx context.Context, to *ib.AHAttr, qpn ib.QPN, most ib.MTU) (ib.MTU, error) {
	p, err := n.netPortAt(to.SGIDIndex)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", driver.ErrUnreachable, err)
	}
	if err := p.checkMTU(most); err != nil {
		return 0, err
	}
	x := &probe{to: peerAddr(to), qpn: uint32(qpn), came: make(chan ib.MTU, int(ib.MTU4096)+1)}
	peer, err := p.sock.Peer(x.to, false)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", driver.ErrUnreachable, err)
	}
	number, err := p.addProbe(x)
	if err != nil {
		return 0, err
	}
	defer p.dropProbe(number)
	timer := time.NewTimer(0)
	defer timer.Stop()
	best, more := ib.MTU(0), 0
	least := most // the longest alone will do, mostly
	pause := probePause
	for begin := time.Now(); best < most && more <= probeMore && time.Since(begin) < probeTime && ctx.Err() == nil; {
		p.sendProbes(x, output{netPeer: peer, port: p}, number, max(least, best+1), most)
		least = ib.MTU256
		timer.Reset(pause)
		for over := false; !over && best < most; {
			select {
			case m := <-x.came:
				best = max(best, m)
			case <-timer.C:
				over = true
			case <-ctx.Done():
				over = true
			}
		}
		if best > 0 {
			more++
		}
		pause = min(2*pause, probePauseMax)
	}
	if best > 0 {
		return best, nil
	}
	if err := ctx.Err(); errors.Is(err, context.Canceled) {
		return 0, err
	}
	if err := p.gone(); err != nil {
		return 0, fmt.Errorf("%w: %w", driver.ErrUnreachable, err)
	}
	return 0, x.blocked(p.sock.Local())
}

// blocked says that no answer has come.
func (x *probe) blocked(from netip.AddrPort) error {
	if x.refused != nil {
		return fmt.Errorf("%w: the system refuses to send UDP from %v to %v: %w: look at routes and firewall rules of this host",
			driver.ErrUnreachable, from, x.to, x.refused)
	}
	return fmt.Errorf("%w: UDP between %v and %v is blocked: of %d packets, none has come back: let UDP pass between these addresses and ports, "+
		"in both directions (firewalls of both hosts, security groups, network policies)", driver.ErrUnreachable, from, x.to, x.sent)
}

// gone says that the port's address is none of this host any more; nil: it is.
func (p *netPort) gone() error {
	p.nic.gids.mu.Lock()
	defer p.nic.gids.mu.Unlock()
	p.nic.gids.look(time.Now())
	for i := range p.nic.gids.slots {
		if s := &p.nic.gids.slots[i]; s.port == p && !s.there {
			return fmt.Errorf("%v is no address of this host any more, or its interface is down", s.addr)
		}
	}
	return nil
}

func (p *netPort) addProbe(x *probe) (number uint32, err error) {
	p.mu.Lock()
	defer p.unlock()
	if p.closed {
		return 0, driver.ErrClosed
	}
	if p.probes == nil {
		p.probes = map[uint32]*probe{}
	}
	for number = rand.Uint32(); p.probes[number] != nil; number++ {
	}
	p.probes[number] = x
	return number, nil
}

func (p *netPort) dropProbe(number uint32) {
	p.mu.Lock()
	delete(p.probes, number)
	p.unlock()
}

// sendProbes sends a packet as long as the longest of each path MTU from least to most.
func (p *netPort) sendProbes(x *probe, out output, number uint32, least, most ib.MTU) {
	p.mu.Lock()
	for m := most; m >= least && !p.closed; m-- {
		if !p.sock.Flush() {
			break // there is no room
		}
		was := p.sock.Stats().NotSent
		p.pkt = roce.Packet{Opcode: roce.Probe, PKey: roce.DefaultPKey, DestQP: x.qpn, QKey: number}
		b, ok := out.Packet(&p.pkt, probePayload(m))
		if !ok {
			break
		}
		clear(b)
		out.Commit()
		p.sock.Flush()
		x.sent++
		if err := p.sock.Stats().SendErr; p.sock.Stats().NotSent != was && !errors.Is(err, syscall.EMSGSIZE) {
			x.refused = err
		}
	}
	p.unlock()
}

// probePayload is the payload of a probe that is as long as the longest packet of the path MTU.
func probePayload(m ib.MTU) int { return m.Bytes() + roce.MaxHeaderLen - roce.Probe.HeaderLen() }

// expectProbe is expect for probes and answers. Called with mu held.
func (p *netPort) expectProbe(src netip.AddrPort, pkt *roce.Packet) bool {
	if pkt.Opcode == roce.ProbeAnswer {
		if x := p.probes[pkt.QKey]; x != nil && x.to == src {
			return true
		}
	} else if p.nic.qp(ib.QPN(pkt.DestQP)) != nil { // strangers hear nothing
		return true
	}
	p.drops.NoQP++
	return false
}

// probed takes a probe, or an answer. Called with mu held.
func (p *netPort) probed(src netip.AddrPort, pkt *roce.Packet) {
	if pkt.Opcode == roce.ProbeAnswer {
		for m := ib.MTU256; m <= ib.MTU4096; m++ {
			if probePayload(m) != len(pkt.Payload) {
				continue
			}
			select {
			case p.probes[pkt.QKey].came <- m:
			default: // it was heard more often than once
			}
		}
		return
	}
	if p.answered = max(p.answered, p.now); p.answered-p.now >= probeBurst*probeEvery {
		p.drops.Probes++
		return
	}
	p.answered += probeEvery
	// What is queued for another may be of answerTo's.
	if !p.sock.Flush() {
		return // no room: another probe comes
	}
	if p.answerTo == nil {
		p.answerTo, _ = p.sock.Peer(src, false)
	}
	if p.answerTo == nil || src.Port() == 0 {
		return
	}
	p.answerTo.Move(src)
	p.pkt = roce.Packet{Opcode: roce.ProbeAnswer, PKey: roce.DefaultPKey, DestQP: pkt.SrcQP, QKey: pkt.QKey}
	if b, ok := p.answerTo.Packet(&p.pkt, len(pkt.Payload)); ok {
		clear(b)
		out := output{netPeer: p.answerTo, port: p}
		out.Commit()
	}
}
