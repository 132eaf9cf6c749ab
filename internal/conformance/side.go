package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/ringside-rdma/ringside/internal/softnic/simnet"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// T is whom a case tells how it goes, as a *testing.T is told; Run has another one.
type T interface {
	Name() string
	Helper()
	Log(args ...any)
	Logf(format string, args ...any)
	Error(args ...any)
	Errorf(format string, args ...any)
	Fatal(args ...any)
	Fatalf(format string, args ...any)
	Skip(args ...any)
	Failed() bool
	Skipped() bool
	Cleanup(f func())
}

// C is what a case gets: the test, and two sides with an open context each.
type C struct {
	T
	A, B    *Side
	peers   []*peer // the processes that were a side
	result  *Result
	net     *simnet.Network // where the sides meet; nil: in the real world
	lossy   bool            // it loses packets
	streams bool            // QPs are connected by streams
}

// A Side is one end of a case: a context with its objects, here or in another process.
type Side struct {
	c      *C
	name   string
	opened openArgs
	dev    deviceInfo
	local  *host // nil if the side is in another process
	remote *peer
	pd     handle // a default domain

	listener *listenInfo // where it is dialled; made when it is needed
	spare    *Mem        // likewise
}

// note tells the log and the matrix which of the answers that the specification allows was seen.
func (c *C) note(format string, args ...any) {
	c.Helper()
	s := fmt.Sprintf(format, args...)
	c.Log(s)
	if c.result != nil {
		c.result.Notes = append(c.result.Notes, s)
	}
}

// Skip ends the case, which the matrix says, with the reason, unless that begins with nothingToDo.
func (c *C) Skip(args ...any) {
	c.Helper()
	if c.result != nil {
		c.result.Reason = fmt.Sprint(args...)
	}
	c.T.Skip(args...)
}

func (s *Side) close(h handle) error {
	_, err := call(s, opClose, h)
	return err
}

func (s *Side) mustClose(h handle) {
	s.c.Helper()
	do(s, opClose, h)
}

// Mem is a memory region of a side.
type Mem struct {
	s *Side
	memInfo
	n int
}

const accessAll = ib.AccessLocalWrite | ib.AccessRemote

func (s *Side) mem(pd handle, n int, access ib.Access) *Mem {
	s.c.Helper()
	return &Mem{s, do(s, opMem, memArgs{PD: pd, Size: n, Access: access}), n}
}

// slice registers an ordinary slice.
func (s *Side) slice(pd handle, n int, access ib.Access) *Mem {
	s.c.Helper()
	return &Mem{s, do(s, opMem, memArgs{PD: pd, Size: n, Access: access, Slice: true}), n}
}

func (m *Mem) sge(off, n int) ib.SGE {
	return ib.SGE{Addr: m.Addr + uint64(off), Length: uint32(n), LKey: m.LKey}
}

func (m *Mem) sges(off, n int) []ib.SGE { return []ib.SGE{m.sge(off, n)} }

func (m *Mem) close() error { return m.s.close(m.H) }

func (m *Mem) write(off int, b []byte) {
	m.s.c.Helper()
	do(m.s, opMemWrite, memRange{H: m.H, Off: off, Data: b})
}

func (m *Mem) read(off, n int) []byte {
	m.s.c.Helper()
	return do(m.s, opMemRead, memRange{H: m.H, Off: off, N: n})
}

// fill writes pattern seed to [off, off+n).
func (m *Mem) fill(off, n int, seed uint64) {
	m.s.c.Helper()
	do(m.s, opMemPattern, memRange{H: m.H, Off: off, N: n, Seed: seed})
}

func (m *Mem) set(off, n int, b byte) {
	m.s.c.Helper()
	do(m.s, opMemPattern, memRange{H: m.H, Off: off, N: n, Byte: b})
}

// has fails the test unless [off, off+n) holds pattern seed.
func (m *Mem) has(what string, off, n int, seed uint64) {
	m.s.c.Helper()
	if d := do(m.s, opMemCheck, memRange{H: m.H, Off: off, N: n, Seed: seed}); d != "" {
		m.s.c.Fatalf("%s: %s, bytes %d to %d: %s", m.s.name, what, off, off+n, d)
	}
}

// is fails the test unless every byte of [off, off+n) is b.
func (m *Mem) is(what string, off, n int, b byte) {
	m.s.c.Helper()
	if d := do(m.s, opMemCheck, memRange{H: m.H, Off: off, N: n, Byte: b}); d != "" {
		m.s.c.Fatalf("%s: %s, bytes %d to %d: %s", m.s.name, what, off, off+n, d)
	}
}

