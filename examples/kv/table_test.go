package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// hostileSource reads the table word by word in a random order, and lets something happen in between: what a device may
// do within one READ, at its worst.
type hostileSource struct {
	t, local []atomic.Uint64
	rng      *rand.Rand
	between  func()
}

func (s *hostileSource) read(_ context.Context, to, off, n int) error {
	for _, i := range s.rng.Perm(n / 8) {
		if s.between != nil {
			s.between()
		}
		s.local[to/8+i].Store(s.t[off/8+i].Load())
	}
	return nil
}

func newPair(n int, seed uint64) (*table, *hostileSource, []byte) {
	g := geometry{n}
	t := newTable(n, make([]byte, g.size()))
	local := make([]byte, windowBytes)
	return t, &hostileSource{t: t.w, local: words(local), rng: rand.New(rand.NewPCG(seed, 1))}, local
}

func TestTable(t *testing.T) {
	tab, src, local := newPair(64, 1)
	var st lookupStats
	get := func(key string) []byte {
		t.Helper()
		v, err := tab.lookup(context.Background(), src, local, []byte(key), &st)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	want := map[string]string{}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		key := fmt.Sprint("key", rng.IntN(60))
		switch rng.IntN(3) {
		case 0:
			_, had := want[key]
			if tab.remove([]byte(key)) != had {
				t.Fatalf("remove %s: want %v", key, had)
			}
			delete(want, key)
		default:
			value := strings.Repeat("v", rng.IntN(maxValue+1))
			err := tab.put([]byte(key), []byte(value))
			if errors.Is(err, errFull) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			want[key] = value
		}
		key = fmt.Sprint("key", rng.IntN(60))
		if v, had := want[key]; had != (get(key) != nil) || v != string(get(key)) {
			t.Fatalf("%s: got %q, want %q", key, get(key), v)
		}
	}
	if st.torn != 0 {
		t.Errorf("%d torn reads with no writer", st.torn)
	}
}

