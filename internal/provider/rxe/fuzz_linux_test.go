package rxe

import (
	"bytes"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A kernel that writes anything to a completion queue, and to its indices: polling comes to an end, gives what is between the indices
// and nothing else, and leaves the kernel's entries alone; what is posted meanwhile is never more than the queues hold.
//
// Each 4 bytes of indices are the producer index of a Poll, with room for as many completions as the second of them says. rxe's completions bear the requests' IDs as the process gave them, and are
// believed.
func FuzzCompletions(f *testing.F) {
	const num = 0x13 // the queue pair's
	entry := func(status, opcode, qpn, flags uint32) []byte {
		e := make([]byte, 64)
		le.PutUint64(e, 1000)
		le.PutUint32(e[8:], status)
		le.PutUint32(e[12:], opcode)
		le.PutUint32(e[20:], 64)
		le.PutUint32(e[24:], 0x521) // a window's key once it is bound, or an immediate
		le.PutUint32(e[28:], qpn)
		le.PutUint32(e[36:], flags)
		return e
	}
	index := func(list ...uint32) (b []byte) {
		for _, v := range list {
			b = le.AppendUint32(b, v|129<<8)
		}
		return b
	}
	for kind := range byte(6) {
		f.Add(kind, bytes.Join([][]byte{entry(0, 0, num, 0), entry(0, 128, num, 3), entry(0, 128, num, 5), entry(10, 0, num, 0)}, nil), index(1, 4))
		f.Add(kind, bytes.Join([][]byte{entry(0, 5, num, 0), entry(5, 0, num, 0), entry(5, 128, num, 0)}, nil), index(127, 126, 0, 128))
		f.Add(kind, entry(1<<32-1, 1<<32-1, 1<<32-1, 1<<32-1), index(1<<32-1, 1<<31, 1))
	}
	f.Fuzz(func(t *testing.T, kind byte, entries, indices []byte) {
		defer testutil.EndOnPanic()
		typ := []ib.QPType{ib.RC, ib.UC, ib.UD}[kind%3]
		b := newBench(t, typ)
		if b.kq.num != num {
			t.Fatalf("the queue pair is %#x: the seeds are of another", b.kq.num)
		}
		m, w, bind, _ := b.windowed()
		defer b.close(w, m)
		if typ != ib.UD {
			b.post(ib.SendWR{ID: 1000, Opcode: ib.OpSend, Flags: ib.SendSignaled}, bind(1), ib.SendWR{ID: 1001, Opcode: ib.OpRDMAWrite})
		}
		if n, err := b.qp.PostRecv([]ib.RecvWR{{ID: 2000}, {ID: 2001}}); n != 2 {
			t.Fatal(err)
		}
		kcq := b.kcq()
		slots := kcq.mem[dataAt:]
		copy(slots, entries)
		was := bytes.Clone(slots)
		at := uint32(0)
		for i := 0; i+4 <= min(len(indices), 400); i += 4 {
			v := le.Uint32(indices[i:])
			kcq.setProducer(v)
			kcq.setConsumer(v * 7) // the process's own, which it does not read back
			b.kq.sq.setConsumer(v * 3)
			b.kq.rq.setConsumer(v * 5)
			wcs := make([]ib.WC, v>>8&0xff%130)
			n, want := b.cq.Poll(wcs), int(min((v-at)&kcq.mask, uint32(len(wcs))))
			if n != want {
				t.Fatalf("%d completions of %d between %d and %d, room for %d", n, want, at, v, len(wcs))
			}
			for j := range wcs[:n] {
				if e, w := kcq.slot(at+uint32(j)), &wcs[j]; !isOf(w, e) {
					t.Fatalf("%+v of %x", w, e)
				}
			}
			if at = (at + uint32(n)) & kcq.mask; n > 0 && kcq.consumer() != at {
				t.Fatalf("the kernel is told of %d, want %d", kcq.consumer(), at)
			}
			if !bytes.Equal(slots, was) {
				t.Fatal("entries that are the kernel's were written")
			}
			if n, _ := b.qp.PostSend(make([]ib.SendWR, 100)); n > 31 {
				t.Fatalf("%d requests fit", n)
			}
			if n, _ := b.qp.PostRecv(make([]ib.RecvWR, 100)); n > 31 {
				t.Fatalf("%d receives fit", n)
			}
		}
		if kind%2 != 0 {
			return
		}
		b.to(b.qp, ib.Reset) // takes the queue pair's completions out
		wcs := make([]ib.WC, 130)
		for _, wc := range wcs[:max(b.cq.Poll(wcs), 0)] {
			if wc.QPN == num {
				t.Fatalf("after the queue pair was reset: %+v", wc)
			}
		}
	})
}

// isOf reports whether a completion can be of an entry.
func isOf(w *ib.WC, e []byte) bool {
	status, opcode, flags := le.Uint32(e[8:]), le.Uint32(e[12:]), le.Uint32(e[36:])
	imm, inv := w.Flags&ib.WCWithImm != 0, w.Flags&ib.WCWithInv != 0
	return w.ID == le.Uint64(e) && w.QPN == ib.QPN(le.Uint32(e[28:])&0xffffff) && w.ByteLen == le.Uint32(e[20:]) &&
		(w.Status == ib.WCSuccess) == (status == 0) && w.Status <= ib.WCGeneralErr && uint32(w.Opcode)&0xff == opcode&0xff &&
		(w.Opcode.IsRecv() || w.Flags == 0) && (!imm || flags&2 != 0) && (!inv || flags&4 != 0) &&
		(imm || w.Imm == 0) && (inv || w.InvalidatedRKey == 0) && w.SrcQPN <= ib.MaxQPN
}
