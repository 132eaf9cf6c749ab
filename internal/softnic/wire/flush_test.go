package wire

import (
	"fmt"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// flushes is a target that counts FLUSHes.
type flushes struct {
	nobody
	n int
}

func (t *flushes) Flush(uint32, uint64, ib.Flush) ib.WCStatus {
	t.n++
	return ib.WCSuccess
}

// rxe has as many FLUSHes on their way as fit its window, whatever it may have of READs; and what it has not heard of, it asks again.
func TestManyFlushes(t *testing.T) {
	const pairs = 40
	target := &flushes{}
	r := NewResponder(Config{MTU: 1024, MaxDestRdAtomic: 1}, target)
	flush := func(psn ib.PSN) {
		r.Receive(&roce.Packet{Opcode: roce.Op(roce.RC, roce.Flush), PSN: psn, AckReq: true, FETH: uint32(ib.FlushGlobal), Len: 8})
	}
	for i := range ib.PSN(pairs) {
		flush(2 * i)
		flush(2*i + 1)
	}
	if target.n != 2*pairs || r.Failed() {
		t.Fatalf("%d of %d were executed; refused: %t", target.n, 2*pairs, r.Failed())
	}
	answers := 0
	for i := r.outHead; i != r.outTail; i++ {
		if r.at(i).result {
			answers++
		}
	}
	if answers != 2*pairs {
		t.Errorf("%d answers", answers)
	}
	r.outHead = r.outTail
	flush(3)
	if x := r.at(r.outHead); r.outTail-r.outHead != 1 || !x.result || x.psn != 3 || target.n != 2*pairs {
		t.Errorf("what was asked for again: %d answers, %+v", r.outTail-r.outHead, x)
	}
}

// What answers a later request says that a FLUSH or an ATOMIC WRITE was executed, too: one whose answer is lost is not asked for again, which
// rxe would not hear. A READ and an atomic are.
func TestLostAnswerImplied(t *testing.T) {
	for _, selective := range []bool{false, true} {
		for _, op := range []ib.Opcode{ib.OpFlush, ib.OpAtomicWrite, ib.OpAtomicFetchAdd} {
			for _, behind := range []ib.Opcode{ib.OpSend, ib.OpRDMARead, ib.OpFlush, ib.OpAtomicFetchAdd} {
				t.Run(fmt.Sprint(op, " before ", behind, ", selective ", selective), func(t *testing.T) {
					n := newNetwork(t, 1, func(c *Config) { c.Selective = selective })
					a, b := n.nodes[0], n.nodes[1]
					b.recvs = 1
					first, asked := a.req.nxt, 0
					implied := op != ib.OpAtomicFetchAdd
					n.drop = func(from *node, p *roce.Packet) bool {
						if from == a && p.PSN == first {
							asked++
							return implied && asked > 1 // as rxe does
						}
						return from == b && p.PSN == first && asked < 2
					}
					request := func(op ib.Opcode) Request {
						r := Request{Op: op, RKey: memKey}
						switch op {
						case ib.OpFlush:
							r.Flush = ib.Flush{Placement: ib.FlushGlobal, Length: 8}
						default:
							r.Len = 8
						}
						return r
					}
					a.post(request(op), make([]byte, 8))
					a.post(request(behind), make([]byte, 8))
					a.pump()
					n.run(n.ended)
					for i, st := range a.done {
						if st != ib.WCSuccess {
							t.Errorf("request %d ends with %v", i, st)
						}
					}
					if again := asked > 1; again == implied || a.req.Counters.Timeouts != 0 {
						t.Errorf("asked for %d times: %+v", asked, a.req.Counters)
					}
				})
			}
		}
	}
}

// Without a later answer it is asked for again.
func TestLostAnswerAtTheEnd(t *testing.T) {
	for _, selective := range []bool{false, true} {
		for _, op := range []ib.Opcode{ib.OpFlush, ib.OpAtomicWrite} {
			n := newNetwork(t, 1, func(c *Config) { c.Selective = selective })
			a, b := n.nodes[0], n.nodes[1]
			lost := 0
			n.drop = func(from *node, p *roce.Packet) bool {
				if from == b && p.Opcode.Op() == roce.ReadResponseOnly && lost == 0 {
					lost++
					return true
				}
				return false
			}
			r := Request{Op: op, RKey: memKey, Flush: ib.Flush{Placement: ib.FlushGlobal}}
			if op == ib.OpAtomicWrite {
				r.Len = 8
			}
			a.post(r, make([]byte, 8))
			a.pump()
			n.run(n.ended)
			if a.done[0] != ib.WCSuccess || a.req.Counters.Timeouts != 1 || lost != 1 {
				t.Errorf("%v, selective %v: %v, %+v", op, selective, a.done, a.req.Counters)
			}
		}
	}
}

// When a timer finds that something is missing, all of it is asked about at once, whatever the newest request is.
func TestInquiry(t *testing.T) {
	took := map[ib.Opcode]time.Duration{}
	ops := []ib.Opcode{ib.OpSend, ib.OpFlush, ib.OpAtomicWrite, ib.OpAtomicCmpSwap}
	for _, op := range ops {
		n := newNetwork(t, 1, func(c *Config) { c.Selective, c.AckTimeout = true, 67*time.Millisecond })
		a, b := n.nodes[0], n.nodes[1]
		const messages = 30
		b.recvs = messages + 1
		first := a.req.nxt
		n.drop = func(from *node, p *roce.Packet) bool { // every third message, and all that is said about it
			if a.req.Counters.Timeouts > 0 {
				return false
			}
			return from == b || distance(first, p.PSN)%3 == 0 && distance(first, p.PSN) < messages
		}
		for range messages {
			a.post(Request{Op: ib.OpSend, Len: 8}, make([]byte, 8))
		}
		r := Request{Op: op, RKey: memKey, Len: 8}
		if op == ib.OpFlush {
			r.Len, r.Flush = 0, ib.Flush{Placement: ib.FlushGlobal}
		}
		a.post(r, make([]byte, 8))
		a.pump()
		n.run(n.ended)
		for i, st := range a.done {
			if st != ib.WCSuccess {
				t.Errorf("%v: request %d ends with %v", op, i, st)
			}
		}
		if a.req.Counters.Timeouts != 1 {
			t.Errorf("%v: %+v", op, a.req.Counters)
		}
		took[op] = n.now
	}
	for _, op := range ops {
		if took[op] > took[ib.OpSend]+2*5*time.Microsecond {
			t.Errorf("behind %v it takes %v, behind %v %v", op, took[op], ib.OpSend, took[ib.OpSend])
		}
	}
}
