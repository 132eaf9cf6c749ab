package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The random sequence of an integrity run, and the model of what it does. testdata/integrity.c has the same in C: both must
// draw the same numbers in the same order.
//
// There are two directions, of which 0 is the client's operations on the server and 1 the reverse. Each has a generator and
// two memories: the initiator's local one, that its operations send from and put results into, and the target's window,
// that they read, write and receive into. Neither is touched by the other direction, so both can be under way at once.
//
// Within a batch every operation has a lane of the local memory for itself. Operations overlap in the window, where the
// order of the queue pair decides: a request that changes the window after a READ of the same batch is fenced, since a READ
// may be answered again if its answer is lost.
//
// No READ or atomic is fenced itself or follows a fenced request in its batch. Linux's rxe looks at a request's fence again
// when it retransmits it, and then waits for READs and atomics that are outstanding, although they are the request itself or
// come after it: for ever (rxe_wqe_is_fenced in rxe_req.c). A busy machine is slow enough for retransmissions.
//
// An atomic behind a SEND or WRITE of its batch may complete without its result between two rxe, when both are sent again: to the SEND
// or WRITE the target answers that everything up to the atomic is done (duplicate_request in rxe_resp.c, whose ack_psn has the atomic,
// too), and the initiator takes that for the atomic's own answer (check_ack in rxe_comp.c). It was done once, and only once, but the 8
// bytes for its result stay what they were. The model notes which those are; with lostResults, a run puts up with exactly that.
const (
	batchMax   = 8
	pieces     = 4        // scatter/gather elements of one request
	pieceMax   = 16 << 10 // bytes of one
	laneSize   = pieces * pieceMax
	localSize  = batchMax * laneSize
	partSize   = 80 << 10 // of the window: each element of a receive is in another part
	windowSize = pieces * partSize
	inlineMax  = 64 // bytes that may be sent inline
)

// A span is a range of a memory.
type span struct{ off, n int }

// An operation is one request of a batch with the receive that it takes at the target.
type operation struct {
	opcode ib.Opcode
	flags  ib.SendFlags
	inline bool
	imm    uint32
	local  []span
	total  int // bytes of local
	remote int // offset in the window; READ, WRITE and atomics

	compareAdd, swap uint64

	behind bool    // an atomic's: a SEND or WRITE of its batch comes before it
	before [8]byte // an atomic's: what was where its result goes

	takesRecv bool
	recv      []span // in the window
}

func (o *operation) atomic() bool {
	return o.opcode == ib.OpAtomicCmpSwap || o.opcode == ib.OpAtomicFetchAdd
}

// gets reports whether the operation has a result from the window.
func (o *operation) gets() bool { return o.opcode == ib.OpRDMARead || o.atomic() }

func (o *operation) String() string {
	return fmt.Sprintf("%v flags %#x inline %v imm %#x local %v (%d bytes) remote %d compare/add %#x swap %#x receive %v",
		o.opcode, o.flags, o.inline, o.imm, o.local, o.total, o.remote, o.compareAdd, o.swap, o.recv)
}

// A direction is the model of one direction.
type direction struct {
	random splitMix
	local  []byte
	window []byte
	batch  []operation // the latest
}

func newDirection(seed uint64, server bool) *direction {
	d := &direction{random: splitMix(seed), local: make([]byte, localSize), window: make([]byte, windowSize)}
	if server {
		d.random ^= 0xd1342543de82ef95
	}
	d.random.fill(d.local)
	d.random.fill(d.window)
	return d
}

func (d *direction) describe() string {
	var b strings.Builder
	for i := range d.batch {
		fmt.Fprintf(&b, "  %d: %v\n", i, &d.batch[i])
	}
	return b.String()
}

var opcodes = [...]ib.Opcode{ib.OpRDMARead, ib.OpRDMAWrite, ib.OpRDMAWriteWithImm, ib.OpSend, ib.OpSendWithImm,
	ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd}

