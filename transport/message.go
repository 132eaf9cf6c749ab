package transport

import (
	"sync/atomic"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Message is a received message. It lies in registered memory and is lent to the handler, or to Recv's callback, until
// that returns; whoever needs it longer calls Take, and later Release. A message that is held counts against the window
// of messages that the peer may send (Config.RecvDepth): a program that holds them all receives no more.
//
// Bytes and Imm may be called by any goroutine as long as the message is held.
type Message struct {
	c                   *Conn
	data                []byte
	imm                 uint32
	hasImm              bool
	shared              bool // the slot belongs to the poller's shared receive queue
	ready               bool // false: a rendezvous whose payload is still being read
	state               atomic.Uint32
	held                bool         // in the queue for Recv, or lent by it; guarded by rcv.mu
	id                  uint32       // of the rendezvous
	key                 mr.RemoteKey // its source
	reading, readQueued bool         // the READ is posted; waits for room in the send queue
	big                 *mr.Buffer   // the payload of a rendezvous
	next                *Message
	slot                slot
	sge                 [1]ib.SGE
	wr                  ib.RecvWR
}

const (
	msgLent     uint32 = iota // nobody's, or a callback's until it returns
	msgTaken                  // Take was called, by a callback that has not returned
	msgKept                   // taken, and the callback has returned
	msgReturned               // Release was called before the callback that took it returned: its end gives it back
)

// init binds m to its slot; n is the length to receive.
func (m *Message) init(s slot, id uint64, n int) {
	m.slot = s
	m.sge[0] = s.sge
	m.sge[0].Length = uint32(n)
	m.wr = ib.RecvWR{ID: id, SGEs: m.sge[:]}
}

// Bytes is the payload.
func (m *Message) Bytes() []byte { return m.data }

// Imm is the immediate value of a message that the peer's WriteImm made; such a message has no payload.
func (m *Message) Imm() (imm uint32, ok bool) { return m.imm, m.hasImm }

// Conn is the connection that the message came on.
func (m *Message) Conn() *Conn { return m.c }

// Take keeps the message past the callback, until Release. It returns m, and panics if the message is not lent.
func (m *Message) Take() *Message {
	if !m.state.CompareAndSwap(msgLent, msgTaken) {
		panic("transport: Take of a message that is not lent")
	}
	return m
}

// Release gives a taken message back; its bytes must not be touched any more. Any goroutine may call it. It panics if
// the message is not taken.
func (m *Message) Release() {
	if m.state.CompareAndSwap(msgTaken, msgReturned) {
		return
	}
	m.c.giveBack(m, true)
}

// endLoan is called when a callback has returned. It reports whether somebody keeps the message; if not, the caller gives
// it back.
func (m *Message) endLoan() (kept bool) {
	if m.state.Load() == msgLent {
		return false
	}
	if m.state.CompareAndSwap(msgTaken, msgKept) {
		return true
	}
	m.state.Store(msgLent) // from msgReturned
	return false
}

// clear forgets the message's content, and gives the memory of a rendezvous back.
func (m *Message) clear() {
	if poison && m.big == nil {
		for i := range m.data {
			m.data[i] = poisonByte
		}
	}
	m.data = nil
	m.hasImm = false
	m.next = nil
	m.dropBig()
}

func (m *Message) dropBig() {
	if big := m.big; big != nil {
		m.big = nil
		big.Release()
		m.c.p.unstall()
	}
}
