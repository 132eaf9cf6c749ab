package siw

import (
	"testing"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What the script of FuzzCompletions has the process and its kernel do; the bytes behind each are its operands.
const (
	fuzzSend    = iota // a request: its flags and opcode
	fuzzRecv           // a receive
	fuzzTake           // the kernel takes a request
	fuzzDone           // it completes one: the ID, opcode and status
	fuzzRaw            // it writes all of the next completion
	fuzzScatter        // it writes a completion to any slot
	fuzzControl        // it writes the word behind the slots
	fuzzPoll           // with room for so many
	fuzzFail           // the queue pair is moved to Err
	fuzzOps
)

// A kernel that writes anything to a completion queue: polling comes to an end, and gives completions of what is posted only, each once
// and in order, and those of requests that nobody wants to hear of if they have failed. Of a shared receive queue there is no account:
// the IDs are those that the process gave, and are believed.
func FuzzCompletions(f *testing.F) {
	const num = 1 // the queue pair's
	raw := func(id uint64, opcode byte, status uint16, qpn uint64) []byte {
		e := make([]byte, 1+cqeBytes)
		e[0] = fuzzRaw
		le.PutUint64(e[1:], id)
		e[1+flagsAt], e[1+9] = 1, opcode
		le.PutUint16(e[1+10:], status)
		le.PutUint64(e[1+24:], qpn)
		return e
	}
	for kind := range byte(4) {
		f.Add(kind, []byte{fuzzSend, 1, 0, fuzzRecv, fuzzTake, fuzzDone, 0, 2, 0, fuzzDone, 0, 8, 0, fuzzPoll, 1, fuzzPoll, 9})
		f.Add(kind, []byte{fuzzSend, 0, 0, fuzzSend, 1, 1, fuzzSend, 0, 2, fuzzTake, fuzzTake, fuzzDone, 1, 1, 0, fuzzDone, 0, 2, 4, fuzzPoll, 0, fuzzPoll, 3, fuzzPoll, 3})
		f.Add(kind, []byte{fuzzSend, 1, 0, fuzzRecv, fuzzTake, fuzzFail, fuzzPoll, 9, fuzzDone, 0, 2, 0, fuzzPoll, 9})
		f.Add(kind, append(raw(0, 8, 0, num), append(raw(1<<63, 2, 0xffff, num), append(raw(0, 0, 0, 1<<24), fuzzPoll, 200)...)...))
	}
	f.Fuzz(func(t *testing.T, kind byte, script []byte) {
		defer testutil.EndOnPanic()
		shared := kind&1 != 0
		b := connected(t, benchOpts{oneCQ: true, srq: shared, sigAll: kind&2 != 0})
		if b.kq.num != num {
			t.Fatalf("the queue pair is %d: the seeds are of another", b.kq.num)
		}
		bytes := func(n int) []byte { // the next of the script, or zeros behind its end
			p := make([]byte, n)
			script = script[copy(p, script):]
			return p
		}
		type posted struct {
			op       ib.WCOpcode
			signaled bool
		}
		requests := map[uint64]posted{} // by ID, those that were not polled
		var lastSend, lastRecv, next uint64
		poll := func(room int) {
			wcs := make([]ib.WC, room)
			n := b.scq.Poll(wcs)
			if n < 0 || n > room {
				t.Fatalf("%d completions in room for %d: %v", n, room, b.scq.Err())
			}
			for i := range wcs[:n] {
				w := &wcs[i]
				if w.QPN != num || w.Status > ib.WCGeneralErr {
					t.Fatalf("%+v", w)
				}
				if shared && w.Opcode == ib.WCRecv {
					continue
				}
				p, ok := requests[w.ID]
				last := &lastSend
				if w.Opcode == ib.WCRecv {
					last = &lastRecv
				}
				if !ok || w.Opcode != p.op || w.ID <= *last || !p.signaled && w.Status == ib.WCSuccess {
					t.Fatalf("%+v, which was posted: %v, as %+v, after %d", w, ok, p, *last)
				}
				delete(requests, w.ID)
				*last = w.ID
			}
		}
		for range min(len(script), 300) {
			switch bytes(1)[0] % fuzzOps {
			case fuzzSend:
				p := bytes(2)
				wr := send(next+1, ib.SendFlags(p[0])&ib.SendSignaled, ib.SGE{Addr: 0x1000, Length: 8, LKey: 5})
				if wr.Opcode = [...]ib.Opcode{ib.OpSend, ib.OpRDMARead, ib.OpRDMAWrite}[p[1]%3]; wr.Opcode != ib.OpSend {
					wr.RemoteAddr, wr.RKey = 0x2000, 6
				}
				if n, _ := b.q.PostSend([]ib.SendWR{wr}); n == 1 {
					next++
					requests[next] = posted{ib.WCOpcodeOf(wr.Opcode), wr.Flags != 0 || kind&2 != 0}
				}
			case fuzzRecv:
				wrs := []ib.RecvWR{{ID: next + 1, SGEs: []ib.SGE{{Addr: 0x3000, Length: 8, LKey: 5}}}}
				post := b.q.PostRecv
				if shared {
					post = driver.SRQ(b.srq).PostRecv
				}
				if n, _ := post(wrs); n == 1 {
					next++
					requests[next] = posted{ib.WCRecv, true}
				}
			case fuzzTake:
				b.kq.sq.take()
			case fuzzDone:
				p := bytes(3)
				b.ks.complete(uint64(p[0]), p[1], uint16(p[2]), 8, num)
			case fuzzRaw:
				copy(b.ks.slot(b.ks.get), bytes(int(cqeBytes)))
				b.ks.get++
			case fuzzScatter:
				p := bytes(1 + int(cqeBytes))
				copy(b.ks.slot(uint64(p[0])), p[1:])
			case fuzzControl:
				copy(b.ks.control(), bytes(4))
			case fuzzPoll:
				poll(int(bytes(1)[0]))
			case fuzzFail:
				if err := b.q.Modify(t.Context(), &ib.QPAttr{State: ib.Err}, ib.AttrState); err != nil {
					t.Fatal(err)
				}
			}
		}
		// In the end everything of the queue pair that is to be heard of has been, and only once.
		if err := b.q.Modify(t.Context(), &ib.QPAttr{State: ib.Err}, ib.AttrState); err != nil {
			t.Fatal(err)
		}
		for i := range b.ks.n {
			b.ks.slot(i)[flagsAt] &^= abi.SIW_WQE_VALID
		}
		poll(255)
		for id, p := range requests {
			if p.signaled && !(shared && p.op == ib.WCRecv) {
				t.Errorf("request %d was posted as %+v, and is not heard of", id, p)
			}
		}
	})
}
