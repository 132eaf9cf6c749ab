package repotest

import (
	"go/parser"
	"testing"
)

func TestUnsafeUsesAreJudged(t *testing.T) {
	const text = `package p
import "unsafe"
func a(b []byte) *int { return (*int)(unsafe.Pointer(&b[0])) }
func b(b []byte) *int { return (*int)(unsafe.Pointer(&b[0])) } // Safe: checked above
func c(b []byte) {
	// Safe: long enough, as the
	// caller has checked.
	x := unsafe.Slice(&b[0], 3)
	y := unsafe.Slice(&b[0], 2)
	_, _ = x, y

	_ = unsafe.Slice(&b[0], 4)
	_ = unsafe.Sizeof(b)
}
// d is fine. Safe: nothing happens.
func d(b []byte) { unsafe.Slice(&b[0], 1) }
func e(b []byte) bool { return uintptr(unsafe.Pointer(unsafe.SliceData(b)))&7 == 0 }
func f(b []byte) *int {
	p := unsafe.Pointer(&b[0])
	if len(b) < 8 {
		return nil
	}
	// Safe: long enough.
	return (*int)(p)
}
func g(b []byte) *int {
	p := unsafe.Pointer(&b[0])
	return (*int)(p)
}
`
	f, err := parser.ParseFile(fset, "p.go", text, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	want := map[int]bool{3: false, 4: true, 8: true, 9: true, 12: false, 16: true, 19: true, 27: false}
	uses := unsafeUses(f)
	if len(uses) != len(want) {
		t.Errorf("%d uses found, want %d", len(uses), len(want))
	}
	for _, u := range uses {
		if l := fset.Position(u.pos).Line; u.safe != want[l] {
			t.Errorf("line %d: safe = %v", l, u.safe)
		}
	}
}
