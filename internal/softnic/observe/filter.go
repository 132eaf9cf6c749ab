package observe

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/ringside-rdma/ringside/internal/roce"
)

// A Filter says which packets are wanted: those that fit each list that is not empty, in one of its entries.
type Filter struct {
	QPNs  []uint32
	Peers []netip.AddrPort // port 0: any
	ops   []func(op roce.Opcode, r *Record) bool
}

// Operations are the words that AddOpcode knows, besides the names of opcodes.
var Operations = []string{"send", "write", "read", "response", "atomic", "ack", "nak", "cnp"}

// AddOpcode adds a word for packets that are wanted: one of Operations, or the name of an opcode, such as rc_send_only.
func (f *Filter) AddOpcode(word string) error {
	word = strings.ToLower(word)
	if slices.Contains(Operations, word) {
		f.ops = append(f.ops, func(op roce.Opcode, r *Record) bool { return isOperation(word, op, r) })
		return nil
	}
	for i := range 256 {
		if o := roce.Opcode(i); o.Known() && strings.ToLower(o.String()) == word {
			f.ops = append(f.ops, func(op roce.Opcode, _ *Record) bool { return op == o })
			return nil
		}
	}
	return fmt.Errorf("%q is none of %s, and no opcode such as RC_SEND_ONLY", word, strings.Join(Operations, ", "))
}

// isOperation reports whether a packet is what one of Operations means: a request of the kind, an answer to a READ or an atomic, or
// an acknowledgement.
func isOperation(word string, op roce.Opcode, r *Record) bool {
	if op == roce.CNP {
		return word == "cnp"
	}
	switch o := op.Op(); word {
	case "send":
		return o <= roce.SendOnlyImm || o == roce.SendLastInv || o == roce.SendOnlyInv
	case "write":
		return o >= roce.WriteFirst && o <= roce.WriteOnlyImm || o == roce.AtomicWrite
	case "read":
		return o == roce.ReadRequest
	case "response":
		return o >= roce.ReadResponseFirst && o <= roce.ReadResponseOnly || o == roce.AtomicAcknowledge
	case "atomic":
		return o == roce.CompareSwap || o == roce.FetchAdd
	case "ack", "nak":
		if o != roce.Acknowledge || len(r.Data) <= roce.BTHLen {
			return false
		}
		return roce.Syndrome(r.Data[roce.BTHLen]).IsAck() == (word == "ack")
	}
	return false
}

// opcodeOf returns the packet's opcode, if enough of it was captured.
func opcodeOf(r *Record) (roce.Opcode, bool) {
	if len(r.Data) == 0 {
		return 0, false
	}
	op := roce.Opcode(r.Data[0])
	return op, op.Known()
}

// destQP is the packet's destination.
func (r *Record) destQP() uint32 {
	if len(r.Data) < roce.BTHLen {
		return 0
	}
	return binary.BigEndian.Uint32(r.Data[4:]) & maxQPN
}

// Wants reports whether the packet is wanted.
func (f *Filter) Wants(r *Record) bool {
	if len(f.QPNs) > 0 && !slices.ContainsFunc(f.QPNs, func(q uint32) bool { return q == r.QPN || q == r.PeerQPN || q == r.destQP() }) {
		return false
	}
	if len(f.Peers) > 0 {
		peer := r.Src
		if r.Out {
			peer = r.Dst
		}
		if !slices.ContainsFunc(f.Peers, func(a netip.AddrPort) bool {
			return a.Addr() == peer.Addr() && (a.Port() == 0 || a.Port() == peer.Port())
		}) {
			return false
		}
	}
	if len(f.ops) > 0 {
		op, ok := opcodeOf(r)
		if !ok || !slices.ContainsFunc(f.ops, func(is func(roce.Opcode, *Record) bool) bool { return is(op, r) }) {
			return false
		}
	}
	return true
}
