package conformance

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A gap that names no case hides nothing.
func TestGapsNameCases(t *testing.T) {
	for _, g := range gaps {
		if !slices.ContainsFunc(table, func(tc testCase) bool { return tc.name == g.name }) {
			t.Errorf("%s: no case %q", g.provider, g.name)
		}
	}
}

// Where results can be lost, no atomic comes behind a request that is only acknowledged.
func TestAtomicsWhereResultsAreLost(t *testing.T) {
	for _, lost := range []bool{true, false} {
		m := &model{inline: 64, atomics: true, imms: true, readSGEs: 2, lost: lost, xmem: make([]byte, areaSize), ymem: make([]byte, areaSize)}
		r := rand.New(rand.NewPCG(1, 2))
		before, behind := 0, 0
		for range 1000 {
			wrs, _ := m.batch(r, &Mem{}, &Mem{})
			acked := false
			for i := range wrs {
				switch wrs[i].Opcode {
				case ib.OpRDMARead:
				case ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd:
					if acked {
						behind++
					} else {
						before++
					}
				default:
					acked = true
				}
			}
		}
		if before == 0 || (behind == 0) != lost {
			t.Errorf("lost %v: %d atomics behind requests that are acknowledged, %d others", lost, behind, before)
		}
	}
}
