package wire

import (
	"testing"

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
