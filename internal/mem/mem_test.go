package mem

import (
	"errors"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

func TestAllocRoundsUpAndIsZero(t *testing.T) {
	for _, size := range []int{1, 100, PageSize(), PageSize() + 1, 3 << 20} {
		r, err := Alloc(size, Options{Populate: size > 1<<20, OnNode: true})
		if err != nil {
			t.Fatal(err)
		}
		b := r.Bytes()
		if len(b) < size || len(b)%r.PageSize() != 0 {
			t.Errorf("%d bytes for %d, pages of %d", len(b), size, r.PageSize())
		}
		for _, i := range []int{0, len(b) / 2, len(b) - 1} {
			if b[i] != 0 {
				t.Errorf("byte %d is %d", i, b[i])
			}
			b[i] = 1
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := r.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
		if r.Bytes() != nil || r.FD() != -1 {
			t.Error("closed region still has memory")
		}
	}
	if n, b := Live(); n != 0 || b != 0 {
		t.Errorf("%d regions with %d bytes left", n, b)
	}
}

func TestAllocBadSizes(t *testing.T) {
	for _, size := range []int{0, -1, maxSize + 1} {
		if _, err := Alloc(size, Options{}); !errors.Is(err, ErrSize) {
			t.Errorf("%d: %v", size, err)
		}
	}
	if _, err := Alloc(1<<56, Options{}); err == nil { // more than there are addresses
		t.Error("64 PiB were allocated")
	} else {
		t.Log(err)
	}
}

func TestMapFDBadRanges(t *testing.T) {
	for _, c := range []struct {
		off  int64
		size int
	}{{0, 0}, {0, -1}, {-1, 1}, {0, maxSize + 1}, {1 << 62, 1}} {
		if _, err := MapFD(0, c.off, c.size, false); !errors.Is(err, ErrSize) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