func TestTableRefuses(t *testing.T) {
	tab, src, local := newPair(1, 1)
	ctx, st := context.Background(), &lookupStats{}
	long := bytes.Repeat([]byte("k"), maxKey+1)
	for _, key := range [][]byte{nil, long} {
		if err := tab.put(key, nil); !errors.Is(err, errBadKey) {
			t.Errorf("put %q: %v", key, err)
		}
		if _, err := tab.lookup(ctx, src, local, key, st); !errors.Is(err, errBadKey) {
			t.Errorf("lookup %q: %v", key, err)
		}
		if tab.remove(key) {
			t.Errorf("remove %q found something", key)
		}
	}
	if err := tab.put([]byte("k"), make([]byte, maxValue+1)); !errors.Is(err, errBadValue) {
		t.Error(err)
	}
	for i := range window {
		if err := tab.put(fmt.Append(nil, i), []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if err := tab.put([]byte("one more"), nil); !errors.Is(err, errFull) {
		t.Error(err)
	}
	tab.w[tab.entryAt(3)/8+1].Add(1)
	if _, err := tab.lookup(ctx, src, local, []byte("one more"), st); !errors.Is(err, errCorrupt) {
		t.Errorf("a bent entry: %v", err)
	}
	tab.w[tab.seqAt(3)/8].Add(1)
	if _, err := tab.lookup(ctx, src, local, []byte("one more"), st); !errors.Is(err, errTorn) {
		t.Errorf("an entry that is never finished: %v", err)
	}
}

// uniform is a value that shows whether it is of one piece: all bytes are equal, and so is the length.
func uniform(i int) []byte { return bytes.Repeat([]byte{byte(1 + i%maxValue)}, 1+i%maxValue) }

func checkUniform(t *testing.T, v []byte) {
	t.Helper()
	if len(v) == 0 || !bytes.Equal(v, bytes.Repeat([]byte{byte(len(v))}, len(v))) {
		t.Fatalf("torn value: % x", v)
	}
}

// The writer makes a step between any two words that the reader copies; the key is there all the time, overwritten in
// place, while its neighbours come and go.
func TestTornReadsInterleaved(t *testing.T) {
	for seed := range uint64(4) {
		tab, src, local := newPair(4, seed)
		key, other := []byte("key"), []byte("other")
		if err := tab.put(key, uniform(0)); err != nil {
			t.Fatal(err)
		}
		var pending []func()
		rng := rand.New(rand.NewPCG(seed, 7))
		n := 0
		at, free := tab.findLocked(key)
		step := func() {
			if len(pending) == 0 {
				// The same stores as writeLocked makes, one a step; prepared on a scratch copy.
				n++
				i, k, v := at, key, uniform(n)
				if rng.IntN(3) == 0 {
					i, k = free, other
				}
				scratch := newTable(4, make([]byte, tab.size()))
				scratch.w[scratch.seqAt(i)/8].Store(tab.w[tab.seqAt(i)/8].Load())
				scratch.writeLocked(i, k, v)
				seq := scratch.w[scratch.seqAt(i)/8].Load()
				pending = append(pending, func() { tab.w[tab.seqAt(i)/8].Store(seq - 1) })
				for j := range entryBytes / 8 {
					w := tab.entryAt(i)/8 + j
					pending = append(pending, func() { tab.w[w].Store(scratch.w[w].Load()) })
				}
				pending = append(pending, func() { tab.w[tab.seqAt(i)/8].Store(seq) })
			}
			pending[0]()
			pending = pending[1:]
		}
		speed := []float64{0.02, 0.05, 0.1, 0.2}[seed]
		src.between = func() {
			if rng.Float64() < speed {
				step()
			}
		}
		var st lookupStats
		for range 200 {
			v, err := tab.lookup(context.Background(), src, local, key, &st)
			if err != nil {
				t.Fatal(err)
			}
			checkUniform(t, v)
		}
		t.Logf("%d lookups, %d torn and read again, %d writes", st.lookups, st.torn, n)
		if st.torn == 0 {
			t.Error("nothing was torn: the test does not test")
		}
	}
}

// A goroutine that never stops writing races with two readers.
func TestTornReadsRacing(t *testing.T) {
	tab, _, _ := newPair(16, 1)
	key := []byte("key")
	if err := tab.put(key, uniform(0)); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var writer, readers sync.WaitGroup
	writer.Go(func() {
		for i := 0; !stop.Load(); i++ {
			if err := tab.put(key, uniform(i)); err != nil {
				t.Error(err)
				return
			}
			for range 3000 { // a pause, or no reader would ever see a whole entry
				if stop.Load() {
					return
				}
			}
		}
	})
	for seed := range uint64(2) {
		readers.Go(func() {
			local := make([]byte, windowBytes)
			src := &hostileSource{t: tab.w, local: words(local), rng: rand.New(rand.NewPCG(seed, 1))}
			var st lookupStats
			for range 500 {
				v, err := tab.lookup(context.Background(), src, local, key, &st)
				if errors.Is(err, errTorn) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if len(v) == 0 || !bytes.Equal(v, bytes.Repeat([]byte{byte(len(v))}, len(v))) {
					t.Errorf("torn value: % x", v)
					return
				}
			}
			t.Logf("%d lookups, %d torn and read again", st.lookups, st.torn)
		})
	}
	readers.Wait()
	stop.Store(true)
	writer.Wait()
}

// Whatever a peer's memory has for an entry: what is taken for whole is within the entry's bounds and has its checksum. sealed: the checksum
// is made to fit where there can be one, which is then taken, and not at another sequence number.
func FuzzParseEntry(f *testing.F) {
	f.Add(uint64(2), makeEntry("key", "value", 2), false)
	f.Add(uint64(4), makeEntry("key", "value", 2), false)
	f.Add(uint64(0), make([]byte, entryBytes), false)
	f.Add(uint64(6), makeEntry(strings.Repeat("k", maxKey), strings.Repeat("v", maxValue), 6), true)
	f.Fuzz(func(t *testing.T, seq uint64, data []byte, sealed bool) {
		var entry [entryBytes]byte
		copy(entry[:], data)
		k, v := int(entry[0]), int(entry[1])
		fits := k <= maxKey && v <= maxValue
		if sealed = sealed && fits; sealed {
			binary.LittleEndian.PutUint64(entry[:], makePrefix(entry[prefix:][:k], entry[prefix+maxKey:][:v], seq))
		}
		p := binary.LittleEndian.Uint64(entry[:])
		key, value, err := parseEntry(entry[:], seq)
		switch {
		case err != nil:
			if err != errCorrupt || key != nil || value != nil || sealed || p == 0 {
				t.Fatalf("%q, %q, %v", key, value, err)
			}
		case p == 0:
			if key != nil || value != nil {
				t.Fatalf("of an entry that was never written: %q, %q", key, value)
			}
		case !fits || !bytes.Equal(key, entry[prefix:][:k]) || !bytes.Equal(value, entry[prefix+maxKey:][:v]) || makePrefix(key, value, seq) != p:
			t.Fatalf("%q, %q of % x", key, value, entry)
		}
		if sealed && p != 0 {
			if _, _, err := parseEntry(entry[:], seq+2); err != errCorrupt {
				t.Fatalf("at another sequence number: %v", err)
			}
		}
	})
}

// makeEntry is an entry as the server writes it.
func makeEntry(key, value string, seq uint64) []byte {
	entry := make([]byte, entryBytes)
	binary.LittleEndian.PutUint64(entry, makePrefix([]byte(key), []byte(value), seq))
	copy(entry[prefix:], key)
	copy(entry[prefix+maxKey:], value)
	return entry
}