// next makes the next batch, and changes the model as it does. What is sent is made anew, so the initiator copies the local
// memory from the model before it posts.
func (d *direction) next() {
	d.batch = d.batch[:0]
	n := d.random.below(batchMax + 1)
	afterRead, fenced, answered := false, false, true
	for i := range n {
		o := operation{opcode: opcodes[d.random.below(len(opcodes))]}
		bits := d.random.next()
		o.imm = uint32(d.random.next())
		if bits&1 != 0 || i == n-1 {
			o.flags |= ib.SendSignaled
		}
		if fenced && o.gets() || afterRead && o.atomic() {
			o.opcode = ib.OpRDMAWrite
		}
		if !o.gets() && (bits>>1&7 == 0 || afterRead) {
			o.flags |= ib.SendFence
			fenced, afterRead = true, false
		}
		afterRead = afterRead || o.opcode == ib.OpRDMARead
		if bits>>4&1 != 0 {
			o.flags |= ib.SendSolicited
		}
		o.behind = !answered
		answered = answered && o.gets()
		if o.atomic() {
			d.atomic(&o, i)
		} else {
			d.transfer(&o, i, bits>>5&1 != 0)
		}
		d.batch = append(d.batch, o)
	}
}

func (d *direction) atomic(o *operation, lane int) {
	o.local = []span{{lane*laneSize + 8*d.random.below(pieceMax/8), 8}}
	o.total = 8
	o.remote = 8 * d.random.below(windowSize/8)
	cell := d.window[o.remote : o.remote+8]
	old := binary.NativeEndian.Uint64(cell) // the device works on numbers of its host
	copy(o.before[:], d.local[o.local[0].off:])
	binary.NativeEndian.PutUint64(d.local[o.local[0].off:], old)
	if o.opcode == ib.OpAtomicFetchAdd {
		o.compareAdd = d.random.next()
		binary.NativeEndian.PutUint64(cell, old+o.compareAdd)
		return
	}
	matches := d.random.below(2) == 0
	o.compareAdd, o.swap = d.random.next(), d.random.next()
	if matches {
		o.compareAdd = old
	}
	if o.compareAdd == old {
		binary.NativeEndian.PutUint64(cell, o.swap)
	}
}

// findLost puts the results of the batch's atomics into local memory that have been lost, and returns how many those were.
func (d *direction) findLost(local []byte) (n int) {
	for i := range d.batch {
		o := &d.batch[i]
		if !o.atomic() || !o.behind {
			continue
		}
		at := o.local[0].off
		got, want := local[at:at+8], d.local[at:at+8]
		if !bytes.Equal(got, want) && bytes.Equal(got, o.before[:]) {
			copy(got, want)
			n++
		}
	}
	return n
}

func (d *direction) transfer(o *operation, lane int, mayInline bool) {
	// No element at all, for a message of no bytes, is rarer than one to four.
	if k := d.random.below(4*pieces + 1); k > 0 {
		for p := range 1 + (k-1)%pieces {
			n := 1 + d.random.below([...]int{64, 1 << 10, 4 << 10, pieceMax}[d.random.below(4)])
			o.local = append(o.local, span{lane*laneSize + p*pieceMax + d.random.below(pieceMax-n+1), n})
			o.total += n
		}
	}
	if o.opcode == ib.OpRDMARead || o.opcode == ib.OpRDMAWrite || o.opcode == ib.OpRDMAWriteWithImm {
		o.remote = d.random.below(windowSize - o.total + 1)
	}
	if o.opcode == ib.OpRDMARead {
		from := d.window[o.remote:]
		for _, s := range o.local {
			from = from[copy(d.local[s.off:s.off+s.n], from):]
		}
		return
	}
	var message []byte
	for _, s := range o.local {
		d.random.fill(d.local[s.off : s.off+s.n])
		message = append(message, d.local[s.off:s.off+s.n]...)
	}
	o.inline = mayInline && o.total > 0 && o.total <= inlineMax
	switch o.opcode {
	case ib.OpRDMAWriteWithImm:
		o.takesRecv = true // of which only the completion is used
		if d.random.below(2) == 0 {
			o.recv = []span{{d.random.below(partSize - 64 + 1), 64}}
		}
		fallthrough
	case ib.OpRDMAWrite:
		copy(d.window[o.remote:], message)
	default:
		o.takesRecv = true
		room := o.total
		if d.random.below(3) == 0 {
			room += d.random.below(1024)
		}
		n, part := 1+d.random.below(pieces), d.random.below(pieces)
		for k := 0; k < n && room > 0; k++ {
			length := room
			if k < n-1 {
				length = 1 + d.random.below(room)
			}
			room -= length
			s := span{(part+k)%pieces*partSize + d.random.below(partSize-length+1), length}
			o.recv = append(o.recv, s)
			message = message[copy(d.window[s.off:s.off+s.n], message):]
		}
	}
}