// canary fills the whole region with canaryByte; intact checks that it still is, outside [off, off+n).
const canaryByte = 0xc5

func (m *Mem) canary() { m.s.c.Helper(); m.set(0, m.n, canaryByte) }

func (m *Mem) intactAround(what string, off, n int) {
	m.s.c.Helper()
	m.is(what+": before the target", 0, off, canaryByte)
	m.is(what+": after the target", off+n, m.n-off-n, canaryByte)
}

func (m *Mem) intact(what string) { m.s.c.Helper(); m.is(what, 0, m.n, canaryByte) }

// CQ is a completion queue of a side.
type CQ struct {
	s *Side
	cqInfo
}

func (s *Side) cq(entries int) *CQ { s.c.Helper(); return s.cqOn(entries, 0) }

func (s *Side) cqOn(entries int, channel handle) *CQ {
	s.c.Helper()
	q := &CQ{s, do(s, opCQ, cqArgs{entries, channel})}
	if q.Entries < entries {
		s.c.Fatalf("%s: CQ of %d entries granted, %d asked for", s.name, q.Entries, entries)
	}
	return q
}

// wait returns n completions; it fails the test if they do not come.
func (q *CQ) wait(n int) []ib.WC {
	q.s.c.Helper()
	wcs := do(q.s, opPoll, pollArgs{q.H, n, patience})
	if len(wcs) < n {
		q.s.c.Fatalf("%s: %d of %d completions within %v: %+v", q.s.name, len(wcs), n, patience, wcs)
	}
	return wcs
}

// empty fails the test if there is a completion, or comes one soon.
func (q *CQ) empty(what string) {
	q.s.c.Helper()
	if wcs := do(q.s, opPoll, pollArgs{q.H, 1, quiet}); len(wcs) != 0 {
		q.s.c.Fatalf("%s: %s: unexpected completion %s", q.s.name, what, showWC(wcs[0]))
	}
}

func (q *CQ) arm(solicitedOnly bool) {
	q.s.c.Helper()
	do(q.s, opArm, armArgs{q.H, solicitedOnly})
}

func showWC(wc ib.WC) string {
	if wc.Status != ib.WCSuccess {
		return fmt.Sprintf("{id %d, QPN %#x: %v}", wc.ID, wc.QPN, wc.Status)
	}
	return fmt.Sprintf("{id %d, QPN %#x: %v, %d bytes, flags %#x, imm %#x}", wc.ID, wc.QPN, wc.Opcode, wc.ByteLen, wc.Flags, wc.Imm)
}

// want is what a completion must say. Of one that failed, only ID and Status count.
type want struct {
	ID     uint64
	Status ib.WCStatus
	Op     ib.WCOpcode
	Len    int // bytes; anyLen for requests whose length is not reported
	Flags  ib.WCFlags
	Imm    uint32
}

const anyLen = -1

func (w want) differs(s *Side, wc ib.WC, qpn ib.QPN) string {
	switch {
	case wc.ID != w.ID:
		return fmt.Sprintf("ID %d, want %d", wc.ID, w.ID)
	case wc.Status != w.Status && !s.instead(w.Status, wc.Status):
		return fmt.Sprintf("status %q, want %q", wc.Status, w.Status)
	case wc.QPN != qpn:
		return fmt.Sprintf("QPN %#x, want %#x", wc.QPN, qpn)
	case w.Status != ib.WCSuccess:
		return ""
	case wc.Opcode != w.Op:
		return fmt.Sprintf("opcode %v, want %v", wc.Opcode, w.Op)
	case w.Len != anyLen && int(wc.ByteLen) != w.Len:
		return fmt.Sprintf("%d bytes, want %d", wc.ByteLen, w.Len)
	case wc.Flags&(ib.WCWithImm|ib.WCWithInv) != w.Flags:
		return fmt.Sprintf("flags %#x, want %#x", wc.Flags, w.Flags)
	case w.Flags&ib.WCWithImm != 0 && wc.Imm != w.Imm:
		return fmt.Sprintf("immediate %#x, want %#x", wc.Imm, w.Imm)
	}
	return ""
}

// QP is a queue pair of a side.
type QP struct {
	s *Side
	qpInfo
	typ      ib.QPType
	scq, rcq *CQ
	peer     *Side // of a QP that has to be settled
}

type qpOpts struct {
	pd       handle
	scq, rcq *CQ
	srq      handle
	cfg      qp.Config
}

func (s *Side) tryQP(o qpOpts) (*QP, error) {
	if o.pd == 0 {
		o.pd = s.pd
	}
	i, err := call(s, opQP, qpArgs{PD: o.pd, SendCQ: o.scq.H, RecvCQ: o.rcq.H, SRQ: o.srq, Config: o.cfg})
	if err != nil {
		return nil, err
	}
	return &QP{s, i, o.cfg.Type, o.scq, o.rcq, nil}, nil
}

