package main

import (
	"bytes"
	"slices"
	"testing"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The first numbers for seed 1, as the authors' C code gives them.
func TestSplitMix(t *testing.T) {
	s := splitMix(1)
	want := []uint64{0x910a2dec89025cc1, 0xbeeb8da1658eec67, 0xf893a2eefb32555e}
	for i, w := range want {
		if got := s.next(); got != w {
			t.Errorf("number %d is %#x, want %#x", i, got, w)
		}
	}
}

// Two sides compute the same, and every operation stays where it may be: within the memories, in its lane, with elements
// that do not overlap, and fenced where the answer to an earlier READ could change.
func TestSequence(t *testing.T) {
	within := func(what string, l []span, size int) {
		t.Helper()
		l = slices.Clone(l)
		slices.SortFunc(l, func(a, b span) int { return a.off - b.off })
		end := 0
		for _, s := range l {
			if s.off < end || s.n < 1 || s.off+s.n > size {
				t.Errorf("%s: elements %v of %d bytes", what, l, size)
			}
			end = s.off + s.n
		}
	}
	for _, server := range []bool{false, true} {
		a, b := newDirection(5, server), newDirection(5, server)
		seen := map[ib.Opcode]int{}
		sawEmpty, sawInline := false, false
		for range 300 {
			a.next()
			b.next()
			afterRead, afterFence := false, false
			for i := range a.batch {
				o := &a.batch[i]
				seen[o.opcode]++
				within("local", o.local, localSize)
				within("receive", o.recv, windowSize)
				for _, s := range o.local {
					if s.off < i*laneSize || s.off+s.n > (i+1)*laneSize {
						t.Errorf("element %v of operation %d is not in its lane", s, i)
					}
				}
				fenced := o.flags&ib.SendFence != 0
				if afterRead && o.opcode != ib.OpRDMARead && !fenced || (afterFence || fenced) && o.gets() {
					t.Errorf("operation %d, %v: after a READ: %v, after a fence: %v", i, o, afterRead, afterFence)
				}
				afterRead = o.opcode == ib.OpRDMARead || afterRead && !fenced
				afterFence = afterFence || fenced
				sawEmpty = sawEmpty || o.total == 0
				sawInline = sawInline || o.inline
			}
			if n := len(a.batch); n > 0 && a.batch[n-1].flags&ib.SendSignaled == 0 {
				t.Error("the last operation of a batch has no completion")
			}
		}
		same := a.random == b.random && bytes.Equal(a.local, b.local) && bytes.Equal(a.window, b.window)
		if !same || a.describe() != b.describe() {
			t.Error("the sequence is not determined by its seed")
		}
		if len(seen) != len(opcodes) || !sawEmpty || !sawInline {
			t.Errorf("operations %v, without payload %v, inline %v", seen, sawEmpty, sawInline)
		}
	}
}

// What a run puts up with is an atomic behind a SEND or WRITE that has left the 8 bytes for its result alone, and nothing else.
func TestLostResults(t *testing.T) {
	d := newDirection(7, false)
	found, alone := 0, 0
	for range 300 {
		old := bytes.Clone(d.local)
		d.next()
		local := bytes.Clone(d.local)
		if d.findLost(local) != 0 {
			t.Fatal("something is lost that is there")
		}
		acked := false
		for i := range d.batch {
			o := &d.batch[i]
			if !o.gets() {
				acked = true
			}
			if !o.atomic() {
				continue
			}
			result := local[o.local[0].off:][:8]
			copy(result, old[o.local[0].off:])
			lost := 1
			if !acked {
				lost = 0
				alone++
			}
			if n := d.findLost(local); n != lost || bytes.Equal(local, d.local) != acked {
				t.Fatalf("operation %d, %v, behind one that is acknowledged: %v: %d results are lost", i, o, acked, n)
			}
			found += lost
			result[3]++ // neither the one nor the other
			if d.findLost(local) != 0 || bytes.Equal(local, d.local) {
				t.Fatal("a wrong result is put up with")
			}
			copy(result, d.local[o.local[0].off:])
		}
	}
	if found < 50 || alone < 50 {
		t.Errorf("%d results were lost, and %d could not be", found, alone)
	}
}
