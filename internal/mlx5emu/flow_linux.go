package mlx5emu

import (
	"bytes"
	"cmp"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Flow rules: which queue pairs get the frames that come in.

// A flow is a rule.
type flow struct {
	counted  // by nobody
	qp       *qp
	kind     ib.FlowKind
	rank     int // rules with lower ones are looked at first
	priority uint16
	filters  []filter
}

// What the kernel's driver has room for.
const (
	maxPriority = 15
	maxSpecs    = 10 // layers of a rule
)

// rankOf orders rules by kind: those with filters, of which those for groups alone come last, then the others.
func (f *flow) rankOf() int {
	switch {
	case f.kind == ib.FlowMulticast:
		return 2
	case f.kind == ib.FlowDefault:
		return 3
	case len(f.filters) > 0 && f.filters[0].typ == abi.FlowSpecEth && f.filters[0].mask[0]&f.filters[0].value[0]&1 != 0:
		return 1
	}
	return 0
}

// matches reports whether the rule is for a frame.
func (f *flow) matches(h *headers, b []byte) bool {
	if f.kind == ib.FlowMulticast {
		return b[0]&1 != 0
	}
	for i := range f.filters {
		if !f.filters[i].matches(h, b) {
			return false
		}
	}
	return true
}

// same reports whether two rules are for the same frames by the same filters.
func (f *flow) same(o *flow) bool {
	return f.kind == o.kind && f.rank == o.rank && f.priority == o.priority && slices.EqualFunc(f.filters, o.filters, func(a, b filter) bool {
		return a.typ == b.typ && bytes.Equal(a.value, b.value) && bytes.Equal(a.mask, b.mask)
	})
}

// parseSpecs reads the specs of a rule, n of them.
func parseSpecs(b []byte, n int) (list []filter, errno syscall.Errno) {
	const head = 8
	for range n {
		if len(b) < head {
			return nil, unix.EINVAL
		}
		typ, size := native.Uint32(b), int(native.Uint16(b[4:]))
		k, ok := filterSizes[typ]
		switch {
		case !ok || native.Uint16(b[6:]) != 0 || size != head+2*k || size > len(b):
			return nil, unix.EINVAL
		case slices.ContainsFunc(list, func(f filter) bool { return f.typ == typ }):
			return nil, unix.EINVAL
		}
		f := filter{typ, slices.Clone(b[head:][:k]), slices.Clone(b[head+k:][:k])}
		for _, m := range f.mask[unknownFields[typ]:] {
			if m != 0 {
				return nil, unix.EOPNOTSUPP
			}
		}
		list = append(list, f)
		b = b[size:]
	}
	if len(b) > 0 {
		return nil, unix.EINVAL
	}
	return list, 0
}

func writeCreateFlow(w *writeCmd) (response, syscall.Errno) {
	c, q := w.c, structOf[abi.CreateFlow](w.core)
	a := &q.FlowAttr
	switch {
	case q.CompMask != 0 || a.Reserved != [2]uint8{}:
		return response{}, unix.EINVAL
	case int(a.Size) != len(w.core)-24 || a.NumOfSpecs > maxSpecs || a.Port != 1 || a.Type > uint32(ib.FlowSniffer):
		return response{}, unix.EINVAL
	case a.Flags != 0: // that rules further down are to see the frame too, or that it is one that goes out
		return response{}, unix.EOPNOTSUPP
	case a.Priority > maxPriority:
		return response{}, unix.ENOSPC
	}
	filters, errno := parseSpecs(w.core[24:], int(a.NumOfSpecs))
	if errno != 0 {
		return response{}, errno
	}
	f := &flow{kind: ib.FlowKind(a.Type), priority: a.Priority, filters: filters}
	if f.rank = f.rankOf(); f.kind != ib.FlowMatch && len(filters) > 0 {
		return response{}, unix.EINVAL
	}
	if errno := firstOf(c.room(objectFlow), w.answerable()); errno != 0 {
		return response{}, errno
	}
	d := c.dev
	d.mu.Lock()
	defer d.mu.Unlock()
	n, ok := get[*qp](c, uint64(q.QPHandle))
	if !ok || !n.raw() {
		return response{}, unix.EINVAL
	}
	f.qp = n
	n.n++
	d.flows = append(slices.Clone(d.flows), f)
	slices.SortStableFunc(d.flows, func(a, b *flow) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.priority, b.priority))
	})
	return response{core: bytesOf(&abi.CreateFlowResp{FlowHandle: c.add(f)})}, 0
}

// steer brings a frame to the queue pairs that the rules name. Called with mu held.
func (d *Device) steer(f *frame) {
	h := parse(f.data)
	var first *flow
	for _, r := range d.flows {
		switch {
		case r.kind == ib.FlowSniffer:
			r.qp.take(f)
		case first == nil && r.matches(&h, f.data):
			first = r
		case first == nil || !r.same(first):
			continue
		}
		if r.kind != ib.FlowSniffer && !r.qp.blocks(f) {
			r.qp.take(f)
		}
	}
}

// blocks reports whether the queue pair gets no such frame because its own context has sent it.
func (n *qp) blocks(f *frame) bool {
	if f.from != n.c {
		return false
	}
	if f.destination().IsMulticast() {
		return !n.selfMC
	}
	return !n.selfUC
}
