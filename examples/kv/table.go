package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"
	"sync/atomic"
)

// The table is one region of the server's memory:
//
//	sequence numbers   a word an entry, even while the entry is whole, odd while it is being written
//	entries            of entryBytes each: lengths and checksum, key, value
//
// A key lies in one of the window entries from its hash on; the table has window-1 entries more than the hash reaches, so
// that a window is always contiguous, and never moves. An entry with an empty key is free.
//
// The server writes an entry between two increments of its sequence number. A client reads a window in three READs, each
// waited for before the next is posted: sequence numbers, entries, sequence numbers. Entries whose number was even and
// is the same both times are whole: had a store to one of them been seen, then so would the increment before it. The
// others are torn, or may be, and are not looked at. One READ of everything would not do: nobody promises an order of
// the bytes within it.
const (
	window     = 8
	entryBytes = 256
	prefix     = 8
	maxKey     = 64
	maxValue   = entryBytes - prefix - maxKey

	// windowBytes is what a client copies: a window's sequence numbers and entries.
	windowSeqs    = window * 8
	windowEntries = window * entryBytes
	windowBytes   = windowSeqs + windowEntries
)

var (
	errBadKey   = fmt.Errorf("a key has 1 to %d bytes", maxKey)
	errBadValue = fmt.Errorf("a value has at most %d bytes", maxValue)
	errFull     = fmt.Errorf("the %d places that this key can have are taken: use a larger table", window)
	errTorn     = errors.New("the entry is overwritten each time that it is read")
	errCorrupt  = errors.New("an entry that should be whole has a wrong checksum")
)

// geometry is where things lie in a table that keys hash to n entries of.
type geometry struct{ n int }

func (g geometry) size() int         { return (g.n + window - 1) * (8 + entryBytes) }
func (g geometry) seqAt(i int) int   { return i * 8 }
func (g geometry) entryAt(i int) int { return (g.n+window-1)*8 + i*entryBytes }
func (g geometry) home(key []byte) int {
	h := uint64(14695981039346656037) // FNV-1a
	for _, c := range key {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return int((h ^ h>>29) % uint64(g.n))
}

// An entry's prefix word: lengths of key and value, and a checksum of both and of the sequence number.
func makePrefix(key, value []byte, seq uint64) uint64 {
	var buf [8 + maxKey + maxValue]byte
	b := binary.LittleEndian.AppendUint64(buf[:0], seq)
	b = append(append(b, key...), value...)
	return uint64(len(key)) | uint64(len(value))<<8 | uint64(crc32.Checksum(b, castagnoli))<<32
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// parseEntry returns the key and value of an entry that was whole at sequence number seq. They alias entry.
func parseEntry(entry []byte, seq uint64) (key, value []byte, err error) {
	p := binary.LittleEndian.Uint64(entry)
	k, v := int(p&0xff), int(p>>8&0xff)
	if p == 0 { // an entry that was never written
		return nil, nil, nil
	}
	if k > maxKey || v > maxValue {
		return nil, nil, errCorrupt
	}
	key, value = entry[prefix:][:k], entry[prefix+maxKey:][:v]
	if makePrefix(key, value, seq) != p {
		return nil, nil, errCorrupt
	}
	return key, value, nil
}

// table is the server's side. Safe for concurrent use.
type table struct {
	geometry
	mem []byte

	mu sync.Mutex // one writer at a time
	w  []atomic.Uint64
}

func newTable(n int, mem []byte) *table {
	return &table{geometry: geometry{n}, mem: mem, w: words(mem)}
}

// find returns the entry that holds the key, and a free one of its window; -1 for none.
func (t *table) findLocked(key []byte) (at, free int) {
	at, free = -1, -1
	home := t.home(key)
	for i := home + window - 1; i >= home; i-- {
		entry := t.mem[t.entryAt(i):][:entryBytes] // only we write: plain loads will do
		switch k := int(entry[0]); {
		case k == 0:
			free = i
		case bytes.Equal(entry[prefix:][:k], key):
			at = i
		}
	}
	return at, free
}

// put stores a value under a key.
func (t *table) put(key, value []byte) error {
	switch {
	case len(key) == 0 || len(key) > maxKey:
		return errBadKey
	case len(value) > maxValue:
		return errBadValue
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	at, free := t.findLocked(key)
	if at < 0 {
		at = free
	}
	if at < 0 {
		return errFull
	}
	t.writeLocked(at, key, value)
	return nil
}

// remove frees the key's entry, and reports whether there was one.
func (t *table) remove(key []byte) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	at, _ := t.findLocked(key)
	if at >= 0 {
		t.writeLocked(at, nil, nil)
	}
	return at >= 0
}

// writeLocked is the writer's half of the protocol. Every store is atomic: the peers' loads are their device's affair,
// but on our side sequentially consistent stores become visible in program order on every architecture.
func (t *table) writeLocked(i int, key, value []byte) {
	var buf [entryBytes]byte
	seq := &t.w[t.seqAt(i)/8]
	next := seq.Load() + 2
	binary.LittleEndian.PutUint64(buf[:], makePrefix(key, value, next))
	copy(buf[prefix:], key)
	copy(buf[prefix+maxKey:], value)

	seq.Store(next - 1) // odd; pairs with the second READ of the sequence numbers in lookup
	entry := t.w[t.entryAt(i)/8:][:entryBytes/8]
	for j := range entry {
		entry[j].Store(binary.LittleEndian.Uint64(buf[j*8:]))
	}
	seq.Store(next) // even again; pairs with the first READ
}

// source reads n bytes of the table at offset off into the local copy at offset to. A client's is a one-sided READ.
type source interface {
	read(ctx context.Context, to, off, n int) error
}

// lookupStats counts what lookups went through.
type lookupStats struct {
	lookups int
	torn    int // windows read again because the key might be in an entry that was being written
}

const maxTries = 10_000 // of one lookup

// lookup finds a key in the table behind src, through local, a copy of windowBytes. The value aliases local. It is nil
// if there is none, and empty but not nil if the value is.
func (g geometry) lookup(ctx context.Context, src source, local, key []byte, st *lookupStats) ([]byte, error) {
	if len(key) == 0 || len(key) > maxKey {
		return nil, errBadKey
	}
	st.lookups++
	home := g.home(key)
	seqs := local[:windowSeqs]
	var before [window]uint64
	for try := 0; try < maxTries; try++ {
		if try > 0 {
			st.torn++
		}
		if err := src.read(ctx, 0, g.seqAt(home), windowSeqs); err != nil {
			return nil, err
		}
		for i := range before {
			before[i] = binary.LittleEndian.Uint64(seqs[i*8:])
		}
		if err := src.read(ctx, windowSeqs, g.entryAt(home), windowEntries); err != nil {
			return nil, err
		}
		if err := src.read(ctx, 0, g.seqAt(home), windowSeqs); err != nil {
			return nil, err
		}
		torn := false
		for i, seq := range before {
			if seq%2 != 0 || binary.LittleEndian.Uint64(seqs[i*8:]) != seq {
				torn = true // it may be our key's
				continue
			}
			k, v, err := parseEntry(local[windowSeqs+i*entryBytes:][:entryBytes], seq)
			if err != nil {
				return nil, err
			}
			if bytes.Equal(k, key) {
				return v, nil
			}
		}
		if !torn {
			return nil, nil
		}
	}
	return nil, errTorn
}