func (s *Side) qp(o qpOpts) *QP {
	s.c.Helper()
	q, err := s.tryQP(o)
	if err != nil {
		s.c.Fatalf("%s: create_qp: %v", s.name, err)
	}
	return q
}

func (q *QP) destroy() error { return q.s.close(q.H) }

func (q *QP) tryModify(attr ib.QPAttr, mask ib.QPAttrMask) error {
	_, err := call(q.s, opModify, modifyArgs{q.H, attr, mask})
	return err
}

func (q *QP) modify(attr ib.QPAttr, mask ib.QPAttrMask) {
	q.s.c.Helper()
	if err := q.tryModify(attr, mask); err != nil {
		q.s.c.Fatalf("%s: modify_qp %#x to %v (%v): %v", q.s.name, q.QPN, attr.State, mask, err)
	}
}

func (q *QP) to(s ib.QPState) { q.s.c.Helper(); q.modify(ib.QPAttr{State: s}, ib.AttrState) }

func (q *QP) query() qpStatus { q.s.c.Helper(); return do(q.s, opQuery, q.H) }

// inState fails the test unless the QP gets into the state; some devices tell the library a moment later.
func (q *QP) inState(want ib.QPState) {
	q.s.c.Helper()
	if s := do(q.s, opWaitState, stateArgs{q.H, want, patience}); s != want {
		q.s.c.Fatalf("%s: QP %#x is in state %v, want %v", q.s.name, q.QPN, s, want)
	}
}

// staysIn fails the test unless the QP is in the state, and stays there for a moment.
func (q *QP) staysIn(want ib.QPState) {
	q.s.c.Helper()
	q.s.c.sleep(quiet / 3)
	if s := q.query().Attr.State; s != want {
		q.s.c.Fatalf("%s: QP %#x is in state %v, want %v", q.s.name, q.QPN, s, want)
	}
}

func (q *QP) tryPost(wrs ...ib.SendWR) (int, error) {
	return call(q.s, opPostSend, sendArgs{q.H, wrs})
}

// post posts send requests, all of which must be accepted.
func (q *QP) post(wrs ...ib.SendWR) {
	q.s.c.Helper()
	if n, err := q.tryPost(wrs...); err != nil || n != len(wrs) {
		q.s.c.Fatalf("%s: post_send: %d of %d accepted: %v", q.s.name, n, len(wrs), err)
	}
}

func (q *QP) tryRecv(wrs ...ib.RecvWR) (int, error) {
	return call(q.s, opPostRecv, recvArgs{q.H, wrs})
}

// recv posts a receive.
func (q *QP) recv(id uint64, sges ...ib.SGE) {
	q.s.c.Helper()
	if n, err := q.tryRecv(ib.RecvWR{ID: id, SGEs: sges}); err != nil || n != 1 {
		q.s.c.Fatalf("%s: post_recv: %d accepted: %v", q.s.name, n, err)
	}
}

func (q *QP) wantOn(cq *CQ, kind string, wants []want) []ib.WC {
	q.s.c.Helper()
	wcs := cq.wait(len(wants))
	for i, w := range wants {
		if d := w.differs(q.s, wcs[i], q.QPN); d != "" {
			q.s.c.Fatalf("%s: %s completion %d of %d: %s", q.s.name, kind, i+1, len(wants), d)
		}
	}
	return wcs
}

// sent waits for completions of the send queue's CQ, in this order. WRITEs among them are done.
func (q *QP) sent(wants ...want) []ib.WC {
	q.s.c.Helper()
	wcs := q.wantOn(q.scq, "send", wants)
	if slices.ContainsFunc(wants, func(w want) bool { return w.Op == ib.WCRDMAWrite && w.Status == ib.WCSuccess }) {
		q.settle(wants[len(wants)-1])
	}
	return wcs
}

// settle waits until WRITEs that have completed are done: over iWARP their completion says that they are on their way. A READ
// comes back from behind them.
func (q *QP) settle(last want) {
	q.s.c.Helper()
	if q.peer == nil || last.Status != ib.WCSuccess || last.Op == ib.WCRDMARead {
		return
	}
	const id = 0x5e771e
	q.post(wrRead(id, q.s.scratch().sges(0, 8), q.peer.scratch(), 0))
	q.wantOn(q.scq, "settling", []want{{ID: id, Op: ib.WCRDMARead, Len: 8}})
}

