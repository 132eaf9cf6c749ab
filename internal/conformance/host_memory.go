package conformance

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

type memArgs struct {
	PD     handle
	Size   int
	Access ib.Access
	Slice  bool // an ordinary slice, registered
	Odd    bool // the slice's address is no multiple of 8, so atomics have no place in it
}

type memInfo struct {
	H    handle
	Addr uint64
	LKey ib.LKey
	RKey ib.RKey
}

var opMem = newOp("reg_mr", func(h *host, a memArgs) (memInfo, error) {
	return use(h, a.PD, func(pd *verbs.PD) (memInfo, error) {
		var m *mr.MR
		var raw []byte
		var err error
		if a.Slice {
			// Somewhere in a larger slice, in the middle of a page. Atomics need words.
			off := 8 + 16*h.intN(200)
			if a.Odd {
				off += 1 + h.intN(7)
			}
			raw = make([]byte, off+a.Size+64)[off : off+a.Size]
			m, err = mr.Register(pd, raw, a.Access)
		} else {
			m, err = mr.Alloc(pd, a.Size, a.Access)
		}
		if err != nil {
			return memInfo{}, err
		}
		if len(m.Bytes()) != a.Size || m.Len() != a.Size || m.Access()&a.Access != a.Access {
			return memInfo{}, fmt.Errorf("asked for %d bytes and %v, got %d, Len %d, %v", a.Size, a.Access, len(m.Bytes()), m.Len(), m.Access())
		}
		i := memInfo{h.add(m), m.Addr(), m.LKey(), m.RKey()}
		if raw != nil {
			h.mu.Lock()
			h.raw[i.H] = raw
			h.mu.Unlock()
		}
		return i, nil
	})
})

type memRange struct {
	H      handle
	Off, N int
	Data   []byte
	Seed   uint64
	Byte   byte
}

func (h *host) bytes(r memRange, n int) ([]byte, error) {
	h.mu.Lock()
	raw := h.raw[r.H]
	h.mu.Unlock()
	if raw != nil {
		return raw[r.Off : r.Off+n], nil
	}
	return use(h, r.H, func(m *mr.MR) ([]byte, error) { return m.Bytes()[r.Off : r.Off+n], nil })
}

var opMemWrite = newOp("write memory", func(h *host, r memRange) (none, error) {
	b, err := h.bytes(r, len(r.Data))
	copy(b, r.Data)
	return none{}, err
})

var opMemRead = newOp("read memory", func(h *host, r memRange) ([]byte, error) {
	b, err := h.bytes(r, r.N)
	return bytes.Clone(b), err
})

type sumArgs struct {
	H           handle
	Areas, Size int
}

// opMemSums returns a checksum of each of the areas that a region starts with.
var opMemSums = newOp("sum memory", func(h *host, a sumArgs) (sums [][]byte, err error) {
	b, err := h.bytes(memRange{H: a.H}, a.Areas*a.Size)
	for ; len(b) > 0; b = b[a.Size:] {
		sum := sha256.Sum256(b[:a.Size])
		sums = append(sums, sum[:])
	}
	return sums, err
})

// pattern fills b with bytes that depend on seed and position.
func pattern(b []byte, seed uint64) {
	g := rand.NewPCG(seed, 0x5eed)
	for len(b) >= 8 {
		binary.LittleEndian.PutUint64(b, g.Uint64())
		b = b[8:]
	}
	var last [8]byte
	binary.LittleEndian.PutUint64(last[:], g.Uint64())
	copy(b, last[:])
}

var opMemPattern = newOp("fill memory", func(h *host, r memRange) (none, error) {
	b, err := h.bytes(r, r.N)
	if err != nil {
		return none{}, err
	}
	if r.Seed == 0 {
		for i := range b {
			b[i] = r.Byte
		}
	} else {
		pattern(b, r.Seed)
	}
	return none{}, nil
})

// opMemCheck compares memory with a pattern, or with one byte if Seed is 0; it returns what differs, or "".
var opMemCheck = newOp("check memory", func(h *host, r memRange) (string, error) {
	b, err := h.bytes(r, r.N)
	if err != nil {
		return "", err
	}
	want := bytes.Repeat([]byte{r.Byte}, r.N)
	if r.Seed != 0 {
		pattern(want, r.Seed)
	}
	return firstDifference(b, want), nil
})

func firstDifference(got, want []byte) string {
	if len(got) != len(want) {
		return fmt.Sprintf("%d bytes, want %d", len(got), len(want))
	}
	if bytes.Equal(got, want) {
		return ""
	}
	first, count := -1, 0
	for i := range got {
		if got[i] != want[i] {
			if first < 0 {
				first = i
			}
			count++
		}
	}
	end := min(first+16, len(got))
	return fmt.Sprintf("%d of %d bytes differ, the first at %d: got % x, want % x", count, len(got), first, got[first:end], want[first:end])
}

var opWindow = newOp("alloc_mw", func(h *host, pd handle) (handle, error) {
	return use(h, pd, func(pd *verbs.PD) (handle, error) {
		w, err := mr.NewWindow(pd)
		if err != nil {
			return 0, err
		}
		return h.add(w), nil
	})
})

type bindArgs struct {
	Window, Mem handle
	Off, N      int
	Access      ib.Access
}

var opBindWR = newOp("bind request", func(h *host, a bindArgs) (ib.SendWR, error) {
	m, err := get[*mr.MR](h, a.Mem)
	if err != nil {
		return ib.SendWR{}, err
	}
	return use(h, a.Window, func(w *mr.Window) (ib.SendWR, error) { return w.BindWR(m, a.Off, a.N, a.Access), nil })
})

var opWindowRKey = newOp("window's rkey", func(h *host, n handle) (ib.RKey, error) {
	return use(h, n, func(w *mr.Window) (ib.RKey, error) { return w.RKey(), nil })
})
