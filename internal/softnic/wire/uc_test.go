package wire

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// ucPair is a one-way unreliable connection over a network that may lose packets and overtake them.
type ucPair struct {
	n    *network
	req  *UCRequester
	resp *UCResponder
	a, b *node
}

func newUCPair(t *testing.T, seed uint64) *ucPair {
	n := newNetwork(t, seed, nil)
	u := &ucPair{n: n, a: n.nodes[0], b: n.nodes[1]}
	u.req, u.resp = NewUCRequester(u.a.req.cfg, u.a), NewUCResponder(u.b.req.cfg, target{u.b})
	u.a.uc, u.b.uc = u, u
	return u
}

func (u *ucPair) post(r Request, data []byte) {
	u.a.sends = append(u.a.sends, data)
	u.a.sinks = append(u.a.sinks, nil)
	u.req.Post(&r)
}

// What comes is whole, each once and in order; what does not come has never been.
func TestUCRandom(t *testing.T) {
	lost, came := 0, 0
	for seed := range uint64(100) {
		u := newUCPair(t, seed)
		r := u.n.r
		if seed%4 != 0 {
			u.n.loss = r.Float64() * 0.2
			u.n.corrupt = r.Float64() * 0.05
		}
		if seed%4 == 2 {
			u.n.jitter = 3 * time.Microsecond
		}
		u.n.full = r.Float64() * 0.2
		u.b.recvs = 1000
		const messages = 100
		for i := range uint64(messages) {
			size := 8 + r.IntN(4*simMTU)
			data := make([]byte, size)
			for k := range data {
				data[k] = byte(i)*3 + byte(k)
			}
			binary.LittleEndian.PutUint64(data, i)
			if r.IntN(2) == 0 {
				u.post(Request{Op: ib.OpSend, Len: uint32(size)}, data)
			} else {
				u.post(Request{Op: ib.OpRDMAWriteWithImm, Len: uint32(size), RKey: memKey, Addr: 64, Imm: uint32(i)}, data)
			}
			for u.req.Queued() > 0 {
				u.req.Pump(u.n.now, u.a)
				u.n.settle()
			}
		}
		u.n.settle()
		if len(u.a.done) != messages || slices.ContainsFunc(u.a.done, func(st ib.WCStatus) bool { return st != ib.WCSuccess }) {
			t.Fatalf("seed %d: requests end with %v", seed, u.a.done)
		}
		last := -1
		for _, m := range u.b.got {
			i := int(m.Imm)
			if !m.Write {
				i = int(binary.LittleEndian.Uint64(m.data))
				if !bytes.Equal(m.data, u.a.sends[i]) {
					t.Fatalf("seed %d: message %d came with other bytes", seed, i)
				}
			}
			if i <= last {
				t.Fatalf("seed %d: message %d after message %d", seed, i, last)
			}
			last = i
		}
		if seed%4 == 0 && len(u.b.got) != messages {
			t.Fatalf("seed %d: %d of %d messages came over a network that loses nothing", seed, len(u.b.got), messages)
		}
		came += len(u.b.got)
		lost += messages - len(u.b.got)
	}
	if lost == 0 || came < 2000 {
		t.Errorf("%d messages came, %d were lost", came, lost)
	}
}

func TestUCRefused(t *testing.T) {
	u := newUCPair(t, 1)
	send := func(r Request, n int) {
		r.Len = uint32(n)
		u.post(r, payloadOf(n))
		u.req.Pump(0, u.a)
		u.n.settle()
	}
	send(Request{Op: ib.OpSend}, 600)                           // nobody has posted a receive
	send(Request{Op: ib.OpRDMAWrite, RKey: roKey}, 600)         // not allowed
	send(Request{Op: ib.OpRDMAWrite, RKey: 0x99}, 600)          // no such key
	send(Request{Op: ib.OpRDMAWriteWithImm, RKey: memKey}, 600) // written, but nobody is told
	if len(u.b.got) != 0 || u.resp.Failed() || u.b.fatal != ib.WCSuccess || u.resp.Counters.Dropped == 0 {
		t.Errorf("%d messages, failed: %v", len(u.b.got), u.b.fatal)
	}
	u.b.recvs = 2
	send(Request{Op: ib.OpSend}, 600)
	if len(u.b.got) != 1 || !bytes.Equal(u.b.got[0].data, payloadOf(600)) {
		t.Error("what came after that is not there")
	}
	u.b.recvLen = 500
	send(Request{Op: ib.OpSend}, 600)
	if len(u.b.got) != 2 || u.b.got[1].st != ib.WCLocalLengthErr || !u.resp.Failed() || u.b.fatal != ib.WCRemoteInvalidReqErr {
		t.Errorf("a message that is too long: %+v, %v", u.b.got[1:], u.b.fatal)
	}
	u.b.recvs = 1
	if send(Request{Op: ib.OpSend}, 8); len(u.b.got) != 2 {
		t.Error("it receives on")
	}
	// The sender does not hear of any of this.
	u.a.badAt = len(u.a.done)
	send(Request{Op: ib.OpSend}, 8)
	send(Request{Op: ib.OpSend}, 8)
	u.req.Resume()
	send(Request{Op: ib.OpSend}, 8)
	want := append(make([]ib.WCStatus, 7), ib.WCLocalProtErr, ib.WCFlushErr, ib.WCSuccess)
	if !slices.Equal(u.a.done, want) {
		t.Errorf("requests end with %v, want %v", u.a.done, want)
	}
}

// The receive of a message that never became one is the next message's.
func TestUCKeepsReceive(t *testing.T) {
	u := newUCPair(t, 1)
	u.b.recvs = 1
	first := roce.Packet{Opcode: roce.Op(roce.UC, roce.SendFirst), PSN: u.resp.want, Payload: make([]byte, simMTU)}
	u.resp.Receive(&first)
	only := roce.Packet{Opcode: roce.Op(roce.UC, roce.SendOnly), PSN: u.resp.want.Add(3), Payload: []byte("next")}
	u.resp.Receive(&only)
	if len(u.b.got) != 1 || string(u.b.got[0].data) != "next" {
		t.Errorf("%+v", u.b.got)
	}
}
