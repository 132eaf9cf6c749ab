package observe

import (
	"slices"
	"testing"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Of a NIC that says that it has ended, and goes on, what comes after that is not read: it would never end.
func TestEnded(t *testing.T) {
	_, p, c := newRing(t)
	s := &Source{ring: c}
	put := func(n int) {
		if p.Begin(example(n), n) == nil {
			t.Fatal("no room")
		}
		p.Commit()
	}
	read := func(want int) {
		t.Helper()
		if !s.Ended() {
			t.Fatal("it has not ended")
		}
		for n := 0; ; n++ {
			var k Record
			ok, err := s.Next(&k)
			if err != nil {
				t.Fatal(err)
			}
			if ok != (n < want) {
				t.Fatalf("packet %d of %d: %v", n, want, ok)
			}
			if !ok {
				return
			}
			put(100 + n)
		}
	}
	put(1)
	if ok, err := s.Next(new(Record)); !ok || err != nil {
		t.Fatal(ok, err)
	}
	put(2)
	put(3)
	s.ended.Store(true)
	read(2)
	read(0)
}

func TestGIDsOf(t *testing.T) {
	const list = `Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0005 01  2254 @ringside-soft-fd000000000000000000000000000001
0000000000000000: 00000003 00000000 00000000 0005 03  2255 @ringside-soft-fd000000000000000000000000000002
0000000000000000: 00000002 00000000 00010000 0005 01  2256 @ringside-soft-fd0000
0000000000000000: 00000002 00000000 00010000 0005 01  2257 @ringside-soft-zz000000000000000000000000000001
0000000000000000: 00000002 00000000 00010000 0005 01  2258 /run/x
0000000000000000: 00000002 00000000 00010000 0005 01  2259
`
	if got, want := gidsOf([]byte(list)), []ib.GID{{0: 0xfd, 15: 1}}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
