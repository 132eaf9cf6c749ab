package softnic

import (
	"sync"

	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Staging: a peer in another process cannot map memory that is private to this one (ordinary slices, and foreign memory). A receive
// into such memory gets a buffer in shared memory instead, and its bytes are copied when the completion is polled.

// stageBuf is a staging buffer.
type stageBuf struct {
	desc  descriptor
	mem   []byte
	class int
}

type stagePool struct {
	mu   sync.Mutex
	free [32][]*stageBuf // by log2 of the size
	regs []*mem.Region
	rs   []*region
}

const (
	stageMinClass = 8
	stageSlab     = 1 << 20
)

// stageRecv returns a staging buffer for a receive of total bytes into elements of which one is private memory. Nil: none is
// needed, or none can be had, and then the peer will find the receive unusable.
func (n *NIC) stageRecv(pd *PD, sges []descriptor, total uint32) *stageBuf {
	for _, s := range sges {
		if s.lenHdl>>32 == 0 {
			return nil // the error is reported when a message arrives
		}
	}
	if total == 0 {
		return nil
	}
	return n.stages.get(n, pd, total)
}

func (p *stagePool) get(n *NIC, pd *PD, total uint32) *stageBuf {
	class := stageMinClass
	for uint64(1)<<class < uint64(total) {
		class++
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.free[class]) == 0 && p.grow(n, class) != nil {
		return nil
	}
	f := p.free[class]
	b := f[len(f)-1]
	p.free[class] = f[:len(f)-1]
	// The length of the descriptor is the receive's, not the buffer's: too long a message must be noticed.
	b.desc.lenHdl = b.desc.lenHdl>>32<<32 | uint64(total)
	return b
}

func (p *stagePool) grow(n *NIC, class int) error {
	size := max(stageSlab, 1<<class)
	reg, err := mem.Alloc(size, mem.Options{Name: "ringside-stage"})
	if err != nil {
		return err
	}
	b := reg.Bytes()[:size]
	r := &region{nic: n, pd: &n.stagePD, mem: b, memAt: addrOf(b), base: addrOf(b), length: uint64(size),
		access: ib.AccessLocalWrite, fd: reg.FD()}
	r.receives.Store(true)
	if err := n.regions.insert(r); err != nil {
		reg.Close()
		return err
	}
	p.regs = append(p.regs, reg)
	p.rs = append(p.rs, r)
	for off := 0; off < size; off += 1 << class {
		p.free[class] = append(p.free[class], &stageBuf{desc: makeDesc(r.base+uint64(off), 0, r.handle),
			mem: b[off : off+1<<class : off+1<<class], class: class})
	}
	return nil
}

func (p *stagePool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.regs {
		r.Close()
	}
	p.regs = nil
}

func (b *stageBuf) free(n *NIC) {
	if b == nil {
		return
	}
	n.stages.mu.Lock()
	n.stages.free[b.class] = append(n.stages.free[b.class], b)
	n.stages.mu.Unlock()
}

// unstage copies a staged message to where it was to go.
func (q *QP) unstage(wc *ib.WC, r *recvRec, sges []descriptor) {
	if wc.Status == ib.WCSuccess && wc.Opcode == ib.WCRecv {
		if !q.nic.scatterDescs(sges, r.staged.mem[:wc.ByteLen]) {
			wc.Status = ib.WCLocalProtErr
			q.remoteFault(q.epoch.Load(), ib.EventQPFatal)
		}
	}
	r.staged.free(q.nic)
	r.staged = nil
}

// scatterDescs copies data to the elements in turn; false: a region has gone.
func (n *NIC) scatterDescs(sges []descriptor, data []byte) bool {
	for _, s := range sges {
		if len(data) == 0 {
			break
		}
		k := min(uint32(len(data)), uint32(s.lenHdl))
		reg := n.regions.lookup(uint32(s.lenHdl >> 32))
		if reg == nil || !reg.store(s.addr, data[:k]) {
			return false
		}
		data = data[k:]
	}
	return true
}