// scratch is a little memory in the default domain.
func (s *Side) scratch() *Mem {
	s.c.Helper()
	if s.spare == nil {
		s.spare = s.mem(s.pd, 64, accessAll)
	}
	return s.spare
}

// received waits for completions of the receive queue's CQ, in this order.
func (q *QP) received(wants ...want) []ib.WC {
	q.s.c.Helper()
	return q.wantOn(q.rcq, "receive", wants)
}

// sentOneOf waits for one completion of the send queue, which must be id's, and returns its status, which must be one of
// those; the first is the one that the specification says, or prefers.
func (q *QP) sentOneOf(id uint64, status ...ib.WCStatus) ib.WCStatus {
	q.s.c.Helper()
	return q.oneOf(q.scq, "send", id, status)
}

func (q *QP) receivedOneOf(id uint64, status ...ib.WCStatus) ib.WCStatus {
	q.s.c.Helper()
	return q.oneOf(q.rcq, "receive", id, status)
}

func (q *QP) oneOf(cq *CQ, kind string, id uint64, status []ib.WCStatus) ib.WCStatus {
	q.s.c.Helper()
	wc := cq.wait(1)[0]
	known := slices.ContainsFunc(status, func(st ib.WCStatus) bool { return st == wc.Status || q.s.instead(st, wc.Status) })
	if wc.ID != id || wc.QPN != q.QPN || !known {
		q.s.c.Fatalf("%s: %s completion %s, want id %d, QPN %#x and one of %q", q.s.name, kind, showWC(wc), id, q.QPN, status)
	}
	if wc.Status != status[0] && wc.Status != ib.WCSuccess {
		q.s.c.note("%s completion says %q, where the specification prefers %q", kind, wc.Status, status[0])
	}
	return wc.Status
}

// flushed waits for the completions ids of a queue, all flushed and in this order.
func (q *QP) flushed(cq *CQ, ids ...uint64) {
	q.s.c.Helper()
	wants := make([]want, len(ids))
	for i, id := range ids {
		wants[i] = want{ID: id, Status: ib.WCFlushErr}
	}
	q.wantOn(cq, "flushed", wants)
}

// Work requests, signalled.

func wrSend(id uint64, sges ...ib.SGE) ib.SendWR {
	return ib.SendWR{ID: id, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: sges}
}

func wrOneSided(id uint64, op ib.Opcode, local []ib.SGE, remote uint64, key ib.RKey) ib.SendWR {
	return ib.SendWR{ID: id, Opcode: op, Flags: ib.SendSignaled, SGEs: local, RemoteAddr: remote, RKey: key}
}

func wrWrite(id uint64, local []ib.SGE, to *Mem, off int) ib.SendWR {
	return wrOneSided(id, ib.OpRDMAWrite, local, to.Addr+uint64(off), to.RKey)
}

func wrRead(id uint64, local []ib.SGE, from *Mem, off int) ib.SendWR {
	return wrOneSided(id, ib.OpRDMARead, local, from.Addr+uint64(off), from.RKey)
}

func wrCAS(id uint64, local []ib.SGE, at *Mem, off int, compare, swap uint64) ib.SendWR {
	wr := wrOneSided(id, ib.OpAtomicCmpSwap, local, at.Addr+uint64(off), at.RKey)
	wr.CompareAdd, wr.Swap = compare, swap
	return wr
}

func wrAdd(id uint64, local []ib.SGE, at *Mem, off int, add uint64) ib.SendWR {
	wr := wrOneSided(id, ib.OpAtomicFetchAdd, local, at.Addr+uint64(off), at.RKey)
	wr.CompareAdd = add
	return wr
}

// noEvent fails the test if an asynchronous event comes.
func (s *Side) noEvent(what string) {
	s.c.Helper()
	if ev, err := call(s, opAsync, waitArgs{Wait: quiet}); !timedOut(err) {
		s.c.Fatalf("%s: %s: event %q, error %v; want none", s.name, what, ev.Type, err)
	}
}

// event waits for an asynchronous event of the type; others that come before are logged.
func (s *Side) event(typ ib.EventType) asyncEvent {
	s.c.Helper()
	for range 64 {
		ev, err := call(s, opAsync, waitArgs{Wait: patience})
		if err != nil {
			s.c.Fatalf("%s: event %q did not come: %v", s.name, typ, err)
		}
		if ev.Type == typ {
			return ev
		}
		s.c.Logf("%s: event %q of QP %#x", s.name, ev.Type, ev.QPN)
	}
	s.c.Fatalf("%s: event %q did not come", s.name, typ)
	return asyncEvent{}
}

// timedOut reports whether a wait ended because nothing came.
func timedOut(err error) bool { return errors.Is(err, context.DeadlineExceeded) }
